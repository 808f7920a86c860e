"""`cvlctl evaluate`: episodes of every seed of every run, then tables and pictures of their scores.

Rows are saved every half minute and at Ctrl-C, and reused wherever the checkpoint is still the same file: after an
interruption, for more episodes, or when a glob finds another run, only what is missing runs. `kept` says what lies in
`out`, `report` what is made of the rows.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cvlctl.checkpoints import Saved
from cvlctl.errors import CvlctlError
from cvlctl.files import write_atomically
from cvlctl.play import envpool, envs, videos
from cvlctl.play.lockstep import run_lockstep
from cvlctl.play.own import probe
from cvlctl.play.players import job_policy, numbers_of, run_episodes
from cvlctl.play.policies import policy_of
from cvlctl.play.rollout import EVALUATION_SEED, Episodes, GoalUse, PolicyJob
from cvlctl.play.rollout import Progress as OnEpisode
from cvlctl.play.showing import run_seeing
from cvlctl.play.sights import SeeingPolicy
from cvlctl.progress import Progress, say
from cvlctl.score import find_runs, kept, places
from cvlctl.score.joined import Joined, joined
from cvlctl.score.recipe import EvaluateRecipe, EvaluationGoals
from cvlctl.score.report import Estimates, as_text, baseline_of, can_be_shown, estimates_of, render, report
from cvlctl.score.tuning import settings_of
from cvlctl.types import EpisodeResult, Spec

if TYPE_CHECKING:
    from cvlctl.data.examples import Examples  # zarr: not without need

__all__ = ["as_text", "evaluate", "render"]

GPU_PAYS_AFTER = 2_000_000  # weights of a policy: on a CPU one answer then takes as long as a simulator's step
SAVE_SECONDS = 30.0  # between two saves: what a kill may cost


class _Wanted(NamedTuple):
    """What an evaluation is of."""

    jobs: list[PolicyJob]
    in_training: list[Saved]  # checkpoints whose runs replace them
    estimates: Estimates
    baseline: str
    goals: Examples | None  # states to arrive at
    beside: Joined  # other evaluations' rows, in the same tables
    record: dict[str, Any]  # what is written of it


def evaluate(recipe: EvaluateRecipe, *, force: bool = False) -> dict[str, Any]:
    """Run what is missing, and compute the tables.

    Returns:
        status ("evaluated" or "finished already"), out, rows (a path), episodes, plots (paths), with `video` videos
        (algorithm, task, seed, step, episode, return, success, path), and lists of records:
        table (`tables.score_table`), aggregate, pairwise, relative, comparison, offline, tuning, runs, profiles,
        efficiency.

    Raises:
        CvlctlError: no such runs, no policies in them, or an `out` that another process is writing, or that holds
            something else (`force` replaces another evaluation).
    """
    wanted = _wanted(recipe)
    paths = {"out": str(recipe.out), "rows": str(recipe.out / "rows.jsonl")}
    if not force:
        before = _earlier(recipe, wanted)
        saved = kept.saved_result(recipe.out, before) if before and kept.finished(wanted.record, before) else None
        if saved is not None and can_be_shown(saved):
            return {"status": "finished already", **paths, **saved}
    with kept.held(recipe.out):
        if force:
            kept.clear(recipe.out)
        before = None if force else _earlier(recipe, wanted)  # by now another's, perhaps
        if recipe.video is not None:
            videos.check(wanted.jobs, recipe.seed, recipe.video.settings, recipe.video.format)
        rows = _begun(recipe, wanted, before)
        played = _play(recipe, wanted, rows)
        everything = [row for job in rows for _, row in sorted(rows[job].items())]
        result = report(recipe, everything, wanted.estimates, wanted.baseline, wanted.record)
        result |= _filmed(recipe, wanted, rows)
        kept.finish(recipe.out, wanted.record, result)
    again = not played and before is not None and kept.finished(wanted.record, before)
    return {"status": "finished already" if again else "evaluated", **paths, **result}


def _wanted(recipe: EvaluateRecipe) -> _Wanted:
    """Look for what the recipe names. Nothing is touched."""
    found = find_runs.checkpoints(recipe)
    labels = find_runs.labels(found)
    estimates = estimates_of(found, labels)
    goals = None if recipe.goals is None else _goals(recipe.goals, found)
    jobs = [
        PolicyJob(
            *key, checkpoint.step, checkpoint.file, estimates[key].gamma if key in estimates else None,
            _goal_use(recipe, goals), recipe.horizon, checkpoint.sha256,
            None if checkpoint.held is None else kept.copy_of(recipe.out, checkpoint.held), checkpoint.settings,
            checkpoint.cameras,
        )
        for checkpoint in found
        for key in ((labels[checkpoint.run], checkpoint.task, seed) for seed in checkpoint.seeds)
    ]  # fmt: skip
    told: dict[str, Any] = {
        "environments": {job.task: places.described(job.env) for job in jobs if job.env is not None},
        "references": find_runs.references(recipe, found),
    }
    beside = joined(recipe, jobs, told)
    names = list(dict.fromkeys([*labels.values(), *(job.algorithm for job in beside.rows)]))
    for pattern in recipe.tuning:
        settings_of(pattern, names)
    held = [checkpoint.held for checkpoint in found if checkpoint.held is not None]
    record = _record(recipe, jobs, beside, goals)
    return _Wanted(jobs, held, estimates, baseline_of(recipe, names), goals, beside, record)


def _record(
    recipe: EvaluateRecipe, jobs: Sequence[PolicyJob], beside: Joined, goals: Examples | None
) -> dict[str, Any]:
    """What evaluation.json says of an evaluation; of parts that are empty, nothing."""
    record = {
        "format": kept.FORMAT,
        "recipe": recipe.resolved(),
        "jobs": [
            {"algorithm": job.algorithm, "task": job.task, "seed": job.seed, "step": job.step,
             "checkpoint": str(job.checkpoint), "sha256": job.sha256}
            for job in jobs
        ] + beside.jobs,
    }  # fmt: skip
    parts = beside.told | {
        "goals": None if goals is None else _digest(goals),
        "cameras": {str(job.checkpoint): {one.name: one.about() for one in job.cameras} for job in jobs if job.cameras},
        "beside": beside.digests,
    }
    return record | {name: part for name, part in parts.items() if part}


def _earlier(recipe: EvaluateRecipe, wanted: _Wanted) -> dict[str, Any] | None:
    """The record of the evaluation in `out`, that this one goes on from; None where there is none."""
    before = kept.read_evaluation(recipe)
    if before and before.get("goals") != wanted.record.get("goals"):
        raise CvlctlError(f"{recipe.out}: the goals have changed since", "choose another out, or --force to replace it")
    now = wanted.record.get("cameras", {})
    for file, then in (before or {}).get("cameras", {}).items():
        if then != now.get(file, then):
            what = f"{recipe.out}: where the cameras stand that {file} sees has changed since"
            raise CvlctlError(what, "choose another out, or --force to replace it")
    now = wanted.record.get("environments", {})
    for task, then in (before or {}).get("environments", {}).items():
        if then != now.get(task, then) and kept.has_rows(recipe.out, task):
            what = f"{recipe.out}: {task}, its code or its settings, has changed since"
            raise CvlctlError(what, "choose another out, or --force to replace it")
    return before


def _begun(recipe: EvaluateRecipe, wanted: _Wanted, before: dict[str, Any] | None) -> kept.JobRows:
    """The rows that are there already; `out` then tells of this evaluation."""
    out, record = recipe.out, wanted.record
    if recipe.backend == "envpool":
        record["simulators"] = _simulators(recipe, wanted.jobs, before)
    rows = kept.reusable(recipe, wanted.jobs, before) | wanted.beside.rows
    if before is None:
        kept.write_record(out, record)
    if wanted.goals is not None:
        buffer, frames = io.BytesIO(), io.BytesIO()
        np.save(buffer, wanted.goals.observations)
        write_atomically(out / kept.GOALS, buffer.getvalue())
        if wanted.goals.images:
            np.savez(frames, allow_pickle=False, **wanted.goals.images)
            write_atomically(out / kept.GOAL_FRAMES, frames.getvalue())
    kept.save(out, record, rows)
    return rows


def _goals(source: EvaluationGoals, found: Sequence[find_runs.Checkpoint]) -> Examples:
    """The states to arrive at (N, O): of the shape that all policies see. With frames (N, S, H, W, C) of the cameras
    that any of them sees, and then the whole vector of a store, by which arrivals are judged."""
    from cvlctl.data.examples import found_examples  # torch and zarr: not without need
    from cvlctl.data.store import open_store

    asked: dict[tuple[Spec, int], None] = {}
    for policy in (policy_of(checkpoint.content(), checkpoint.seeds[0]) for checkpoint in found):
        spec, stack = policy.spec, policy.observe.stack if isinstance(policy, SeeingPolicy) else 0
        if stack and source.from_ is not None:
            spec = replace(spec, observation_shape=open_store(source.from_).spec.observation_shape)
        asked[spec, stack] = None
    states = [found_examples(source, spec, "goals", stack) for spec, stack in sorted(asked, key=lambda one: one[1])]
    widest = max(states, key=lambda one: one.observations.shape[1])
    width = widest.observations.shape[1]
    if bad := [column for column in source.columns or () if column >= width]:
        raise CvlctlError(f"goals.columns: {bad} of states with {width} columns", "columns count from 0")
    return widest._replace(images={camera: frames for one in states for camera, frames in one.images.items()})


def _digest(goals: Examples) -> str:
    return hashlib.sha256(b"".join(x.tobytes() for x in (goals.observations, *goals.images.values()))).hexdigest()


def _goal_use(recipe: EvaluateRecipe, found: Examples | None) -> GoalUse | None:
    goals = recipe.goals
    if goals is None or found is None:
        return None
    frames = recipe.out / kept.GOAL_FRAMES if found.images else None
    return GoalUse(recipe.out / kept.GOALS, goals.columns, goals.within, frames)


def _simulators(
    recipe: EvaluateRecipe, jobs: Sequence[PolicyJob], before: dict[str, Any] | None
) -> dict[str, dict[str, str]]:
    """What simulates each task; it has to be what simulated the rows that are there already."""
    tasks = dict.fromkeys(job.task for job in jobs)
    found = {task: envpool.announced_versions(task, str(recipe.out)) for task in tasks}
    for task, then in (before or {}).get("simulators", {}).items():
        if then != found.get(task, then):
            what = f"{recipe.out}: {task} was simulated by {_named(then)}, and now would be by {_named(found[task])}"
            raise CvlctlError(what, "choose another out, or --force to replace it")
    return found


def _named(simulator: dict[str, str]) -> str:
    return ", ".join(f"{name} {simulator[name]}" for name in ("envpool", "mujoco") if name in simulator)


def _play(recipe: EvaluateRecipe, wanted: _Wanted, rows: kept.JobRows) -> int:
    """Run the episodes that `rows` lacks, into it; saved now and then, and however it ends. Returns how many."""
    numbers = {job: [at for at in range(recipe.episodes) if at not in done] for job, done in rows.items()}
    missing = {job: lacking for job, lacking in numbers.items() if lacking}
    own = [rows[job] for job in wanted.jobs]
    total, start = len(own) * recipe.episodes, sum(map(len, own))
    if not missing:
        return 0
    if start:
        say(f"{recipe.out}: {start} of {total} episodes are evaluated already")
    job_of = {(job.algorithm, job.task, job.seed, job.step): job for job in rows}
    saved, done = time.monotonic(), start

    def keep(_played: int, _total: int, row: EpisodeResult) -> None:
        nonlocal saved, done
        rows[job_of[row.algorithm, row.task, row.seed, row.step]][row.episode] = row
        done += 1
        progress.update(done)
        if time.monotonic() - saved >= SAVE_SECONDS:
            kept.save(recipe.out, wanted.record, rows)
            saved = time.monotonic()

    copied = {job.copy for job in missing}
    held = [content for content in wanted.in_training if kept.copy_of(recipe.out, content) in copied]
    _probe(recipe, missing)
    with kept.copies(recipe.out, held), Progress("evaluate", total, "episodes", start) as progress:
        player = _player(recipe)
        try:
            player(list(missing), list(missing.values()), keep)
        finally:
            kept.save(recipe.out, wanted.record, rows)
    return total - start


def _filmed(recipe: EvaluateRecipe, wanted: _Wanted, rows: kept.JobRows) -> dict[str, Any]:
    """Make the videos that the recipe asks for, in the place of earlier ones; what the result says of them."""
    kept.clear_videos(recipe.out)
    if recipe.video is None:
        return {}
    count, form = min(recipe.video.episodes, recipe.episodes), recipe.video.format
    workers = None if recipe.workers == "auto" else recipe.workers
    place = lambda job, episode: recipe.out / kept.VIDEOS / videos.name_of(job, episode, form)  # noqa: E731
    held = [content for content in wanted.in_training if kept.copy_of(recipe.out, content) in {j.copy for j in rows}]
    with kept.copies(recipe.out, held), Progress("videos", len(wanted.jobs) * count, "episodes") as progress:
        videos.make_videos(
            wanted.jobs, count, recipe.seed, recipe.video.settings, place, device=_seeing_device(recipe, rows),
            workers=workers, progress=progress.update,
        )  # fmt: skip
    told = [
        {"algorithm": job.algorithm, "task": job.task, "seed": job.seed, "step": job.step, "episode": at,
         "return": rows[job][at].episode_return, "success": rows[job][at].success, "path": str(place(job, at))}
        for job in wanted.jobs
        for at in range(count)
    ]  # fmt: skip
    return {"videos": told}


def _probe(recipe: EvaluateRecipe, jobs: Iterable[PolicyJob]) -> None:
    """Make each environment of one's own once, here: what is amiss with it is said once, and before anything runs."""
    for task, horizon, env in dict.fromkeys((job.task, job.horizon, job.env) for job in jobs if job.env is not None):
        with closing(envs.make(task, EVALUATION_SEED + recipe.seed, horizon, env)) as made:
            probe(made)


