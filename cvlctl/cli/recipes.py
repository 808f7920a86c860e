"""`cvlctl recipes`: parse, call, render. As `app`, it imports nothing heavy before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cvlctl.cli.console import console, present
from cvlctl.cli.options import Json, register
from cvlctl.terminal import print_text

COMMANDS = ("run", "build-dataset", "pretrain", "finetune", "evaluate")  # held to those of experiments by a test

app = typer.Typer(help="Recipes: what there is, what they may say, copies to edit, and whether they are valid.")


def names(incomplete: str) -> list[str]:
    """Completion: recipes that came with cvlctl."""
    from cvlctl.recipes import shipped

    return [name for name in shipped.names() if name.startswith(incomplete)]


def commands(incomplete: str) -> list[str]:
    """Completion: commands that take a recipe."""
    return [name for name in COMMANDS if name.startswith(incomplete)]


Name = Annotated[
    str, typer.Argument(metavar="NAME", help="As `ls` has it: quickstart, methods/rewards.", autocompletion=names)
]


@register(app, "ls", None, "cvlctl recipes ls")
def ls(
    root: Annotated[
        Path | None, typer.Argument(help="Directory to look under. Default: recipes, or else what came with cvlctl.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List recipes: which command each is for, and what it reproduces."""
    from cvlctl.experiments import shelf

    present(lambda: shelf.ls(root), lambda result: shelf.render_ls(result, console()), as_json)


@register(app, "show", None, "cvlctl recipes show quickstart")
def show(name: Name, as_json: Json = False) -> None:
    """Print a recipe that came with cvlctl."""
    from cvlctl.experiments import shelf

    present(lambda: shelf.show(name), lambda result: print_text(result["text"], end=""), as_json)


@register(app, "cp", None, "cvlctl recipes cp quickstart .")
def cp(
    name: Name,
    to: Annotated[Path, typer.Argument(help="A file, or a directory that is there.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace another file of that name.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe that came with cvlctl, to edit and run it.

    Stores that it names and that came along, too, are copied into `data` beside it; what is there already stays.
    """
    from cvlctl.experiments import shelf

    present(lambda: shelf.copy(name, to, force=force), lambda result: shelf.render_copy(result, console()), as_json)


@register(app, "schema", None, "cvlctl recipes schema finetune > finetune.json")
def schema(
    command: Annotated[
        str, typer.Argument(metavar="COMMAND", help="Whose recipes. Default: those of `run`.", autocompletion=commands)
    ] = "run",
) -> None:
    """Print the JSON Schema of a command's recipes: every key with its meaning, for editors and programs.

    Recipes that came with cvlctl name theirs in a comment, so that editors with a YAML language server complete and
    check keys. docs/recipes.md shows the same as tables.
    """
    from cvlctl.experiments import shelf

    present(lambda: shelf.schema(command), lambda result: None, True)


@register(app, "validate", None, "cvlctl recipes validate recipes/quickstart.yaml")
def validate(
    paths: Annotated[list[Path] | None, typer.Argument(help="Recipes or directories. Default: as `ls`.")] = None,
    as_json: Json = False,
) -> None:
    """Check recipes against the schema; exit code 2 where one is not valid."""
    from cvlctl.experiments import shelf

    result = present(
        lambda: shelf.validate(paths or []), lambda result: shelf.render_validate(result, console()), as_json
    )
    raise typer.Exit(0 if all(one["ok"] for one in result) else 2)
