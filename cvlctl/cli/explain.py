"""`cvlctl explain`: parse, call, render. As `app`, it imports nothing heavy before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cvlctl.cli.console import console, present
from cvlctl.cli.options import Json, Quiet
from cvlctl.errors import CvlctlError
from cvlctl.terminal import print_text


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run with an occupancy critic.", show_default=False)],
    episode: Annotated[
        int, typer.Option("--episode", help="Its number in the store; with --play, in evaluations.")
    ] = 0,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N,N,...", help="Of the episode. Default: first, middle and last.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Where the episode lies. Default: the first that the run was trained on."),
    ] = None,
    play: Annotated[bool, typer.Option("--play", help="Play the episode now, by the run's policy.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Of training. Default: the run's first.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="last, or a step such as 5000.")] = "last",
    label: Annotated[str | None, typer.Option("--label", help="Whose rewards count. Default: the run's own.")] = None,
    top: Annotated[str, typer.Option("--top", metavar="N|all", help="How many states and episodes of each.")] = "3",
    q_map: Annotated[
        str | None, typer.Option("--map", metavar="X,Y", help="Draw Q over these columns of the observation instead.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="A .png or .svg. Of --map, and of frames, also without: in RUN/explain/."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the picture.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a run's Q stands on: the states of the data that carry it, each with its exact share.

    At moments of an episode, for the policy's action, the logged one, and a rejected one (the lowest Q of 64). Q of an
    occupancy critic is a weighted mean of the data's rewards; of LAEO, a mean over success examples.
    """
    about: dict[str, Any] = {"seed": seed, "checkpoint": checkpoint, "label": label, "plot": plot, "force": force}
    if q_map is not None:
        columns = _whole_numbers("--map", q_map)
        if len(columns) != 2:
            raise CvlctlError(f"--map {q_map} is not two columns", "such as --map 0,1: they count from 0")

        def drawn() -> Any:
            from cvlctl.score import explain

            return explain.map_q(run, (columns[0], columns[1]), **about)

        present(drawn, lambda result: print_text(result["path"]), as_json, quiet)
        return
    chosen = None if steps is None else _whole_numbers("--steps", steps)
    count = _top(top)

    def work() -> Any:
        from cvlctl.score import explain

        return explain.explain(run, episode=episode, steps=chosen, store=store, play=play, top=count, **about)

    def show(result: Any) -> None:
        from cvlctl.score import explained

        explained.render(result, console())

    present(work, show, as_json, quiet)


def _top(text: str) -> Any:
    """ "all" or a number."""
    try:
        return text if text == "all" else int(text)
    except ValueError:
        raise CvlctlError(f"--top {text} is no whole number", "such as --top 3, or --top all") from None


def _whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of an option's "0,50,100"; a CvlctlError where it is something else."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise CvlctlError(f"{option} {text} is not a list of whole numbers", f"such as {option} 0,50") from None
