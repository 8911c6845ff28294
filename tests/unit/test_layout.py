"""The rules of design section 3 and of taste that a machine can check: imports point one way, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "embedwright"
UNIT = Path(__file__).parent
MODULES = {".".join(p.relative_to(SRC).with_suffix("").parts): p for p in sorted(SRC.rglob("*.py"))}

MAX_LINES = 450
BASE = {"fingerprint", "text", "packing", "threads", "cpu", "sentence_transformer"}
BOTTOM = {"errors", "files", "config", "cache", "endpoint"}  # every part may import these
ENTRY_POINTS = {"cli", "cli_data", "demo", "quickstart"}
PRINTING = {"cli", "demo"}
TOP = "__init__"  # the names that `from embedwright import ...` gives

# What each part (a module at the top, or a package with all that is in it) may import of ours, besides itself. A part
# that is not listed imports nothing of ours. `None`: everything but the entry points.
MAY_IMPORT: dict[str, set[str] | None] = {
    "files": {"errors"},
    "config": {"errors"},
    "endpoint": {"errors"},
    "errors": set(),
    "registration": {"model"},
    "cache": {"errors"},
    "text": {"threads"},
    "packing": {"text"},
    "fingerprint": set(),
    "sentence_transformer": {"fingerprint", "text"},
    "cpu": {"text", "packing", "model"},
    "model": BASE,
    "llm": set(),
    "data": {"fingerprint", "llm", "text", "threads", "cpu", "sentence_transformer"},
    "evaluation": BASE | {"model", "data"},
    "search": BASE | {"model", "data"},
    "serve": BASE | {"model", "data"},
    "compress": BASE | {"model", "data"},
    "training": BASE | {"model", "data", "evaluation"},
    "display": {"training"},  # what entry points show; no other part may import it
    TOP: None,
    "demo": None,
    "quickstart": None,
    "cli": None,
    "cli_data": None,
}
ENTRY_POINTS_OF = {"__main__": {"cli"}, "cli": {"cli_data", "demo", "quickstart"}}  # who may import an entry point

# Modules without a test file of their own, and the file that tests them.
TESTED_ELSEWHERE = {
    "data.teacher": "data/test_mine.py",
    "cpu.attention": "cpu/test_blocks.py",
    "registration": "test_imports.py",
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# ---- the checker


def part_of(module: str) -> str:
    return module.split(".")[0]


def imports(module: str, tree: ast.AST, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, part of ours that is imported) for every import in `tree`, those inside of functions too."""
    package = ["embedwright", *([] if module == TOP else module.removesuffix(".__init__").split("."))]
    package = package if is_package or module == TOP else package[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            front = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*front, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "embedwright" else [origin]
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            ours, _, rest = name.partition(".")
            if ours == "embedwright":
                part = part_of(rest)
                yield node.lineno, part if part in PARTS else TOP


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    """What breaks a rule in the source of `module` (dotted, without `embedwright.`), as `line: reason`."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["1: no docstring"]
    if (lines := source.count("\n")) > MAX_LINES:
        found.append(f"{lines}: longer than {MAX_LINES} lines")
    part = part_of(module)
    for line, other in imports(module, tree, is_package):
        allowed = MAY_IMPORT.get(part, set())
        if other == part or (other in BOTTOM and part not in BOTTOM):
            continue
        if other in ENTRY_POINTS and other not in ENTRY_POINTS_OF.get(part, set()):
            found.append(f"{line}: imports the entry point {other}")
        elif other not in ENTRY_POINTS and allowed is not None and other not in allowed:
            found.append(f"{line}: {part} imports {other}")
    for node in ast.walk(tree):
        found += [f"{node.lineno}: {reason}" for reason in unsafe(part, node)]
    return found


def unsafe(part: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        origin = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        yield from (f"imports {name}" for name in origin if name.split(".")[0] in UNSAFE_MODULES)
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            yield "imports torch.load"
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "joblib.load", "pickle.load"):
        yield f"uses {ast.unparse(node)}"
    elif isinstance(node, ast.Call) and called(node) == "print" and part not in PRINTING:
        yield "prints"
    elif (
        isinstance(node, ast.Call)
        and opens_strangers_files(node)
        and not any(keyword.arg == "trust_remote_code" and is_false(keyword.value) for keyword in node.keywords)
    ):
        yield f"{called(node)} without trust_remote_code=False"
    elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle") and is_true(node.value):
        yield f"sets {node.arg}"
    elif isinstance(node, ast.Dict):
        keys = [k.value for k, v in zip(node.keys, node.values, strict=True) if is_true(v) and is_constant(k)]
        yield from (f"sets {key}" for key in keys if key in ("trust_remote_code", "allow_pickle"))


def opens_strangers_files(node: ast.Call) -> bool:
    """Calls of other libraries that ask on standard input whether to run a folder's code, unless they are told."""
    owner, _, name = called(node).rpartition(".")
    return owner != "super()" and name in {
        "from_pretrained",
        "from_config",
        "SentenceTransformer",
        "CrossEncoder",
        "load_dataset",
    }


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_constant(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant)


def is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


PARTS = {part_of(module) for module in MODULES} | set(MAY_IMPORT) | BASE | BOTTOM


# ---- our modules


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_the_rules(module: str) -> None:
    path = MODULES[module]
    assert faults(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py") == []


def test_the_modules_are_found() -> None:
    assert {"text", "packing", "model.embedder", "data.mine", "training.loop", "evaluation.suite"} <= MODULES.keys()


def test_unit_tests_mirror_the_modules() -> None:
    missing = []
    for module, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines <= 15 or path.name == "__init__.py" or module in ENTRY_POINTS | TESTED_ELSEWHERE.keys():
            continue
        test = UNIT / path.relative_to(SRC).with_name(f"test_{path.name}")
        if not test.is_file():
            missing.append(f"{module}: no {test.relative_to(UNIT.parent)}")
    assert missing == []


def test_the_allow_list_is_short_and_true() -> None:
    assert len(TESTED_ELSEWHERE) <= 5
    for module, test in TESTED_ELSEWHERE.items():
        assert module in MODULES, f"{module} is gone"
        own = UNIT / MODULES[module].relative_to(SRC).with_name(f"test_{MODULES[module].name}")
        assert not own.is_file(), f"{module} has a test file now: take it off the list"
        assert (UNIT / test).is_file()


# ---- the checker itself


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("text", "from embedwright.packing import pack", "1: text imports packing"),
        ("packing", "from embedwright.model.embedder import Embedder", "1: packing imports model"),
        ("model.pooling", "import embedwright.data.mine", "1: model imports data"),
        ("model.pooling", "from ..training import loss", "1: model imports training"),
        ("model.pooling", "from .. import training", "1: model imports training"),
        ("data.mine", "def f():\n    from embedwright.model.embedder import Embedder", "2: data imports model"),
        ("data.mine", "from embedwright import Embedder", f"1: data imports {TOP}"),
        ("data.mine", "import importlib\nimportlib.import_module('embedwright.model')", "2: data imports model"),
        ("evaluation.suite", "from embedwright.training.loop import train", "1: evaluation imports training"),
        ("search.index", "if True:\n    from embedwright.evaluation import metrics", "2: search imports evaluation"),
        ("training.loop", "from embedwright.search import index", "1: training imports search"),
        ("novelty", "from embedwright import text", "1: novelty imports text"),
        (TOP, "from embedwright.cli import main", "1: imports the entry point cli"),
        ("demo", "from embedwright import cli", "1: imports the entry point cli"),
        ("quickstart", "from embedwright.demo import run", "1: imports the entry point demo"),
        ("training.loop", "from embedwright.quickstart import run", "1: imports the entry point quickstart"),
        ("training.loop", "print('step')", "1: prints"),
        ("quickstart", "print('step')", "1: prints"),
        ("cache", "import pickle", "1: imports pickle"),
        ("cache", "from joblib import load", "1: imports joblib"),
        ("model.storage", "import torch\ntorch.load('x')", "2: uses torch.load"),
        ("model.storage", "from torch import load", "1: imports torch.load"),
        ("model.storage", "f(trust_remote_code=True)", "1: sets trust_remote_code"),
        ("model.storage", "f(**{'trust_remote_code': True})", "1: sets trust_remote_code"),
        ("model.storage", "A.from_pretrained(x)", "1: A.from_pretrained without trust_remote_code=False"),
        ("model.storage", "f(type(x).from_pretrained(x, trust_remote_code=y))", "1: type(x).from_pretrained without"),
        ("model.storage", "A.from_config(x, **{})", "1: A.from_config without trust_remote_code=False"),
        ("data.build", "import datasets\ndatasets.load_dataset(x)", "2: datasets.load_dataset without"),
        ("model.opening", "SentenceTransformer(x)", "1: SentenceTransformer without trust_remote_code=False"),
        ("cache", "import numpy as np\nnp.load('x', allow_pickle=True)", "2: sets allow_pickle"),
        ("cache", "x = 1\n" * 451, "451: longer than 450 lines"),
    ],
)
def test_the_checker_finds(module: str, source: str, reason: str) -> None:
    assert any(fault.startswith(reason) for fault in faults(module, source))


