"""The commands of `data` that only read and write files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from embedwright.cli import options
from embedwright.cli.display import say
from embedwright.cli.options import arg, opt, say_json
from embedwright.errors import InputError
from embedwright.files import check_file, check_new_folder

data_app = typer.Typer(help="Build, check, clean and convert training data.", no_args_is_help=True)


@data_app.command("list")
def data_list(
    family: options.Family = None,
    version: Annotated[Literal["v1", "v2"] | None, opt("Show sets of this NV-Embed only. Default: all.")] = None,
    as_markdown: Annotated[bool, opt("Print the tables of the documentation instead.", "--markdown")] = False,
) -> None:
    """Show the public training sets that `data build` knows."""
    from embedwright.data.sources.catalog import load_catalog, markdown, plain

    sets = [
        entry
        for entry in load_catalog().values()
        if family in (None, entry.family) and (version is None or version in entry.target)
    ]
    say((markdown if as_markdown else plain)(sets).removesuffix("\n"))


@data_app.command("build")
def data_build(
    name: Annotated[str, arg("Name in `data list`, a YAML file, or `docstrings` (of installed libraries).")],
    out: Annotated[
        Path,
        opt(
            "File to write; for `docstrings`, a folder.",
            "--out",
            callback=options.to_write(options.check_rows_name),
        ),
    ],
    source: Annotated[Path | None, opt("File or folder to read. Default: the hub.")] = None,
    limit: Annotated[int | None, opt("Number of rows or queries to take. Default: all.", min=1)] = None,
    share: Annotated[
        float | None, opt("Share of the samples in `data list`, of 500 rows at least, and of the corpus. Default: all.")
    ] = None,
    corpus_out: Annotated[
        Path | None,
        opt(
            "File for the documents that `mine --corpus` searches; it reads .arrow in place. Default: none.",
            callback=options.corpus_to_write,
        ),
    ] = None,
    seed: options.Seed = 0,
    form: options.Form = None,
    negatives: options.PerExample = 7,
    label: options.OnlyLabels = None,
    strict: Annotated[bool, opt("Refuse a set that is not pinned to a commit.", "--strict")] = False,
) -> None:
    """Turn a public training set, or a local copy of one, into examples."""
    if name == "docstrings":
        from embedwright.demo import docstrings

        check_new_folder(out)
        docstrings.build(out)
        say((out / "report.json").read_text())
        return
    from embedwright.data.labels import LabelRules
    from embedwright.data.sources.build import build
    from embedwright.data.sources.catalog import find_entry

    check_file(out)
    counts = build(
        find_entry(name),
        out,
        source=source,
        limit=limit,
        share=share,
        corpus_out=corpus_out,
        seed=seed,
        labels=LabelRules(form, negatives, label),
        strict=strict,
    )
    say_json(counts)


@data_app.command("check")
def data_check(
    path: options.DataPath,
    against: options.Against = None,
    corpus: options.WithCorpus = False,
    bm25: options.Bm25 = 0.9,
    leaks: Annotated[Path | None, opt("File for the leaks (JSONL).", callback=options.file_to_write)] = None,
) -> None:
    """Read a whole data set and report its rows, duplicates and leaks. Exits 2 if a row was bad, 1 if a text leaks."""
    from embedwright.data.clean.clean import clean_file
    from embedwright.data.clean.leaks import EvalTexts

    _check_against(against, corpus, leaks)
    held_out = EvalTexts(against, corpus=corpus, bm25=bm25 or None) if against else None
    report = clean_file(path, None, leaks_to=leaks, held_out=held_out)
    say_json(report)
    if report["quarantined"]:
        raise InputError(f"{path}: {report['quarantined']} bad lines, named above")
    if report["leaks"]:
        sys.stderr.write(f"embedwright: {path}: texts of {', '.join(report['leaks'])} are in it\n")
        raise typer.Exit(1)


@data_app.command("clean")
def data_clean(
    path: options.DataPath,
    out: options.PartsOut,
    against: options.Against = None,
    corpus: options.WithCorpus = False,
    bm25: options.Bm25 = 0.9,
    leaks: Annotated[
        Path | None,
        opt(
            "File for the leaks (JSONL). Default: OUT.leaks.jsonl; with --shard, that of the part.",
            callback=options.file_to_write,
        ),
    ] = None,
    repeats: Annotated[
        Literal["both", "query", "positive", "none"], opt("Sides that must repeat an earlier row for a row to go.")
    ] = "both",
    language: Annotated[list[str] | None, opt("Keep this language (en, de, ...). Repeatable. Default: all.")] = None,
    min_chars: Annotated[int, opt("Fewest characters of each text.", min=0)] = 0,
    max_chars: Annotated[int | None, opt("Most characters of each text. Default: no limit.", min=1)] = None,
    min_words: Annotated[int, opt("Fewest words of each text.", min=0)] = 0,
    max_words: Annotated[int | None, opt("Most words of each text. Default: no limit.", min=1)] = None,
    licence: Annotated[
        list[str] | None, opt("Keep tasks of this licence, as CC-BY*. Repeatable. Default: all.")
    ] = None,
    not_licence: Annotated[list[str] | None, opt("Drop tasks of this licence, as *-NC*. Repeatable.")] = None,
    licences: Annotated[Path | None, opt("YAML file of tasks' licences, besides the catalogue's.")] = None,
    shard: options.ShardOption = None,
) -> None:
    """Remove unwanted rows, duplicates and leaks from evaluation data, and report what went and why.

    With --shard, near-duplicates are found within a part alone; exact ones are found everywhere.
    """
    from embedwright.config import load_texts
    from embedwright.data.clean.clean import clean_file
    from embedwright.data.clean.filters import Filters
    from embedwright.data.clean.leaks import EvalTexts

    options.check_out(out, shard)
    _check_against(against, corpus, leaks)
    if shard and leaks:
        raise InputError("--leaks: with --shard, the leaks of each part lie beside it")
    filters = Filters(
        licences=load_texts(licences) if licences else {},
        allow=tuple(licence or ()),
        deny=tuple(not_licence or ()),
        languages=tuple(language or ()),
        min_chars=min_chars,
        max_chars=max_chars,
        min_words=min_words,
        max_words=max_words,
    )
    held_out = EvalTexts(against, corpus=corpus, bm25=bm25 or None) if against else None
    leaks = (leaks or out.with_name(f"{out.name}.leaks.jsonl")) if held_out else None
    say_json(clean_file(path, out, leaks_to=leaks, filters=filters, by=repeats, held_out=held_out, shard=shard))


def _check_against(against: list[Path] | None, corpus: bool, leaks: Path | None) -> None:
    """Refuses options that say what to do with leaks where none is looked for."""
    for name, given in (("--corpus", corpus), ("--leaks", leaks is not None)):
        if given and not against:
            raise InputError(f"{name} is of leaks: name the evaluation data with --against, or leave {name} out")


@data_app.command("export")
def data_export(
    path: options.DataPath,
    out: Annotated[Path, opt("File to write: .parquet.", "--out", callback=options.file_to_write)],
    format: Annotated[
        Literal["sentence-transformers"], opt("Trainer whose columns are written.")
    ] = "sentence-transformers",
    negatives: Annotated[int | None, opt("Number of negatives of a row. Default: the fewest of all.")] = None,
    task: Annotated[str | None, opt("Write examples of this task only. Default: of all tasks.")] = None,
) -> None:
    """Write examples as Parquet, in the columns that another trainer reads."""
    from embedwright.data.export import export

    say_json(export(path, out, format=format, negatives=negatives, task=task))


@data_app.command("labels")
def data_labels(
    path: Annotated[Path, arg('Rows {"text", "label"}; a label may be a list of labels.')],
    out: options.Out,
    task: Annotated[str | None, opt("Name of the task. Default: the file's name.")] = None,
    negatives: options.PerExample = 7,
    seed: options.Seed = 0,
    form: options.Form = None,
    label: options.OnlyLabels = None,
    words: Annotated[Path | None, opt("YAML file of labels and their texts. Default: the labels.")] = None,
) -> None:
    """Turn labelled texts into examples: positives are of the same class, negatives of other classes."""
    from embedwright.config import load_texts
    from embedwright.data.labels import LabelRules
    from embedwright.data.sources.build import label_file

    counts = label_file(
        path,
        out,
        task=task,
        words=load_texts(words) if words else None,
        labels=LabelRules(form, negatives, label),
        seed=seed,
    )
    say_json(counts)


@data_app.command("pairs")
def data_pairs(
    path: Annotated[Path, arg("Documents: rows with `text`, a .txt (a text a line), a folder of .txt and .md, BEIR.")],
    how: Annotated[
        str, opt(f"Ways to make examples, separated by commas, of {options.WAYS}. See docs/pairs.md.", "--how")
    ],
    out: options.Out,
    column: Annotated[
        list[str] | None,
        opt("Column of rows that is the text, title, id, label, source or links, as title=summary. Repeatable."),
    ] = None,
    per_document: Annotated[
        int, opt("Number of draws of a document, for ways that draw. See docs/pairs.md.", min=1)
    ] = 1,
    negatives: Annotated[int, opt("Most negatives of an example, for `bm25`, `gloss` and `classes`.", min=1)] = 7,
    wordnet: Annotated[Path | None, opt("Folder of WordNet's database files, for `lemma`. See docs/pairs.md.")] = None,
    name: Annotated[str | None, opt("What the tasks' names begin with. Default: the file's name.")] = None,
    licence: Annotated[str, opt("Licence of the documents, for the tasks.")] = "",
    seed: options.Seed = 0,
) -> None:
    """Make training examples from plain documents by rules: no queries and no language model are needed."""
    from embedwright.data.files.documents import columns_of
    from embedwright.pairs.make import make_pairs

    counts = make_pairs(
        path,
        out,
        [way.strip() for way in how.split(",") if way.strip()],
        columns=columns_of(column or []),
        per_document=per_document,
        negatives=negatives,
        wordnet=wordnet,
        name=name,
        licence=licence,
        seed=seed,
    )
    say_json(counts)
