"""Evaluation episodes in lock-step: all environments in this process, all policies answered at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cvlctl.play.envs import Env, make
from cvlctl.play.players import goal_lookup, job_policy, numbers_of, succeeds
from cvlctl.play.policies import NumpyPolicy
from cvlctl.play.rollout import EVALUATION_SEED, Episodes, PolicyJob, Progress, check_fit, result_row
from cvlctl.types import EpisodeResult


def run_lockstep(
    jobs: Sequence[PolicyJob],
    *,
    episodes: Episodes,
    seed: int = 0,
    device: str = "cuda",
    num_envs: int = 32,
    progress: Progress | None = None,
) -> list[EpisodeResult]:
    """The rows of `run_episodes`, from one process: about `num_envs` environments step together, and the policies of
    all jobs answer in one batched product on `device`. For a GPU beside few CPU cores, or many large policies."""
    policies = [job_policy(job) for job in jobs]
    numbers = numbers_of(jobs, episodes)
    groups: dict[Any, list[int]] = {}
    for index, (job, policy) in enumerate(zip(jobs, policies, strict=True)):
        groups.setdefault((job.task, job.horizon, tuple(weight.shape for weight, _ in policy.layers)), []).append(index)
    rows: dict[tuple[int, int], EpisodeResult] = {}
    for (task, horizon, _), indices in groups.items():
        envs: list[Env] = []
        for part in (indices[start : start + num_envs] for start in range(0, len(indices), num_envs)):
            each = max(1, min(max(len(numbers[index]) for index in part), num_envs // len(part)))
            envs += [make(task, EVALUATION_SEED + seed, horizon) for _ in range(each * len(part) - len(envs))]
            for index in part:
                check_fit(jobs[index].checkpoint, policies[index], envs[0], jobs[index].goals is not None)
            own = [policies[index] for index in part]
            some, theirs = [jobs[index] for index in part], [numbers[index] for index in part]
            for place, row in _lockstep(some, own, _stacked(own, device), envs, each, theirs):
                rows[part[place], row.episode] = row
                if progress:
                    progress(len(rows), sum(map(len, numbers)), row)
    return [rows[item] for item in sorted(rows)]


def _lockstep(
    jobs: Sequence[PolicyJob],
    policies: Sequence[NumpyPolicy],
    act: Callable[[np.ndarray], np.ndarray],
    envs: Sequence[Env],
    each: int,
    numbers: Sequence[Sequence[int]],
) -> Iterator[tuple[int, EpisodeResult]]:
    """(place in `jobs`, row) of every episode as it ends; slot (j, i) is the i-th of `each` environments of job j."""
    observations = np.zeros((len(jobs), each, *policies[0].mean.shape), dtype=np.float32)  # as the policies see them
    goal_of = goal_lookup()
    waiting = [iter(wanted) for wanted in numbers]
    running: dict[tuple[int, ...], tuple[int, list[float], list[bool | None]]] = {}

    def begin(slot: tuple[int, ...]) -> None:
        running.pop(slot, None)
        if (episode := next(waiting[slot[0]], None)) is not None:
            first = envs[slot[0] * each + slot[1]].reset(episode)
            observations[slot] = policies[slot[0]].command(first, goal_of(jobs[slot[0]], episode))
            running[slot] = (episode, [], [])

    for slot in np.ndindex(len(jobs), each):
        begin(slot)
    while running:
        actions = act(observations)
        for slot, (episode, rewards, successes) in list(running.items()):
            step = envs[slot[0] * each + slot[1]].step(actions[slot])
            observation, reward, terminated, truncated, success = step
            job, policy = jobs[slot[0]], policies[slot[0]]
            goal = goal_of(job, episode)
            observations[slot] = policy.command(observation, goal)
            rewards.append(reward)
            successes.append(succeeds(job, policy, observation, goal, success))
            if terminated or truncated:
                yield slot[0], result_row(jobs[slot[0]], episode, rewards, successes)
                begin(slot)


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
