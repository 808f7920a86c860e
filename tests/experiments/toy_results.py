"""Results as commands leave them, made up in an instant: runs, an evaluation of them, a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cvlctl
from cvlctl.data.store import open_store
from cvlctl.runs import Run
from cvlctl.score import kept
from cvlctl.score.recipe import Confidence, EvaluateRecipe
from cvlctl.score.report import tables_of
from cvlctl.score.rows import write_rows
from cvlctl.types import EpisodeResult


def save_store(path: Path, task: str = "gym/Pendulum-v1", episodes: int = 6, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    made = (
        cvlctl.Episode(rng.normal(size=(11, 3)).astype(np.float32), np.zeros((10, 1), np.float32), rng.normal(size=10))
        for _ in range(episodes)
    )
    cvlctl.write_store(path, made, task=task)
    return path


def save_run(out: Path, store: Path, algorithm: str = "bc", task: str = "gym/Pendulum-v1", *, finished: bool = True,
             **more: Any) -> Path:  # fmt: skip
    """A run of three seeds with a log of two lines, and something in the place of its checkpoint."""
    recipe = {
        "stores": [{"path": str(store)}], "steps": 200, "seeds": [0, 1, 2], "out": str(out),
        "algorithm": {"name": algorithm}, **more,
    }  # fmt: skip
    run = Run(out, recipe, {str(store): open_store(store).digest()})
    run.open()
    for step in (100, 200):
        run.log(step, {"actor/bc": [1.0, 0.5, 0.25 + step]})
    run.checkpoints.mkdir(exist_ok=True)
    run.last.write_bytes(f"{algorithm} of {out}".encode())
    if finished:
        run.finish(algorithm=algorithm, task=task, seeds=[0, 1, 2], steps=200)
    run.close()
    return out


def save_scores(out: Path, runs: Sequence[Path], tasks: Sequence[str], names: Sequence[str], *, episodes: int = 4,
                steps: Sequence[int] = (100, 200), skip: int = 0) -> list[EpisodeResult]:  # fmt: skip
    """An evaluation of those runs, called `names`; its rows. `skip`: so many episodes are not played yet."""
    rng = np.random.default_rng(1)
    rows = [
        EpisodeResult(
            name, task, seed, step, i, 100.0 * (n + 1) + step + rng.normal(0, 40), 10, bool(rng.random() < 0.5)
        )
        for n, (task, name) in enumerate(zip(tasks, names, strict=True))
        for seed in (0, 1, 2)
        for step in steps
        for i in range(episodes)
    ]
    jobs = [
        {"algorithm": name, "task": task, "seed": seed, "step": step,
         "checkpoint": str(run / "checkpoints" / "last.safetensors"), "sha256": "0" * 64}
        for run, task, name in zip(runs, tasks, names, strict=True) for seed in (0, 1, 2) for step in steps
    ]  # fmt: skip
    recipe = EvaluateRecipe(runs=tuple(map(str, runs)), episodes=episodes, out=out, confidence=Confidence(resamples=50))
    record = {"format": kept.FORMAT, "recipe": recipe.resolved(), "jobs": jobs}
    rows = rows[: len(rows) - skip]
    kept.write_record(out, record)
    write_rows(out / "rows.jsonl", rows)
    if not skip:
        kept.finish(out, record, {"episodes": len(rows), "plots": [], **tables_of(recipe, rows, {}, "bc")})
    return rows
