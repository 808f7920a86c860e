"""Whole episodes of policies: rows for the score tables, episodes for the stores.

Whole episodes run in worker processes with numpy policies (`players`); or workers step environments together, and one
process answers for all policies on a GPU (`lockstep`). Both see the same episodes of the same stream,
so their rows agree up to the rounding of the matrix products.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.play.cameras import Camera
from cvlctl.play.env import Act, Env
from cvlctl.play.policies import NumpyPolicy, Policy
from cvlctl.play.settings import Settings
from cvlctl.play.sights import SeeingPolicy
from cvlctl.types import Episode, EpisodeResult
from cvlctl.units import plain, wide

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
    frames: Path | None = None  # .npz of these states' frames by camera, (N, S, H, W, C), the latest last


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
    sha256: str | None = None  # of the checkpoint file that is meant; None: whatever is there when it is played
    copy: Path | None = None  # of the file, to be read instead: a run in training replaces its own
    env: Settings | None = None  # of an environment of one's own
    cameras: tuple[Camera, ...] = ()  # what a policy is shown that sees frames


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
    """Episode number `episode` of `env` under `act`, (observation (O,), step) -> action (A,), clipped to [-1, 1].

    With what `env.film` saw of it, where there is one.
    """
    observations, actions, rewards, steps, terminated = roll(env, act, episode)
    successes = flags(steps)
    env.told(episode, successes is not None)
    return Episode(
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array(rewards, dtype=np.float32),
        successes=successes,
        terminated=terminated,
        task=env.task,
        collected_at=collected_at,
        seed=env.seed,
        **env.filmed(),
    )


def flags(successes: Sequence[bool | None]) -> np.ndarray | None:
    """(T,) bool of an episode's steps; None where the environment says nothing of success in any of them."""
    return None if all(one is None for one in successes) else np.array(successes, dtype=bool)


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


def roll(env: Env, act: Act, episode: int) -> tuple[list, list, list, list, bool]:
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


def check_fit(checkpoint: Path, policy: Policy, env: Env, has_goal: bool = False) -> None:
    """Refuse a policy that sees or does something else than the environment has, or in other units, or lacks a goal."""
    if policy.needs_goal and not has_goal:
        what = f"{checkpoint} sees the observation and a goal beside it, and no goal is given"
        stated = "" if isinstance(policy, SeeingPolicy) else ", or train it with critic.command_columns"
        raise CvlctlError(what, f"evaluate it with goals: {{from: STORE}}{stated}")
    sees, does = policy.spec.observation_shape, policy.spec.action_dim
    if isinstance(policy, SeeingPolicy) and not policy.observe.vector:
        sees = env.spec.observation_shape
    if (sees, does) != (env.spec.observation_shape, env.spec.action_dim):
        what = f"{checkpoint} sees {sees} and emits {does} actions"
        has = f"{env.task} has {env.spec.observation_shape} and {env.spec.action_dim}"
        raise CvlctlError(f"{what}; {has}", "use a policy on the task that it was trained for")
    _check_scale(checkpoint, policy, env)
    names, theirs = policy.units.observation_columns, env.columns
    seen, shown = ([_plain(name) for name in some] for some in (names, theirs))
    if sorted(seen) == sorted(shown) and seen != shown:
        what = f"{checkpoint} sees {', '.join(names)}; {env.task} has them in another order: {', '.join(theirs)}"
        raise CvlctlError(what, "choose the order of the data: env: {keys: [...]}")


def _plain(name: str) -> list[str]:
    """The same for joint_2 and joint[2]."""
    return re.findall(r"[a-z0-9]+", name.lower())


def _check_scale(checkpoint: Path, policy: Policy, env: Env) -> None:
    """Refuse a policy whose actions of -1 and 1 stand for others than the environment's, unless the recipe says so."""
    said = policy.units.action_bounds
    if said is None or env.bounds_given:
        return
    theirs, ours = (wide(one, policy.spec.action_dim) for one in (said, env.action_bounds))
    if np.allclose(theirs, ours, rtol=1e-5):
        return
    what = (
        f"{checkpoint}: actions of -1 and 1 are {plain(said)} in its data, and {plain(env.action_bounds)} in {env.task}"
    )
    within = (theirs[0] >= ours[0]).all() and (theirs[1] <= ours[1]).all() and env.own
    here = f"play it in the units of its data, env: {{action_bounds: {plain(said)}}}; or " if within else ""
    raise CvlctlError(what, f"{here}import the data with the environment's: --action-bounds LOW HIGH")


def result_row(
    job: PolicyJob, episode: int, rewards: Sequence[float], successes: Iterable[bool | None]
) -> EpisodeResult:
    """The row of an episode, from its steps' rewards and successes."""
    known = flags(list(successes))  # an episode succeeds where any of its steps does, as Metaworld counts
    success = None if known is None else bool(known.any())
    total, discounted = float(sum(rewards)), None
    if job.gamma is not None:
        discounted = float(np.asarray(rewards, np.float64) @ job.gamma ** np.arange(len(rewards)))
    return EpisodeResult(
        job.algorithm, job.task, job.seed, job.step, episode, total, len(rewards), success, discounted
    )  # fmt: skip
