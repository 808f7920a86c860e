"""`cvlctl recipes`: which there are, whether they are valid, what they may say, and copies of those that came along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import COMMANDS, STEPS, kind_of, load, model
from cvlctl.recipes import shipped
from cvlctl.recipes.explain import nearest
from cvlctl.recipes.schema import schema as schema_of
from cvlctl.recipes.yamlfile import read

# how the opening comment of a recipe begins that reprints something: "CVL Figure 2: what it is"
_ITEM = re.compile(r"((?:CVL|LAEO) (?:Figure|Tables?|section)[^:]*|Proposal, [^:]*): ")
_HERE = Path("recipes")
_PLACEHOLDER = {"type": "string", "pattern": r"\$\{"}


def _in(folder: Path) -> list[Path]:
    """The files of recipes under a folder. A pipe is waited for where it is named, not where it just lies."""
    return sorted(path for path in folder.rglob("*.yaml") if not path.is_fifo())


def ls(root: Path | None = None) -> list[dict[str, Any]]:
    """The recipes under `root`: path, command (None: not a recipe), item (of a paper, or None), about (its opening
    comment's start). None: those under `recipes`, and where there is no such directory those that came with cvlctl,
    each by its `name` too."""
    if root is None and not _HERE.is_dir():
        return [{"name": name, **_row(path)} for name, path in shipped.names().items()]
    root = root or _HERE
    if not root.is_dir():
        raise CvlctlError(f"no directory {root}", "name the directory that holds the recipes")
    return [_row(path) for path in _in(root)]


def validate(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Each recipe among `paths` (files, or directories of them; none: as `ls`): path, command, ok, error, hint."""
    paths = list(paths) or [_HERE if _HERE.is_dir() else shipped.root() / "recipes"]
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


def show(name: str) -> dict[str, Any]:
    """A recipe that came with cvlctl: name, path, text."""
    path = shipped.find(name)
    return {"name": name, "path": str(path), "text": path.read_text(encoding="utf-8")}


def copy(name: str, to: Path, *, force: bool = False) -> dict[str, Any]:
    """Copy one, and the stores that it names and that came along: recipe, data, command."""
    made = shipped.copy(name, to, force=force)
    command = kind_of(read(made.recipe)[1])
    return {"recipe": str(made.recipe), "data": [str(path) for path in made.data], "command": command}


def schema(command: str) -> dict[str, Any]:
    """The JSON Schema of a command's recipes. Those of `run` have the keys of the four steps in their stages, any of
    which may be filled in by `${key}`."""
    if command not in COMMANDS:
        raise CvlctlError(f"no command {command!r} takes a recipe", nearest(command, [*COMMANDS], "commands"))
    found = {**schema_of(model(command)), "title": f"Recipe of cvlctl {command}"}
    if command == "run":
        stage: dict[str, Any] = {"type": "object", "required": ["command"], "allOf": []}
        stage["properties"] = {"command": {"enum": list(STEPS), "description": "the step that this stage is"}}
        for step in STEPS:
            keys = _filled_in(step, schema_of(model(step)), found["$defs"])
            stage["allOf"].append({"if": {"properties": {"command": {"const": step}}}, "then": {"properties": keys}})
        matrix = found["properties"]["matrix"]
        matrix["additionalProperties"] = _or_placeholder(matrix["additionalProperties"])
        found["properties"]["stages"]["additionalProperties"] = stage
    return found


def _filled_in(step: str, one: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The keys of a step's schema, each value of which may be a placeholder too; what they refer to is added to
    `definitions`, under the step's name."""

    def moved(node: Any) -> Any:
        if isinstance(node, list):
            return [moved(each) for each in node]
        if not isinstance(node, dict):
            return node
        found = {key: moved(value) for key, value in node.items() if key != "discriminator"}
        if "$ref" in node:
            found["$ref"] = node["$ref"].replace("#/$defs/", f"#/$defs/{step}.")
        if isinstance(properties := found.get("properties"), dict):
            found["properties"] = {key: _or_placeholder(value) for key, value in properties.items()}
        if isinstance(items := found.get("items"), dict):
            found["items"] = _or_placeholder(items)
        return found

    for name, node in one.get("$defs", {}).items():
        definitions[f"{step}.{name}"] = moved(node)
    return {key: _or_placeholder(moved(value)) for key, value in one["properties"].items()}


def _or_placeholder(node: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: node[key] for key in ("description", "default") if key in node}
    return {**kept, "anyOf": [{key: value for key, value in node.items() if key not in kept}, _PLACEHOLDER]}


def render_ls(result: list[dict[str, Any]], console: Console) -> None:
    """Print the result of `ls`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    items, along = any(row["item"] for row in result), any("name" in row for row in result)
    for heading in ("recipe", "command", *(["paper"] if items else []), "what it is"):
        table.add_column(heading, no_wrap=heading == "command", overflow="fold")
    for row in result:
        item = [Text(row["item"] or "")] if items else []
        table.add_row(Text(row.get("name", row["path"])), row["command"] or "?", *item, Text(row["about"]))
    console.print(table)
    if along:
        console.print("These came with cvlctl: `cvlctl recipes cp NAME .` copies one to edit and run.", markup=False)


def render_validate(result: list[dict[str, Any]], console: Console) -> None:
    """Print the result of `validate`: one line a recipe."""
    for row in result:
        console.print(f"{row['path']}: {'valid' if row['ok'] else row['error']}", markup=False, soft_wrap=True)
        if row["hint"]:
            console.print(f"    hint: {row['hint']}", markup=False, soft_wrap=True)


def render_copy(result: dict[str, Any], console: Console) -> None:
    """Print the result of `copy`: what was written, and the command that runs it."""
    for path in (result["recipe"], *result["data"]):
        console.print(f"copied: {path}", markup=False, soft_wrap=True)
    console.print(f"run it with: cvlctl {result['command']} {result['recipe']}", markup=False, soft_wrap=True)


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
