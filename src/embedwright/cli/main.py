"""The `embedwright` command: the list of its verbs, which are functions in this room, and its exit codes."""

from __future__ import annotations

import logging
import os
import select
import sys
import traceback
from collections.abc import Callable

import typer

from embedwright.cli import compress, evaluation, index, mining, model, serve, studies
from embedwright.cli.cache import cache_app
from embedwright.cli.data import data_app
from embedwright.errors import InputError

app = typer.Typer(
    help="Turn decoder-only LLMs into text-embedding models, and use them.\n\n"
    "Start with `embedwright demo`: the whole system on real weights in minutes.\n\n"
    "Then `embedwright train --data my_pairs.jsonl --base smollm2-135m --out runs/mine`, where each line of the file "
    'is {"query": "...", "positive": "..."}.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
VERBS: dict[str, Callable[..., None]] = {
    "demo": model.demo,
    "train": model.train,
    "mine": mining.mine,
    "synth": mining.synth,
    "eval": evaluation.evaluate,
    "bench": evaluation.bench,
    "compare": evaluation.compare,
    "ablate": studies.ablate,
    "report": studies.report,
    "encode": model.encode,
    "index": index.index,
    "search": model.search,
    "serve": serve.serve,
    "merge": model.merge,
    "compress": compress.compress,
    "export": model.export,
    "doctor": model.doctor,
}
for name, verb in VERBS.items():
    app.command(name)(verb)
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")
data_app.command("relabel")(mining.relabel)

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 75
_STDOUT = 1  # its number in every process


def main() -> None:
    """Runs the command. Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and resumable."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("embedwright.model.formats.gguf").setLevel(logging.INFO)  # it converts for half a minute, once
    logging.getLogger("embedwright.training.run.distill").setLevel(logging.INFO)  # a teacher may encode for hours
    _quiet_libraries()
    try:
        if code := app(standalone_mode=False):  # typer returns the code of an exit, or 130 for an interrupt
            raise KeyboardInterrupt if code == 130 else typer.Exit(code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # older typers raise Abort for an interrupt
        _stop("interrupted: run the same command again to go on", INTERRUPTED)
    except BrokenPipeError:
        if _is_read(_STDOUT):  # another pipe broke
            traceback.print_exc()
        else:  # `| head` has read enough; what Python still holds goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        sys.exit(FAILED)
    except InputError as error:
        if os.environ.get("EMBEDWRIGHT_DEBUG"):
            raise
        _stop(error, BAD_INPUT)
    except Exception as error:
        if refused := getattr(error, "format_message", None):  # the parser has refused an option or argument
            _stop(refused(), BAD_INPUT)
        traceback.print_exc()
        sys.exit(FAILED)


def _stop(message: object, code: int) -> None:
    if str(message):  # a bare `embedwright` has shown its help, and its message is empty
        sys.stderr.write(f"embedwright: {message}\n")
    sys.exit(code)


def _is_read(handle: int) -> bool:
    """Returns whether what is written to this open file reaches somebody: it is not a pipe whose reader has gone."""
    waiting = select.poll()
    waiting.register(handle, 0)  # asks for errors alone
    return not waiting.poll(0)


def _quiet_libraries() -> None:
    """Sets the variables by which libraries print less. They read them on import, which `--help` does without."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar that transformers draws while it reads a GGUF file
