"""Examples in parts on disk, so that a run that was killed goes on at the first part that it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from embedwright.data.schema import Example, parse_example, to_row
from embedwright.files import check_new_folder, remove_leftovers, whole_file, write_json

Counts = dict[str, Any]


class Parts:
    """Keeps the examples of each part in a file of a folder that holds nothing else."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Opens the folder. Removes the parts of other `facts`, which are all that decides what the examples are.

        Raises OutputExistsError if the folder holds something else.
        """
        self.folder = folder
        known = folder / "facts.json"
        remove_leftovers(folder)
        if known.is_file() and json.loads(known.read_text(encoding="utf-8")) == facts:
            return
        if known.is_file():
            shutil.rmtree(folder)
        check_new_folder(folder)
        write_json(known, facts)

    def part(self, name: str, make: Callable[[Counts], Iterator[Example]]) -> tuple[Counts, Iterator[Example]]:
        """Returns the counts and the examples of a part. `make` yields them, and counts, where there is no file."""
        file = self.folder / f"{name}.jsonl"
        if not file.is_file():
            counts: Counts = {}
            with whole_file(file) as temp, temp.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(to_row(example)) + "\n" for example in make(counts))
                lines.write(json.dumps(counts))
        *rows, last = file.read_text(encoding="utf-8").split("\n")
        return json.loads(last), (parse_example(json.loads(row), default_task="") for row in rows)

    def remove(self) -> None:
        shutil.rmtree(self.folder)
