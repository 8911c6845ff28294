"""Options that several commands share, and the check of output paths, which comes before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from embedwright.cli.display import say
from embedwright.data.files.parts import Shard
from embedwright.endpoint import shown_model
from embedwright.errors import InputError
from embedwright.files import check_file, check_folder, check_new_folder
from embedwright.remote import RemoteFolder, is_remote


def opt(help: str, *names: str, **settings: Any) -> Any:
    """Makes an option with this help."""
    return typer.Option(*names, help=help, **settings)


def arg(help: str, **settings: Any) -> Any:
    """Makes an argument with this help."""
    return typer.Argument(help=help, **settings)


def say_json(report: Any) -> None:
    say(json.dumps(report, indent=2))


def to_write(check: Callable[[Path], Path]) -> Callable[[Path | None], Path | None]:
    """Makes a callback of an option, which refuses a path that cannot be written and expands `~`."""

    def checked(value: Path | None) -> Path | None:
        if value is None:
            return None
        if re.match(r"\w[\w+.-]+:/", str(value)):  # a `Path` has lost a slash of s3://
            raise InputError(f"{value}: this is written on this disk; only `encode` and `mine --shard` write to stores")
        check(value)
        return value.expanduser()

    return checked


def or_remote(check: Callable[[Path], Path]) -> Callable[[str], str]:
    """Makes a callback of an option that may be a path of a store. It checks others as `to_write` does."""

    def checked(value: str) -> str:
        if not is_remote(value):
            return str(to_write(check)(Path(value)))
        RemoteFolder(value, Path())  # raises where no package knows the store
        return value

    return checked


def check_results(path: Path) -> Path:
    """Checks that results can be written: `path` is a file if its name ends in .json, else a folder."""
    return check_file(path) if path.suffix == ".json" else check_folder(path)


results_to_write = to_write(check_results)
file_to_write, folder_to_write, new_folder = map(to_write, (check_file, check_folder, check_new_folder))


def check_rows_name(path: Path) -> Path:
    """Refuses a name that ends as another format's files do. `data build` may also write a folder."""
    if path.suffix in (".csv", ".tsv", ".json", ".txt", ".arrow", ".zst"):
        raise InputError(f"--out {path}: rows are written as .jsonl, .jsonl.gz or .parquet, not as {path.suffix}")
    return path


def check_rows_file(path: Path) -> Path:
    return check_file(check_rows_name(path))


def check_out(out: Path | str, shard: Shard | None) -> None:
    """Checks that `out` can be written: a file, or with `shard` a folder of parts. For commands with `PartsOut`."""
    if is_remote(out):
        if shard is None:
            raise InputError(f"--out {out}: a store takes a folder of parts: add --shard 0/1, for one part")
    elif shard is None:
        check_file(out)
    else:
        check_folder(out)


_OPENING: dict[str, Any] = {
    "device": Annotated[str | None, opt("Device of the model, as cpu or cuda:1. Default: a GPU if there is one.")],
    "dtype": Annotated[
        Literal["float32", "bfloat16", "float16", "int8"] | None,
        opt("Number type of the weights; int8: of the linear layers alone, for CPUs. Default: the stored one."),
    ],
    "max_tokens": Annotated[int | None, opt("Tokens after which a text is cut. Default: the model's.", min=1)],
}
How = Mapping[str, Any]


def opens_models(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a command --device, --dtype and --max-tokens. Those given come as `how`, arguments of `open_encoder`."""
    own = [one for one in signature(verb, eval_str=True).parameters.values() if one.name != "how"]
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in _OPENING.items()]

    @wraps(verb)
    def call(**given: Any) -> None:
        values = {name: given.pop(name, None) for name in _OPENING}
        verb(**given, how={name: value for name, value in values.items() if value is not None})

    call.__annotations__ = {one.name: one.annotation for one in [*own, *more]}
    call.__signature__ = Signature([*own, *more])  # type: ignore[attr-defined]  # what typer reads
    return call


def check_opened(names: Sequence[str], how: How) -> None:
    """Refuses `how` where none of these models is opened here, but asked over HTTP, or no model at all."""
    if how and all("://" in name or name in ("bm25", "random") for name in names):
        raise InputError(
            f"--{next(iter(how)).replace('_', '-')}: no model is opened here, only {', '.join(map(shown_model, names))}"
        )


def check_asked(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuses options of servers, those in `given` that have a value, where none of these models is a server."""
    options = [name for name, value in given.items() if value not in (None, False)]
    if options and not any("://" in name for name in names):
        raise InputError(f"--{options[0].replace('_', '-')}: no server is asked here, only {', '.join(names)}")


def given(context: typer.Context, *names: str) -> list[str]:
    """Returns those of these parameters that the user gave, as options (`--max-chars`)."""
    own = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in own]


