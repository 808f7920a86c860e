"""Two tasks' datasets: one after the other, and both at once in worker processes.

    python benchmarks/building.py [--frames 1500] [--rounds 1] [--compile] [--json building.json]

SAC on two Metaworld tasks, sizes as shipped (256x256, batch 256, one update a frame, one thread). Both ways build by
`build_many`, with processes=1 and processes=2, so that both pay a process's start for each task; the stores are
compared: the same bits. The ratio is at most the number of idle cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import conditions, machine

from cvlctl.commands.build_many import build_many
from cvlctl.recipes import BuildManyRecipe, BuildRecipe
from cvlctl.store import open_store

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
    before = machine()
    seconds: dict[int, list[float]] = {1: [], len(tasks): []}
    digests: dict[int, list[str]] = {}
    for _ in range(rounds):
        for processes, taken in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                digests[processes] = build(Path(folder), tasks, source, compile, processes)
                taken.append(round(time.perf_counter() - begin, 1))
    alone, together = seconds.values()
    return {
        "tasks": list(tasks), "source": source, "compile": compile,
        "same_stores": len(set(map(tuple, digests.values()))) == 1,
        "one_after_the_other_seconds": alone, "at_once_seconds": together,
        "ratio": round(float(np.median(np.array(alone) / np.array(together))), 2),
        "machine": before, "load_average_after": machine()["load_average"],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--frames", type=int, default=1500)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the training step: for longer runs")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args(arguments)
    source = {"name": "sac", "steps": args.frames, "hidden": args.hidden, "learning_starts": min(500, args.frames // 2)}
    found = benchmark(args.tasks, source, args.rounds, args.compile)
    print(f"{len(args.tasks)} tasks of {args.frames} frames of SAC, seconds of each round")
    print(f"one after the other  {found['one_after_the_other_seconds']}")
    print(f"at once              {found['at_once_seconds']}")
    print(f"ratio                {found['ratio']:.2f}x, {'the same' if found['same_stores'] else 'OTHER'} stores")
    print(f"{conditions(found)}; torch {found['machine']['versions']['torch']}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
