"""Whole episodes of policies: rows for the score tables, episodes for the stores.

On a CPU whole episodes run in worker processes with numpy policies (`run_episodes`); on a GPU one process steps several
environments in lock-step and asks all policies at once (`run_lockstep`). Both see the same episodes of the same stream,
so their rows agree up to the rounding of the matrix products.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.envs import Act, Env, make
from cvlctl.errors import CvlctlError
from cvlctl.machine import num_cpus
from cvlctl.policies import NumpyPolicy, load_policy
from cvlctl.types import Episode, EpisodeResult
from cvlctl.workers import share_out

EVALUATION_SEED = 1_000_003  # environment seed = this + seed: apart from the seeds 0, 1, ... of collection and training

Progress = Callable[[int, int, EpisodeResult], None]  # (episodes done, episodes in all, the one just done)
Episodes = int | Sequence[Sequence[int]]  # how many of each job, or for each job the numbers of those wanted
Outcome = tuple[float, bool | None]  # return and success; None where the task has no notion of it


@dataclass(frozen=True)
class GoalUse:
    """Goals that an evaluation commands: episode i gets state i mod N of a file."""

    file: Path  # .npy of states (N, O)
    columns: tuple[int, ...] | None = None  # of a state, that make the goal; None: the policy's own
    within: float | None = None  # success is to come this close (Euclidean); None: the environment's own success


@dataclass(frozen=True)
class PolicyJob:
    """One policy to evaluate: the member `seed` of a checkpoint (file or run), and what its rows are called."""

    algorithm: str
    task: str
    seed: int
    step: int
    checkpoint: Path
    gamma: float | None = None  # for the discounted return too
    goals: GoalUse | None = None  # for a policy that is told where to go
    horizon: int | None = None  # episodes are cut off after so many steps; None: the task's own limit


@dataclass(frozen=True)
class PolicyAct:
    """A checkpoint playing one episode of at most H steps: (observation (O,), step) -> action (A,)."""

    policy: NumpyPolicy
    sampling: np.ndarray | None  # (H, A) standard normal; None: greedy
    noise: np.ndarray  # (H, A), added to the action

    def __call__(self, observation: np.ndarray, step: int) -> np.ndarray:
        action = self.policy(observation, None if self.sampling is None else self.sampling[step])
        return np.clip(action + self.noise[step], -1.0, 1.0)


def act_together(
    acts: Sequence[Act | None], observations: np.ndarray, steps: Sequence[int], action_dim: int
) -> np.ndarray:
    """Actions (N, A) of N episodes at once: row i for `acts[i]` at `observations[i]` and `steps[i]`; None: zeros.

    A policy answers all rows in one product, those of others too: so what it answers to a row is the same whichever
    the others are.
    """
    actions = np.zeros((len(acts), action_dim), dtype=np.float32)
    groups: dict[int, dict[int, PolicyAct]] = {}
    for row, act in enumerate(acts):
        if isinstance(act, PolicyAct):
            groups.setdefault(id(act.policy), {})[row] = act
        elif act is not None:
            actions[row] = act(observations[row], steps[row])
    for group in groups.values():
        sampling, noise = np.zeros_like(actions), np.zeros_like(actions)
        for row, one in group.items():
            noise[row] = one.noise[steps[row]]
            if one.sampling is not None:
                sampling[row] = one.sampling[steps[row]]
        answers = one.policy(observations, None if one.sampling is None else sampling)
        rows = list(group)
        actions[rows] = np.clip(answers[rows] + noise[rows], -1.0, 1.0)
    return actions


def collect_episode(env: Env, act: Act, episode: int, *, collected_at: int = 0) -> Episode:
    """Episode number `episode` of `env` under `act`, (observation (O,), step) -> action (A,), clipped to [-1, 1]."""
    observations, actions, rewards, successes, terminated = _roll(env, act, episode)
    return Episode(
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array(rewards, dtype=np.float32),
        successes=None if successes[0] is None else np.array(successes, dtype=bool),
        terminated=terminated,
        task=env.task,
        collected_at=collected_at,
        seed=env.seed,
    )


def outcome(episode: Episode) -> Outcome:
    """What an episode with rewards came to."""
    assert episode.rewards is not None
    success = None if episode.successes is None else bool(episode.successes.any())
    return float(episode.rewards.sum(dtype=np.float64)), success


def in_words(latest: Iterable[Outcome]) -> str:
    """The latest episodes, for a progress bar."""
    returns, successes = zip(*latest, strict=True)
    rate = "" if successes[0] is None else f", success {np.mean(successes):.0%}"
    return f"return {np.mean(returns):.4g}{rate} (last {len(returns)} episodes)"


def _roll(env: Env, act: Act, episode: int) -> tuple[list, list, list, list, bool]:
    observation = env.reset(episode)
    observations: list[np.ndarray] = [observation]
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    successes: list[bool | None] = []
    terminated = truncated = False
    while not (terminated or truncated):
        action = np.asarray(act(observation, len(actions)), dtype=np.float32)
        observation, reward, terminated, truncated, success = env.step(action)
        observations.append(observation)
        actions.append(np.clip(action, -1.0, 1.0))
        rewards.append(reward)
        successes.append(success)
    return observations, actions, rewards, successes, terminated


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
    plain = [json.loads(json.dumps(asdict(job), default=str)) for job in jobs]
    requests = [{"job": plain[index], "episode": episode, "seed": seed} for index, episode in items]
    with closing(share_out("cvlctl.rollout:_work", requests, workers)) as answers:
        for place, row in answers:
            yield place, EpisodeResult(**row)


def _work(request: dict[str, Any]) -> dict[str, Any]:
    """One episode in a worker: JSON in, JSON out."""
    plain = request["job"]
    goals = plain["goals"] and GoalUse(**plain["goals"])
    job = PolicyJob(**plain | {"checkpoint": Path(plain["checkpoint"]), "goals": goals})
    return asdict(_worker_player(request["seed"])(job, request["episode"]))


def _player(seed: int) -> Callable[[PolicyJob, int], EpisodeResult]:
    """A function (job, episode) -> row that keeps the environments and policies it made."""
    env_of = lru_cache(maxsize=4)(lambda task, horizon: make(task, EVALUATION_SEED + seed, horizon))
    policy_of = lru_cache(maxsize=64)(load_policy)
    goal_of = _goals()

    def play(job: PolicyJob, episode: int) -> EpisodeResult:
        env, policy = env_of(job.task, job.horizon), policy_of(job.checkpoint, job.seed)
        check_fit(job.checkpoint, policy, env, job.goals is not None)
        goal = goal_of(job, episode)
        seen, _, rewards, successes, _ = _roll(env, lambda o, step: policy(policy.command(o, goal)), episode)
        successes = [_succeeds(job, policy, o, goal, s) for o, s in zip(seen[1:], successes, strict=True)]
        return result_row(job, episode, rewards, successes)

    return play


# in workers only: they end with the evaluation, so that nothing in it goes stale
_worker_player = lru_cache(maxsize=1)(_player)


def _goals() -> Callable[[PolicyJob, int], np.ndarray | None]:
    """A function (job, episode) -> the state (O,) that the job commands in it, None where it commands none."""
    states_of = lru_cache(maxsize=4)(partial(np.load, allow_pickle=False))

    def goal_of(job: PolicyJob, episode: int) -> np.ndarray | None:
        if job.goals is None:
            return None
        states = states_of(job.goals.file)
        return states[episode % len(states)]

    return goal_of


def _succeeds(
    job: PolicyJob, policy: NumpyPolicy, observation: np.ndarray, goal: np.ndarray | None, success: bool | None
) -> bool | None:
    """Success of a step that led to `observation`: within reach of the goal, or what the environment says."""
    if goal is None or job.goals is None or job.goals.within is None:
        return success
    columns = job.goals.columns or (policy.goals and policy.goals.goal)
    if columns is None:
        what = f"goals.within: {job.algorithm} has no goals, and does not say which columns of a state make one"
        raise CvlctlError(what, "add goals.columns, such as [0, 1, 2]")
    return bool(np.linalg.norm(observation[list(columns)] - goal[list(columns)]) < job.goals.within)


def check_fit(checkpoint: Path, policy: NumpyPolicy, env: Env, has_goal: bool = False) -> None:
    """Refuse a policy that sees or does something else than the environment has, or lacks a goal."""
    if policy.needs_goal and not has_goal:
        what = f"{checkpoint} sees the observation and a goal beside it, and no goal is given"
        raise CvlctlError(what, "evaluate it with goals: {from: STORE}, or train it with critic.command_columns")
    sees, does = policy.spec.observation_shape, policy.spec.action_dim
    if (sees, does) != (env.spec.observation_shape, env.spec.action_dim):
        what = f"{checkpoint} sees {sees} and emits {does} actions"
        has = f"{env.task} has {env.spec.observation_shape} and {env.spec.action_dim}"
        raise CvlctlError(f"{what}; {has}", "use a policy on the task that it was trained for")


def result_row(
    job: PolicyJob, episode: int, rewards: Sequence[float], successes: Iterable[bool | None]
) -> EpisodeResult:
    """The row of an episode, from its steps' rewards and successes."""
    flags = list(successes)  # an episode succeeds where any of its steps does, as Metaworld counts
    success = None if flags[0] is None else any(flags)
    total, discounted = float(sum(rewards)), None
    if job.gamma is not None:
        discounted = float(np.asarray(rewards, np.float64) @ job.gamma ** np.arange(len(rewards)))
    return EpisodeResult(
        job.algorithm, job.task, job.seed, job.step, episode, total, len(rewards), success, discounted
    )  # fmt: skip


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
    policies = [load_policy(job.checkpoint, job.seed) for job in jobs]
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
    goal_of = _goals()
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
            successes.append(_succeeds(job, policy, observation, goal, success))
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
