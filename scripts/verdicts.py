"""What was found here of each claim of the papers: the first table of docs/results.md.

`claims.yaml` says which two arms of which study decide a claim. Their difference is as the study's `study.json` has it.
Only differences over several training seeds decide. Their p-values are corrected for the claims of one study (Holm).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from embedwright.evaluation.compare.compare import MEAN
from embedwright.evaluation.compare.statistics import LEVEL, holm
from embedwright.studies.ablate.file import SHARED
from embedwright.studies.ablate.table import grid

HOLDS, NOT, UNRESOLVED, NOT_RUN = "holds here", "does not hold here", "cannot be resolved at this size", "not run"
HEAD = [
    "claim",
    "verdict",
    "difference",
    "95 % interval",
    "p (Holm)",
    "smallest visible",
    "seeds",
    "tokens a cell",
    "paper",
]
TEXT = """## Claims of the paper

What was found of each claim of NV-Embed (arXiv 2405.17428), and of NV-Retriever's on mining (arXiv 2407.15831). A
difference is that of the two arms in brackets, in points, over training seeds in pairs and over items. A claim holds,
or the other way round does, if p is below 0.05; "no difference" takes two one-sided tests within the study's bound, and
refutes a claim only if the paper's difference is at least that bound. Both are corrected for all claims of one study,
also those that have not run (Holm); a study's own table corrects for all that it compares, and may show less. All else
cannot be resolved: the smallest visible difference is the true one that so many seeds find in four cases of five,
tested alone (corrected, it is larger). With "2 of 6" seeds, a verdict is an interim one. Where an arm's best learning
rate is the first or last that was tried, its distance from the optimum may decide. Tokens are those of a cell's
training with its shared stages, on these seeds; of each arm where they differ by over 3 %. The paper's numbers are
single runs of a 7B decoder, means over 56 tasks of MTEB unless a row says otherwise; ours are of a small decoder cut in
depth, on other data. Made from [claims.yaml](results/claims.yaml).
"""
Claim = Mapping[str, Any]
Study = Mapping[str, Any]


def page(folder: Path) -> list[str]:
    """The table and what others found; nothing where there is no file of claims. `folder` is docs/results."""
    file = folder / "claims.yaml"
    if not file.is_file():
        return []
    claims = yaml.safe_load(file.read_text(encoding="utf-8"))
    files = sorted((folder / "ablations").glob("*/study.json"))
    studies = {said["study"]: said for file in files for said in [json.loads(file.read_text(encoding="utf-8"))]}
    lines = [TEXT, f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [
        f"| {' | '.join(_cells(claim, found))} |" for claim, found in zip(claims, decided(claims, studies), strict=True)
    ]
    told = [f"- {claim['claim']}: {'; '.join(claim['others'])}." for claim in claims if claim.get("others")]
    return [*lines, "", "What others found:", "", *told, ""]


def decided(claims: Sequence[Claim], studies: Mapping[str, Study]) -> list[dict[str, Any]]:
    """What is known of each claim: its verdict, and the numbers that it comes from."""
    found = [difference(claim, studies[claim["study"]]) if claim["study"] in studies else {} for claim in claims]
    for study in studies:
        own = [each for claim, each in zip(claims, found, strict=True) if claim["study"] == study]
        for name, key in (("p", "p_holm"), ("p_within", "p_equivalent")):
            known = [each.get(name) is not None for each in own]
            # what has not run counts as 1, so that a verdict does not depend on how much has run
            corrected = holm([each[name] if there else 1.0 for each, there in zip(own, known, strict=True)])
            for each, there, value in zip(own, known, corrected, strict=True):
                each |= {key: value} if there else {}
    return [
        each | {"verdict": verdict(each, _theirs(claim.get("paper")))}
        for claim, each in zip(claims, found, strict=True)
    ]


def difference(claim: Claim, study: Study) -> dict[str, Any]:
    """How much better the better arm is, from the study's comparison of the two; or why there is none."""
    better, worse = claim["better"], claim["worse"]
    runs = {(run["arm"], run["seed"]): run for run in (*study["cells"], *study.get("shared_stages", ()))}
    planned = {cell["seed"] for cell in study["cells"]} | {int(cell.rpartition("/")[2]) for cell in study["missing"]}
    both = [seed for seed in planned if (better, seed) in runs and (worse, seed) in runs]
    if not both:
        return {"why": f"{NOT_RUN} yet: no seed of both arms"}
    pairs = [pair for pair in (study["comparison"], *study.get("pairs", ())) if pair]
    rows = [
        (row, pair) for pair in pairs for row in pair["rows"] if {row["candidate"], pair["baseline"]} == {better, worse}
    ]
    if not rows:
        return {"why": "not compared: the study has no such pair"}
    if "task" in claim:
        rows = [(row, pair) for row, pair in rows if row["task"] == claim["task"]]
    elif len(rows) > 1:
        rows = [(row, pair) for row, pair in rows if row["kind"] == "tasks"]
    if not rows:
        return {"why": f"not compared: {claim.get('task', MEAN)} was left out"}
    [(row, pair)] = rows
    sign = 1 if row["candidate"] == better else -1
    of_seeds = "seeds" in row["over"]  # else its interval is of the items alone, and decides nothing
    found = {
        "difference": sign * row["difference"],
        "seeds": len(both),
        "planned": len(planned),
        "tokens": [fmean(_tokens(runs, arm, seed) for seed in both) for arm in (better, worse)],
        "smallest": row["smallest"] if of_seeds else None,
        "bound": pair["equivalent"],
        "without": row["without"],
        "edge": _at_the_edge(study, (better, worse)),
    }
    if of_seeds:
        low, high = sorted((sign * row["low"], sign * row["high"]))
        found |= {"low": low, "high": high, "p": row["p"], "p_within": row["p_within"]}
    return found


