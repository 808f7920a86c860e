"""The plan of an experiment: what each cell is, how far it is, and about how long it will take."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cvlctl.errors import CvlctlError
from cvlctl.experiments.graph import Cell, needed_by
from cvlctl.experiments.recipe import Job
from cvlctl.folders import partial_of
from cvlctl.runs import another, changed, is_worth_something, raised, read_run

RECORDS = ("run.json", "zarr.json", "evaluation.json")  # the last thing that a command writes into its `out`

LEFT = ("to do", "partial")  # states of cells that there is something to do for


def title(job: Job) -> str:
    """A job in words: "train: finetune metaworld/drawer-close-v3 cvl"."""
    return f"{job.stage}: {job.command} {job.label}".strip()


def plan(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One dict a cell: cell (its name), stage, command, combination, needs (names), out, state, size, estimate_seconds,
    threads (how many, and why; None: no matter), refused (what its command would say, and a hint; else None).

    The state is "finished", "partial", "to do", or "another recipe" (it is refused without --force).
    """
    rows, needed = [], needed_by(cells)
    for cell in cells:
        job = cell.job
        size, seconds = job.recipe.work(needed[cell.name])
        state, refused = ("to do", None) if cell.force else looked_at(job)
        rows.append({
            "cell": cell.name, "stage": job.stage, "command": job.command, "combination": job.combination,
            "needs": list(cell.needs), "out": str(job.recipe.out), "state": state, "size": size,
            "estimate_seconds": round(seconds), "threads": getattr(job.recipe, "about_threads", None),
            "refused": refused and [refused.what, refused.hint],
        })  # fmt: skip
    return rows


def state_of(job: Job) -> str:
    """How far a job is, by what lies at its `out`."""
    return looked_at(job)[0]


def looked_at(job: Job) -> tuple[str, CvlctlError | None]:
    """How far a job is, by what lies at its `out`; and what its command says of that, where it would not begin."""
    look = {"build-dataset": _store, "evaluate": _evaluation}.get(job.command, _run)
    try:
        return look(job.recipe, Path(job.recipe.out)), None
    except CvlctlError as error:
        return "another recipe", error


def _store(recipe: Any, out: Path) -> str:
    from cvlctl.data.store import open_store

    if not out.exists():
        return "partial" if partial_of(out).exists() else "to do"
    recipe.check_built(open_store(out).provenance.get("recipe"))
    return "finished"


def _evaluation(recipe: Any, out: Path) -> str:
    from cvlctl.score.kept import read_evaluation

    before = read_evaluation(recipe)
    if before is None:
        return "to do"
    same = all(before["recipe"].get(key) == recipe.resolved()[key] for key in ("episodes", "beside"))
    return "finished" if same and before["status"] == "finished" else "partial"


def _run(recipe: Any, out: Path) -> str:
    if not (out / "run.json").exists():
        return "to do"
    before, plain = read_run(out), recipe.resolved()
    recorded = recipe.with_defaults(before["recipe"])
    then = {key: value for key, value in recorded.items() if key in plain}
    if why := changed(then, plain):
        if is_worth_something(out, before):
            raise another(out, why)
        return "to do"
    same = not raised(then, plain) and then.get("label") == plain.get("label")
    return "finished" if same and before["status"] == "finished" else "partial"


def is_older(job: Job) -> bool:
    """Whether something that a finished job has read was written after it: its command knows what that means."""
    own = _written(str(job.recipe.out))
    read = [place for pattern in job.recipe.reads() for place in (pattern, *_found(pattern))]
    return any(_written(place) > own for place in read)


def _found(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else []


def _written(place: str) -> float:
    """When a result was finished, by the file system's clock; 0: there is none."""
    times = [0.0]
    for name in RECORDS:
        with suppress(OSError):
            times.append(Path(place, name).stat().st_mtime)
    return max(times)


def lines(cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], at_once: int) -> list[str]:
    """What is about to be done, a line for each cell of the plan that is left, and in all; none: nothing is.

    Of many cells a line for each stage.
    """
    left = [(cell, row) for cell, row in zip(cells, rows, strict=True) if row["state"] in LEFT]
    if len(left) > 30:
        stages = dict.fromkeys(row["stage"] for _, row in left)
        told = [_stage_line(stage, [row for _, row in left if row["stage"] == stage]) for stage in stages]
    else:
        told = [f"plan: {title(cell.job)}, {row['size']}: about {rough(row['estimate_seconds'])}" for cell, row in left]
    return [*told, f"plan: {in_all(rows, at_once)}"] if left else []


def _stage_line(stage: str, rows: Sequence[Mapping[str, Any]]) -> str:
    seconds = sum(row["estimate_seconds"] for row in rows)
    return f"plan: {stage}: {len(rows)} cells: about {rough(seconds)} one after the other"


def in_all(rows: Sequence[Mapping[str, Any]], at_once: int) -> str:
    """How long what is left takes, with so many cells at once: at least the longest way through it."""
    left = [row for row in rows if row["state"] in LEFT]
    ends: dict[str, float] = {}
    for row in left:
        ends[row["cell"]] = row["estimate_seconds"] + max([0.0, *(ends.get(need, 0.0) for need in row["needs"])])
    seconds = max([sum(row["estimate_seconds"] for row in left) / at_once, *ends.values()])
    beside = f", {at_once} cells at once," if at_once > 1 and len(left) > 1 else ""
    return f"about {rough(seconds)} in all{beside} on an idle machine, give or take a factor of two"


def threads_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What computes with how many threads, and why: a line for each answer."""
    kinds = dict.fromkeys(row["threads"] for row in rows if row["threads"])
    names = {kind: dict.fromkeys(row["stage"] for row in rows if row["threads"] == kind) for kind in kinds}
    return [f"threads: {kind}: {', '.join(found)}" for kind, found in names.items()]


def rough(seconds: float) -> str:
    """A duration to one unit: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
