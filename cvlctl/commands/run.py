"""`cvlctl run`: the stages of an experiment, one after the other, in this process. Finished ones are skipped.

Estimates are rules of thumb for two CPU cores, good to a factor of two or three: a training step costs 6 floating point
operations a weight and example at 200 GFLOP/s, and 0.5 ms besides; simulators make 4,000 steps a second alone and
10,000 with two workers. Observations are taken to have 40 dimensions and episodes 500 steps.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlctl import recipes
from cvlctl.commands import function
from cvlctl.errors import CvlctlError
from cvlctl.experiments import text_of
from cvlctl.recipes import ExperimentRecipe, Job
from cvlctl.runs import clock, read_run, say
from cvlctl.schema import OnlineSource

if TYPE_CHECKING:
    from rich.console import Console

FLOPS, STEP_SECONDS, SIMULATED, SIMULATED_WITH_WORKERS = 200e9, 0.5e-3, 4_000, 10_000
OBSERVATION_DIM, EPISODE_STEPS = 40, 500
PASSES = {"td3_bc": 6, "iql": 6, "cql": 8, "successor_features": 6, "contrastive_ac": 14, "fqe": 4}  # networks' a step


def run_experiment(
    path: str | Path, overrides: Sequence[str] = (), *, force: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Run every job of the experiment in file `path`, in order.

    Returns:
        out, status ("planned", "done" or "finished already"), stages (a dict a job: stage, command, combination, out,
        state, size, estimate_seconds; after a run also result and seconds), and scores: the results of evaluate.

    Raises:
        CvlctlError: what is wrong with the recipe, before anything starts; what went wrong in a stage, naming it.
    """
    experiment: ExperimentRecipe = recipes.load(path, overrides, "run")
    stages = plan(experiment, force=force)
    if dry_run:
        return {"status": "planned", "out": str(experiment.out), "stages": stages, "scores": []}
    for number, (job, stage) in enumerate(zip(experiment.jobs, stages, strict=True), start=1):
        if stage["state"] != "finished":
            say(f"{number}/{len(stages)} {title(job)}")
        begin = time.monotonic()
        try:
            stage["result"] = function(job.command)(job.recipe, force=force)
        except CvlctlError as error:
            raise CvlctlError(f"stage {title(job)}: {error.what}", error.hint) from error
        seconds = time.monotonic() - begin
        stage["seconds"] = round(seconds, 1)
        again = stage["result"]["status"] == "finished already"
        say(f"{number}/{len(stages)} {title(job)}: " + ("finished already" if again else f"done in {clock(seconds)}"))
        stage["state"] = "finished"
    results = [stage["result"] for stage in stages]
    fresh = any(result["status"] != "finished already" for result in results)
    return {
        "status": "done" if fresh else "finished already",
        "out": str(experiment.out),
        "stages": stages,
        "scores": [stage["result"] for stage in stages if stage["command"] == "evaluate"],
    }


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
    out, plain = Path(job.recipe.out), recipes.resolved(job.recipe)
    before: Mapping[str, Any]
    try:
        if job.command == "build-dataset":
            from cvlctl.store import open_store

            if not out.exists():
                return "partial" if out.with_name(out.name + ".partial").exists() else "to do"
            same = recipes.built_as(open_store(out).provenance.get("recipe"), job.recipe)
            return "finished" if same else "another recipe"
        if job.command == "evaluate":
            from cvlctl.commands.evaluate import read_evaluation

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
    recorded = recipes.with_defaults(job.command, before["recipe"])
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


def render(result: dict[str, Any], console: Console) -> None:
    """Print the plan, or the scores and where everything lies."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from cvlctl.commands import evaluate

    if result["status"] != "planned":
        for scored in result["scores"]:
            evaluate.render(scored, console)
        trained = [stage["out"] for stage in result["stages"] if stage["command"] in ("pretrain", "finetune")]
        stores = [_store_line(stage) for stage in result["stages"] if stage["command"] == "build-dataset"]
        for name, places in (("stores", stores), ("runs", trained)):
            for place in places:
                console.print(f"{name + ':':8}{place}", markup=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("stage", "of", "out", "state", "size"):
        table.add_column(heading, overflow="fold")
    table.add_column("about", justify="right", no_wrap=True)
    for stage in result["stages"]:
        of = " ".join(text_of(value).split("/")[-1] for value in stage["combination"].values())
        out = stage["out"].removeprefix(result["out"].rstrip("/") + "/")
        about = "" if stage["state"] == "finished" else rough(stage["estimate_seconds"])
        cells = (f"{stage['stage']}: {stage['command']}", of, out, stage["state"], stage["size"], about)
        table.add_row(*map(Text, cells))
    console.print(table)
    left = sum(stage["estimate_seconds"] for stage in result["stages"] if stage["state"] != "finished")
    console.print(f"out: {result['out']}", markup=False)
    console.print(f"to do: about {rough(left)} on two CPU cores, give or take a factor of two", markup=False)


def _store_line(stage: Mapping[str, Any]) -> str:
    """Where a store lies, and what its episodes achieve; beside a normalised score what it is of."""
    about, facts = stage.get("result") or {}, []
    if about.get("return_mean") is not None:
        facts.append(f"return {about['return_mean']:.4g}")
    if about.get("success_rate") is not None:
        facts.append(f"success {about['success_rate']:.1%}")
    if about.get("normalised") is not None:
        facts.append(f"normalised {about['normalised']:.1f} on {about['environment']}")
    return stage["out"] + (f"  {', '.join(facts)}" if facts else "")


def rough(seconds: float) -> str:
    """A duration to one unit: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
