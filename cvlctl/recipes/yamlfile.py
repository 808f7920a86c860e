"""Recipe files: read with the line of every key, overrides from the command line, and where a value comes from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.recipes import yamltext
from cvlctl.recipes.yamltext import MAX_DEPTH, Fault, Key, cut

_COMMAND_LINE = -1
_MAX_BYTES = 2**20  # what is longer is no recipe, and reading it would take seconds


class Source(NamedTuple):
    """Where the values of a recipe come from."""

    file: Path
    lines: dict[Key, int]  # key -> line, or _COMMAND_LINE

    def where(self, key: Key) -> str:
        """File and line of the key, or of the nearest key around it."""
        line = next((self.lines[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self.lines), None)
        if line is None:
            return str(self.file)
        return "command line" if line == _COMMAND_LINE else f"{self.file}, line {line}"


def read(path: Path) -> tuple[Source, dict[str, Any]]:
    """The mapping in a YAML file, and where its keys are."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise CvlctlError(f"{path} is longer than a megabyte", "a recipe is a YAML text file of a page or two")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise CvlctlError(f"no recipe at {path}", _nearest_file(path)) from None
    except (OSError, ValueError) as error:
        raise CvlctlError(f"{path} cannot be read: {error}", "a recipe is a YAML text file in UTF-8") from error
    try:
        data, lines = yamltext.parse(text)
    except Fault as fault:
        at = str(path) if fault.line is None else f"{path}, line {fault.line}"
        raise CvlctlError(f"{at}: {_of(fault)}", fault.hint) from fault
    if not isinstance(data, dict):
        raise CvlctlError(f"{path} is not a recipe: expected `key: value` lines", "`cvlctl recipes ls` lists examples")
    return Source(path, lines), data


def _of(fault: Fault) -> str:
    return f"{dotted(fault.key)}: {fault.problem}" if fault.key else fault.problem


def _nearest_file(path: Path) -> str:
    there = sorted({*Path("recipes").rglob("*.yaml"), *path.parent.glob("*.yaml")})
    names = {str(p): p for p in there}
    near = [name for name in names if names[name].stem == path.stem]
    near += difflib.get_close_matches(str(path), names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else "cvlctl recipes ls shows those there are"


def override(source: Source, data: dict[str, Any], text: str) -> None:
    """Set `key.sub=value` in `data`; a number as key is a place in a list."""
    name, equals, value = text.partition("=")
    names = name.strip().split(".")
    if not equals or not all(names) or len(names) > MAX_DEPTH:
        what = f"command line: {cut(text)!r} is not of the form key.sub=value"
        raise CvlctlError(what, "for example steps=1000 or seeds=[0,1]")
    key: Key = ()
    where: Any = data
    for depth, name in enumerate(names, start=1):
        in_list = isinstance(where, list) and name.isdecimal() and len(name) < 10
        part: str | int = int(name) if in_list else name
        legal = isinstance(where, dict) or (isinstance(where, list) and isinstance(part, int) and part < len(where))
        if not legal:
            what = f"command line: {dotted(names)} cannot be set: {dotted(key)} is {shown(where)}"
            raise CvlctlError(what, "set the whole of it instead")
        key = (*key, part)
        if depth == len(names):
            where[part] = _value(source, value, key)
        else:
            if isinstance(where, dict) and where.get(part) is None:
                where[part] = {}
                source.lines[key] = _COMMAND_LINE
            where = where[part]


def _value(source: Source, text: str, key: Key) -> Any:
    """The value of an override of `key`; what was known of the lines in it is replaced."""
    try:
        value, lines = yamltext.parse(text, key)
    except Fault as fault:
        what = _of(fault) if fault.key else f"{dotted(key)}: {fault.problem}"
        raise CvlctlError(f"command line: {what}", fault.hint) from fault
    for old in [k for k in source.lines if k[: len(key)] == key]:
        del source.lines[old]
    source.lines.update(dict.fromkeys([*lines, key], _COMMAND_LINE))
    return value


def dotted(key: Iterable[str | int]) -> str:
    """A key in a message: "stages.train.steps"."""
    return cut(".".join(map(str, key)), 200)


def shown(value: Any) -> str:
    """A value in a message, cut to a line's length."""
    words = {type(None): "nothing", dict: "a mapping", list: f"the list {value}", tuple: f"the list {value}"}
    return cut(words.get(type(value)) or (str(value).lower() if isinstance(value, bool) else repr(value)))
