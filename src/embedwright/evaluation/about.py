"""Says how a number was made: the model, the command, the machine and the versions."""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embedwright.endpoint import shown_model
from embedwright.files import sha256_of
from embedwright.threads import cores

VERSIONS = ("embedwright", "torch", "transformers", "sentence-transformers", "mteb", "scikit-learn", "bm25s", "numpy")


def about(model: str, fingerprint: dict[str, str] | None = None) -> dict[str, Any]:
    """Returns the facts to keep beside the scores of `model`, as JSON values. `fingerprint` identifies its vectors."""
    import torch

    return {
        "model": shown_model(model),
        "fingerprint": fingerprint,
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code(),
        "machine": {
            "processor": processor(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version()}
        | {name: found for name in VERSIONS if (found := installed(name)) is not None},
    }


def _command() -> str:
    """Returns the command of this process, without the passwords in its addresses.

    `python -m embedwright` is written as that, not as its `__main__.py`.
    """
    program = Path(sys.argv[0])
    module = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*module, *(re.sub(r"://[^/?#\s]*@", "://", word) for word in sys.argv[1:])])


def processor() -> str:
    """Returns the processor's name with family and model: names alone are coarse on rented machines."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor() or platform.machine()
    lines = [line.split(":", 1) for line in file.read_text().splitlines() if ":" in line]
    facts = dict(reversed([(key.strip(), value.strip()) for key, value in lines]))
    known = [facts[key] for key in ("model name",) if key in facts]
    return ", ".join([*known, *(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)])


@cache
def code() -> str:
    """Returns the fingerprint of the package's own source files: two results of one state of the code share it."""
    root = Path(__file__).parents[1]
    files = sorted(file for file in root.rglob("*") if file.suffix in (".py", ".c", ".h"))
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:12]


@cache
def installed(package: str) -> str | None:
    """Returns the version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
