"""Evaluation episodes in lock-step: environments in worker processes, all policies answered at once in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cvlctl.machine import num_cpus
from cvlctl.play.players import goal_lookup, job_policy, numbers_of, succeeds
from cvlctl.play.policies import NumpyPolicy
from cvlctl.play.rollout import EVALUATION_SEED, Episodes, PolicyJob, Progress, check_fit, result_row
from cvlctl.play.stepping import Stepper
from cvlctl.types import EpisodeResult

JOBS, ENVS = 8, 8  # policies in a product, environments of each


def run_lockstep(
    jobs: Sequence[PolicyJob],
    *,
    episodes: Episodes,
    seed: int = 0,
    device: str = "cuda",
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[EpisodeResult]:
    """The rows of `run_episodes`: environments step together in worker processes, and this one answers for the policies
    of all jobs by one batched product on `device`. For policies that take longer to answer than a simulator to step.

    On one device the rows are the same for any number of workers, and whichever jobs and episodes are played together:
    the product is always of JOBS policies and ENVS environments each, the last policy repeated where there are fewer.

    Args:
        workers: None: one for each CPU that this process may use; 0 or 1: none, all in this process.
    """
    policies = [job_policy(job) for job in jobs]
    numbers = numbers_of(jobs, episodes)
    workers = num_cpus() if workers is None else workers
    groups: dict[Any, list[int]] = {}
    for index, (job, policy) in enumerate(zip(jobs, policies, strict=True)):
        shapes = tuple(weight.shape for weight, _ in policy.layers)
        groups.setdefault((job.task, job.horizon, job.env, shapes), []).append(index)
    rows: dict[tuple[int, int], EpisodeResult] = {}
    for (task, horizon, env, _), indices in groups.items():
        with Stepper(task, EVALUATION_SEED + seed, horizon, JOBS * ENVS, workers, env) as envs:
            for part in (indices[start : start + JOBS] for start in range(0, len(indices), JOBS)):
                for index in part:
                    check_fit(jobs[index].checkpoint, policies[index], envs.first, jobs[index].goals is not None)
                own = [policies[index] for index in part]
                act = _stacked([*own, *[own[-1]] * (JOBS - len(part))], device)
                some, theirs = [jobs[index] for index in part], [numbers[index] for index in part]
                for place, row in _lockstep(some, own, act, envs, theirs):
                    rows[part[place], row.episode] = row
                    if progress:
                        progress(len(rows), sum(map(len, numbers)), row)
    return [rows[item] for item in sorted(rows)]


class _Playing(NamedTuple):
    """An episode under way."""

    job: int  # its place
    episode: int
    goal: np.ndarray | None
    rewards: list[float]
    successes: list[bool | None]


def _lockstep(
    jobs: Sequence[PolicyJob],
    policies: Sequence[NumpyPolicy],
    act: Callable[[np.ndarray], np.ndarray],
    envs: Stepper,
    numbers: Sequence[Sequence[int]],
) -> Iterator[tuple[int, EpisodeResult]]:
    """(place in `jobs`, row) of every episode as it ends; environment j ENVS + i is the i-th of job j."""
    seen = np.zeros((JOBS * ENVS, *policies[0].mean.shape), dtype=np.float32)  # as the policies see the observations
    table, goal_of = envs.table, goal_lookup()
    waiting = [iter(wanted) for wanted in numbers]
    playing: dict[int, _Playing] = {}
    free = list(range(len(jobs) * ENVS))
    while True:
        begun = {}
        for number in free:
            place = number // ENVS
            if (episode := next(waiting[place], None)) is not None:
                begun[number] = _Playing(place, episode, goal_of(jobs[place], episode), [], [])
        if not (begun or playing):
            return
        if playing:
            table["action"] = act(seen.reshape(JOBS, ENVS, -1)).reshape(table["action"].shape)
        envs.run({number: one.episode for number, one in begun.items()}, list(playing))
        free = []
        for number, one in playing.items():
            job, policy, observation = jobs[one.job], policies[one.job], table["observation"][number]
            success = None if table["success"][number] < 0 else bool(table["success"][number])
            one.rewards.append(float(table["reward"][number]))
            one.successes.append(succeeds(job, policy, observation, one.goal, success))
            if table["over"][number]:
                free.append(number)
                yield one.job, result_row(job, one.episode, one.rewards, one.successes)
        for number in free:
            del playing[number]
        playing |= begun
        for number, one in playing.items():
            seen[number] = policies[one.job].command(table["observation"][number], one.goal)


def _stacked(policies: Sequence[NumpyPolicy], device: str) -> Callable[[np.ndarray], np.ndarray]:
    """(J, n, O) observations -> (J, n, A) greedy actions of J policies of one shape: NumpyPolicy's maths in torch."""
    import torch

    def stack(arrays: Iterable[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(arrays))).to(device)

    mean, std = stack(p.mean[None] for p in policies), stack(p.std[None] for p in policies)
    layers = [
        (stack(p.layers[i][0] for p in policies), stack(p.layers[i][1][None] for p in policies))
        for i in range(len(policies[0].layers))
    ]

    @torch.inference_mode()
    def act(observations: np.ndarray) -> np.ndarray:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(
            "highest"
        )  # training may have left it at less: rows are to equal the workers'
        x = ((torch.from_numpy(observations).to(device) - mean) / std).clamp(-10.0, 10.0)
        for weight, bias in layers[:-1]:
            x = torch.baddbmm(bias, x, weight).relu()
        x = torch.baddbmm(layers[-1][1], x, layers[-1][0])
        torch.set_float32_matmul_precision(precision)
        return x[..., : policies[0].spec.action_dim].tanh().cpu().numpy()

    return act
