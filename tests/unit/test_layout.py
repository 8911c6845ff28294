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

MAX_LINES = 350
# Rooms: a module or a folder. A module belongs to the room with the longest name that it starts with.
BOTTOM = {
    "errors",
    "files",
    "config",
    "cache",
    "endpoint",
    "processes",
    "fingerprint",
    "threads",
    "host",
    "locate",
    "remote",
}  # known to all
# Along a chain, each room may import those before it.
MODEL = [
    "text",
    "packing",
    "model.attention",
    "model.pooling",
    "model.backbone",
    "model.quantized",
    "model.verify.modes",
    "model.network",
    "model.verify.probe",
    "cpu",
    "model.verify.selftest",
    "model.adapters",
    "model.formats",
    "model.interop",
    "model.encode",
    "model.embedder",
]
DATA = [
    "data.schema",
    "data.keys",
    "data.answers",
    "data.labels",
    "data.files",
    "data.sources.catalog",
    "data.tables",
    "data.export",
    "data.sources",
    "data.clean",
]
TRAINING = [
    "training.parts",
    "training.stages",
    "training.recipe",
    "training.batches",
    "training.losses",
    "training.engine",
    "training.masked",
    "training.run",
    "training.steps",
    "training.cost",
    "training.lengths",
    "training.plan",
    "training.dry_run",
    "training.remine",
    "training.train",
]
SEARCH = ["encoders", "vectors"]
EVALUATION = ["evaluation", "evaluation.bench", "evaluation.compare"]
TRAINERS_USE = {*MODEL, *DATA, *SEARCH, "encoders.open", "mining", *EVALUATION}
ENTRY_POINTS = {"cli", "demo"}  # they see all, and are seen by each other alone
PRINTING = ("cli.", "demo.demo")
TOP = "__init__"  # the names that `from embedwright import ...` gives

EVERYTHING = (
    BOTTOM
    | TRAINERS_USE
    | {
        *TRAINING,
        "registration",
        "export",
        "frameworks",
        "index",
        "index.lancedb",
        "llm",
        "synth",
        "pairs",
        "serve",
        "studies.ablate",
        "studies.report",
        "compress",
        "model.verify.doctor",
    }
    | {
        "model.formats.nvembed_export",
        "model.formats.soup",
    }
)
MAY_IMPORT: dict[str, set[str]] = {
    TOP: EVERYTHING,
    "__main__": {"cli"},
    "cli": EVERYTHING | ENTRY_POINTS | {TOP},
    "demo": EVERYTHING | ENTRY_POINTS | {TOP},
    "errors": set(),
    "host": set(),
    "fingerprint": set(),
    "threads": set(),
    "processes": {"errors"},
    "files": {"errors"},
    "config": {"errors"},
    "endpoint": {"errors"},
    "cache": {"errors"},
    "locate": {"errors", "cache"},
    "remote": {"errors", "cache", "files"},
    "registration": {"model"},
    "model": {"model.interop"},  # the package: importing it registers our model type with transformers
    **{room: BOTTOM | set(MODEL[:i]) for i, room in enumerate(MODEL)},
    **{room: BOTTOM | set(DATA[:i]) for i, room in enumerate(DATA)},
    **{room: BOTTOM | TRAINERS_USE | set(TRAINING[:i]) for i, room in enumerate(TRAINING)},
    "model.formats.nvembed_export": BOTTOM | set(MODEL),
    "model.formats.soup": BOTTOM | set(MODEL),
    "encoders": BOTTOM | {"text"},
    "encoders.chunks": BOTTOM | {"encoders", *MODEL},
    "encoders.open": BOTTOM | {"encoders", *MODEL},
    "model.verify.by_hand": BOTTOM | {"encoders", *MODEL},
    "model.verify.doctor": BOTTOM | {"encoders", "encoders.open", "export", "model.verify.by_hand", *MODEL},
    "export": BOTTOM | set(MODEL),
    "vectors": BOTTOM | {"encoders", "cpu", "text", *DATA[:7]},
    "frameworks": BOTTOM | {"encoders", "encoders.open"},
    "index.lancedb": BOTTOM | {"index", "encoders", "encoders.open"},
    "index": BOTTOM | {*SEARCH, "encoders.chunks", *DATA[:7], *MODEL},
    "mining": BOTTOM | {*SEARCH, *DATA},
    "pairs": BOTTOM | {*SEARCH, *DATA},
    "llm": BOTTOM,
    "synth": BOTTOM | {"llm", *DATA},
    "evaluation": BOTTOM | {*SEARCH, "encoders.open", "encoders.chunks", *DATA, *MODEL},
    "evaluation.bench": BOTTOM | {"evaluation", *SEARCH, *DATA, *MODEL},
    "evaluation.compare": BOTTOM | {"evaluation", "encoders.open"},
    "serve": BOTTOM | {*MODEL, *SEARCH, "index"},
    "compress": BOTTOM | TRAINERS_USE | {*TRAINING},
    "studies": set(),
    "studies.ablate": BOTTOM | TRAINERS_USE | {*TRAINING},
    "studies.report": BOTTOM | TRAINERS_USE | {*TRAINING},
}

