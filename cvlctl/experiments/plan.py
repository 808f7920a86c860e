"""The plan of an experiment: what each job is, how far it is, and about how long it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlctl.errors import CvlctlError
from cvlctl.experiments.recipe import ExperimentRecipe, Job
from cvlctl.folders import partial_of
from cvlctl.runs import read_run


def title(job: Job) -> str:
    """A job in words: "train: finetune metaworld/drawer-close-v3 cvl"."""
    return f"{job.stage}: {job.command} {job.label}".strip()


def plan(experiment: ExperimentRecipe, *, force: bool = False) -> list[dict[str, Any]]:
    """One dict a job: stage, command, combination, out, state, size, estimate_seconds, threads (how many,
    and why; None: no matter).

    The state is "finished", "partial", "to do", or "another recipe" (it will not start without `force`).
    """
    stages, recipes = [], [job.recipe for job in experiment.jobs]
    for job in experiment.jobs:
        size, seconds = job.recipe.work(recipes)
        stages.append({
            "stage": job.stage, "command": job.command, "combination": job.combination, "out": str(job.recipe.out),
            "state": "to do" if force else _state(job), "size": size, "estimate_seconds": round(seconds),
            "threads": getattr(job.recipe, "about_threads", None),
        })  # fmt: skip
    return stages


def _state(job: Job) -> str:
    out, plain = Path(job.recipe.out), job.recipe.resolved()
    before: Mapping[str, Any]
    try:
        if job.command == "build-dataset":
            from cvlctl.data.store import open_store

            if not out.exists():
                return "partial" if partial_of(out).exists() else "to do"
            same = job.recipe.built(open_store(out).provenance.get("recipe"))
            return "finished" if same else "another recipe"
        if job.command == "evaluate":
            from cvlctl.score.kept import read_evaluation

            found = read_evaluation(job.recipe)
            if found is None:
                return "to do"
            before = found if found["recipe"].get("episodes") == job.recipe.episodes else {**found, "status": "started"}
        elif not (out / "run.json").exists():
            return "to do"
        else:
            before = read_run(out)
    except CvlctlError:
        return "another recipe"
    recorded = job.recipe.with_defaults(before["recipe"])
    same = all(recorded.get(key) == value for key, value in plain.items() if key != "out")
    if job.command != "evaluate" and not same:
        return "another recipe"
    return "finished" if before["status"] == "finished" else "partial"


def lines(jobs: Sequence[Job], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is about to be done, a line for each job of the plan that is not finished, and in all; none: nothing is."""
    left = [(title(job), stage) for job, stage in zip(jobs, stages, strict=True) if stage["state"] != "finished"]
    told = [f"plan: {name}, {stage['size']}: about {rough(stage['estimate_seconds'])}" for name, stage in left]
    return [*told, f"plan: {in_all(stages)}"] if left else []


def in_all(stages: Sequence[Mapping[str, Any]]) -> str:
    """How long what is left takes."""
    left = sum(stage["estimate_seconds"] for stage in stages if stage["state"] != "finished")
    return f"about {rough(left)} in all on an idle machine, give or take a factor of two"


def threads_of(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What computes with how many threads, and why: a line for each answer."""
    kinds = dict.fromkeys(stage["threads"] for stage in stages if stage["threads"])
    names = {kind: dict.fromkeys(stage["stage"] for stage in stages if stage["threads"] == kind) for kind in kinds}
    return [f"threads: {kind}: {', '.join(found)}" for kind, found in names.items()]


def rough(seconds: float) -> str:
    """A duration to one unit: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
