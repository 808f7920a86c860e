"""Write docs/recipes.md and recipes/schemas from the models of recipes; with --check, fail where they are out of date.

python docs/generate_recipes.py [--check]
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cvlctl.experiments import shelf
from cvlctl.experiments.commands import COMMANDS, STEPS, model
from cvlctl.recipes.schema import MISSING, Row, rows, schema

HERE = Path(__file__).parent
HEAD = """# Recipes: every key

Written by `python docs/generate_recipes.py` from the models that check recipes; do not edit. The same as JSON Schema:
`cvlctl recipes schema COMMAND`, which editors with a YAML language server complete and check keys by (recipes that came
with cvlctl name theirs in a comment). What there is to start from: `cvlctl recipes ls`, `show`, `cp`.

Lengths of time are in environment steps and training in updates, unless a key says seconds; actions and observations
are in the units of the store. Symbols in brackets are the papers'. Keys without a default must be given; `none` is what
a key is when it is left out, or `null`. Any key can be said on the command line: `algorithm.bc_coefficient=0.1`.
"""
TITLES = {
    "run": "An experiment: stages of the other commands, multiplied by a matrix ([more](experiments.md)).",
    "build-dataset": "Episodes into a store ([more](datasets.md)).",
    "pretrain": "A reward-free occupancy critic ([more](training.md)).",
    "finetune": "Policies ([more](training.md), [the methods](algorithms.md)).",
    "evaluate": "Episodes of every seed of every run, and tables of their scores ([more](scores.md)).",
}


def page() -> str:
    """The whole page."""
    told: dict[str, str] = {}
    return "\n".join([HEAD, *(line for command in ("run", *STEPS) for line in _command(command, told))])


def _command(command: str, told: dict[str, str]) -> Iterator[str]:
    found = schema(model(command))
    yield f"## {command}\n\n{TITLES[command]}\n"
    yield from _table(found, "", found.get("$defs", {}), told)


def _table(node: Mapping[str, Any], path: str, definitions: Mapping[str, Any], told: dict[str, str]) -> Iterator[str]:
    """The keys of a mapping, then the mappings in them that were not told of before."""
    listed = list(rows(node))
    yield "| key | value | default | |\n| --- | --- | --- | --- |"
    new: list[tuple[str, str]] = []
    for row in listed:
        links = []
        for choice, name in row.inside:
            heading = f"{path}{row.key}" + (f": {choice}" if choice else "")
            place = json.dumps(definitions[name], sort_keys=True)
            if place not in told:
                told[place] = heading
                new.append((heading, name))
            links.append(f"[{choice or told[place]}](#{_anchor(told[place])})")
        yield _line(row, links)
    yield ""
    for heading, name in new:
        yield f"### {heading}\n"
        if about := definitions[name].get("description"):
            yield textwrap.fill(" ".join(about.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"
        yield from _table(definitions[name], f"{heading.split(':')[0]}.", definitions, told)


def _line(row: Row, links: list[str]) -> str:
    kind = row.kind.replace("mapping", ", ".join(links), 1) if links and "mapping" in row.kind else row.kind
    kind = kind if not links or "](" in kind else f"{kind}: {', '.join(links)}".removeprefix("anything: ")
    default = (
        "" if row.default is MISSING else "its own" if isinstance(row.default, dict) else f"`{_yaml(row.default)}`"
    )
    meaning = row.meaning.replace("|", "\\|")
    return f"| `{row.key}` | {kind} | {default} | {meaning} |"


def _anchor(heading: str) -> str:
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "").replace("null", "none")


def main() -> None:
    written = {HERE / "recipes.md": page()}
    for command in COMMANDS:
        text = json.dumps(shelf.schema(command), indent=1) + "\n"
        written[HERE.parent / "recipes" / "schemas" / f"{command}.json"] = text
    stale = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
    if "--check" not in sys.argv[1:]:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(written[path])
    elif stale:
        sys.exit(f"{', '.join(path.name for path in stale)} out of date: run python docs/generate_recipes.py")


if __name__ == "__main__":
    main()
