"""Two tasks' datasets: one after the other, and both at once in worker processes.

    python benchmarks/building.py [--frames 3000] [--rounds 3] [--compile] [--json building.json]

SAC on two Metaworld tasks, sizes as shipped (256x256, batch 256, one update a frame, one thread). Both ways build by
`build_many`, with processes=1 and processes=2, so that both pay a process's start for each task; the stores are
compared: the same bits. The ratio is at most the number of idle cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common

from cvlctl.collect.build_many import build_many
from cvlctl.collect.recipe import BuildManyRecipe, BuildRecipe
from cvlctl.data.store import open_store

TASKS = ("metaworld/window-open-v3", "metaworld/drawer-open-v3")


def build(folder: Path, tasks: Sequence[str], source: dict[str, Any], compile: bool, processes: int) -> list[str]:
    """Digests of the stores, built so many at a time."""
    plain = [{"task": task, "source": source, "out": folder / f"{i}.zarr"} for i, task in enumerate(tasks)]
    how = {"threads": 1, "compile": str(compile).lower(), "checkpoint_seconds": 30.0}
    recipes = tuple(BuildRecipe.model_validate(one | how) for one in plain)
    for result in build_many(BuildManyRecipe(processes=processes, recipes=recipes)):
        if result["status"] != "built":
            raise RuntimeError(f"{result['task']}: {result['error']}")
    return [open_store(recipe.out).digest() for recipe in recipes]


def benchmark(tasks: Sequence[str], source: dict[str, Any], rounds: int, compile: bool) -> dict[str, Any]:
    """Wall seconds of both ways, round by round in turns, and the median of their ratio."""
    digests: list[list[str]] = []

    def way(processes: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            digests.append(build(Path(folder), tasks, source, compile, processes))

    taken = common.timed({"alone": partial(way, 1), "together": partial(way, len(tasks))}, rounds)
    alone, together = taken["alone"], taken["together"]
    work = f"building {len(tasks)} stores by SAC, {source['steps']:,} frames each, {len(tasks)} processes"
    row = common.versus(work, "one after the other", together, alone, unit="seconds", threads=1, least=1.8, aim=1.95)
    return {
        "comparisons": [row], "tasks": list(tasks), "source": source, "compile": compile,
        "same_stores": len(set(map(tuple, digests))) == 1,
        "one_after_the_other_seconds": alone, "at_once_seconds": together,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None, rounds=3)
    options.add_argument("--tasks", nargs="+", default=list(TASKS))
    options.add_argument("--frames", type=int, default=3000)
    options.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    options.add_argument("--compile", action="store_true", help="compile the training step: for longer runs")

    def measured(args: argparse.Namespace) -> dict[str, Any]:
        starts = min(500, args.frames // 2)
        source = {"name": "sac", "steps": args.frames, "hidden": args.hidden, "learning_starts": starts}
        found = benchmark(args.tasks, source, args.rounds, args.compile)
        print(f"{'the same' if found['same_stores'] else 'OTHER'} stores")
        return found

    common.main(options, measured, arguments)


if __name__ == "__main__":
    main()
