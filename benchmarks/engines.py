"""An experiment's cells side by side, beside one after the other; and what an engine costs a cell.

    python benchmarks/engines.py [--cells 4] [--steps 600] [--rounds 3] [--json engines.json]

The grid: CVL from scratch with the quickstart's networks (256x256, batch 256, eager), each cell one seed of its own, on
a synthetic store of 20,000 rows. Once by the pool of `engine: local` on all CPUs, `threads: 1`; once with one cell at a
time, the same otherwise; and once one at a time with as many threads as there are CPUs. Weights of the first two are
compared: the same bits.

The cost: cells of a single update, one at a time, from the end of the first to the end of the last, less what the same
commands take when a shell runs them one after the other. So the first cell warms up the engine: Ray's start and its
worker's are not in it. Ray is left out where it is not installed (extra `ray`).

Looking: `--status` and `--dry-run` of a plan of 5,000 cells of which nothing has run, as commands, Python's start and
all that they import in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import common

# isort: split
import numpy as np
import torch

import cvlctl
from cvlctl import checkpoints
from cvlctl.experiments.commands import load
from cvlctl.experiments.engines.start import arguments, state_in, write_recipe
from cvlctl.experiments.run import planned, run_experiment
from cvlctl.machine import num_cpus

LENGTH = 100
LIMITS = {"local": 0.5, "ray": 1.5}  # seconds a cell
LOOKING = 5.0  # seconds, of a whole plan
LEAST = 0.01  # of a cost that is told: below it clocks decide


def episodes(rows: int) -> Iterator[cvlctl.Episode]:
    rng = np.random.default_rng(0)
    for _ in range(max(1, rows // (LENGTH + 1))):
        observation = rng.standard_normal((LENGTH + 1, 39), dtype=np.float32)
        action, reward = rng.uniform(-1, 1, (LENGTH, 4)), rng.uniform(0, 10, LENGTH)
        yield cvlctl.Episode(observation, action.astype(np.float32), reward.astype(np.float32))


def experiment(out: Path, store: Path, cells: int, steps: int, hidden: int, threads: int, **more: Any) -> Any:
    """An experiment of so many cells, each a seed."""
    networks = {"hidden": [hidden, hidden]}
    train = {
        "command": "finetune", "stores": [str(store)], "algorithm": {"name": "cvl", **networks, "critic": networks},
        "steps": steps, "batch_size": 256, "seeds": ["${seed}"], "threads": threads, "device": "cpu",
        "compile": "false", "out": "${out}/${seed}",
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    whole = {"out": str(out), "matrix": {"seed": [*range(cells)]}, "stages": {"train": train}, **more}
    file.write_text(json.dumps(whole))
    return load(file, (), "run")


def run(loaded: Any) -> None:
    """All of it, or an error."""
    result = run_experiment(loaded)
    if result["status"] != "done":
        raise RuntimeError(next(row["error"] for row in result["cells"] if row.get("error")))


def weights(out: Path) -> list[torch.Tensor]:
    """Of all cells."""
    files = sorted(out.glob("*/checkpoints/last.safetensors"))
    return [value for file in files for _, value in sorted(checkpoints.load(file)[0].items())]


def pool(folder: Path, store: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """The grid in its three ways; and whether the same bits came of the first two."""
    cpus, numbers, outs = num_cpus(), count(), dict[str, Path]()

    def way(name: str, processes: int, threads: int) -> None:
        outs[name] = folder / f"grid-{next(numbers)}"
        settings = {"local": {"processes": processes}}
        run(experiment(outs[name], store, args.cells, args.steps, args.hidden, threads, **settings))

    ways = {"pool": (cpus, 1), "alone": (1, 1), "threads": (1, cpus)}
    taken = common.timed({name: partial(way, name, *how) for name, how in ways.items()}, args.rounds)
    first, second = weights(outs["pool"]), weights(outs["alone"])
    same = len(first) == len(second) > 0 and all(map(torch.equal, first, second))
    work = f"{args.cells} cells of {args.steps} updates, threads: 1, {cpus} at a time"
    versus = partial(common.versus, work, ours=taken["pool"], unit="seconds", threads=1)
    alone = versus(peer="one at a time", theirs=taken["alone"], least=1.7)
    return [alone, versus(peer=f"one at a time, {cpus} threads", theirs=taken["threads"])], same


def cost(folder: Path, store: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Seconds a cell of each engine, beyond those of its command; and seconds a cell of each way."""
    numbers = count()
    tiny = partial(experiment, store=store, cells=args.more + 1, steps=1, hidden=16, threads=1)

    def shell() -> float:
        out = folder / f"shell-{next(numbers)}"
        commands = [arguments(cell, write_recipe(out, cell)) for cell in planned(tiny(out), keep=True)][1:]
        return common.seconds(lambda: [_command(line) for line in commands]) / len(commands)

    def engine(name: str) -> float:
        out = folder / f"{name}-{next(numbers)}"
        settings = {"local": {"processes": 1}, "ray": {"num_cpus": num_cpus()}}
        run(tiny(out, engine=name, **settings))
        ends = sorted(state_in(path)["ended"] for path in (out / "cells").iterdir() if path.is_dir())
        return float(ends[-1] - ends[0]) / args.more

    names = ["local", *(["ray"] if find_spec("ray") else [])]
    found = common.turns({"shell": shell, **{name: partial(engine, name) for name in names}}, args.rounds)
    rows = []
    for name in names:
        own = [max(LEAST, mine - bare) for mine, bare in zip(found[name], found["shell"], strict=True)]
        work, limit = f"engine: {name}, a cell beyond its command", LIMITS[name]
        rows.append(common.versus(
            work, f"a limit of {limit} s", own, [limit] * len(own), unit="seconds", threads=1, least=1
        ))  # fmt: skip
    return rows, found


def looking(folder: Path, store: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the commands that show a plan."""
    experiment(folder / "many", store, args.many, 1, 16, 1)
    start = ["run", str(folder / "many.yaml")]
    ways = {how: partial(_command, [*start, how]) for how in ("--status", "--dry-run")}
    taken = common.timed(ways, args.rounds)
    return [
        common.versus(
            f"{how} of {args.many:,} cells", f"a limit of {LOOKING:g} s", taken[how], [LOOKING] * len(taken[how]),
            unit="seconds", threads=1, least=1,
        )
        for how in ways
    ]  # fmt: skip


def _command(line: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "cvlctl", *line], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cvlctl.write_store(folder / "x.zarr", episodes(args.rows), task="synthetic")
        costs, seconds = cost(folder, folder / "x.zarr", args)
        shown = looking(folder, folder / "x.zarr", args)
        ways, same = pool(folder, folder / "x.zarr", args)
    print(f"{'the same' if same else 'OTHER'} weights")
    return {"comparisons": [*ways, *costs, *shown], "same_weights": same, "seconds_a_cell": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None, rounds=3, rows=20_000)
    options.add_argument("--cells", type=int, default=4, help="of the grid")
    options.add_argument("--steps", type=int, default=600, help="of each")
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--many", type=int, default=5_000, help="cells of the plan that is shown")
    options.add_argument("--more", type=int, default=4, help="cells whose cost is measured, after the first")
    common.main(options, benchmark, arguments)


if __name__ == "__main__":
    main()
