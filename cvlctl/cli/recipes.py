"""`cvlctl recipes ls | validate`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import kind_of, load
from cvlctl.recipes.yamlfile import read

# how the opening comment of a recipe begins that reprints something: "CVL Figure 2: what it is"
_ITEM = re.compile(r"((?:CVL|LAEO) (?:Figure|Tables?|section)[^:]*|Proposal, [^:]*): ")


def _in(folder: Path) -> list[Path]:
    """The files of recipes under a folder. A pipe is waited for where it is named, not where it just lies."""
    return sorted(path for path in folder.rglob("*.yaml") if not path.is_fifo())


def ls(root: Path) -> list[dict[str, Any]]:
    """The recipes under `root`: path, command (None: not a recipe), item (of a paper, or None), about (its opening
    comment's start)."""
    if not root.is_dir():
        raise CvlctlError(f"no directory {root}", "name the directory that holds the recipes")
    return [_row(path) for path in _in(root)]


def validate(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Each recipe among `paths` (files, or directories of them): path, command, ok, error, hint."""
    files: list[Path] = []
    for path in paths:
        files += _in(path) if path.is_dir() else [path]
    if not files:
        raise CvlctlError(f"no recipes under {', '.join(map(str, paths))}", "name a recipe, or a directory of recipes")
    results = []
    for file in files:
        row = {"path": str(file), "command": None, "ok": True, "error": None, "hint": None}
        try:
            row["command"] = load(file).command
        except CvlctlError as error:
            row |= {"ok": False, "error": error.what, "hint": error.hint}
        results.append(row)
    return results


def render_ls(result: list[dict[str, Any]], console: Console) -> None:
    """Print the result of `ls`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    items = any(row["item"] for row in result)
    for heading in ("recipe", "command", *(["paper"] if items else []), "what it is"):
        table.add_column(heading, no_wrap=heading == "command", overflow="fold")
    for row in result:
        item = [Text(row["item"] or "")] if items else []
        table.add_row(Text(row["path"]), row["command"] or "?", *item, Text(row["about"]))
    console.print(table)


def render_validate(result: list[dict[str, Any]], console: Console) -> None:
    """Print the result of `validate`: one line a recipe."""
    for row in result:
        console.print(f"{row['path']}: {'valid' if row['ok'] else row['error']}", markup=False, soft_wrap=True)
        if row["hint"]:
            console.print(f"    hint: {row['hint']}", markup=False, soft_wrap=True)


def _row(path: Path) -> dict[str, Any]:
    try:
        command = kind_of(read(path)[1])
        line = path.read_text(encoding="utf-8-sig").lstrip().splitlines()[0]
        first = re.split(r"\.\s+(?=[A-Z])", line)[0].rstrip(".")
    except CvlctlError as error:
        return {"path": str(path), "command": None, "item": None, "about": error.what}
    about = first.lstrip("# ") if first.startswith("#") else ""
    item = _ITEM.match(about)
    row = {"path": str(path), "command": command, "item": item and item[1], "about": about}
    return {**row, "about": about[item.end() :]} if item else row
