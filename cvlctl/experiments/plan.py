"""The plan of an experiment: what each job is, how far it is, and about how long it will take.

Estimates are rules of thumb for two CPU cores, good to a factor of two or three: a training step costs 6 floating point
operations a weight and example at 200 GFLOP/s, and 0.5 ms besides; simulators make 4,000 steps a second alone and
10,000 with two workers. Observations are taken to have 40 dimensions and episodes 500 steps.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvlctl.collect.recipe import OnlineSource
from cvlctl.errors import CvlctlError
from cvlctl.experiments.recipe import ExperimentRecipe, Job
from cvlctl.runs import read_run

FLOPS, STEP_SECONDS, SIMULATED, SIMULATED_WITH_WORKERS = 200e9, 0.5e-3, 4_000, 10_000
OBSERVATION_DIM, EPISODE_STEPS = 40, 500
PASSES = {"td3_bc": 6, "iql": 6, "cql": 8, "successor_features": 6, "contrastive_ac": 14, "fqe": 4}  # networks' a step


def title(job: Job) -> str:
    """A job in words: "train: finetune metaworld/drawer-close-v3 cvl"."""
    return f"{job.stage}: {job.command} {job.label}".strip()


# --- the plan


def plan(experiment: ExperimentRecipe, *, force: bool = False) -> list[dict[str, Any]]:
    """One dict a job: stage, command, combination, out, state, size, estimate_seconds.

    The state is "finished", "partial", "to do", or "another recipe" (it will not start without `force`).
    """
    stages = []
    for job in experiment.jobs:
        size, seconds = _size(job, experiment)
        stages.append({
            "stage": job.stage, "command": job.command, "combination": job.combination, "out": str(job.recipe.out),
            "state": "to do" if force else _state(job), "size": size, "estimate_seconds": round(seconds),
        })  # fmt: skip
    return stages


def _state(job: Job) -> str:
    out, plain = Path(job.recipe.out), job.recipe.resolved()
    before: Mapping[str, Any]
    try:
        if job.command == "build-dataset":
            from cvlctl.data.store import open_store

            if not out.exists():
                return "partial" if out.with_name(out.name + ".partial").exists() else "to do"
            same = job.recipe.built(open_store(out).provenance.get("recipe"))
            return "finished" if same else "another recipe"
        if job.command == "evaluate":
            from cvlctl.score.evaluate import read_evaluation

            found = read_evaluation(job.recipe)
            if found is None:
                return "to do"
            before = found if found["recipe"]["episodes"] == job.recipe.episodes else {**found, "status": "started"}
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


def _size(job: Job, experiment: ExperimentRecipe) -> tuple[str, float]:
    """What there is to do, in words and in seconds."""
    recipe: Any = job.recipe
    if job.command == "build-dataset":
        source = recipe.source
        if isinstance(source, OnlineSource):
            # two critics, their targets, the actor; with the gate V, two classifiers, and three times the critics
            passes = 5 if getattr(source, "gate", "none") == "none" else 14
            weights = passes * _weights(OBSERVATION_DIM, *source.hidden)
            seconds = _step(source.batch_size * weights) / source.update_every + 1 / SIMULATED
            return f"{source.steps:,} steps of {source.title}", source.steps * seconds
        if source.name == "stores":
            return f"episodes of {_count(len(source.stores), 'store')}", 10.0
        checkpoints = getattr(source, "checkpoints", ())
        turns = len(checkpoints) if isinstance(checkpoints, tuple) and checkpoints else 1
        if getattr(source, "transitions", None):
            return _count(source.transitions, "transition"), source.transitions / SIMULATED
        return _count(source.episodes * turns, "episode"), source.episodes * turns * EPISODE_STEPS / SIMULATED
    if job.command == "evaluate":
        seeds = sum(
            len(other.recipe.seeds)
            for other in experiment.jobs
            if other.command == "finetune" and any(_matches(other.recipe.out, pattern) for pattern in recipe.runs)
        )
        policies = _count(seeds, "policy") if seeds else "policies of earlier runs"
        more = ", every checkpoint" if recipe.checkpoints == "all" else ""
        seconds = max(seeds, 1) * recipe.episodes * EPISODE_STEPS / SIMULATED_WITH_WORKERS
        return f"{policies} x {_count(recipe.episodes, 'episode')}{more}", seconds
    config = recipe.critic if job.command == "pretrain" else recipe.algorithm.config
    critic = config if job.command == "pretrain" else getattr(config, "critic", None)
    for other in experiment.jobs:
        if job.command == "finetune" and other.command == "pretrain" and other.recipe.out == recipe.init_from:
            critic = other.recipe.critic
    work = 0.0
    if critic is not None:
        work += recipe.batch_size * 2 * _weights(OBSERVATION_DIM, *critic.hidden, critic.latent_dim)
    if job.command == "finetune":
        passes = PASSES.get(recipe.algorithm.name, 1) + 6 * getattr(config, "num_actions", 0)  # CQL: two critics, 3 n
        work += recipe.batch_size * passes * _weights(OBSERVATION_DIM, *config.hidden)
        if critic is not None:  # the readout: a bank through psi, and actions through phi
            bank = getattr(config, "bank_size", 0) + getattr(config, "num_examples", 0)
            work += (bank / 3 + recipe.batch_size) * _weights(OBSERVATION_DIM, *critic.hidden, critic.latent_dim)
    seeds = len(recipe.seeds)
    return f"{_count(recipe.steps, 'step')} x {_count(seeds, 'seed')}", recipe.steps * _step(seeds * work)


def _count(num: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{num:,} {noun if num == 1 else plural}"


def _weights(*widths: int) -> int:
    return sum(a * b for a, b in itertools.pairwise(widths))


def _step(work: float) -> float:
    """Seconds of one update of `work` weights times examples."""
    return 6 * work / FLOPS + STEP_SECONDS


def _matches(out: Path, pattern: str) -> bool:
    return fnmatch.fnmatch(os.path.normpath(out), os.path.normpath(pattern))


def rough(seconds: float) -> str:
    """A duration to one unit: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
