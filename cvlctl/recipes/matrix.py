"""Experiments: stages, multiplied by a matrix; plain data in, plain data out.

    out: runs/demo
    matrix: {task: [metaworld/drawer-close-v3], algorithm: [{name: cvl, bc_coefficient: 0.1}, bc]}
    stages:
      data:  {command: build-dataset, task: "${task}", source: {...}, out: "${out}/${task}.zarr"}
      train: {command: finetune, algorithm: "${algorithm}", stores: ["${out}/${task}.zarr"], ...,
              out: "${out}/${task}/${algorithm}"}

* A stage is `command` and that command's recipe; stages run in the order of the file.
* `${key}` stands for one value of the matrix key, `${key.sub}` for a part of a value that is a mapping, `${out}` for
  the experiment's `out`. Where it is the whole of a scalar, the value itself takes its place, mappings included; inside
  longer text its text does (a mapping's is its `name`; `.name` of a plain value is the value). Other names are those of
  environment variables, which paths may hold (`cvlctl.paths`).
* A stage runs once for each combination of the matrix keys that it mentions: the one above builds its data once a task.
  A placeholder that names neither is an error, and so are two jobs with the same `out`.
* `sizes: {small: {frames: 20_000, tasks: [...]}, full: {...}}` are scales of one experiment, each with the same keys,
  and `size: small` (or `size=full` behind the file's name) chooses one: `${size.frames}` stands for its value anywhere
  in the file, a whole list of the matrix included (`task: "${size.tasks}"`), and `${size.name}` is what it is called.
* Every job's recipe is checked before the first one starts.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.recipes.explain import nearest
from cvlctl.recipes.yamlfile import Source, dotted, shown
from cvlctl.recipes.yamltext import Key, cut

MAX_JOBS = 10_000  # of a stage: more are a slip, and their plan alone would take minutes
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")


class Filled(NamedTuple):
    """A stage with one combination of matrix values in place."""

    stage: str
    command: str
    combination: dict[str, Any]  # the matrix keys that the stage mentions, and their values
    body: dict[str, Any]  # its command's recipe, not yet checked


def sized(data: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """An experiment with the values of its size in place: `${size.key}`, and `${size.name}`, what it is called.

    Raises:
        CvlctlError: naming file, line and key: a size that is none, or one that lacks a key which another has.
    """
    size, sizes = data.get("size"), data.get("sizes", {})
    legal = isinstance(sizes, Mapping) and all(isinstance(values, Mapping) for values in sizes.values())
    if not legal or not (size or sizes):
        return dict(data)  # what the schema refuses, or no sizes
    keys = list(dict.fromkeys(key for values in sizes.values() for key in values))
    for name, key in itertools.product(sizes, keys):
        if key not in sizes[name]:
            what = f"{source.where(('sizes', name))}: sizes.{name} lacks the key {key}, which another size has"
            raise CvlctlError(what, f"add `{key}: ...`: all sizes have the same keys, so that each runs the same file")
    if size not in tuple(sizes):
        raise CvlctlError(f"{source.where(('size',))}: size is {shown(size)}", nearest(size, list(sizes), "sizes"))
    values = {"size": {**sizes[size], "name": size}}
    return {key: value if key == "sizes" else _fill(value, values, source, (key,)) for key, value in data.items()}


def expand(
    out: str,
    matrix: Mapping[str, Sequence[Any]],
    stages: Mapping[str, Mapping[str, Any]],
    commands: Sequence[str],
    source: Source,
) -> Iterator[Filled]:
    """Every stage once for each combination of the matrix keys that it mentions, in the order of the file.

    Raises:
        CvlctlError: naming file and line: a command that is not among `commands`, or a placeholder of no matrix key.
    """
    for stage, given in stages.items():
        at: Key = ("stages", stage)
        body = dict(given)
        command = body.pop("command", None)
        if command not in commands:
            key = (*at, "command")
            what = f"{source.where(key)}: {dotted(key)} is {shown(command)}"
            raise CvlctlError(what, nearest(command, commands, "commands"))
        mentioned: set[str] = set()
        for key, text in _texts(body, at):
            for name in _PLACEHOLDER.findall(text):
                mentioned.add(name.split(".")[0])
                if name.split(".")[0] not in (*matrix, "out") and name not in os.environ:
                    what = f"{source.where(key)}: ${{{cut(name)}}} names no matrix key"
                    raise CvlctlError(what, nearest(name, [*matrix, "out"], "names"))
        keys = [key for key in matrix if key in mentioned]
        if (num := math.prod(len(matrix[key]) for key in keys)) > MAX_JOBS:
            what = f"{source.where(at)}: {dotted(at)} would be {num:,} jobs, one for each of {', '.join(keys)}"
            raise CvlctlError(what, f"at most {MAX_JOBS:,} are run: mention fewer matrix keys in it")
        for values in itertools.product(*(matrix[key] for key in keys)):
            combination = dict(zip(keys, values, strict=True))
            yield Filled(stage, command, combination, _fill(body, {**combination, "out": out}, source, at))


def _texts(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _texts(item, (*key, name))


def _fill(value: Any, values: Mapping[str, Any], source: Source, key: Key) -> Any:
    if isinstance(value, dict):
        return {name: _fill(item, values, source, (*key, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, values, source, (*key, place)) for place, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(name: str) -> Any:
        first, *rest = name.split(".")
        if first not in values:
            return f"${{{name}}}"  # of the environment
        found = values[first]
        for part in rest:
            if isinstance(found, Mapping) and part in found:
                found = found[part]
            elif isinstance(found, Mapping) or part != "name":
                what = f"{source.where(key)}: ${{{name}}}: {cut(text_of(found))} has no {cut(part)}"
                raise CvlctlError(what, nearest(part, list(found), "keys") if isinstance(found, Mapping) else "")
        return found

    whole = _PLACEHOLDER.fullmatch(value)
    return look_up(whole[1]) if whole else _PLACEHOLDER.sub(lambda match: text_of(look_up(match[1])), value)


def text_of(value: Any) -> str:
    """The value of a matrix key in words."""
    return str(value.get("name", value)) if isinstance(value, Mapping) else str(value)
