"""YAML text into plain data, as YAML 1.2 reads it, with the line of every key.

Plain data: dicts whose keys are text, lists, text, numbers, booleans, None. Nothing in them is shared: an alias
(`*name`) stands for a copy, so that changing one place changes no other. PyYAML finds the structure; what a scalar
means is 1.2's core schema: 0100 is a hundred, 0o10 eight, 1e6 a number; 1:30, dates, yes, no, on and off are text.
Beside it `_` may stand between digits, and `<<: *name` merges a mapping into another, as before 1.2.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

Key = tuple[str | int, ...]
MAX_DEPTH = 60  # of lists and mappings in each other
MAX_VALUES = 100_000  # aliases of aliases can stand for more than memory holds
_PARSER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # C takes a tenth of the time
_TAG = "tag:yaml.org,2002:"
_DIGITS = "[0-9]+(?:_[0-9]+)*"
_INT = re.compile(rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS = {text: value for word, value in (("true", True), ("false", False), ("null", None))
          for text in (word, word.capitalize(), word.upper())} | {"": None, "~": None}  # fmt: skip
_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "null": type(None)}


class Fault(Exception):
    """What is wrong with the text, and where: line (from 1; None: nobody knows) and key."""

    def __init__(self, line: int | None, key: Key, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.line, self.key, self.problem, self.hint = line, key, problem, hint


class _Node(NamedTuple):
    line: int
    kind: str  # "scalar", "list" or "mapping"
    content: Any  # [node] of a list; [(name, value)] of a mapping, both nodes
    text: str = ""  # of a scalar, as it is written
    tag: str | None = None  # given, or "str" of what stands in quotes


def parse(text: str, root: Key = ()) -> tuple[Any, dict[Key, int]]:
    """The value of a YAML text, which lies at `root`, and the line of every key in it (from 1).

    Raises:
        Fault: it is no YAML, or none that a recipe may be.
    """
    lines: dict[Key, int] = {}
    try:
        events = yaml.parse(text, Loader=_PARSER)
        node = _document(events)
        return (None if node is None else _built(node, root, lines, itertools.count())), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "check indentation, colons and brackets"
        raise Fault(mark and mark.line + 1, (), f"not valid YAML: {problem}", hint) from error
    except (RecursionError, ValueError) as error:  # aliases too deep in each other; half a character
        raise Fault(None, (), f"not valid YAML: {type(error).__name__}: {error}") from error


def cut(text: str, width: int = 80) -> str:
    """Somebody's text in a message: in one line, printable, and no longer than `width`."""
    short = text if len(text) <= width else text[: width - 3] + "..."
    return short if short.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def _document(events: Iterator[Any]) -> _Node | None:
    """The node of the only document; None where there is none."""
    anchors: dict[str, _Node] = {}
    found = None
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent) and found is not None:
            raise Fault(_line(event), (), "not valid YAML: a second document begins", "a recipe is one document")
        if isinstance(event, yaml.NodeEvent):
            found = _composed(event, events, anchors, 0)
    return found


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _composed(event: Any, events: Iterator[Any], anchors: dict[str, _Node], depth: int) -> _Node:
    """The node that begins with `event`; what else belongs to it is taken from `events`."""
    line = _line(event)
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            problem = (
                f"not valid YAML: *{cut(str(event.anchor))} names nothing before it, or is an alias that holds itself"
            )
            raise Fault(line, (), problem)
        return anchors[event.anchor]
    if depth > MAX_DEPTH:
        raise Fault(line, (), f"not valid YAML: lists and mappings are more than {MAX_DEPTH} deep in each other")
    if isinstance(event, yaml.ScalarEvent):
        tag = event.tag or (None if event.implicit[0] else _TAG + "str")
        node = _Node(line, "scalar", None, event.value, None if tag == "!" else tag)
    else:
        parts = []
        while not isinstance(inner := next(events), yaml.CollectionEndEvent):
            parts.append(_composed(inner, events, anchors, depth + 1))
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _TAG + ("map" if mapping else "seq")):
            raise _unknown_tag(line, (), event.tag)
        pairs = list(zip(parts[::2], parts[1::2], strict=True)) if mapping else parts
        node = _Node(line, "mapping" if mapping else "list", pairs)
    if event.anchor:
        anchors[event.anchor] = node
    return node


def _unknown_tag(line: int, key: Key, tag: str) -> Fault:
    return Fault(line, key, f"not valid YAML: could not determine a constructor for the tag {cut(tag)!r}")


def _scalar(node: _Node, key: Key) -> Any:
    """The value of a scalar that lies at `key`."""
    if node.tag is None:
        return _core(node, key)
    name = node.tag.removeprefix(_TAG)
    if name not in _TYPES:
        raise _unknown_tag(node.line, (), node.tag)
    value = node.text if name == "str" else _core(node, key)
    if name == "float" and type(value) is int:
        return float(value)
    if type(value) is not _TYPES[name]:
        raise Fault(node.line, key, f"{cut(node.text)!r} is no !!{name}")
    return value


def _core(node: _Node, key: Key) -> Any:
    """The value of a plain scalar under 1.2's core schema."""
    text = node.text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # no number of a recipe is near it, and Python refuses to write out one of thousands of digits
        if len(text) > 100 or abs(int(text, base)) >= 2**63:
            raise Fault(node.line, key, f"{cut(text)} is too large a number")
        return int(text, base)
    if not _FLOAT.fullmatch(text) and not _NOT_FINITE.fullmatch(text):
        return text
    value = float(text) if _FLOAT.fullmatch(text) else math.inf
    if abs(value) > 1e38:  # float32 ends soon after, and some of a step's numbers are cast to it
        what = "too large a number" if math.isfinite(value) else "not a finite number"
        raise Fault(node.line, key, f"{cut(text)} is {what}")
    return value


def _built(node: _Node, key: Key, lines: dict[Key, int], count: Iterator[int]) -> Any:
    """The node as plain data of its own; the lines of the keys in it go into `lines`."""
    if next(count) > MAX_VALUES or len(key) > MAX_DEPTH:
        raise Fault(node.line, key, "too many values, or aliases too deep in each other")
    if node.kind == "scalar":
        return _scalar(node, key)
    if node.kind == "list":
        for place, item in enumerate(node.content):
            lines[*key, place] = item.line
        return [_built(item, (*key, place), lines, count) for place, item in enumerate(node.content)]
    data: dict[str, Any] = {}
    merges = [value for name, value in node.content if _is_merge(name)]
    for merged in merges:
        for part in reversed(merged.content if merged.kind == "list" else [merged]):
            if part.kind != "mapping":
                raise Fault(merged.line, key, "<< merges mappings, and nothing else")
            data |= _built(part, key, lines, count)
    given: dict[str, int] = {}
    for name, value in node.content:
        if _is_merge(name):
            continue
        text = _scalar(name, key) if name.kind == "scalar" else None
        if not isinstance(text, str):
            raise Fault(name.line, key, f"key {cut(name.text)} is not text: put it in quotes")
        if text in given:
            raise Fault(name.line, key, f"key {cut(text)!r} is given twice; the first is on line {given[text]}")
        given[text] = lines[*key, text] = name.line
        data[text] = _built(value, (*key, text), lines, count)
    return data


def _is_merge(name: _Node) -> bool:
    return name.text == "<<" and name.tag is None
