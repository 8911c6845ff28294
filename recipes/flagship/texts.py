"""Fetches free English text from Debian's archive through apt, and writes it as documents for `embedwright data pairs`.

    python recipes/flagship/texts.py FOLDER      any Debian or Ubuntu with apt; no root; the system stays as it is

Writes FOLDER/NAME.jsonl with rows {id, title, text, source, tags} and FOLDER/NAME.licence for each NAME in `SOURCES`.
A file that is there is not written again. apt's lists and the packages lie in FOLDER/apt; delete it afterwards.
Code, tables, navigation, changelogs and texts in other languages are left out.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from readers import Row, crawl, gcide, packages, page, terms, wordnet  # type: ignore[import-not-found]  # beside this

from embedwright.files import write_text


class Source(NamedTuple):
    """Says where text comes from: the package (a pattern, since versions differ), its files, and how they are read."""

    package: str
    licence: str
    files: str
    read: Callable[[Path], Iterator[Row]]


def main(folder: Path) -> None:
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if not shutil.which(program):
            sys.exit(
                f"{program} is missing: these texts come from Debian's archive. Run this on Debian or Ubuntu, or in a"
                f" container of one, and copy {folder}/*.jsonl and *.licence here."
            )
    if all((folder / f"{name}.licence").is_file() for name in ["debian", *SOURCES]):
        return
    apt = Apt(folder / "apt")
    apt.run("apt-get", "update", "-qq")
    names, show = apt.run("apt-cache", "pkgnames").split(), ("apt-cache", "show", "--no-all-versions")
    if not (folder / "debian.licence").is_file():
        stanzas = (stanza for some in _chunks(sorted(names)) for stanza in apt.run(*show, *some).split("\n\n"))
        _write(folder, "debian", packages(stanzas), ["of each package"])
    for name, sources in SOURCES.items():
        if (folder / f"{name}.licence").is_file():
            continue
        found = [(source, apt.unpacked(source.package, names)) for source in sources]
        for source, root in found:
            if root is None:
                print(f"  no package {source.package} in this release: its text is left out of {name}")
        rows = (
            {**row, "id": f"{root.name}/{row['id']}", "source": f"{root.name}/{row['source']}"}
            for source, root in found
            if root is not None
            for file in sorted(root.glob(source.files))
            for row in source.read(file)
        )
        _write(folder, name, rows, [source.licence for source, root in found if root is not None])


def _write(folder: Path, name: str, rows: Iterable[Row], licences: list[str]) -> None:
    """Writes each text once, in an order that is drawn; the licence last, so that it says that the file is whole."""
    texts: dict[str, Row] = {}
    for row in rows:
        texts.setdefault(str(row["text"]), row)
    numbers: Counter[str] = Counter()
    lines = []
    for row in texts.values():
        numbers[str(row["id"])] += 1
        lines.append(json.dumps({**row, "id": f"{row['id']}#{numbers[str(row['id'])]}"}, ensure_ascii=False) + "\n")
    random.Random(name).shuffle(lines)  # so that the first so many are a sample
    write_text(folder / f"{name}.jsonl", "".join(lines))
    write_text(folder / f"{name}.licence", ", ".join(dict.fromkeys(licences)) + "\n")
    print(f"{name}: {len(lines):,} documents, {sum(len(text.split()) for text in texts):,} words")


class Apt:
    """Runs apt with lists and cache of its own, in `folder`: without root, and the system's own stay as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        (self.folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self.folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        settings = {
            "Dir::State::lists": self.folder / "lists",
            "Dir::Cache": self.folder / "cache",
            "Acquire::Languages": "en",  # the long descriptions
            "Acquire::GzipIndexes": "false",  # in containers these three are otherwise: each call takes minutes
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
            "APT::Sandbox::User": "",  # root downloads as itself into this folder
        }
        self.options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def run(self, program: str, *arguments: str) -> str:
        command = [program, *self.options, *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, errors="replace")
        if done.returncode:
            sys.exit(f"{' '.join([program, *arguments])} failed:\n{done.stderr.strip()}")
        return done.stdout

    def unpacked(self, pattern: str, names: list[str]) -> Path | None:
        """Returns the files of the newest package of this name, fetched and unpacked once, or None if there is none."""
        fitting = sorted((name for name in names if re.fullmatch(pattern, name)), key=_version)
        if not fitting:
            return None
        root = self.folder / "files" / fitting[-1]
        if not root.is_dir():
            print(f"  fetching {fitting[-1]}")
            self.run("apt-get", "download", "-qq", fitting[-1])
            [archive] = self.folder.glob(f"{fitting[-1]}_*.deb")
            part = root.with_name(f"{root.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            subprocess.run(["dpkg-deb", "-x", str(archive), str(part)], check=True)
            archive.unlink()
            part.rename(root)
        return root


def _chunks(names: list[str], size: int = 4000) -> Iterator[list[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))


def _version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


_DICT, _DOC = "usr/share/dictd", "usr/share/doc"
SOURCES: dict[str, list[Source]] = {
    "wordnet": [Source("wordnet-base", "WordNet-3.0", "usr/share/wordnet/data.*", wordnet)],
    "gcide": [Source("dict-gcide", "GPL-2+", f"{_DICT}/gcide.index", gcide)],
    "terms": [
        Source("dict-foldoc", "GFDL-1.1+", f"{_DICT}/foldoc.index", terms),
        Source("dict-jargon", "public domain", f"{_DICT}/jargon.index", terms),
        Source("dict-devil", "public domain", f"{_DICT}/devil.index", terms),
    ],
    "prose": [
        Source("anarchism", "GPL-2", f"{_DOC}/anarchism/html/*.html", page),
        Source("debian-history", "GPL-2+", f"{_DOC}/debian-history/docs/*.en.html", page),
        Source("crawl-common", "GPL-2+", "usr/share/crawl/dat/descript/*.txt", crawl),
    ],
    "manuals": [
        Source("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", f"{_DOC}/debian-handbook/html/en-US/*.html", page),
        Source("debian-faq", "copyleft notice of the Debian FAQ", f"{_DOC}/debian/FAQ/*.en.html", page),
        Source("gnome-user-docs", "CC-BY-SA-3.0", "usr/share/help/C/**/*.page", page),
        Source("gimp-help-en", "GFDL-1.2+", "usr/share/gimp/2.0/help/en/*.html", page),
        Source("gnucash-docs", "GFDL-1.1+", f"{_DOC}/gnucash-docs/gnucash-*-en/*.html", page),
        Source("libreoffice-help-en-us", "MPL-2.0", "usr/share/libreoffice/help/en-US/text/**/*.html", page),
        Source(r"postgresql-doc-\d+", "PostgreSQL", f"{_DOC}/postgresql-doc-*/html/*.html", page),
        Source(r"python3\.\d+-doc", "PSF-2.0", f"{_DOC}/python3*/html/[fhtw][aoub]*/*.html", page),
        Source("privoxy", "GPL-2+", f"{_DOC}/privoxy/*/*.html", page),
        Source("sqlite3-doc", "public domain", f"{_DOC}/sqlite3/*.html", page),
        Source("lilypond-doc-html", "GFDL-1.3+", f"{_DOC}/lilypond/html/Documentation/[mle][ues][usa]*/*.html", page),
        Source("solfege-doc", "GPL-3+", f"{_DOC}/solfege/help/C/*.html", page),
        Source("gnugo", "GFDL-1.3+", f"{_DOC}/gnugo/**/*.html", page),
    ],
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
