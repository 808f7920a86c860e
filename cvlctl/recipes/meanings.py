"""What the keys of recipes mean: the comments beside the fields of their models, read from the source.

So a key is told in one place, where it is defined: at the end of its line, or above it.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tokenize
from functools import cache
from typing import Any

# of keys that mean the same wherever they are and nothing else is said beside them
SHARED = {
    "name": "which one; the other keys here are its own",
    "stores": "paths of stores, or {path: ..., ...}",
    "out": "where the result goes",
    "seed": "of what is drawn at random",
    "seeds": "independent repetitions, each of which is a policy or critic of its own; they train together",
    "steps": "updates",
    "batch_size": "transitions in an update",
    "log_every_steps": "how often metrics are written to metrics.jsonl, in steps",
    "hidden": "widths of the networks' hidden layers",
    "learning_rate": "of Adam",
    "gamma": "discount a step",
    "ema_rate": "by which target networks follow, an update",
    "latent_dim": "numbers that phi and psi give, whose inner product is f",
    "layer_norm": "in the hidden layers",
    "episodes": "how many whole episodes",
    "transitions": "whole episodes until there are so many steps",
    "noise": "standard deviation of what is added to actions",
}


def meanings(model: type) -> dict[str, str]:
    """What is said of each field of a model or Config, in its class or the nearest of those that it inherits from."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        found |= _comments(one.__module__).get(one.__qualname__, {})
    return found


@cache
def _comments(module: str) -> dict[str, dict[str, str]]:
    """Of each class in a module's source: field -> comment. Nothing where there is no source."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}
    said, alone = _by_line(source)
    classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return {node.name: dict(_fields(node, said, alone)) for node in classes}


def _by_line(source: str) -> tuple[dict[int, str], set[int]]:
    """Comments by line, and the lines that hold nothing else."""
    said, alone = dict[int, str](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:", "# fmt:")):
            said[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    return said, alone


def _fields(node: ast.ClassDef, said: dict[int, str], alone: set[int]) -> Any:
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        above, line = list[str](), field.lineno - 1
        while line in alone:
            above.insert(0, said[line])
            line -= 1
        words = [*above, *([said[field.end_lineno or 0]] if field.end_lineno in said else [])]
        if words:
            yield field.target.id, " ".join(words)
