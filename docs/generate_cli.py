"""Write docs/cli.md from the command line itself; with --check, fail where it is out of date.

python docs/generate_cli.py [--check]
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from cvlctl.cli.app import app

TARGET = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Written by `python docs/generate_cli.py`; do not edit.

A recipe is a YAML file; `KEY=VALUE` arguments win over it (`algorithm.bc_coefficient=0.1`, `seeds=[0,1]`). Results go
to stdout, progress to stderr; `--json` prints one JSON document, for errors too (`{"error": ..., "hint": ...}`). Every
command can be interrupted and run again: it goes on from where it was saved last, and says so where it has finished
already.

Recipes are YAML 1.2: `0100` is a hundred, `1e6` a number, `1:30`, `yes` and `off` are text. In paths, of recipes and of
arguments, `~` at the start is the home directory and `$NAME` or `${NAME}` what the environment says. What stays
unresolved is an error: no folder is ever called `~` or `$NAME`.

Exit codes: 0 done, 1 `data verify` or `doctor --parity` found faults, 2 something to mend (two lines say what and how),
70 a bug of ours, 130 interrupted.
"""


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command under `command`, with its full name; groups before their commands."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


def section(path: str, command: Any) -> str:
    """A command's part of the page."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    lines = [f"## {path}" if path.count(" ") < 2 else f"### {path}"]
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(paragraph.split())
        lines += ["", textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)]
    if not hasattr(command, "commands"):
        words = [_usage(p) for p in arguments]
        lines += ["", "```", " ".join([path, *words, "[OPTIONS]" if options else ""]).strip(), "```"]
    if command.epilog:
        lines += ["", f"Example: `{command.epilog.removeprefix('Example: ')}`"]
    if arguments or options:
        lines += ["", "| | |", "| --- | --- |"]
        lines += [f"| `{_usage(p)}` | {_described(p)} |" for p in arguments]
        lines += [f"| {', '.join(f'`{name}`' for name in p.opts)} | {_described(p)} |" for p in options]
    return "\n".join(lines) + "\n"


def _usage(argument: Any) -> str:
    name = (argument.metavar or argument.name).strip("[]{}.").upper()
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def _described(parameter: Any) -> str:
    default = parameter.default
    default = getattr(default, "value", default)
    shown = default is not None and not isinstance(default, bool | list | tuple) and str(default)
    return (parameter.help or "") + (f" Default: `{default}`." if shown else "")


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(path, command) for path, command in commands(get_command(app), "cvlctl"))])


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page())
    elif not TARGET.exists() or TARGET.read_text() != page():
        sys.exit("docs/cli.md is out of date: run python docs/generate_cli.py")