def test_the_checker_wants_a_docstring() -> None:
    assert faults("cache", "x = 1") == ["1: no docstring"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("packing", "from embedwright.text import TokenizedText"),
        ("model.pooling", "from .attention import attend"),
        ("model.pooling", "from ..packing import pack\nf(trust_remote_code=False)"),
        ("evaluation.suite", "from embedwright.model.embedder import Embedder"),
        ("training.loop", "from embedwright.evaluation.suite import evaluate"),
        ("demo", "from embedwright import Embedder\nprint(1)"),
        ("cli", "from embedwright import demo, quickstart\nfrom embedwright.demo import run"),
        ("model.storage", "A.from_pretrained(x, trust_remote_code=False)\nsuper().from_pretrained(x)"),
        (TOP, "from embedwright.training.loop import train"),
        ("text", "import torch\nmodel.print(1)\n'torch.load is never called'"),
    ],
)
def test_the_checker_lets_pass(module: str, source: str) -> None:
    assert faults(module, f'"""Made up."""\n{source}') == []


def test_the_base_install_needs_none_of_the_extras() -> None:
    project = tomllib.loads((SRC.parents[1] / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[^\w.-]", line)[0] for lines in project["optional-dependencies"].values() for line in lines}
    extras = {re.sub(r"[-_.]+", "-", name).lower() for name in named - {project["name"]}}
    modules = [
        module
        for module, owners in packages_distributions().items()
        if extras & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    ]
    assert {"rensa", "peft", "mteb"} <= set(modules)
    code = f"import sys; sys.modules |= dict.fromkeys({modules!r}); import embedwright; embedwright.Embedder"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
