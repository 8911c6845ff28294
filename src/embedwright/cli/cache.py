"""The commands `cache list` and `cache clear`: conversions that are kept, and room on the disk."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from embedwright.cache import Cached, cache_folder, cached, remove
from embedwright.cli.display import say
from embedwright.cli.options import arg, opt
from embedwright.errors import InputError

cache_app = typer.Typer(help="Show or clear the cache of converted data and models.", no_args_is_help=True)


@cache_app.command("list")
def cache_list() -> None:
    """Show what lies in the cache: sizes, ages and names."""
    entries = cached()
    for entry in entries:
        used = f"   in use by process {', '.join(map(str, entry.users))}" if entry.users else ""
        say(f"{_size(entry.size):>9}  {_days(entry):7.1f} days  {entry.name}{used}")
    say(f"{_size(sum(entry.size for entry in entries)):>9}  in {len(entries)} entries of {cache_folder()}")


@cache_app.command("clear")
def cache_clear(
    names: Annotated[list[str], arg("What to remove: `data`, `gguf`, ..., or single names of `cache list`.")],
    days: Annotated[float, opt("Age from which entries are removed.", min=0)] = 0.0,
) -> None:
    """Remove entries of the cache. They are made again when needed. On Linux, what a process has open stays."""
    entries = cached()
    for name in names:
        if not any(_is(entry, name) for entry in entries):
            kinds = ", ".join(sorted({entry.name.split("/")[0] for entry in entries})) or "nothing"
            raise InputError(f"{name}: not in the cache {cache_folder()}, which holds {kinds}: see `cache list`")
    chosen = [entry for entry in entries if any(_is(entry, name) for name in names) and _days(entry) >= days]
    for entry in chosen:
        if entry.users:
            say(f"{entry.name} stays: process {', '.join(map(str, entry.users))} has it open")
        else:
            remove(entry)
    gone = [entry for entry in chosen if not entry.users]
    say(f"{_size(sum(entry.size for entry in gone))} in {len(gone)} entries removed")


def _is(entry: Cached, name: str) -> bool:
    return name.rstrip("/") in (entry.name, entry.name.split("/")[0])


def _days(entry: Cached) -> float:
    return max(time.time() - entry.changed, 0.0) / 86_400


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
