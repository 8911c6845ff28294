"""Trains both systems for some steps in float32, and shows how far their losses and their weights are apart.

    TWINS_DATA=runs/twins-data python benchmarks/twins/same.py ours --steps 0.05

Both draw the same LoRA weights from the same seed and take the same rows, so that only rounding is left, and texts that
come twice in a batch, which ours counts once. `--steps` is the factor of the recipe's steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cell  # first: it binds the threads
import run
import st
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embedwright.training.recipe import Recipe
from embedwright.training.run.checks import open_checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("ours", "plain"))
    parser.add_argument("--steps", type=float, default=0.05)
    options = parser.parse_args()
    plan = run.read_plan(run.HERE / "plan.yaml")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = folder / "base"
        run.save_base(plan, base)
        spec = {"recipe": str(run.HERE / f"{options.recipe}.yaml"), "base": str(base), "seed": plan.tuning_seed}
        spec |= {"setting": run.Setting().model_dump(), "steps": options.steps}
        spec |= {"st": plan.st | {"weights": "float32"}}
        recipe = in_float32(cell.recipe_for(spec, folder))
        limits = [None] * len(recipe.stages)
        ours = cell.ours(recipe, limits, None)
        theirs = st.train(recipe, open_checked(recipe), limits, spec, folder)
        for step, (one, other) in enumerate(zip(ours["losses"], theirs["losses"], strict=True), start=1):
            print(f"step {step}: losses {one:.4f} and {other:.4f}")
        before = weights_of(SentenceTransformer(str(base))[0].model)
        after = weights_of(SentenceTransformer(str(folder / "model"))[0].model)
        own = weights_of(ours["model"].network.backbone)
        changes = [torch.cat([(some[name] - before[name]).flatten() for name in before]) for some in (own, after)]
        cosine = torch.nn.functional.cosine_similarity(*changes, dim=0)
        norms = " and ".join(f"{change.norm():.5f}" for change in changes)
        print(f"changes of the weights: norms {norms}, cosine {cosine:.6f}")


def in_float32(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": "fp32"})})


def weights_of(decoder: Any) -> dict[str, Tensor]:
    """Returns the matrices of all layers, in float64, by their name below `layers`."""
    return {
        name[name.index("layers.") :]: weights.detach().double()
        for name, weights in decoder.named_parameters()
        if "layers." in name and weights.ndim == 2
    }


if __name__ == "__main__":
    sys.exit(main())
