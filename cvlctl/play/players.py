"""Evaluation episodes of many policies in worker processes: whole episodes, the same for any number of workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.checkpoints import checkpoint_file, read
from cvlctl.errors import CvlctlError
from cvlctl.machine import num_cpus
from cvlctl.play.envs import make
from cvlctl.play.policies import NumpyPolicy, Policy, vector_policy_of
from cvlctl.play.rollout import EVALUATION_SEED, Episodes, GoalUse, PolicyJob, Progress, check_fit, result_row, roll
from cvlctl.play.settings import Settings
from cvlctl.play.workers import share_out
from cvlctl.types import EpisodeResult


def run_episodes(
    jobs: Sequence[PolicyJob],
    *,
    episodes: Episodes,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[EpisodeResult]:
    """`episodes` greedy episodes of each job: rows in the order of (job, episode), the same for any number of workers.

    Every job of a task meets the same episodes: those of environment seed EVALUATION_SEED + `seed`. An episode depends
    on nothing but its number, and not on which others are played.

    Args:
        episodes: how many of each job, from number 0 on; or for each job the numbers of those wanted.
        workers: processes; None: one for each CPU that this process may use; 0 or 1: none, all in this process.
        progress: called in this process after every finished episode.

    Raises:
        CvlctlError: what a user can mend in a checkpoint or task, also when a worker met it; a worker that died.
    """
    # by task: a worker keeps few environments, and building one takes longer than an episode
    order = sorted(range(len(jobs)), key=lambda index: (jobs[index].task, index))
    numbers = numbers_of(jobs, episodes)
    items = [(index, episode) for index in order for episode in numbers[index]]
    if workers is None:
        workers = num_cpus()
    workers = min(workers, len(items))
    rows: dict[tuple[int, int], EpisodeResult] = {}
    with closing(_answers(jobs, items, seed, workers)) as answers:  # closing: whatever happens here, the workers end
        for place, row in answers:
            rows[items[place]] = row
            if progress:
                progress(len(rows), len(items), row)
    return [rows[item] for item in sorted(rows)]


def numbers_of(jobs: Sequence[PolicyJob], episodes: Episodes) -> Sequence[Sequence[int]]:
    """For each job the numbers of its episodes."""
    return [range(episodes)] * len(jobs) if isinstance(episodes, int) else episodes


def _answers(
    jobs: Sequence[PolicyJob], items: Sequence[tuple[int, int]], seed: int, workers: int
) -> Generator[tuple[int, EpisodeResult], None, None]:
    if workers <= 1:
        play = _player(seed)
        for place, (index, episode) in enumerate(items):
            yield place, play(jobs[index], episode)
        return
    plain = [plain_of(job) for job in jobs]
    requests = [{"job": plain[index], "episode": episode, "seed": seed} for index, episode in items]
    with closing(share_out("cvlctl.play.players:_work", requests, workers)) as answers:
        for place, row in answers:
            yield place, EpisodeResult(**row)


def _work(request: dict[str, Any]) -> dict[str, Any]:
    """One episode in a worker: JSON in, JSON out."""
    return asdict(_worker_player(request["seed"])(job_of(request["job"]), request["episode"]))


def plain_of(job: PolicyJob) -> dict[str, Any]:
    """A job as JSON has it."""
    return json.loads(json.dumps(asdict(job), default=str))


def job_of(plain: dict[str, Any]) -> PolicyJob:
    """The job that `plain_of` was given."""
    goals = plain["goals"] and GoalUse(**plain["goals"])
    paths = {name: plain[name] and Path(plain[name]) for name in ("checkpoint", "copy")}
    env = plain["env"] and Settings.of(plain["env"])
    return PolicyJob(**plain | paths | {"goals": goals, "env": env, "cameras": ()})


def _player(seed: int) -> Callable[[PolicyJob, int], EpisodeResult]:
    """A function (job, episode) -> row that keeps the environments and policies it made."""
    env_of = lru_cache(maxsize=4)(lambda task, horizon, env: make(task, EVALUATION_SEED + seed, horizon, env))
    known_policy = lru_cache(maxsize=64)(job_policy)
    goal_of = goal_lookup()

    def play(job: PolicyJob, episode: int) -> EpisodeResult:
        env, policy = env_of(job.task, job.horizon, job.env), known_policy(job)
        check_fit(job.checkpoint, policy, env, job.goals is not None)
        goal = goal_of(job, episode)
        seen, _, rewards, successes, _ = roll(env, lambda o, step: policy(policy.command(o, goal)), episode)
        successes = [succeeds(job, policy, o, goal, s) for o, s in zip(seen[1:], successes, strict=True)]
        return result_row(job, episode, rewards, successes)

    return play


# in workers only: they end with the evaluation, so that nothing in it goes stale
_worker_player = lru_cache(maxsize=1)(_player)


def job_policy(job: PolicyJob) -> NumpyPolicy:
    """The policy of a job: of the very bytes that the job is about. CvlctlError where they are no longer there."""
    return vector_policy_of(read(checkpoint_file(job.copy or job.checkpoint), job.sha256), job.seed)


def goal_lookup() -> Callable[[PolicyJob, int], np.ndarray | None]:
    """A function (job, episode) -> the state (O,) that the job commands in it, None where it commands none."""
    states_of = lru_cache(maxsize=4)(partial(np.load, allow_pickle=False))

    def goal_of(job: PolicyJob, episode: int) -> np.ndarray | None:
        if job.goals is None:
            return None
        states = states_of(job.goals.file)
        return states[episode % len(states)]

    return goal_of


def succeeds(
    job: PolicyJob, policy: Policy, observation: np.ndarray, goal: np.ndarray | None, success: bool | None
) -> bool | None:
    """Success of a step that led to `observation`: within reach of the goal, or what the environment says."""
    if goal is None or job.goals is None or job.goals.within is None:
        return success
    own = policy.goals if isinstance(policy, NumpyPolicy) else None
    columns = job.goals.columns or (own and own.goal)
    if columns is None:
        has = "is shown its goals" if policy.needs_goal else "has no goals"
        what = f"goals.within: {job.algorithm} {has}, and does not say which columns of a state make one"
        raise CvlctlError(what, "add goals.columns, such as [0, 1, 2]")
    return bool(np.linalg.norm(observation[list(columns)] - goal[list(columns)]) < job.goals.within)
