"""`cvlctl runs ls | show | rm`: parse, call, render. As `app`, it imports nothing heavy before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cvlctl.cli.console import console, present
from cvlctl.cli.options import Json, register
from cvlctl.errors import CvlctlError
from cvlctl.streams import is_terminal
from cvlctl.terminal import visible

app = typer.Typer(help="Runs and evaluations: what there is, what one is, and removing them.")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or an evaluation's.", show_default=False)]


@register(app, "ls", None, "cvlctl runs ls runs/quickstart")
def ls(
    root: Annotated[Path, typer.Argument(help="Directory to look under.")] = Path("runs"), as_json: Json = False
) -> None:
    """List the runs and evaluations under a directory, with their sizes."""
    from cvlctl.experiments import inventory

    present(lambda: inventory.ls(root), lambda result: inventory.render_ls(result, console()), as_json)


@register(app, "show", None, "cvlctl runs show runs/quickstart/finetune/cvl")
def show(run: Run, as_json: Json = False) -> None:
    """Show one: its recipe, data, versions, how it computes, its last metrics; what scored it, and what needs it."""
    from cvlctl.experiments import inventory

    present(lambda: inventory.show(run), lambda result: inventory.render_show(result, console()), as_json)


@register(app, "rm", None, "cvlctl runs rm runs/short runs/shorter")
def rm(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Folders of runs or evaluations.", show_default=False)
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what other runs were started from, or read.")] = False,
    as_json: Json = False,
) -> None:
    """Remove runs or evaluations, for good; it asks first.

    What other runs need stays, unless --force is given. In the folders only what cvlctl wrote is removed; anything else
    stays there, and is told of. No link is followed.
    """
    from cvlctl.experiments import inventory

    def work() -> Any:
        chosen = list(dict.fromkeys(folders))
        rows = inventory.check_removal(chosen, force=force)
        if not yes:
            _ask(rows)
        return inventory.remove(chosen, force=force)

    present(work, lambda result: inventory.render_rm(result, console()), as_json)


def _ask(rows: list[dict[str, Any]]) -> None:
    if not is_terminal(sys.stdin):
        raise CvlctlError(
            "rm asks before it removes anything, and nobody is here to answer", "--yes says it beforehand"
        )
    for row in rows:
        typer.echo(f"{row['kind']}: {visible(row['path'])} ({row['size_mb']:.1f} MB)", err=True)
    if not typer.confirm("remove for good?", err=True):
        raise CvlctlError("nothing was removed")