PartsOut = Annotated[
    Path,
    opt(
        "File to write: .jsonl, .jsonl.gz or .parquet; with --shard, a folder of such.",
        "--out",
        callback=to_write(check_rows_name),
    ),
]
StoreOut = Annotated[
    str,
    opt(
        "File to write: .jsonl, .jsonl.gz or .parquet; with --shard, a folder of such, also of a store (s3://...).",
        "--out",
        callback=or_remote(check_rows_name),
    ),
]
ShardOption = Annotated[
    Shard | None,
    opt(
        "Read and write part I of N alone, from 0/N to N-1/N. Default: all.",
        "--shard",
        parser=Shard.parse,
        metavar="I/N",
    ),
]
StoredPrecision = Annotated[
    Literal["float32", "float16"], opt("Number type of stored vectors; float16 halves them.", "--precision")
]
rows_to_write = to_write(check_rows_file)
corpus_to_write = to_write(lambda path: check_file(path) if path.suffix == ".arrow" else check_rows_file(path))
Out = Annotated[Path, opt("File to write: .jsonl, .jsonl.gz or .parquet.", "--out", callback=rows_to_write)]
Model = Annotated[str, arg("Model: a folder, a hub id, or `minilm`.")]
StoreTexts = Annotated[
    str,
    arg(
        "JSONL or Parquet with `text`, or .txt with a text a line; also of a store (s3://...). "
        "-: standard input, JSONL or a text a line."
    ),
]
Texts = Annotated[
    Path, arg("JSONL or Parquet with `text`, or .txt with a text a line. -: standard input, JSONL or a text a line.")
]
TaskOption = Annotated[
    str | None, opt('Instruction for these texts, if they are queries; "" for queries without one.', "--task")
]
DataPath = Annotated[Path, arg("Data file, or BEIR folder.")]
Family = Annotated[
    Literal["retrieval", "classification", "clustering", "sts"] | None,
    opt("Show sets of this family only. Default: all."),
]
Form = Annotated[
    Literal["example", "label"] | None,
    opt(
        "What a text's positive is: `example`, another text of its class; `label`, the label's own text. "
        "Default: as in the catalogue, else `label` for two classes and `example` for more."
    ),
]
OnlyLabels = Annotated[
    list[str] | None, opt("Keep rows of this label only. Repeatable. Default: all labels.", "--label")
]
# Those of `data pairs`.
WAYS = "title, summary, crops, sentence, bm25, cloze, templates, gloss, swap, classes, see-also, lemma"
Seed = Annotated[int, opt("Seed of all random draws.")]
NumpySeed = Annotated[int, opt("Seed of all random draws.", min=0)]  # numpy takes no other
PerExample = Annotated[int, opt("Number of negatives of an example that is made of labels.", min=1)]
Against = Annotated[
    list[Path] | None,
    opt(
        "Evaluation data whose texts must not occur: a file, a BEIR folder, or a folder of these. Repeatable. "
        "Default: no such check."
    ),
]
WithCorpus = Annotated[bool, opt("Count the documents of evaluation data as leaks, too.", "--corpus")]
Bm25 = Annotated[float, opt("Lowest BM25 score of a leak, as a fraction of the text's own score; 0 for no rule.")]
KeyVariable = Annotated[
    str | None, opt("Environment variable with the server's API key. Default: OPENAI_API_KEY, for its own server.")
]
Concurrency = Annotated[int, opt("Number of requests that are under way at once.", min=1)]
MaxTokens = Annotated[int, opt("Largest number of tokens of one answer.", min=1)]
Timeout = Annotated[float, opt("Time limit of one request, in seconds.")]
TokenBudget = Annotated[
    int | None,
    opt(
        "Stop before all runs together have paid for this many tokens; part I of N pays an Nth. Default: no limit.",
        min=1,
    ),
]
