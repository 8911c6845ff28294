"""The commands that make a model and use it: `train`, `merge`, `encode`, `search`, `export`, `doctor`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from embedwright.cli import options
from embedwright.cli.display import counter, note, say, training
from embedwright.cli.evaluation import score, show_run
from embedwright.cli.options import arg, opt
from embedwright.cli.shell import file_of, queries_of
from embedwright.errors import InputError
from embedwright.files import check_folder, write_text

if TYPE_CHECKING:
    from embedwright.training.recipe import Recipe


def train(
    recipe: Annotated[Path | None, arg("Recipe: a YAML file, or a packaged one by its name, as laptop.")] = None,
    data: Annotated[Path | None, opt("File of your own pairs, instead of a recipe.")] = None,
    base: Annotated[
        str | None,
        opt("With --data: decoder to start from, a name, folder, hub id or .gguf. Default: smollm2-135m."),
    ] = None,
    out: Annotated[
        Path | None, opt("Folder of the run. Default: the recipe's run.out.", callback=options.folder_to_write)
    ] = None,
    layers: Annotated[int | None, opt("With --data: number of the base's layers to keep. Default: all.")] = None,
    instruction: Annotated[
        str | None, opt("With --data: instruction of queries whose task has none. Default: a general one.")
    ] = None,
    teacher: Annotated[str | None, opt("With --data: model that mines hard negatives. Default: minilm.")] = None,
    plan_only: Annotated[
        bool, opt("Print rows, steps, tokens and memory, and train nothing; --data prepares its pairs first.", "--plan")
    ] = False,
    processes: Annotated[int, opt("With --plan: number of GPUs.", min=1)] = 1,
    dry: Annotated[
        bool, opt("Measure memory and time in two steps of each stage; write nothing.", "--dry-run")
    ] = False,
) -> None:
    """Train all stages of a recipe, or the two default stages on your own pairs. Run it again to go on after a stop."""
    from embedwright.demo import quickstart
    from embedwright.processes import joined
    from embedwright.training.recipe import Recipe
    from embedwright.training.run.save import check_no_older
    from embedwright.training.train import train as run

    if (recipe is None) == (data is None):
        raise InputError("give a recipe file, or --data with your own pairs")
    if dry and (plan_only or data is not None):
        raise InputError("--dry-run is for a recipe file, without --plan; --data would write its pairs first")
    if processes != 1 and not plan_only:
        raise InputError("--processes is for --plan: torchrun starts the processes of a run or of a dry run")
    own = {"--base": base, "--layers": layers, "--instruction": instruction, "--teacher": teacher}
    if data is None and (given := [option for option, value in own.items() if value is not None]):
        raise InputError(f"{given[0]} is for --data: a recipe file says it by itself")
    if data is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--data mines first, which is for one process: start many of them with a recipe file")
        if out is None:
            raise InputError("--data needs --out, the folder that the run is kept in")
        check_no_older(out)
        plan = quickstart.recipe_for(
            data,
            base or "smollm2-135m",
            out,
            layers=layers,
            instruction=instruction or quickstart.INSTRUCTION,
            teacher=teacher or "minilm",
        )
    else:
        assert recipe is not None
        plan = Recipe.load(recipe)
        plan = plan if out is None else plan.with_out(out)
    if plan_only:
        from embedwright.training.plan import report

        say(report(plan, processes=processes))
        return
    if dry:
        from embedwright.training.dry_run import dry_run

        with joined(plan.run.timeout_minutes) as group:
            lines = dry_run(plan)
            if group.is_rank_0:
                say("\n".join(lines))
        return
    run(plan, on_step=training(plan), on_evaluation=lambda line: note(f"  {line}"))
    with joined() as group:
        if group.is_rank_0:
            _show(plan)


def _show(plan: Recipe) -> None:
    """Shows the scores of a finished run, and says how to search with its model."""
    from embedwright.training.run.save import kept_forms
    from embedwright.training.stages import ContrastiveStage

    show_run(plan.out)
    tasks = (stage.data[0].task for stage in plan.stages if isinstance(stage, ContrastiveStage))
    instruction = getattr(next(tasks, None), "instruction", "")
    asked = f' --task "{instruction}"' if instruction and not plan.model.default_task else ""
    folders = list(kept_forms(plan).values())
    for folder in folders:
        say(f'model: {folder}   (in Python: Embedder.load("{folder}"))')
    for folder in folders[:1]:
        say(
            "search with it, in a file of texts (.txt, or JSONL with `text`):\n"
            f"  embedwright index {folder} texts.jsonl {folder.with_name('index')}\n"
            f'  embedwright search {folder} {folder.with_name("index")} "your query"{asked}'
        )


def merge(
    models: Annotated[
        list[str], arg("One adapter folder, ours or peft's; or several models of one base.", metavar="MODEL...")
    ],
    out: Annotated[Path, arg("New folder for the merged model.", callback=options.new_folder)],
    how: Annotated[Literal["average", "slerp"], opt("How several models are joined; slerp joins two.")] = "average",
    weights: Annotated[str | None, opt("Weights of several models, as 0.7,0.3. Default: equal ones.")] = None,
    suite: Annotated[str | None, opt("Suite on which all models and the result are scored.")] = None,
) -> None:
    """Make one model of an adapter and its base, checked against the adapter; or of several models, as a soup."""
    from embedwright.evaluation.suite import load_suite
    from embedwright.model.formats.soup import soup

    if suite is not None:
        load_suite(suite)  # raises for a mistake before the work is done
    if len(models) > 1:
        soup(models, out, how=how, weights=None if weights is None else _numbers(weights))
        say(f"{out}: {how} of {len(models)} models")
    elif weights is not None or how != "average":
        option = f"--how {how} is" if weights is None else "--weights are"
        raise InputError(f"{option} for several models: one adapter is added to its base as it is")
    else:
        _fold_in(models[0], out)
    if suite is not None:
        score([*models, str(out)], suite)


def _numbers(written: str) -> list[float]:
    try:
        return [float(number) for number in written.split(",")]
    except ValueError:
        raise InputError(f"--weights {written}: numbers with commas between them, as 0.7,0.3") from None


def _fold_in(adapter: str, out: Path) -> None:
    from embedwright.model.embedder import Embedder
    from embedwright.model.interop.card import card_of, facts, inherited, model_card
    from embedwright.model.verify.selftest import TEXTS

    texts = [text for text, _ in TEXTS]
    model = Embedder.load(adapter)
    before = model.encode(texts)
    model.merge()
    card = inherited(model_card(out.name, **facts(model.network, model.text_tokenizer)), [card_of(adapter)])
    model.save(out)
    write_text(out / "README.md", card)
    del model  # memory may have room for one model only
    difference = abs(Embedder.load(out).encode(texts) - before).max()
    say(f"{out}: largest difference from the adapter's vectors {difference:.1e}")


@options.opens_models
def encode(
    how: options.How,
    model: options.Model,
    source: options.StoreTexts,
    out: Annotated[
        str,
        arg("Folder for the vectors (Arrow shards), also of a store.", callback=options.or_remote(check_folder)),
    ],
    task: options.TaskOption = None,
    precision: options.StoredPrecision = "float32",
    shard: options.ShardOption = None,
) -> None:
    """Encode a file of texts into Arrow shards. Run it again to go on after a stop.

    Under torchrun, all processes encode, each a part of the texts.
    """
    from embedwright.remote import fetched, local_folder
    from embedwright.vectors.corpus import encode_corpus

    settings: dict[str, Any] = {"task": task, "precision": precision, "shard": shard}

    def work(encoder: Any) -> None:
        with file_of(fetched(source)) as texts, local_folder(out) as (folder, remote):
            encode_corpus(encoder, texts, folder, progress=counter("texts"), remote=remote, **settings)
        say(out)

    with_all(model, how, work, task)


def with_all(model: str, how: options.How, work: Callable[[Any], None], task: str | None = None) -> None:
    """Opens a model in every process that torchrun has started, and runs `work` in the first, where all encode.

    Raises InputError for a `task` that the model would not read.
    """
    from embedwright.encoders.open import open_encoder
    from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
    from embedwright.encoders.sharded import shared
    from embedwright.processes import joined

    def opened() -> list[Any]:
        encoder = open_encoder(model, **how)
        if isinstance(encoder, SentenceTransformerEncoder):
            encoder.check_task(task)
        return [encoder]

    with joined() as processes:
        shared(opened, processes, lambda own: work(own[0]))


@options.opens_models
def search(
    how: options.How,
    model: Annotated[str, arg("Model that made the index.")],
    folder: Annotated[Path, arg("Folder that `index` wrote.")],
    queries: Annotated[
        list[str] | None, arg("Queries, each in quotes. Default, and for -: standard input, a query a line.")
    ] = None,
    k: Annotated[int, opt("Number of hits of a query.")] = 5,
    task: options.TaskOption = None,
    where: Annotated[
        list[str] | None,
        opt("Condition on the metadata, as lang=en, year>=2020 or `lang in en,de`. Repeatable: all must hold."),
    ] = None,
    each_chunk: Annotated[bool, opt("Show each chunk as a hit, not the best one of a document.", "--chunks")] = False,
    by: Annotated[
        Literal["exact", "ann", "hybrid"],
        opt("How: exactly; or in the table that `index --lancedb` wrote, approximately or by vectors and full text."),
    ] = "exact",
    as_json: Annotated[bool, opt("Print each query with its hits as a line of JSON.", "--json")] = False,
) -> None:
    """Search an index."""
    from embedwright.encoders.open import open_encoder
    from embedwright.encoders.protocol import task_for
    from embedwright.index.index import Index

    asked, encoder, opened = queries_of(queries), open_encoder(model, **how), Index.open(folder)
    if by == "exact":
        found = opened.search(encoder, asked, k, task, where, each_chunk=each_chunk)
    else:
        from embedwright.index.lancedb import search_lancedb

        if each_chunk:
            raise InputError(f"--chunks is for exact search: leave out --by {by}")
        found = search_lancedb(opened, encoder, asked, k, task, where, by=by)
    said = task_for(encoder, "") or None if task is None else task
    for query, hits in zip(asked, found, strict=True):
        if as_json:
            line = {"query": query, "task": said, "hits": [hit._asdict() for hit in hits]}
            say(json.dumps(line, ensure_ascii=False))
            continue
        say(query)
        for hit in hits:
            shown = f"{hit.title} {hit.text[hit.start : hit.end]}"
            say(f"  {hit.score:.4f}  {hit.id}  {' '.join(shown.split())[:100]}")


_WEIGHTS = {"nvembed": (), "onnx": ("float32", "int8"), "gguf": ("f16", "f32", "q8_0")}  # the first is the default


def export(
    model: Annotated[str, arg("Folder of a model.")],
    out: Annotated[Path, arg("New folder, or new .gguf file.", callback=options.new_folder)],
    layout: Annotated[
        Literal["nvembed", "onnx", "gguf"],
        opt(
            "What to write: a released NV-Embed's layout, a folder for ONNX Runtime, a file for llama.cpp.", "--format"
        ),
    ] = "nvembed",
    weights: Annotated[
        Literal["float32", "int8", "f16", "f32", "q8_0"] | None,
        opt("Type of the weights. With onnx: float32 (default) or int8; with gguf: f16 (default), f32 or q8_0."),
    ] = None,
) -> None:
    """Write a model for other programs: as a released NV-Embed folder, for ONNX Runtime, or as a GGUF file."""
    from embedwright.model.embedder import Embedder
    from embedwright.model.formats.detect import check_float

    if weights is not None and weights not in _WEIGHTS[layout]:
        fits = next(name for name, types in _WEIGHTS.items() if weights in types)
        raise InputError(f"--weights {weights} is for --format {fits}, not for {layout}")
    kind: Any = weights or next(iter(_WEIGHTS[layout]), None)
    check_float(model, "export")
    if layout == "gguf":
        from embedwright.export.gguf import check_gguf, export_gguf

        check_gguf(out)
        served = export_gguf(Embedder.load(model), out, kind)
        say(f"{out}: {kind}, not run: by its source, llama.cpp gives the vectors of {served}")
    elif layout == "onnx":
        from embedwright.export.onnx import export_onnx
        from embedwright.model.adapters.lora import has_lora

        opened = Embedder.load(model, device="cpu", dtype="float32")
        said = export_onnx(opened.merge() if has_lora(opened.network.backbone) else opened, out, kind)
        say(f"{out}: {layout} layout, {said}")
    else:
        from embedwright.model.formats.nvembed_export import export_nvembed

        export_nvembed(Embedder.load(model), out)
        say(f"{out}: {layout} layout")


def doctor(model: Annotated[str | None, arg("Folder of a model to examine.")] = None) -> None:
    """Show versions, device and threads; with a model, prove that it is what it says it is."""
    from embedwright.model.verify.doctor import environment, examine_name

    for name, value in environment().items():
        say(f"{name:<22} {value}")
    if model is not None:
        findings = examine_name(model)
        for finding in findings:
            say(f"{'ok ' if finding.ok else 'BAD'} {finding.name:<40} {finding.detail}")
        if not all(finding.ok for finding in findings):
            sys.stderr.write(f"embedwright: {model}: not healthy\n")
            raise typer.Exit(1)


def demo(recipe: Annotated[Path, opt("Recipe to train.")] = Path("laptop")) -> None:
    """Build data, mine, train in two stages, evaluate, save and search: everything, in minutes on two cores."""
    from embedwright.demo import demo as whole
    from embedwright.training.recipe import Recipe

    if worse := whole.run(Recipe.load(recipe)):
        typer.echo(f"embedwright: not better than before training: {', '.join(worse)}", err=True)
        raise typer.Exit(1)
