"""The commands that ask other models for training data: `mine`, `synth` and `data relabel`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from embedwright.cli import options
from embedwright.cli.display import counter, note
from embedwright.cli.options import arg, opt, say_json
from embedwright.data.files.parts import Shard, is_done
from embedwright.errors import InputError, as_input_error
from embedwright.files import locked, write_json
from embedwright.llm.answers import tokens_paid
from embedwright.llm.client import Client, Server
from embedwright.mining.rules import NAMED, Ensemble, Positives, Rule


def _naming_refused(verb: Callable[..., None]) -> Callable[..., None]:
    """Makes `mine` name file and row of texts that a teacher refuses for their length."""

    @wraps(verb)
    def call(examples: str, *, corpus: str | None = None, **given: Any) -> None:
        from embedwright.data.files.beir import corpus_rows, document_text
        from embedwright.data.tables.table import open_as_named
        from embedwright.remote import fetched

        try:
            verb(examples=examples, corpus=corpus, **given)
        except InputError as error:  # from another process under torchrun, it is not a RefusedTextsError
            if not (refused := getattr(error, "texts", ())):
                raise
            texts, places = set(refused), list[str]()
            for number, example in enumerate(open_as_named(fetched(examples)), start=1):
                passages = (*example.positives, *example.negatives)
                if not texts.isdisjoint([example.query, *(passage.text for passage in passages)]):
                    places.append(f"{examples}: row {number}, id {example.id!r}")
            rows = corpus_rows(fetched(corpus)) if corpus else ()
            places += [f"{file}:{n}" for file, n, row in rows if isinstance(row, dict) and document_text(row) in texts]
            raise InputError("\n".join([f"{error}, or --cut{':' * bool(places)}", *places[:20]])) from None

    return call


@options.opens_models
@_naming_refused
def mine(
    how: options.How,
    examples: Annotated[str, arg("Training examples or pairs, also of a store (s3://...).")],
    out: options.StoreOut,
    corpus: Annotated[
        str | None,
        opt('Documents to mine from: rows {"_id", "text"}, or what `encode` wrote of them. Default: all positives.'),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        opt("Teacher: folder, hub id, bm25, random or http://HOST/v1#MODEL. Repeatable. Default: minilm."),
    ] = None,
    rule: Annotated[Rule, opt("Rule that says which documents may be negatives.")] = "perc",
    margin: Annotated[float | None, opt("Margin of the rule. Default: the paper's best, 0.95 for perc.")] = None,
    negatives: Annotated[int, opt("Number of negatives of a query.")] = 7,
    depth: Annotated[int, opt("Number of candidates of a query, before the rule.")] = 100,
    task: Annotated[str, opt("Instruction of all queries. Default: each row's own, else the teacher's.")] = "",
    positives: Annotated[Positives, opt("Which of several positives sets the threshold of the rule.")] = "lowest",
    sampled: Annotated[bool, opt("Draw negatives by a softmax over scores.", "--sampled")] = False,
    sample_from: Annotated[
        int | None, opt("Number of candidates that --sampled draws from. Default: 10.", min=1)
    ] = None,
    seed: options.NumpySeed = 0,
    ensemble: Annotated[Ensemble, opt("How several teachers share the work.")] = "cross-sample",
    vectors: Annotated[
        Path | None, opt("Folder that keeps vectors of documents.", callback=options.folder_to_write)
    ] = None,
    precision: options.StoredPrecision = "float32",
    report: Annotated[Path | None, opt("Folder for report.json.", callback=options.folder_to_write)] = None,
    query_template: Annotated[str | None, opt("Query for an HTTP teacher, with {task} and {text}.")] = None,
    document_template: Annotated[str | None, opt("Document for an HTTP teacher, with {text}.")] = None,
    cut: Annotated[bool, opt("Cut texts that an HTTP teacher refuses for their length.", "--cut")] = False,
    api_key_env: Annotated[
        list[str] | None,
        opt("Environment variable with an HTTP teacher's API key; for several, HOST=NAME. Repeatable."),
    ] = None,
    shard: options.ShardOption = None,
) -> None:
    """Find hard negatives with one or more teacher models, and leave out probable positives.

    Under torchrun, all processes encode, each a part of the texts.
    """
    from embedwright.data.files.parts import folder_of_part, settings_of, write_part
    from embedwright.data.files.tasks import digest_of
    from embedwright.data.tables.documents import DocumentTable
    from embedwright.data.tables.table import PartOfTable, open_as_named
    from embedwright.encoders.http import HttpEncoder
    from embedwright.encoders.open import open_encoder
    from embedwright.encoders.sharded import shared
    from embedwright.endpoint import key_variables, shown_model
    from embedwright.fingerprint import brief_of
    from embedwright.mining.mine import mine as run
    from embedwright.mining.pool import positives_of
    from embedwright.processes import joined
    from embedwright.remote import fetched
    from embedwright.vectors.corpus import corpus_at, is_encoded

    options.check_out(out, shard)
    if shard and report:
        raise InputError("--report is of all rows: with --shard, each part's report lies beside it, in OUT")
    given = {"query_template": query_template, "document_template": document_template, "cut": cut or None}
    templates = {key: template for key, template in given.items() if template is not None}
    names = teacher or ["minilm"]
    options.check_opened(names, how)
    options.check_asked(names, {**given, "api_key_env": api_key_env})
    chosen: dict[str, Any] = {
        "rule": rule,
        "margin": margin,
        "negatives": negatives,
        "depth": depth,
        "task": task,
        "positives": positives,
        "sampled": sampled,
        "sample_from": sample_from,
        "seed": seed,
        "ensemble": ensemble,
        "precision": precision,
    }

    def opened() -> list[Any]:
        keys = key_variables(api_key_env or [], [name for name in names if "://" in name])
        return [
            HttpEncoder.from_url(name, api_key_env=keys.get(name), **templates)
            if "://" in name
            else name
            if name in NAMED
            else open_encoder(name, **how)
            for name in names
        ]

    def work(teachers: list[Any]) -> None:
        def write(file: Path) -> dict[str, Any]:
            rows = PartOfTable(table, shard.rows(len(table))) if shard else table
            where: dict[str, Any] = {"tasks": table.tasks, "vectors": vectors, "out": file}
            return run(rows, pool, teachers, **chosen, **where, progress=counter("texts"))[1].to_json()

        if shard:
            identity = pool.identity if isinstance(pool, DocumentTable) else None
            known = {"examples": table.fingerprint, "corpus": identity, **templates, **chosen}
            known["teachers"] = list(map(shown_model, names))
            # a part that is done opens no teacher
            known["fingerprints"] = settings_of(folder).get("fingerprints") if done else list(map(brief_of, teachers))
            known |= {name: value for name, value in how.items() if name != "device"}
            known["tasks"] = digest_of(table.tasks)  # whose instructions go before the queries
            counts = write_part(folder, shard, known, write, remote)
        else:
            counts = write(Path(out))
        if report:
            write_json(report / "report.json", counts)
        say_json({key: value for key, value in counts.items() if key != "scores"})

    with joined() as processes, ExitStack() as opened_folder:
        with processes.together():  # before a teacher is loaded: bad rows show at once
            if processes.is_rank_0:
                table, place = open_as_named(fetched(examples)), fetched(corpus) if corpus else None
                pool = corpus_at(place) if place else positives_of(table)
                folder, remote = opened_folder.enter_context(folder_of_part(out, shard)) if shard else (Path(), None)
                there = vectors or set(names) <= set(NAMED) or (place and is_encoded(place))
                if shard and shard.count > 1 and not there:
                    many = f"each of {shard.count} parts encodes all {len(pool):,} documents"
                    note(f"{out}: {many}: `encode` them once, and give that folder as --corpus")
        done = processes.on_rank_0(lambda: shard is not None and is_done(shard.file(folder)))
        shared(lambda: [] if done else opened(), processes, work)


def synth(
    out: options.PartsOut,
    base_url: Annotated[str, opt("Address of an OpenAI-compatible server: http://127.0.0.1:8000/v1.")],
    model: Annotated[list[str], opt("Model, as the server names it. Repeatable: each example draws one of them.")],
    count: Annotated[int, opt("Number of examples, of all types together.", min=1)],
    types: Annotated[
        str, opt("Types, by commas: short-long, long-short, short-short, long-long, sts, bitext.")
    ] = "short-long,long-short,short-short",
    per_task: Annotated[int, opt("Number of examples of one brainstormed task.", min=1)] = 2,
    seed: options.Seed = 0,
    licence: Annotated[str, opt("Licence of the examples, by the model's terms.")] = "",
    prompts: Annotated[Path | None, opt("YAML file with other prompts and values. Default: the packaged ones.")] = None,
    concurrency: options.Concurrency = 8,
    token_budget: options.TokenBudget = None,
    max_tokens: options.MaxTokens = 2048,
    timeout: options.Timeout = 300.0,
    api_key_env: options.KeyVariable = None,
    shard: options.ShardOption = None,
) -> None:
    """Write training examples with a language model: brainstorm tasks, then write examples of each task.

    The tasks and the model's answers are kept in files beside OUT. Run the same command again to go on.
    """
    from embedwright.synth.plan import PROMPTS, Plan, Prompts, split_evenly
    from embedwright.synth.synthesize import ask_for_tasks, synthesize

    options.check_out(out, shard)
    kinds = split_evenly(count, types.lower().split(","))
    plan = Plan(kinds, tuple(model), per_task=per_task, seed=seed, prompts=Prompts.load(prompts or PROMPTS))
    limits: dict[str, Any] = {"concurrency": concurrency, "max_tokens": max_tokens, "token_budget": token_budget}
    limits |= {"base_url": base_url, "api_key_env": api_key_env}
    if shard and not is_done(shard.file(out)):  # its own answers, which one process at a time opens
        with locked(out.with_name(f".{out.name}.tasks.lock")), _client(out, None, timeout, shard, **limits) as client:
            ask_for_tasks(out, client, plan, licence, shard)
    with _client(out, shard, timeout, **limits) as client:
        report = synthesize(out, client, plan, licence=licence, progress=counter("examples"), shard=shard)
    say_json(report)
    if not report["written"] and not shard:
        sys.stderr.write(f"embedwright: {out}: no usable example came out, nothing written\n")
        raise typer.Exit(1)
    _check_answered(report, out)


def relabel(
    context: typer.Context,
    path: Annotated[Path, arg("Examples with mined negatives.")],
    out: options.PartsOut,
    base_url: Annotated[str | None, opt("Address of an OpenAI-compatible server.")] = None,
    model: Annotated[str | None, opt("Model that judges, as the server names it.")] = None,
    cross_encoder: Annotated[str | None, opt("Folder or hub id of a cross-encoder.")] = None,
    threshold: Annotated[float | None, opt("Lowest score of a positive, for --cross-encoder.")] = None,
    action: Annotated[
        Literal["drop", "promote"], opt("What happens to a negative that is judged a positive.")
    ] = "drop",
    tasks: Annotated[Path | None, opt("File of the rows' tasks (JSONL), besides that of the examples.")] = None,
    max_chars: Annotated[
        int | None, opt("Most characters of each text that a language model reads. Default: all.", min=1)
    ] = None,
    concurrency: options.Concurrency = 8,
    token_budget: options.TokenBudget = None,
    max_tokens: options.MaxTokens = 512,
    timeout: options.Timeout = 300.0,
    api_key_env: options.KeyVariable = None,
    shard: options.ShardOption = None,
) -> None:
    """Find negatives that are in truth positives, by a language model or a cross-encoder.

    A language model's answers are kept in a file beside OUT. Run the same command again to go on.
    """
    from embedwright.data.files.tasks import merge_tasks, read_tasks, tasks_beside, tasks_file
    from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
    from embedwright.fingerprint import brief_of
    from embedwright.synth.relabel import Judge, judge_by_model, judge_by_scores, relabel_file

    options.check_out(out, shard)
    own = read_tasks(tasks) if tasks else {}
    described = merge_tasks([(tasks_file(path), tasks_beside(path)), *([(tasks, own)] if tasks else [])])

    def run(judge: Judge, name: str, client: Client | None = None) -> dict[str, Any]:
        given: dict[str, Any] = {"tasks": own, "shard": shard, "judged_by": name, "client": client}
        return relabel_file(path, out, judge, action, progress=counter("examples"), **given)

    if cross_encoder is not None and threshold is not None and base_url is None and model is None:
        limits_of_servers = ("max_chars", "concurrency", "token_budget", "max_tokens", "timeout", "api_key_env")
        if ignored := options.given(context, *limits_of_servers):
            raise InputError(f"{', '.join(ignored)}: no server is asked here, a cross-encoder judges: leave it out")
        judge = _cross_encoder(cross_encoder)
        brief = f" ({brief_of(SentenceTransformerEncoder(judge))})" if shard else ""  # its kind has the same facts
        say_json(run(judge_by_scores(judge, threshold), f"{cross_encoder}{brief} from {threshold}"))
        return
    if base_url is None or model is None or cross_encoder is not None or threshold is not None:
        raise InputError("name the judge: --base-url and --model, or --cross-encoder and --threshold")
    limits: dict[str, Any] = {"concurrency": concurrency, "max_tokens": max_tokens, "token_budget": token_budget}
    with _client(out, shard, timeout, base_url=base_url, api_key_env=api_key_env, **limits) as client:
        judged_by = model if max_chars is None else f"{model}, {max_chars} characters"
        report = run(judge_by_model(client, model, described, max_chars), judged_by, client)
    say_json(report)
    _check_answered(report, out)


def _check_answered(report: dict[str, Any], out: Path) -> None:
    """Exits with 1 if the same command, run again, would ask for more."""
    if count := report.get("unanswered"):
        again = (
            "run the same command again; if --token-budget is spent or --max-tokens cuts answers off, with a larger one"
        )
        sys.stderr.write(f"embedwright: {out}: {count} questions have no answer yet: {again}\n")
        raise typer.Exit(1)


def _cross_encoder(name: str) -> Any:
    if not name:
        raise InputError("--cross-encoder is empty: give a folder or a hub id")
    from sentence_transformers import CrossEncoder

    with as_input_error(name, "cannot be opened as a cross-encoder"):
        return CrossEncoder(name, trust_remote_code=False)


def _client(out: Path, shard: Shard | None, timeout: float, tasks_of: Shard | None = None, **settings: Any) -> Client:
    """Returns a client of the server with these settings. It keeps the answers beside `out`, or beside the part.

    A part also knows the answers that were paid for without parts, with another number of them, or for the tasks of all
    parts. What these leave of the budget is shared by all parts alike, so that together they stay below it. With
    `tasks_of`, the client asks for the tasks of all parts, and may pay what all have left.
    """
    if not (timeout > 0 and math.isfinite(timeout)):
        raise InputError(f"--timeout {timeout}: a number of seconds above 0")
    file = shard.file(out) if shard else out.with_name(f"{out.name}.brainstorm") if tasks_of else out
    own, earlier = file.with_name(f"{file.name}.answers.sqlite"), list[Path]()
    if shard or tasks_of:
        beside = [out.with_name(f"{out.name}{name}.answers.sqlite") for name in ("", ".brainstorm")]
        beside += sorted(out.glob("part-*.answers.sqlite"))
        others = f"-of-{shard.count:05d}." if shard else own.name
        earlier = [path for path in beside if path.is_file() and others not in path.name]
        if budget := settings["token_budget"]:
            left = budget - sum(map(tokens_paid, earlier))
            settings["token_budget"] = max(left // (shard.count if shard else 1), 1)
    return Client(Server(timeout_s=timeout, **settings), own, earlier)
