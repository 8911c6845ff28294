"""The commands that make training data: `mine` and all of `data`. As in `cli`: parse, call, print, nothing else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from embedwright.cli.display import counter, say
from embedwright.errors import InputError, blaming
from embedwright.files import check_file, check_folder, check_new_folder
from embedwright.llm.client import Client, Server
from embedwright.mining.ensemble import Ensemble
from embedwright.mining.rules import Positives, Rule


def to_write(check: Callable[[Path], Path]) -> Callable[[Path | None], Path | None]:
    """A callback of options: a place that cannot be written is refused before any work. `~` is expanded."""

    def checked(value: Path | None) -> Path | None:
        if value is None:
            return None
        check(value)
        return value.expanduser()

    return checked


Out = Annotated[Path, typer.Option("--out", help="Where to write.", callback=to_write(check_file))]
TaskOption = Annotated[str | None, typer.Option("--task", help="Instruction for these texts, if they are queries.")]
By = Literal["both", "query", "positive", "none"]
FamilyOption = Annotated[Literal["retrieval", "classification", "clustering", "sts"] | None, typer.Option()]
VersionOption = Annotated[Literal["v1", "v2"] | None, typer.Option(help="Of NV-Embed.")]
FormOption = Annotated[
    Literal["example", "label"] | None,
    typer.Option(help="Positives are texts of the class, or the label's own text; default: as the set, or by count."),
]
Closed = Annotated[list[str] | None, typer.Option("--label", help="Only rows of these; may be given again.")]
Seed = Annotated[int, typer.Option(help="Of all draws.")]
PerExample = Annotated[int, typer.Option(min=1, help="Per example made of labels.")]
Against = Annotated[
    list[Path] | None,
    typer.Option(help="Evaluation data: a file, a BEIR folder, a folder of such; may be given again."),
]
WithCorpus = Annotated[bool, typer.Option("--corpus", help="Documents of evaluation data count as leaks, too.")]
Bm25Fraction = Annotated[float, typer.Option(help="Of an evaluation text's BM25 self-score; 0: no BM25 rule.")]

Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at once.")]
TokenBudget = Annotated[int | None, typer.Option(min=1, help="Stop before so many are paid for, over all runs.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of one answer.")]
KeyVariable = Annotated[str | None, typer.Option(help="Environment variable with the server's API key.")]
Timeout = Annotated[float, typer.Option(help="Seconds, of one request.")]

data_app = typer.Typer(help="Build, check and convert training data.", no_args_is_help=True)


def mine(
    examples: Annotated[Path, typer.Argument(help="Training examples or pairs.")],
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help='Rows {"_id", "text"}; default: the positives of all.')] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="`minilm` (default), a folder, a hub id, or http://HOST/v1#MODEL; may be given again."),
    ] = None,
    rule: Annotated[Rule, typer.Option(help="What may be a negative.")] = "perc",
    margin: Annotated[float | None, typer.Option(help="Default: 0.95 for perc, the paper's best for others.")] = None,
    negatives: Annotated[int, typer.Option(help="Per query.")] = 7,
    depth: Annotated[int, typer.Option(help="Candidates looked at per query.")] = 100,
    task: Annotated[
        str, typer.Option(help="Instruction for all queries; default: of each row's task, else the teacher's own.")
    ] = "",
    positives: Annotated[Positives, typer.Option(help="Which of several sets the threshold.")] = "lowest",
    sampled: Annotated[bool, typer.Option("--sampled", help="Draw by softmax over scores, not the best.")] = False,
    sample_from: Annotated[
        int | None,
        typer.Option(min=1, help="With --sampled: draw from the first so many that the rule lets pass [10]."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    ensemble: Annotated[Ensemble, typer.Option(help="How several teachers share the work.")] = "cross-sample",
    vectors: Annotated[
        Path | None,
        typer.Option(help="Folder to keep the vectors of the documents in.", callback=to_write(check_folder)),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.json and histogram.png.", callback=to_write(check_folder))
    ] = None,
    query_template: Annotated[str | None, typer.Option(help="For HTTP: what is sent of {task} and {text}.")] = None,
    document_template: Annotated[str | None, typer.Option(help="For HTTP: what is sent of {text}.")] = None,
    api_key_env: Annotated[
        list[str] | None,
        typer.Option(help="For HTTP: environment variable with the server's API key; of several servers HOST=NAME."),
    ] = None,
) -> None:
    """Find hard negatives with one or more teacher models, leaving out what is likely a positive."""
    from embedwright.data.files.beir import read_corpus
    from embedwright.data.files.table import open_as_named, write_examples
    from embedwright.encoders.http import HttpEncoder
    from embedwright.encoders.open import open_encoder
    from embedwright.endpoint import key_variables
    from embedwright.mining.mine import mine as run
    from embedwright.mining.mine import positives_of
    from embedwright.mining.report import check_drawing, write_report

    if report:
        check_drawing()
    table = open_as_named(examples)
    rows = list(table)
    pool = read_corpus(corpus) if corpus else positives_of(rows)
    given = {"query_template": query_template, "document_template": document_template}
    templates = {key: template for key, template in given.items() if template is not None}
    names = teacher or ["minilm"]
    keys = key_variables(api_key_env or [], [name for name in names if "://" in name])
    teachers = [
        HttpEncoder.from_url(name, api_key_env=keys.get(name), **templates) if "://" in name else open_encoder(name)
        for name in names
    ]
    found, counts = run(
        rows,
        pool,
        teachers,
        rule=rule,
        margin=margin,
        negatives=negatives,
        depth=depth,
        task=task,
        tasks=table.tasks,
        positives=positives,
        sampled=sampled,
        sample_from=sample_from,
        seed=seed,
        ensemble=ensemble,
        vectors=vectors,
        progress=counter("texts"),
    )
    write_examples(out, found, table.tasks)
    if report:
        write_report(counts, report)
    say(json.dumps(counts.counts(), indent=2))


def synth(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Examples; tasks and answers are kept in files beside it.",
            callback=to_write(check_file),
        ),
    ],
    base_url: Annotated[str, typer.Option(help="Of an OpenAI-compatible server: http://127.0.0.1:8000/v1")],
    model: Annotated[list[str], typer.Option(help="As the server names it; several take turns at random.")],
    count: Annotated[int, typer.Option(min=1, help="Examples of all types together.")],
    types: Annotated[
        str, typer.Option(help="Of short-long, long-short, short-short, long-long, sts, bitext; commas between.")
    ] = "short-long,long-short,short-short",
    per_task: Annotated[int, typer.Option(min=1, help="Examples of one brainstormed task.")] = 2,
    seed: Seed = 0,
    licence: Annotated[str, typer.Option(help="Of what comes out, as the model's terms have it.")] = "",
    prompts: Annotated[Path | None, typer.Option(help="YAML with prompts and values of your own.")] = None,
    concurrency: Concurrency = 8,
    token_budget: TokenBudget = None,
    max_tokens: MaxTokens = 2048,
    timeout: Timeout = 300.0,
    api_key_env: KeyVariable = None,
) -> None:
    """Make synthetic training examples with a language model: brainstorm tasks, then write examples of each."""
    from embedwright.synth.plan import PROMPTS, Plan, Prompts, split_evenly
    from embedwright.synth.synthesize import synthesize

    kinds = split_evenly(count, types.lower().split(","))
    plan = Plan(kinds, tuple(model), per_task=per_task, seed=seed, prompts=Prompts.load(prompts or PROMPTS))
    limits = (api_key_env, timeout, concurrency, max_tokens, token_budget)
    with _client(out, base_url, *limits) as client:
        report = synthesize(out, client, plan, licence=licence, progress=counter("examples"))
    say(json.dumps(asdict(report), indent=2))
    if not report.written:
        sys.stderr.write(f"embedwright: {out}: no usable example came out, nothing written\n")
        raise typer.Exit(1)


@data_app.command("list")
def data_list(
    family: FamilyOption = None,
    version: VersionOption = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The tables of the documentation.")] = False,
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
    name: Annotated[str, typer.Argument(help="Of `data list`, a YAML file, or `docstrings` of installed libraries.")],
    out: Annotated[Path, typer.Option("--out", help="File to write (of `docstrings`: folder).")],
    source: Annotated[Path | None, typer.Option(help="File or folder to read instead of the hub.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows to take, or queries; of labelled rows at random.")
    ] = None,
    seed: Seed = 0,
    form: FormOption = None,
    negatives: PerExample = 7,
    label: Closed = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a set that is not pinned to a commit.")] = False,
) -> None:
    """Turn a public training set, or a local copy of one, into examples."""
    if name == "docstrings":
        from embedwright.demo import docstrings

        check_new_folder(out)
        docstrings.build(out)
        say((out / "report.json").read_text())
        return
    from embedwright.data.sources.build import build
    from embedwright.data.sources.catalog import find_entry

    check_file(out)
    counts = build(
        find_entry(name),
        out,
        source=source,
        limit=limit,
        seed=seed,
        form=form,
        negatives=negatives,
        known=label,
        strict=strict,
    )
    say(json.dumps(counts, indent=2))


@data_app.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(help="A data file or BEIR folder.")],
    against: Against = None,
    corpus: WithCorpus = False,
    bm25: Bm25Fraction = 0.9,
    leaks: Annotated[
        Path | None, typer.Option(help="Leakage report to write (JSONL).", callback=to_write(check_file))
    ] = None,
) -> None:
    """Read a whole data set; report what is in it, repeats, leaks. Exits 2 if a line was bad, 1 if a text leaks."""
    from embedwright.data.clean.clean import clean_file
    from embedwright.data.clean.leaks import EvalTexts

    held_out = EvalTexts(against, corpus=corpus, bm25=bm25 or None) if against else None
    report = clean_file(path, None, leaks_to=leaks, held_out=held_out)
    say(json.dumps(report, indent=2))
    if report["quarantined"]:
        raise InputError(f"{path}: {report['quarantined']} bad lines, named above")
    if report["leaks"]:
        sys.stderr.write(f"embedwright: {path}: texts of {', '.join(report['leaks'])} are in it\n")
        raise typer.Exit(1)


@data_app.command("clean")
def data_clean(
    path: Annotated[Path, typer.Argument(help="A data file or BEIR folder.")],
    out: Out,
    against: Against = None,
    corpus: WithCorpus = False,
    bm25: Bm25Fraction = 0.9,
    leaks: Annotated[Path | None, typer.Option(help="Leakage report; default: OUT.leaks.jsonl.")] = None,
    repeats: Annotated[By, typer.Option(help="The sides of two rows that must repeat to make one go.")] = "both",
    language: Annotated[list[str] | None, typer.Option(help="Keep these (en, de, ...); may be given again.")] = None,
    min_chars: Annotated[int, typer.Option(min=0, help="Of each text.")] = 0,
    max_chars: Annotated[int | None, typer.Option(min=1, help="Of each text.")] = None,
    min_words: Annotated[int, typer.Option(min=0, help="Of each text.")] = 0,
    max_words: Annotated[int | None, typer.Option(min=1, help="Of each text.")] = None,
    licence: Annotated[list[str] | None, typer.Option(help="Keep tasks of these, as `CC-BY*`.")] = None,
    not_licence: Annotated[list[str] | None, typer.Option(help="Drop tasks of these, as `*-NC*`.")] = None,
    licences: Annotated[Path | None, typer.Option(help="YAML: task name to licence, besides the catalogue's.")] = None,
) -> None:
    """Remove unwanted rows, repeats and leaks from evaluation data; report what went, by reason."""
    from embedwright.config import load_texts
    from embedwright.data.clean.clean import clean_file
    from embedwright.data.clean.filters import Filters
    from embedwright.data.clean.leaks import EvalTexts

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
    say(json.dumps(clean_file(path, out, leaks_to=leaks, filters=filters, by=repeats, held_out=held_out), indent=2))


@data_app.command("export")
def data_export(
    path: Annotated[Path, typer.Argument(help="A data file or BEIR folder.")],
    out: Out,
    format: Annotated[Literal["sentence-transformers"], typer.Option(help="Whose columns.")] = "sentence-transformers",
    negatives: Annotated[int | None, typer.Option(help="Per row; default: as many as every example has.")] = None,
    task: Annotated[str | None, typer.Option(help="Name of the only task to write; default: all.")] = None,
) -> None:
    """Write examples as Parquet in the columns that another trainer reads."""
    from embedwright.data.export import export

    say(json.dumps(export(path, out, format=format, negatives=negatives, task=task), indent=2))


@data_app.command("labels")
def data_labels(
    path: Annotated[Path, typer.Argument(help='Rows {"text", "label"}; a label may be a list of labels.')],
    out: Out,
    task: Annotated[str | None, typer.Option(help="Name of the task; default: the file's.")] = None,
    negatives: PerExample = 7,
    seed: Seed = 0,
    form: FormOption = None,
    label: Closed = None,
    words: Annotated[Path | None, typer.Option(help="YAML: label to what stands for it in the form `label`.")] = None,
) -> None:
    """Turn labelled texts into examples: positives of the same class, negatives of others."""
    from embedwright.config import load_texts
    from embedwright.data.sources.build import label_file

    counts = label_file(
        path,
        out,
        task=task,
        form=form or "auto",
        words=load_texts(words) if words else None,
        known=label,
        negatives=negatives,
        seed=seed,
    )
    say(json.dumps(counts, indent=2))


@data_app.command("relabel")
def data_relabel(
    path: Annotated[Path, typer.Argument(help="Examples with mined negatives.")],
    out: Out,
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible server, whose model judges.")] = None,
    model: Annotated[str | None, typer.Option(help="As the server names it.")] = None,
    cross_encoder: Annotated[str | None, typer.Option(help="Instead of a server: a folder or hub id.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of the cross-encoder: a positive from this on.")] = None,
    action: Annotated[Literal["drop", "promote"], typer.Option(help="Of what is judged a positive.")] = "drop",
    tasks: Annotated[Path | None, typer.Option(help="Of the rows, besides the file beside them.")] = None,
    concurrency: Concurrency = 8,
    token_budget: TokenBudget = None,
    max_tokens: MaxTokens = 512,
    timeout: Timeout = 300.0,
    api_key_env: KeyVariable = None,
) -> None:
    """Find negatives that are in truth positives, by a language model or a cross-encoder; drop or promote them."""
    from embedwright.data.files.tasks import merge_tasks, read_tasks, tasks_beside, tasks_file
    from embedwright.synth.relabel import judge_by_model, judge_by_scores, relabel_file

    described = merge_tasks([(tasks_file(path), tasks_beside(path)), *([(tasks, read_tasks(tasks))] if tasks else [])])
    if cross_encoder is not None and threshold is not None and base_url is None and model is None:
        by_scores = judge_by_scores(_cross_encoder(cross_encoder), threshold)
        report = relabel_file(path, out, by_scores, action, tasks=described, progress=counter("examples"))
        say(json.dumps(report, indent=2))
        return
    if base_url is None or model is None or cross_encoder is not None or threshold is not None:
        raise InputError("name the judge: --base-url and --model, or --cross-encoder and --threshold")
    limits = (api_key_env, timeout, concurrency, max_tokens, token_budget)
    with _client(out, base_url, *limits) as client:
        by_model = judge_by_model(client, model, described)
        report = relabel_file(path, out, by_model, action, tasks=described, progress=counter("examples"))
        say(json.dumps(report | {"client": dict(client.counts)}, indent=2))


def _cross_encoder(name: str) -> Any:
    if not name:
        raise InputError("--cross-encoder is empty: give a folder or a hub id")
    from sentence_transformers import CrossEncoder

    with blaming(name, "cannot be opened as a cross-encoder"):
        return CrossEncoder(name, trust_remote_code=False)


def _client(
    out: Path,
    base_url: str,
    api_key_env: str | None,
    timeout: float,
    concurrency: int,
    max_tokens: int,
    token_budget: int | None,
) -> Client:
    """Of a server; what it answers is kept beside `out`."""
    if not (timeout > 0 and math.isfinite(timeout)):
        raise InputError(f"--timeout {timeout}: a number of seconds above 0")
    server = Server(
        base_url=base_url,
        api_key_env=api_key_env,
        timeout_s=timeout,
        concurrency=concurrency,
        max_tokens=max_tokens,
        token_budget=token_budget,
    )
    return Client(server, out.with_name(f"{out.name}.answers.sqlite"))
