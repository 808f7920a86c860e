"""A schema's errors in words: file, line and key, what was expected, and the nearest legal name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from cvlctl.errors import CvlctlError
from cvlctl.recipes.yamlfile import Source, dotted, shown
from cvlctl.recipes.yamltext import Key, cut

# --- the schema's errors in words

_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a number",
    "bool_": "true or false",
    "string_": "text",
    "path_": "a path",
    "list_": "a list",
    "tuple_": "a list",
    "dict_": "a mapping (key: value)",
    "mapping_": "a mapping (key: value)",
    "model_": "a mapping (key: value)",
    "dataclass_": "a mapping (key: value)",
}
_ONCE_BOOLEANS = ("yes", "no", "on", "off", "y", "n")  # before YAML 1.2
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "of at least",
    "less_than": "below",
    "less_than_equal": "of at most",
}


def explain(
    invalid: ValidationError, model: type[BaseModel], data: Any, source: Source, prefix: Key = ()
) -> CvlctlError:
    """The first fault that pydantic found in `data`, which lies at `prefix` in the file, in one sentence."""
    faults = invalid.errors(include_url=False)
    # an unknown key first: a misspelt key is also a missing one
    unknown = [fault for fault in faults if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument")]
    fault: Any = (unknown or faults)[0]
    kind, context, given = fault["type"], fault.get("ctx") or {}, fault["input"]
    key = _data_key(data, fault)
    full = (*prefix, *key)
    where, name = source.where(full), dotted(full)
    if unknown:
        legal = _legal_names(model.model_json_schema(), data, key[:-1])
        return CvlctlError(f"{where}: unknown key {name}", nearest(key[-1], legal, "keys here"))
    if kind == "union_tag_not_found" and isinstance(given, Mapping):
        return CvlctlError(f"{where}: missing key {name}.name", "add `name: ...`")
    if kind == "missing" and isinstance(key[-1], int):  # of a list of so many
        count = 1 + max(int(other["loc"][-1]) for other in faults if other["loc"][:-1] == fault["loc"][:-1])
        expected = f"expected a list of {count}, given {shown(given)}"
        return CvlctlError(f"{source.where(full[:-1])}: {dotted(full[:-1])}: {expected}")
    if kind in ("missing", "missing_argument"):
        return CvlctlError(f"{where}: missing key {name}", f"add `{key[-1]}: ...`")
    if kind == "union_tag_invalid":
        legal = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        what = f"{source.where((*full, 'name'))}: {name}.name: unknown name {shown(context['tag'])}"
        return CvlctlError(what, nearest(context["tag"], legal, "names"))
    if kind in ("value_error", "cvlctl"):
        message = str(context.get("what") or context.get("error") or fault["msg"])
        # where the fault is of several keys together: the line of the one that the message names
        inside = [str(part) for part in given] if isinstance(given, Mapping) else []
        named = [(*full, part) for part in inside if re.search(rf"\b{re.escape(part)}\b", message)]
        lines = [part for part in named if part in source.lines]
        where = source.where(lines[0] if len(lines) == 1 else full)
        return CvlctlError(f"{where}: {name + ': ' if name else ''}{message}", str(context.get("hint", "")))
    same = [other for other in faults if _data_key(data, other) == key]
    expected = " or ".join(dict.fromkeys(map(_expected, same)))
    alone = expected == "a list" and isinstance(given, str | int | float)
    hint = f"for a list of one, write [{shown(given).strip(chr(39))}]" if alone else ""
    if expected == "true or false" and str(given).lower() in _ONCE_BOOLEANS:
        hint = f"write true or false: to YAML 1.2 {given} is text"
    return CvlctlError(f"{where}: {name}: expected {expected}, given {shown(given)}", hint)


def nearest(name: object, legal: Sequence[str], what: str) -> str:
    """A hint: the legal name that is most like `name`, and all of them."""
    near = difflib.get_close_matches(cut(str(name)), legal, 1, 0.5)
    return f"{f'did you mean {near[0]}? ' if near else ''}legal {what}: {', '.join(legal)}"


def _data_key(data: Any, fault: Any) -> Key:
    """The fault's place in the data: pydantic's own, less the tags of unions and names of types between."""
    key: list[str | int] = []
    for place, part in enumerate(fault["loc"]):
        listed = isinstance(data, Sequence) and not isinstance(data, str)
        there = part in data if isinstance(data, Mapping) else listed and isinstance(part, int) and part < len(data)
        if there:
            key.append(part)
            data = data[part]
        elif place == len(fault["loc"]) - 1 and fault["type"] in ("missing", "missing_argument"):
            key.append(part)
    return tuple(key)


def _expected(fault: Any) -> str:
    kind, context = fault["type"], fault.get("ctx") or {}
    if kind == "literal_error":
        return context["expected"]
    if kind in _BOUNDS:
        return f"a number {_BOUNDS[kind]} {next(iter(context.values()))}"
    if kind in ("too_short", "string_too_short"):
        return "text" if kind == "string_too_short" else f"a list of at least {context['min_length']}"
    if kind == "too_long":
        return f"a list of at most {context['max_length']}"
    if kind == "string_pattern_mismatch":
        return "auto, cpu, cuda or cuda:N"
    return next((words for start, words in _EXPECTED.items() if kind.startswith(start)), fault["msg"])


def _legal_names(schema: Mapping[str, Any], data: Any, key: Key) -> list[str]:
    """The names that the JSON schema allows in the mapping at `key` of the data."""
    nodes: list[Any] = [schema]
    for part in (*key, None):
        nodes = [branch for node in nodes for branch in _branches(schema, node, data)]
        if part is not None:
            nodes = [inner for node in nodes if (inner := _inner(node, part)) is not None]
            data = data[part]
    return sorted({name for node in nodes for name in node.get("properties", {})})


def _inner(node: Mapping[str, Any], part: str | int) -> Any:
    """What a schema says of the value at `part`; None where it says nothing."""
    if isinstance(part, int):
        return node.get("items")
    more = node.get("additionalProperties")
    return node.get("properties", {}).get(part, more if isinstance(more, Mapping) else None)


def _branches(schema: Mapping[str, Any], node: Mapping[str, Any], data: Any) -> Iterator[Mapping[str, Any]]:
    if "$ref" in node:
        yield from _branches(schema, schema["$defs"][node["$ref"].split("/")[-1]], data)
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
        yield from _branches(schema, choice, data)
    tag = node.get("properties", {}).get("name", {}).get("const")
    if tag is None or not isinstance(data, Mapping) or data.get("name") == tag:
        yield node