# Modules without a test file of their own, and the file that tests them.
TESTED_ELSEWHERE = {
    "training.batches.batch": "training/batches/test_make.py",
    "mining.choose": "mining/test_mine.py",
    "cpu.attention": "cpu/test_blocks.py",
    "model.verify.by_hand": "model/verify/test_doctor.py",
    "registration": "test_imports.py",
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# ---- the checker


def room_of(module: str) -> str:
    """The room with the longest name that `module` starts with; the top for a name that is in none."""
    parts = module.split(".")
    return next((front for i in range(len(parts), 0, -1) if (front := ".".join(parts[:i])) in ROOMS), TOP)


def imports(module: str, tree: ast.AST, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, room of ours that is imported) for every import in `tree`, those inside of functions too."""
    package = ["embedwright", *([] if module == TOP else module.removesuffix(".__init__").split("."))]
    package = package if is_package or module == TOP else package[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            front = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*front, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            ours, _, rest = name.partition(".")
            if ours == "embedwright":
                yield node.lineno, room_of(rest)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    """What breaks a rule in the source of `module` (dotted, without `embedwright.`), as `line: reason`."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["1: no docstring"]
    if (lines := source.count("\n")) > MAX_LINES:
        found.append(f"{lines}: longer than {MAX_LINES} lines")
    room = room_of(module)
    for line, other in imports(module, tree, is_package):
        if other == room or other in MAY_IMPORT[room]:
            continue
        found.append(
            f"{line}: imports the entry point {other}" if other in ENTRY_POINTS else f"{line}: {room} imports {other}"
        )
    for node in ast.walk(tree):
        found += [f"{node.lineno}: {reason}" for reason in unsafe(module, node)]
    return found


def unsafe(module: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        origin = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        yield from (f"imports {name}" for name in origin if name.split(".")[0] in UNSAFE_MODULES)
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            yield "imports torch.load"
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "joblib.load", "pickle.load"):
        yield f"uses {ast.unparse(node)}"
    elif isinstance(node, ast.Call) and called(node) == "print" and not module.startswith(PRINTING):
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


ROOMS = {*MAY_IMPORT}


# ---- our modules


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_the_rules(module: str) -> None:
    path = MODULES[module]
    assert faults(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py") == []


def test_the_modules_are_found_and_each_is_in_a_room() -> None:
    assert {"text", "packing", "model.embedder", "mining.mine", "training.train", "evaluation.suite"} <= MODULES.keys()
    homeless = [m for m in MODULES if room_of(m) == TOP and m != TOP and not m.endswith(".__init__")]
    assert homeless == []


def test_unit_tests_mirror_the_modules() -> None:
    missing = []
    for module, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").count("\n")
        if (
            lines <= 15
            or path.name == "__init__.py"
            or module in TESTED_ELSEWHERE
            or module.startswith(("cli.", "demo.demo"))
        ):
            continue
        test = UNIT / path.relative_to(SRC).with_name(f"test_{path.name}")
        if not test.is_file():
            missing.append(f"{module}: no {test.relative_to(UNIT.parent)}")
    assert missing == []


def test_the_allow_list_is_short_and_true() -> None:
    assert len(TESTED_ELSEWHERE) <= 8
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
        ("packing", "from embedwright.model.embedder import Embedder", "1: packing imports model.embedder"),
        ("model.pooling", "import embedwright.mining.mine", "1: model.pooling imports mining"),
        ("model.pooling", "from ..training.losses import terms", "1: model.pooling imports training.losses"),
        ("model.attention", "from .backbone import load_backbone", "1: model.attention imports model.backbone"),
        ("model.network", "from embedwright.model.verify import probe", "1: model.network imports model.verify.probe"),
        ("cpu.linears", "from embedwright.model.adapters import lora", "1: cpu imports model.adapters"),
        ("model.formats.gguf", "from embedwright.model.interop.hub import x", "1: model.formats imports model.interop"),
        ("data.files.rows", "from ..sources import catalog", "1: data.files imports data.sources"),
        (
            "mining.mine",
            "def f():\n    from embedwright.model.embedder import Embedder",
            "2: mining imports model.embedder",
        ),
        ("mining.mine", "from embedwright import Embedder", f"1: mining imports {TOP}"),
        ("mining.mine", "import importlib\nimportlib.import_module('embedwright.encoders.open')", "2: mining imports"),
        ("evaluation.suite", "from embedwright.training.train import train", "1: evaluation imports training.train"),
        ("vectors.search", "if True:\n    from embedwright.evaluation import metrics", "2: vectors imports evaluation"),
        ("training.losses.total", "from ..engine import step", "1: training.losses imports training.engine"),
        (TOP, "from embedwright.cli.main import main", "1: imports the entry point cli"),
        ("training.train", "from embedwright.demo.quickstart import run", "1: imports the entry point demo"),
        ("training.train", "print('step')", "1: prints"),
        ("demo.quickstart", "print('step')", "1: prints"),
        ("cache", "import pickle", "1: imports pickle"),
        ("cache", "from joblib import load", "1: imports joblib"),
        ("model.formats.open", "import torch\ntorch.load('x')", "2: uses torch.load"),
        ("model.formats.open", "from torch import load", "1: imports torch.load"),
        ("model.formats.open", "f(trust_remote_code=True)", "1: sets trust_remote_code"),
        ("model.formats.open", "f(**{'trust_remote_code': True})", "1: sets trust_remote_code"),
        ("model.formats.open", "A.from_pretrained(x)", "1: A.from_pretrained without trust_remote_code=False"),
        (
            "model.formats.open",
            "f(type(x).from_pretrained(x, trust_remote_code=y))",
            "1: type(x).from_pretrained without",
        ),
        ("model.formats.open", "A.from_config(x, **{})", "1: A.from_config without trust_remote_code=False"),
        ("data.sources.build", "import datasets\ndatasets.load_dataset(x)", "2: datasets.load_dataset without"),
        ("encoders.open", "SentenceTransformer(x)", "1: SentenceTransformer without trust_remote_code=False"),
        ("cache", "import numpy as np\nnp.load('x', allow_pickle=True)", "2: sets allow_pickle"),
        ("cache", "x = 1\n" * 351, "351: longer than 350 lines"),
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
        ("training.train", "from embedwright.evaluation.suite import evaluate"),
        ("demo.demo", "from embedwright import Embedder\nprint(1)"),
        ("cli.main", "from embedwright.demo import demo, quickstart\nfrom embedwright.demo.demo import run"),
        ("model.formats.open", "A.from_pretrained(x, trust_remote_code=False)\nsuper().from_pretrained(x)"),
        (TOP, "from embedwright.training.train import train"),
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
