"""How long a report of 2,000 runs takes, and how large its page is.

    python benchmarks/reporting.py [--tasks 50] [--lines 100] [--rounds 3] [--json reporting.json]

Two shapes of 2,000 runs over 50 tasks: a grid of 8 methods with 5 seeds each, 400 folders; and 40 methods with a seed
each, 2,000 folders. Each folder has a log of 100 lines with six metrics; every policy has 10 episodes at two steps; all
was trained on one store, and scored by one finished evaluation. The page and all its files, on one thread. There is no
peer: the comparison is with limits of 60 seconds and 10 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

# isort: split
import numpy as np

import cvlctl
from cvlctl.data.store import open_store
from cvlctl.experiments.reports.report import report
from cvlctl.score import kept
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.report import tables_of
from cvlctl.score.rows import write_rows
from cvlctl.types import EpisodeResult

SECONDS, MEGABYTES = 60.0, 10.0
SHAPES = {"8 methods, 5 seeds": (8, 5), "40 methods, 1 seed": (40, 1)}
METRICS = ("critic/nce", "critic/accuracy", "critic/log_mean_ratio", "actor/q", "actor/bc", "actor/entropy")


def results(root: Path, tasks: int, methods: int, seeds: int, lines: int) -> None:
    """Runs below `root`, and an evaluation of them, as commands leave them."""
    rng, store, jobs = np.random.default_rng(0), root / "store.zarr", []
    names = [f"method-{i}" if i else "bc" for i in range(methods)]
    episodes = (cvlctl.Episode(*_episode(rng)) for _ in range(100))
    cvlctl.write_store(store, episodes, task="family/task-0")
    digest, rows = open_store(store).digest(), list[EpisodeResult]()
    for task in (f"family/task-{i}" for i in range(tasks)):
        for name in names:
            out = root / "runs" / task / name
            (out / "checkpoints").mkdir(parents=True)
            (out / "checkpoints" / "last.safetensors").write_bytes(b"x")
            recipe = {"stores": [{"path": str(store)}], "algorithm": {"name": name}, "seeds": [*range(seeds)]}
            record = {"status": "finished", "algorithm": name, "task": task, "seeds": [*range(seeds)]}
            (out / "run.json").write_text(json.dumps(record | {"inputs": {str(store): digest}, "recipe": recipe}))
            values = rng.standard_normal((lines, len(METRICS), seeds)).tolist()
            log = [{"step": 100 * i, **dict(zip(METRICS, line, strict=True))} for i, line in enumerate(values, 1)]
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
            for seed in range(seeds):
                for step in (5_000, 10_000):
                    checkpoint = str(out / "checkpoints" / "last.safetensors")
                    jobs.append({"algorithm": name, "task": task, "seed": seed, "step": step,
                                 "checkpoint": checkpoint, "sha256": "0" * 64})  # fmt: skip
                    rows += [EpisodeResult(name, task, seed, step, i, float(x), 500, bool(x > 0))
                             for i, x in enumerate(rng.standard_normal(10))]  # fmt: skip
    scores = EvaluateRecipe(runs=(str(root / "runs"),), episodes=10, out=root / "scores")
    record = {"format": kept.FORMAT, "recipe": scores.resolved(), "jobs": jobs}
    kept.write_record(scores.out, record)
    write_rows(scores.out / "rows.jsonl", rows)
    kept.finish(scores.out, record, {"episodes": len(rows), "plots": [], **tables_of(scores, rows, {}, "bc")})


def _episode(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    observation = rng.standard_normal((501, 39)).astype(np.float32)
    return observation, np.zeros((500, 4), np.float32), rng.standard_normal(500)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name, (methods, seeds) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            root, sizes = Path(folder), list[float]()
            results(root, args.tasks, methods, seeds, args.lines)

            def write(root: Path = root, sizes: list[float] = sizes) -> None:
                sizes.append(report([str(root)], root / "report.html")["bytes"] / 1e6)

            seconds = common.timed({"report": write}, args.rounds)["report"]
        work = f"report of {args.tasks * methods * seeds:,} runs ({name})"
        rows.append(
            common.versus(work, f"a limit of {SECONDS:g} s", seconds, [SECONDS] * len(seconds), unit="seconds",
                          threads=1, least=1)
        )  # fmt: skip
        rows.append(
            common.comparison(f"{work}, its page", f"a limit of {MEGABYTES:g} MB", MEGABYTES / max(sizes),
                              low=MEGABYTES / max(sizes), high=MEGABYTES / min(sizes), ours=max(sizes),
                              theirs=MEGABYTES, unit="MB", threads=1, least=1)
        )  # fmt: skip
    return {"comparisons": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None)
    options.add_argument("--tasks", type=int, default=50)
    options.add_argument("--lines", type=int, default=100, help="of each run's log")
    options.add_argument("--rounds", type=int, default=3)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    common.main(options, benchmark, arguments)


if __name__ == "__main__":
    main()
