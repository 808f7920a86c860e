"""Completion of `KEY=VALUE` on the command line, from the JSON Schemas that travel with cvlctl: nothing is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cvlctl.errors import CvlctlError
from cvlctl.recipes.shipped import SCHEMAS, root
from cvlctl.recipes.yamlfile import read

Node = Mapping[str, Any]


def keys(command: str, recipe: Path | None, typed: str) -> list[str]:
    """The words that `typed` may become: `algorithm.bc_` becomes `algorithm.bc_coefficient=`, of the algorithm that
    the recipe names, or of any. After the `=`: the values that a key is one of."""
    schema = json.loads((root() / "recipes" / SCHEMAS / f"{command}.json").read_text())
    data = _data(recipe)
    key, equals, value = typed.partition("=")
    *path, last = key.split(".")
    nodes: list[tuple[Node, Any]] = [(schema, data)]
    for part in path:
        nodes = [child for node, there in nodes for name, *child in _children(schema, node, there) if name == part]  # type: ignore[misc]
    children = [child for node, there in nodes for child in _children(schema, node, there)]
    if equals:
        return sorted({f"{key}={one}" for name, node, _ in children if name == last for one in _values(schema, node)
                       if one.startswith(value)})  # fmt: skip
    found = {".".join([*path, name]): _deeper(schema, node, there) for name, node, there in children
             if name.startswith(last)}  # fmt: skip
    return sorted(f"{name}{'.' if deeper else '='}" for name, deeper in found.items())


def _data(recipe: Path | None) -> Any:
    try:
        return read(recipe)[1] if recipe is not None else {}
    except CvlctlError:
        return {}


def _children(schema: Node, node: Node, data: Any) -> Iterator[tuple[str, Node, Any]]:
    """Keys of the mappings that a node may be, with their nodes and the recipe's data there."""
    given = data if isinstance(data, Mapping) else {"name": data} if isinstance(data, str) else {}
    for one in _branches(schema, node, given):
        for name, child in one.get("properties", {}).items():
            yield name, child, given.get(name)
        more = one.get("additionalProperties")
        if isinstance(more, Mapping) and more.get("allOf"):  # stages, whose names the recipe says
            for name, value in given.items():
                yield str(name), more, value


def _branches(schema: Node, node: Node, data: Mapping[str, Any]) -> Iterator[Node]:
    if "$ref" in node:
        yield from _branches(schema, schema["$defs"][node["$ref"].split("/")[-1]], data)
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _branches(schema, choice, data)
    for rule in node.get("allOf", ()):
        if all(data.get(key) == value["const"] for key, value in rule["if"]["properties"].items()):
            yield rule["then"]
    tag = _const(node.get("properties", {}).get("name", {}))
    if tag is None or data.get("name", tag) == tag:
        yield node


def _const(node: Node) -> Any:
    """The one value that a node may have, beside a placeholder."""
    return next((one["const"] for one in (node, *node.get("anyOf", ())) if "const" in one), None)


def _deeper(schema: Node, node: Node, data: Any) -> bool:
    return next(_children(schema, node, data), None) is not None


def _values(schema: Node, node: Node) -> Iterator[str]:
    for one in (node, *node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from (str(value).lower() if isinstance(value, bool) else str(value) for value in one.get("enum", ()))
        if "const" in one:
            yield str(one["const"])
        if one.get("type") == "boolean":
            yield from ("true", "false")
        if "$ref" in one:
            tag = _const(schema["$defs"][one["$ref"].split("/")[-1]].get("properties", {}).get("name", {}))
            if tag is not None:
                yield str(tag)
