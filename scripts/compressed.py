"""The tables and the picture of docs/compression.md, from the records in docs/results/compression.

A record is the `compression.json` that `embedwright compress --report` leaves in a folder. `make_docs.py` writes
the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from embedwright.compress.report import picture, table
from embedwright.model.interop.card import history_lines, markdown_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORDS = DOCS / "results" / "compression"
MARKS = "<!-- runs -->\n", "<!-- end of runs -->\n"
NEEDED = ("model", "command", "date", "machine", "versions")  # of a number that may be shown
PAPER = [  # appendix A as recalled: no number of it is confirmed; and what of it runs here
    (
        "magnitude, Wanda and SparseGPT, half of all weights set to zero",
        "",
        "not run: on no processor here would it save a byte or a product",
    ),
    (
        "the same in patterns of 2:4 and 4:8",
        "with INT8 after it 0.00 % and 0.01 % lower",
        "not run: needs a GPU with sparse products",
    ),
    ("whole layers and channels", "nothing", "`--layers`, `--width`: what is left is a smaller stock model"),
    ("training with LoRA after pruning", "SparseGPT is best", "`--heal RECIPE` with `tune: {method: lora}`"),
    (
        "distillation: the whole model teaches the pruned one",
        "better than labels alone",
        "`--heal RECIPE` with `loss.distill`",
    ),
    (
        "INT8 weights (GPTQ)",
        "0.01 % lower; of small models that were trained directly, 0.14 % to 0.84 %",
        "`--weights int8`, without GPTQ",
    ),
    ("FP8 weights (E4M3, E5M2)", "about as INT8", "not run: needs a GPU"),
]


def pages() -> dict[Path, str]:
    """Returns the page and its picture, as they should be."""
    records = [checked(file) for file in sorted(RECORDS.glob("*.json"))]
    page = DOCS / "compression.md"
    before, mark, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    made = {page: f"{before}{mark}{tables(records)}{MARKS[1]}{rest.partition(MARKS[1])[2]}"}
    return made | ({page.with_suffix(".svg"): picture(records)} if records else {})


def checked(file: Path) -> dict[str, Any]:
    """Reads a record, under the name of its file. Exits where it does not say how it was made."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) | {"name": file.stem}
    if lacking := [key for key in NEEDED if not record["about"].get(key)]:
        sys.exit(f"{file}: about has no {', '.join(lacking)}: a number without these is not shown")
    return record


def tables(records: list[dict[str, Any]]) -> str:
    lines = [] if records else ["Not measured yet: no record is kept.", ""]
    for record in records:
        about, machine = record["about"], record["about"]["machine"]
        lines += [f"### {record['name']}\n", markdown_table(table(record)), ""]
        lines += [f"{number}. {line}" for number, line in enumerate(history_lines(record["history"]), start=1)]
        lines += [
            "",
            f"Suite `{record['suite']}`, {about['date'][:10]}, {machine['cores']} cores of {machine['processor']}, "
            f"torch {about['versions']['torch']}. Speed: the fastest of three passes over {record['texts']}, "
            f"{record['tokens']:,} tokens. `{about['command']}`",
            "",
        ]
    if records:
        lines += ["![Mean score against size and against speed](compression.svg)", ""]
    head = ("appendix A of the paper", "said there, as recalled", "here")
    lines += ["### Beside the paper\n", markdown_table([dict(zip(head, row, strict=True)) for row in PAPER]), ""]
    return "\n".join(lines)
