"""The command `compress`: steps that make a model smaller, in a fixed order, and the report of all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from embedwright.cli import options
from embedwright.cli.display import counter, note, say, training
from embedwright.cli.options import arg, opt
from embedwright.errors import InputError
from embedwright.files import write_json, write_text

if TYPE_CHECKING:
    from embedwright.compress.chain import Step
    from embedwright.compress.states import Texts
    from embedwright.evaluation.results import Row
    from embedwright.evaluation.suite import Suite

REPORT = "compression.json"  # in the folder that is made; the picture lies beside it
_TEXTS = 256  # for calibration
_LIBRARIES = ("numpy", "networkx")  # torch needs both, so they are always there


def compress(
    model: Annotated[str, arg("Model: a folder or a hub id. The adapters of an adapter folder are merged first.")],
    out: Annotated[Path, arg("New folder for the compressed model.", callback=options.folder_to_write)],
    layers: Annotated[int | None, opt("Prune: number of layers to keep.", min=1)] = None,
    by: Annotated[
        Literal["angular", "influence"] | None,
        opt(
            "With --layers, what is removed: the block of layers whose output is nearest to its input, or the single "
            "layers that change states least. Default: angular."
        ),
    ] = None,
    width: Annotated[
        float | None, opt("Prune: share of each gated block's channels to keep, as 0.75, in groups of 32.")
    ] = None,
    width_by: Annotated[
        Literal["wanda", "magnitude"] | None,
        opt("With --width, how channels are scored: by weight times activation, or by weight alone. Default: wanda."),
    ] = None,
    heal: Annotated[
        Path | None,
        opt("Train the pruned model by this recipe. Stages that follow vectors follow MODEL, if they name no teacher."),
    ] = None,
    student: Annotated[
        str | None,
        opt(
            "Student of MODEL: a number of its first layers, the name of a decoder, or static. "
            "Default, with --distil: what the steps before left."
        ),
    ] = None,
    distil: Annotated[
        Path | None, opt("Train the student by this recipe. At least one stage follows MODEL (docs/students.md).")
    ] = None,
    aligned: Annotated[
        bool, opt("With --distil: measure and note whether its queries can search the indexes of MODEL.", "--aligned")
    ] = False,
    dim: Annotated[int | None, opt("Numbers of a static student's vectors. Default: 256.", min=1)] = None,
    weights: Annotated[
        Literal["int8", "int4"] | None,
        opt("Hold the decoder's linear layers in 8 or 4 bits, for inference alone: a half or a quarter of bfloat16."),
    ] = None,
    texts: Annotated[
        Path | None,
        opt(
            f"File of texts to measure on, of which the first {_TEXTS} count. "
            f"Default: docstrings of {' and '.join(_LIBRARIES)}."
        ),
    ] = None,
    report: Annotated[
        str | None,
        opt("Measure and score MODEL and each step on this suite, as in `eval`: size, speed, memory and quality."),
    ] = None,
) -> None:
    """Make a model smaller, step by step, in the order of the options. Run it again to go on after a stop.

    Each step notes in the folder and in its model card what it did. The steps lie in OUT.steps until all are done.
    """
    from embedwright.compress.chain import chained, finished, write_card
    from embedwright.compress.depth import layers_step
    from embedwright.compress.heal import heal_step
    from embedwright.compress.weights import weights_step
    from embedwright.compress.width import width_step
    from embedwright.evaluation.results import render
    from embedwright.evaluation.suite import load_suite
    from embedwright.model.formats.detect import check_float, history_of
    from embedwright.model.interop.card import history_lines
    from embedwright.model.quantized import INT4, INT8

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compress is for one process: prune first, and train OUT with model: {from: OUT} by torchrun")
    calibrated = layers is not None or (width is not None and width_by != "magnitude") or report is not None
    _check_used("--by", by, layers is not None, "is of --layers")
    _check_used("--width-by", width_by, width is not None, "is of --width")
    _check_used("--texts", texts, calibrated, "is for --layers, --width by wanda and --report")
    first, decoder = _student(student)
    if decoder is not None and (layers, width, heal) != (None, None, None):
        raise InputError(
            f"--student {decoder} begins with that decoder, and nothing of --layers, --width and --heal would be left: "
            "leave these out, or name a number of layers"
        )
    measured_on, suite = _texts(texts), None if report is None else load_suite(report)
    steps: list[Step] = []
    rows: list[Row] = []
    if layers is not None:
        steps.append(layers_step(layers, by or "angular", measured_on))
    if width is not None:
        steps.append(width_step(width, width_by or "wanda", measured_on))
    if heal is not None:
        steps.append(heal_step(heal, model, training, lambda line: note(f"  {line}")))
    steps += _student_steps(model, student, distil, aligned, dim)
    if weights is not None:
        if student == "static":
            raise InputError("--weights are of linear layers, and a static student has none: leave it out")
        steps.append(weights_step(INT8 if weights == "int8" else INT4))
    if not steps:
        names = "--layers, --width, --heal, --student, --distil, --weights"
        raise InputError(f"no step is asked for: name at least one of {names}")
    if decoder is None:  # else MODEL is only followed
        check_float(model, "compress")
        _check_sizes(model, layers, width, first)
    if not finished(model, out, steps):
        with chained(model, out, steps, note) as models:
            last = Path(models[steps[-1].name])
            rows = [] if suite is None else _report(out.name, models, suite, measured_on, last)
            write_card(last, out.name, model, rows, decoder)
    done = history_lines(history_of(out) or ())
    say("\n".join([f"{out}:", *(f"  {line}" for line in done)]))
    if rows:
        say(f"\n{render(rows)}\n\nalso in {out}: README.md, {REPORT}, compression.svg")


def _check_used(name: str, given: object, used: bool, wanted: str) -> None:
    if given is not None and not used:
        raise InputError(f"{name} {wanted}, and none is asked for: leave it out")


def _student(named: str | None) -> tuple[int | None, str | None]:
    """Returns the first layers that --student asks for, or the decoder; neither for a static one or none."""
    if named is None or named == "static":
        return None, None
    return (int(named), None) if named.isdecimal() else (None, named)


def _check_sizes(model: str, layers: int | None, width: float | None, student: int | None) -> None:
    """Raises InputError for more layers or channels than there are, before the first step has taken its time."""
    from embedwright.compress.depth import check_kept
    from embedwright.compress.width import channels
    from embedwright.model.formats.open import outline

    config = outline(model).decoder
    count = config.num_hidden_layers
    for option, keep in (("--layers", layers), ("--student", student)):
        if keep is not None:
            check_kept(option, keep, count)
            count = keep
    if width is not None and getattr(config, "intermediate_size", None):
        channels(config.intermediate_size, width)


def _student_steps(model: str, student: str | None, recipe: Path | None, aligned: bool, dim: int | None) -> list[Step]:
    """Returns the steps that make a student of a model and train it."""
    from embedwright.compress.distil import distil_step, first_layers_step
    from embedwright.compress.static import static_step

    if dim is not None and student != "static":
        raise InputError("--dim is of a static student: add --student static")
    if student == "static":
        if recipe is not None or aligned:
            raise InputError("--student static needs no training: leave --distil and --aligned out")
        return [static_step(model, dim or 256, counter("tokens"))]
    if recipe is None:
        if student is not None or aligned:
            raise InputError("a student is trained to follow MODEL: give --distil RECIPE")
        return []
    layers, decoder = _student(student)
    train = distil_step(recipe, model, training, lambda line: note(f"  {line}"), decoder=decoder, aligned=aligned)
    return [train] if layers is None else [first_layers_step(layers), train]


def _report(name: str, models: dict[str, str], suite: Suite, texts: Texts, folder: Path) -> list[Row]:
    """Evaluates all steps, and writes the record and its picture into the folder of the last one."""
    from embedwright.compress.report import evaluated, picture, table

    record = evaluated(name, models, suite, texts, note)
    write_json(folder / REPORT, record)
    write_text((folder / REPORT).with_suffix(".svg"), picture([record]))
    return table(record)


def _texts(file: Path | None) -> Texts:
    """Returns the calibration texts: of a file, or packaged ones."""
    from embedwright.compress.states import Texts
    from embedwright.files import sha256_of

    if file is None:
        return Texts(f"{_TEXTS} docstrings of {' and '.join(_LIBRARIES)}", cache(_docstrings))
    if not file.is_file():
        raise InputError(f"--texts {file}: there is no such file")
    read = cache(partial(_first_texts, file))
    return Texts(f"{file.name} (sha256 {sha256_of(file)[:12]})", read)


def _docstrings() -> list[str]:
    """Returns docstrings of the libraries at an even spacing: summary and body, cut after 60 words."""
    from embedwright.demo.docstrings import harvest

    rows = list(harvest(_LIBRARIES))
    return [
        " ".join(f"{row.query} {row.positives[0].text}".split()[:60])
        for row in rows[:: max(1, len(rows) // _TEXTS)][:_TEXTS]
    ]


def _first_texts(file: Path) -> list[str]:
    from embedwright.vectors.corpus import read_source

    rows: Iterator[str] = (row.text for row in read_source(file))
    return list(islice(rows, _TEXTS))
