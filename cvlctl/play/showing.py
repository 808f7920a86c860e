"""Evaluation episodes of policies that see frames: worker processes simulate and draw, this one answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cvlctl.checkpoints import checkpoint_file, read
from cvlctl.errors import CvlctlError
from cvlctl.machine import num_cpus
from cvlctl.play.env import Env
from cvlctl.play.players import goal_lookup, numbers_of, succeeds
from cvlctl.play.policies import policy_of
from cvlctl.play.rollout import EVALUATION_SEED, Episodes, PolicyJob, Progress, check_fit, result_row
from cvlctl.play.sights import VECTOR, SeeingPolicy
from cvlctl.play.stepping import Stepper, frames_in
from cvlctl.types import EpisodeResult

ENVS = 8  # that step together: a policy always answers for so many, so that rows are the same for any number of workers


def run_seeing(
    jobs: Sequence[PolicyJob],
    *,
    episodes: Episodes,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress | None = None,
    acted: Callable[[int, int, np.ndarray], None] | None = None,
) -> list[EpisodeResult]:
    """The rows of policies that see frames, as `players.run_episodes` gives those of vectors: the same episodes.

    Args:
        jobs: with `cameras`.
        device: on which frames are encoded.
        workers: processes that simulate and draw; None: one for each CPU that this process may use; 0 or 1: none.
        acted: told the place of a job, the number of its episode that is over, and the actions (T, A) taken in it.
    """
    numbers, workers = numbers_of(jobs, episodes), num_cpus() if workers is None else workers
    groups: dict[tuple, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault((job.task, job.horizon, job.env, job.cameras), []).append(index)
    rows: dict[tuple[int, int], EpisodeResult] = {}
    for (task, horizon, env, cameras), indices in groups.items():
        with Stepper(task, EVALUATION_SEED + seed, horizon, ENVS, workers, env, cameras) as envs:
            for index in indices:
                job = jobs[index]
                policy = policy_of(read(checkpoint_file(job.copy or job.checkpoint), job.sha256), job.seed)
                check_fit(job.checkpoint, policy, envs.first, job.goals is not None)
                assert isinstance(policy, SeeingPolicy)
                goals = _Goals(job, policy, envs.first)
                for row, actions in _played(job, policy.to(device), envs, numbers[index], goals):
                    rows[index, row.episode] = row
                    if acted:
                        acted(index, row.episode, np.stack(actions))
                    if progress:
                        progress(len(rows), sum(map(len, numbers)), row)
    return [rows[item] for item in sorted(rows)]


class _Goals:
    """Where a job sends its policy: episode i to state i mod N.

    Raises:
        CvlctlError: how near the environment comes to them cannot be told.
    """

    def __init__(self, job: PolicyJob, policy: SeeingPolicy, env: Env) -> None:
        self._job, self._policy, self._state_of = job, policy, goal_lookup()
        self._frames: dict[str, np.ndarray] = {}
        if job.goals is not None and job.goals.frames is not None:
            with np.load(job.goals.frames, allow_pickle=False) as kept:
                self._frames = {name: kept[name][:, -policy.observe.stack :] for name in policy.observe.cameras}
        state = self.state(0)
        if state is not None and job.goals and job.goals.within and len(state) != env.spec.observation_shape[0]:
            has = f"observations of {env.spec.observation_shape[0]} columns, and the goals have {len(state)}"
            hint = "take goals from: a store of this task with a vector beside its frames, or leave within out"
            raise CvlctlError(f"goals.within: {env.task} has {has}", hint)

    def state(self, episode: int) -> np.ndarray | None:
        """(O,); None where none is commanded."""
        return self._state_of(self._job, episode)

    def told(self, episode: int) -> np.ndarray | None:
        """(1, G), what the policy is told; None where it is told none."""
        state = self.state(episode)
        if state is None or not self._policy.needs_goal:
            return None
        frames = {name: of[episode % len(of)][None] for name, of in self._frames.items()}
        return self._policy.told({VECTOR: state[None], **frames})


class _Playing(NamedTuple):
    """An episode under way."""

    episode: int
    goal: np.ndarray | None
    actions: list[np.ndarray]
    rewards: list[float]
    successes: list[bool | None]


def _played(
    job: PolicyJob, policy: SeeingPolicy, envs: Stepper, wanted: Sequence[int], goals: _Goals
) -> Iterator[tuple[EpisodeResult, list[np.ndarray]]]:
    """The rows of a policy's episodes, as they end, and its actions in them."""
    table, waiting = envs.table, iter(wanted)
    playing: dict[int, _Playing] = {}
    frames = {name: frames_in(table, i) for i, name in enumerate(camera.name for camera in job.cameras)}
    stacks = {name: np.repeat(frames[name][:, None], policy.observe.stack, axis=1) for name in frames}
    told: np.ndarray | None = None  # (ENVS, G)
    free = list(range(ENVS))
    while True:
        begun = {number: episode for number in free if (episode := next(waiting, None)) is not None}
        if not (begun or playing):
            return
        if playing:
            shown = {name: stacks[name] for name in policy.observe.cameras}
            table["action"] = policy({**shown, VECTOR: table["observation"]}, goal=told)
        envs.run(begun, list(playing))
        for name, stack in stacks.items():
            stack[:, :-1] = stack[:, 1:]
            stack[:, -1] = frames[name]
            for number in begun:
                stack[number] = frames[name][number]
        free = []
        for number, one in playing.items():
            one.actions.append(table["action"][number].copy())
            one.rewards.append(float(table["reward"][number]))
            success = None if table["success"][number] < 0 else bool(table["success"][number])
            one.successes.append(succeeds(job, policy, table["observation"][number], one.goal, success))
            if table["over"][number]:
                free.append(number)
                yield result_row(job, one.episode, one.rewards, one.successes), one.actions
        for number in free:
            del playing[number]
        for number, episode in begun.items():
            playing[number] = _Playing(episode, goals.state(episode), [], [], [])
            if (goal := goals.told(episode)) is not None:
                told = goal.repeat(ENVS, axis=0) if told is None else told
                told[number] = goal