def _player(recipe: EvaluateRecipe) -> Callable[[Sequence[PolicyJob], Episodes, OnEpisode], list[EpisodeResult]]:
    workers = None if recipe.workers == "auto" else recipe.workers
    if recipe.backend == "envpool":
        return lambda jobs, episodes, progress: envpool.run_episodes(
            jobs, episodes=episodes, seed=recipe.seed, threads=workers, progress=progress
        )

    def play(jobs: Sequence[PolicyJob], episodes: Episodes, progress: OnEpisode) -> list[EpisodeResult]:
        rows: list[EpisodeResult] = []
        for sees in (False, True):
            mine = [index for index, job in enumerate(jobs) if bool(job.cameras) == sees]
            wanted = numbers_of(jobs, episodes)
            options: dict[str, Any] = {
                "episodes": [wanted[index] for index in mine], "seed": recipe.seed, "workers": workers,
                "progress": progress,
            }  # fmt: skip
            rows += _played([jobs[index] for index in mine], recipe.device, options) if mine else []
        return rows

    return play


def _played(jobs: Sequence[PolicyJob], asked: str, options: dict[str, Any]) -> list[EpisodeResult]:
    """The rows of policies all of which see frames, or none."""
    device = _device(asked, jobs)
    if jobs[0].cameras:
        return run_seeing(jobs, device=device, **options)
    return run_episodes(jobs, **options) if device == "cpu" else run_lockstep(jobs, device=device, **options)


def _seeing_device(recipe: EvaluateRecipe, jobs: Iterable[PolicyJob]) -> str:
    """Where frames are encoded, if any policy sees them."""
    seeing = [job for job in jobs if job.cameras]
    return _device(recipe.device, seeing) if seeing else "cpu"


def _device(asked: str, jobs: Sequence[PolicyJob]) -> str:
    """Where policies answer: what was asked for, or whatever is faster for the largest of them.

    Raises:
        CvlctlError: a GPU is asked for that is not there.
    """
    if asked == "cpu":
        return asked
    import torch

    from cvlctl.learn.settings import lack_of

    if lacking := lack_of(asked, compile=False):
        raise CvlctlError(*lacking)
    if asked != "auto":
        return asked
    if not torch.cuda.is_available():
        return "cpu"
    if jobs[0].cameras:
        return "cuda"
    largest = max(sum(weight.size for weight, _ in job_policy(job).layers) for job in jobs)
    chosen, relation = ("cuda", "above") if largest > GPU_PAYS_AFTER else ("cpu", "up to")
    say(f"device: {chosen} (auto: policies of {relation} {GPU_PAYS_AFTER:,} weights; the largest has {largest:,})")
    return chosen
