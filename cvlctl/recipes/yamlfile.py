"""Recipe files: YAML with the line of every key, overrides from the command line, and a schema's errors in words.

YAML as version 1.2 reads it where 1.1 surprises: `1e6` and `3e-4` are numbers, dates are text. A key given twice is an
error, and so are keys that are not text and numbers that are not finite.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cvlctl.errors import CvlctlError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (1e6, 3e-4), and no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

Key = tuple[str | int, ...]
_COMMAND_LINE = -1
_MAX_NODES = 100_000  # aliases of aliases can stand for more than memory holds


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
    source = Source(path, {})
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CvlctlError(f"no recipe at {path}", _nearest_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CvlctlError(f"{path} cannot be read: {error}", "a recipe is a YAML text file in UTF-8") from error
    data = _parse(text, source, ())
    if not isinstance(data, dict):
        raise CvlctlError(f"{path} is not a recipe: expected `key: value` lines", "see recipes/ for examples")
    return source, data


def _nearest_file(path: Path) -> str:
    there = sorted({*Path("recipes").rglob("*.yaml"), *path.parent.glob("*.yaml")})
    names = {str(p): p for p in there}
    near = [name for name in names if names[name].stem == path.stem]
    near += difflib.get_close_matches(str(path), names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else "cvlctl recipes ls shows those there are"


def _parse(text: str, source: Source, root: Key) -> Any:
    """The YAML value; the lines of its keys go into `source`. A `root` says that it is the value of an override."""
    loader = None
    where = f"command line: {'.'.join(map(str, root))}" if root else str(source.file)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        count = itertools.count()
        for key, line, fault in _walk(node, root, count):
            if fault:
                at = "command line" if root else f"{source.file}, line {line}"
                raise CvlctlError(f"{at}: {'.'.join(map(str, key))}: {fault}" if key else f"{at}: {fault}")
            source.lines[key] = _COMMAND_LINE if root else line
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}, line {mark.line + 1}" if mark and not root else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise CvlctlError(f"{at}: not valid YAML: {problem}", "check indentation, colons and brackets") from error
    except (RecursionError, ValueError) as error:
        raise CvlctlError(f"{where}: not valid YAML: {type(error).__name__}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _walk(node: yaml.Node, key: Key, count: Iterator[int]) -> Iterator[tuple[Key, int, str | None]]:
    """(key, line, fault or None) of everything under the node."""
    line = node.start_mark.line + 1
    if next(count) > _MAX_NODES:
        yield key, line, "too many values, or an alias that holds itself"
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield (*key, place), item.start_mark.line + 1, None
            yield from _walk(item, (*key, place), count)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode) or name.tag.rsplit(":")[-1] not in ("str", "merge"):
                yield key, line, f"key {getattr(name, 'value', '')!s} is not text: put it in quotes"
                return
            if name.value in seen and name.value != "<<":
                yield key, line, f"key {name.value!r} is given twice; the first is on line {seen[name.value]}"
            seen[name.value] = line
            yield (*key, name.value), line, None
            yield from _walk(value, (*key, name.value), count)
    elif node.tag.endswith(":float") and not math.isfinite(_float(node.value)):
        yield key, line, f"{node.value} is not a finite number"


def _float(text: str) -> float:
    text = text.replace("_", "").lower()
    return math.inf if "." in text and text.lstrip("+-") in (".inf", ".nan") else 0.0 if ":" in text else float(text)


def override(source: Source, data: dict[str, Any], text: str) -> None:
    """Set `key.sub=value` in `data`; a number as key is a place in a list."""
    dotted, equals, value = text.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        what = f"command line: {text!r} is not of the form key.sub=value"
        raise CvlctlError(what, "for example steps=1000 or seeds=[0,1]")
    key: Key = ()
    where: Any = data
    for depth, name in enumerate(names, start=1):
        part: str | int = int(name) if isinstance(where, list) and name.isdecimal() else name
        legal = isinstance(where, dict) or (isinstance(where, list) and isinstance(part, int) and part < len(where))
        if not legal:
            inside = f"{'.'.join(map(str, key))} is {shown(where)}"
            raise CvlctlError(f"command line: {dotted} cannot be set: {inside}", "set the whole of it instead")
        key = (*key, part)
        if depth == len(names):
            for old in [k for k in source.lines if k[: len(key)] == key]:
                del source.lines[old]
            where[part] = _parse(value, source, key)
            source.lines[key] = _COMMAND_LINE
        else:
            if isinstance(where, dict) and where.get(part) is None:
                where[part] = {}
                source.lines[key] = _COMMAND_LINE
            where = where[part]


def shown(value: Any) -> str:
    """A value in a message, cut to a line's length."""
    words = {type(None): "nothing", dict: "a mapping", list: f"the list {value}", tuple: f"the list {value}"}
    text = words.get(type(value)) or (str(value).lower() if isinstance(value, bool) else repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
