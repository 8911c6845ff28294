"""What importing the package loads, and what a user gets by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import embedwright
from embedwright.model.embedder import Embedder

HEAVY = (
    "torch",
    "transformers",
    "faiss",
    "pyarrow",
    "sklearn",
    "scipy",
    "sentence_transformers",
    "peft",
    "datasets",
    "fsspec",
)


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


IMPORT = f"""
import json, sys
import embedwright
assert {{"Embedder", "train", "__version__"}} <= set(dir(embedwright)) and not hasattr(embedwright, "Embeder")
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
HELP = f"""
import io, json, sys
from contextlib import redirect_stdout
from embedwright.cli import main as cli
sys.argv = ["embedwright", *sys.argv[1:]]
try:
    with redirect_stdout(io.StringIO()) as shown:
        cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert "Usage" in shown.getvalue()
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


def test_the_import_loads_nothing_heavy() -> None:
    assert json.loads(python(IMPORT)) == []


@pytest.mark.parametrize("arguments", [["--help"], ["mine", "--help"], ["data", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert json.loads(python(HELP, *arguments)) == []


OURS_FIRST = """
import importlib.util, sys
import embedwright
assert importlib.util.find_spec("transformers") and "transformers" not in sys.modules  # looked for, as libraries do
from transformers import AutoModel, AutoTokenizer
assert not any(type(finder).__module__.startswith("embedwright") for finder in sys.meta_path)
folder = sys.argv[1]
print(type(AutoModel.from_pretrained(folder)).__name__, type(AutoTokenizer.from_pretrained(folder)).__name__)
"""


def test_our_folders_open_in_transformers_that_is_imported_later(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    tiny_embedder("latent").save(tmp_path / "model")
    assert python(OURS_FIRST, str(tmp_path / "model")) == "EmbedwrightModel EmbedwrightTokenizer\n"


def test_the_wheel_works_in_any_folder(tmp_path: Path) -> None:
    """Built and unpacked into a folder of its own: the recipes come with it, and nothing is read from the sources."""
    pytest.importorskip("hatchling")
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=root,
        check=True,
        capture_output=True,
    )
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    names = sorted(file.name for file in (root / "recipes").glob("*.yaml"))
    assert sorted(file.name for file in (site / "embedwright" / "recipes").glob("*.yaml")) == names

    def installed(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "embedwright", *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "Usage" in installed("--help")
    assert installed("data", "list").count("\n") > 40
    code = "from embedwright import Recipe; import embedwright; print(Recipe.load('laptop').name, embedwright.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["laptop", str(site / "embedwright" / "__init__.py")]


def test_every_public_name_is_there() -> None:
    for name in embedwright.__all__:
        assert getattr(embedwright, name).__name__ == name
    assert set(embedwright.__all__) <= set(dir(embedwright))
    with pytest.raises(AttributeError, match="Embeder"):
        _ = embedwright.Embeder


FORKS = """
import os, sys, traceback
import torch, transformers, peft
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
{}
for module in sys.argv[1:]:
    child = os.fork()  # the libraries stay loaded, ours are not yet
    if not child:
        try:
            for loaded in [name for name in sys.modules if name.split(".")[0] == "embedwright"]:
                del sys.modules[loaded]
            __import__(module)
            {}
        except BaseException as error:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
OPENS = "print(type(AutoModel.from_pretrained(FOLDER)).__name__, type(AutoTokenizer.from_pretrained(FOLDER)).__name__)"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@needs_fork
def test_our_folders_open_in_transformers(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    tiny_embedder("latent").save(tmp_path / "model")
    opened = python(FORKS.format(f"FOLDER = {str(tmp_path / 'model')!r}", OPENS), "embedwright")
    assert opened.splitlines() == ["EmbedwrightModel EmbedwrightTokenizer"]


@needs_fork
def test_any_module_can_be_the_first_one() -> None:
    """`embedwright.model` imports modules of `cpu`, which import `embedwright.model`: any of them may come first."""
    root = Path(embedwright.__file__).parent
    parts = [path.relative_to(root).with_suffix("").parts for path in sorted(root.rglob("*.py"))]
    names = [".".join(("embedwright", *part)) for part in parts if part[0] == "cpu"]
    names = [name.removesuffix(".__init__") for name in names]
    assert python(FORKS.format("import embedwright.model", "pass"), *names) == ""
