"""The JSON Schema of recipes, with what each key means: for editors, for docs/recipes.md, for completion."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from cvlctl.recipes.meanings import SHARED, meanings

Node = Mapping[str, Any]
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_SIGNS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


class _Described(GenerateJsonSchema):
    """Pydantic's, with what is said beside the fields."""

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        return _described(super().model_schema(schema), schema["cls"])

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        return _described(super().dataclass_schema(schema), schema["cls"])


def _described(found: JsonSchemaValue, model: Any) -> JsonSchemaValue:
    said = meanings(model)
    for base in getattr(model, "described_by", ()):
        said |= meanings(base)
        page = (sys.modules[base.__module__].__doc__ or "").split("\n\n")[0]
        found["description"] = " ".join(f"{page} {found.get('description', '')}".split())
    for name, node in found.get("properties", {}).items():
        field = name if name in said else f"{name}_"  # an alias: `from`
        if text := said.get(field, SHARED.get(name)):
            node["description"] = text.replace("None", "none")
        node.pop("title", None)
    return found


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe. Numbers may be written as YAML files of ours do: 20_000."""
    found: dict[str, Any] = _standard(model.model_json_schema(schema_generator=_Described))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _standard(node: Any) -> Any:
    """Bounds by their standard names; whole numbers as text with underscores too, which is what editors take them
    for."""
    if isinstance(node, list):
        return [_standard(one) for one in node]
    if not isinstance(node, dict):
        return node
    found = {_BOUNDS.get(key, key) if not isinstance(value, dict) else key: _standard(value)
             for key, value in node.items()}  # fmt: skip
    if found.get("type") == "integer":
        found["type"], found["pattern"] = ["integer", "string"], "^[0-9][0-9_]*$"
    return found


class Row(NamedTuple):
    """What there is to say of a key."""

    key: str
    kind: str  # what its value may be, in words
    default: Any  # MISSING: it must be given
    meaning: str
    inside: tuple[tuple[str, str], ...]  # (choice or "", name of a definition) of mappings that it may be


MISSING = object()


def rows(node: Node) -> Iterator[Row]:
    """The keys of a mapping in a schema."""
    for key, value in node.get("properties", {}).items():
        default = value.get("default", MISSING if key in node.get("required", ()) else None)
        inside = tuple(dict.fromkeys(_inside(value)))
        yield Row(key, words(value), default, value.get("description", ""), inside)


def words(node: Node) -> str:
    """What a value may be."""
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in dict.fromkeys(map(_plain, node["enum"])))
    if choices := node.get("anyOf", node.get("oneOf")):
        return " or ".join(dict.fromkeys(filter(None, map(words, choices))))
    kind = node.get("type")
    if kind == "array":
        items = node.get("items", {})
        pair = node.get("prefixItems")
        return f"list of {' and '.join(map(words, pair)) if pair else words(items) or 'anything'}"
    if kind in (["integer", "string"], "integer", "number"):
        bounds = [f"{_SIGNS[name]} {node[name]:,}" for name in _SIGNS if name in node]
        return " ".join(["number" if kind == "number" else "whole number", ", ".join(bounds)]).strip()
    named = {"string": "text", "boolean": "`true`, `false`", "null": "none", "object": "mapping"}
    if kind == "string" and node.get("format") == "path":
        return "path"
    return named.get(str(kind), "mapping" if "$ref" in node else "anything")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _inside(node: Any, tag: str = "") -> Iterator[tuple[str, str]]:
    """Definitions that a value may be: with the name that chooses one, where one is chosen by name."""
    if not isinstance(node, dict):
        return
    if "$ref" in node:
        yield tag, node["$ref"].split("/")[-1]
    named = {ref.split("/")[-1]: name for name, ref in node.get("discriminator", {}).get("mapping", {}).items()}
    for one in (*node.get("anyOf", ()), *node.get("oneOf", ()), node.get("items"), node.get("additionalProperties")):
        if isinstance(one, dict):
            yield from _inside(one, named.get(one.get("$ref", "").split("/")[-1], tag))