def _tokens(runs: Mapping[tuple[str, int], Mapping[str, Any]], arm: str, seed: int) -> int:
    """The tokens that a cell was trained on, those of the shared stages that it began from among them."""
    return sum(int(runs[own, seed]["tokens"]) for own in {arm, SHARED} if (own, seed) in runs)


def verdict(found: Mapping[str, Any], theirs: float | None) -> str:
    """The verdict on a claim. `theirs` is the paper's difference, where it has one."""
    if "difference" not in found:
        return str(found.get("why", NOT_RUN))
    if found.get("p_holm") is None:
        return f"{UNRESOLVED}: one run each"
    equal, bound = found.get("p_equivalent", 1) < LEVEL, found["bound"]
    within = f"within {bound:g}" if equal else ""
    if found["p_holm"] >= LEVEL:
        if not equal:
            return UNRESOLVED
        if theirs is None:
            return f"no difference, {within}"
        # a difference below the bound is not excluded: equivalence says nothing against it
        small = f"no difference beyond {bound:g}; the paper's {theirs:+.2f} is too small to be told apart"
        return f"{NOT}: no difference, {within}" if abs(theirs) >= bound else small
    told = HOLDS if found["difference"] > 0 else f"{NOT}: the other way round"
    return f"{told}, {within}" if equal else told


def _at_the_edge(study: Study, arms: Sequence[str]) -> list[str]:
    """The arms, with their rate, whose best rate is the first or the last of the grid."""
    factors = grid(study)
    ends = {*factors[:1], *factors[-1:]}
    rates = {run["arm"]: run["rate"] for run in study["cells"] if run.get("rate") in ends}
    return [f"{arm} x{rates[arm]:g}" for arm in arms if arm in rates]


def _cells(claim: Claim, found: Mapping[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(found[key], form) if found.get(key) is not None else "-"

    interval = f"{found['low']:+.2f} to {found['high']:+.2f}" if "low" in found else "-"
    if found.get("without"):
        interval += f", without items of {', '.join(found['without'])}"
    arms = f"{claim['study']}: {claim['better']} - {claim['worse']}" + (f", {claim['task']}" if "task" in claim else "")
    verdict = f"**{found['verdict']}**" if found["verdict"].startswith((HOLDS, NOT)) else found["verdict"]
    if found.get("edge"):
        verdict += f"; rate at the grid's edge: {', '.join(found['edge'])}"
    cells = [
        f"{claim['claim']} (`{arms}`)",
        verdict,
        number("difference", "+.2f"),
        interval,
    ]
    seeds, tokens = number("seeds", "d"), found.get("tokens", ())
    if found.get("planned") != found.get("seeds"):
        seeds += f" of {found['planned']}"
    if tokens and max(tokens) <= 1.03 * min(tokens):
        tokens = [fmean(tokens)]
    cells += [number("p_holm", ".3f"), number("smallest", ".2f"), seeds]
    return [*cells, " and ".join(f"{count:,.0f}" for count in tokens) or "-", _paper(claim.get("paper"))]


def _paper(said: Mapping[str, Any] | None) -> str:
    if said is None:
        return "not in it"
    if (theirs := _theirs(said)) is None:
        return str(said["where"])
    return f"{theirs:+.2f} ({said['better']:.2f}, {said['worse']:.2f}; {said['where']})"


def _theirs(said: Mapping[str, Any] | None) -> float | None:
    """The paper's difference, as it can be read there; None for a claim without numbers."""
    return round(said["better"] - said["worse"], 2) if said and "better" in said else None
