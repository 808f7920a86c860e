"""Checkpoints of an online agent, measured as they are rolled out: which is first to reach a return, which come next.

D4RL's `medium` is the first checkpoint that reaches a third of the expert's return; LAEO's datasets are rolled out from
several checkpoints, mixed to a success rate. Both need to know what a checkpoint achieves. It is measured with sampled
actions, as the stores are collected, on starts of the evaluation seed: never on the very episodes that are collected,
among which the luckiest checkpoint would then be chosen for its luck.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.checkpoints import Saved, read
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.collect.source_recipes import MixSource, Reaching
from cvlctl.errors import CvlctlError
from cvlctl.learn.algorithms import ONLINE
from cvlctl.play import envs
from cvlctl.play.cameras import Camera
from cvlctl.play.eyes import cameras_seen, playing, stand
from cvlctl.play.policies import Policy, policy_of
from cvlctl.play.rollout import EVALUATION_SEED, Outcome, check_fit, collect_episode, outcome
from cvlctl.progress import Progress, say
from cvlctl.runs import read_run
from cvlctl.types import Spec

GAIN = 0.25  # how much each episode that is missing moves the success rate that the next checkpoint should have
AROUND = 0.1  # checkpoints this much further from that rate than the nearest stand in for it: the least used is taken


def normal(spec: Spec, seed: int, number: int, stream: int) -> np.ndarray:
    """(horizon, A) standard normal, float32, of one episode."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number, stream, 0xAC7]))
    return rng.standard_normal((spec.horizon, spec.action_dim), dtype=np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A policy checkpoint of a finished online collection."""

    file: Path
    step: int  # environment steps of the collection by then
    policy: Policy
    content: Saved  # of the file, as it was when the policy was read from it
    cameras: tuple[Camera, ...] = ()  # that the policy sees


def sampled(checkpoint: Checkpoint, env: envs.Env, number: int) -> envs.Act:
    """What acts in episode `number` where the policy's actions are sampled."""
    drawn = normal(env.spec, env.seed, number, 1)
    return playing(checkpoint.policy, env, checkpoint.cameras, drawn, np.zeros_like(drawn))


def checkpoints_of(run: Path, env: envs.Env) -> list[Checkpoint]:
    """Those that were kept along the way, in order; the last stands for the end of the collection.

    Raises:
        CvlctlError: no such run, one that is not finished or no online collection, or policies that do not fit `env`.
    """
    record = read_run(run)
    steps, seeds = record.get("steps", -1), record.get("seeds", [])
    # some learn offline too: the recipe of such a run names them as `algorithm`, a collection's as `source`
    collected = record.get("algorithm") in tuple(ONLINE) and "algorithm" not in record["recipe"]
    told = isinstance(steps, int) and isinstance(seeds, list) and len(seeds) == 1
    if record["status"] != "finished" or not collected or not told:
        what = f"{run} is not the run of a finished online collection"
        raise CvlctlError(what, "collect it first: cvlctl build-dataset with source: {name: sac} or the like")
    numbered = [
        (re.fullmatch(r"step-(\d{1,18})", file.stem), file) for file in (run / "checkpoints").glob("*.safetensors")
    ]
    files = {int(name[1]): file for name, file in numbered if name}
    files[steps] = run / "checkpoints" / "last.safetensors"
    found = [_checkpoint(files[step], step, seeds[0]) for step in sorted(files)]
    for checkpoint in found:
        check_fit(checkpoint.file, checkpoint.policy, env)
    return found


def _checkpoint(file: Path, step: int, seed: int) -> Checkpoint:
    content = read(file)
    return Checkpoint(file, step, policy_of(content, seed), content, cameras_seen(file, content, stand(content)))


def measure(checkpoint: Checkpoint, env: envs.Env, episodes: int) -> list[Outcome]:
    """What `episodes` episodes of sampled actions come to. `env` is of the evaluation seed."""
    numbers = range(episodes)
    return [outcome(collect_episode(env, sampled(checkpoint, env, number), number)) for number in numbers]


def first_reaching(rule: Reaching, recipe: BuildRecipe) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that `rule` asks for, and how it was found: for the store's attributes.

    Raises:
        CvlctlError: the last checkpoint's mean return is not positive, so that a share of it says nothing.
    """
    env = envs.make(recipe.task, EVALUATION_SEED, recipe.horizon, recipe.settings)
    try:
        found = checkpoints_of(rule.run, env)
        with Progress(f"measuring {rule.run}", len(found), "checkpoints") as progress:

            def mean_return(checkpoint: Checkpoint) -> float:
                return float(np.mean([total for total, _ in measure(checkpoint, env, rule.episodes)]))

            last = mean_return(found[-1])
            if last <= 0:
                what = f"{rule.run}: the last checkpoint's mean return is {last:.4g}: no share of it can be reached"
                raise CvlctlError(what, "collect for more steps, or name a checkpoint yourself")
            tried: list[tuple[int, float]] = []
            for number, checkpoint in enumerate(found[:-1]):
                tried.append((checkpoint.step, mean_return(checkpoint)))
                progress.update(number + 1, f"return {tried[-1][1]:.4g} at {checkpoint.step}")
                if tried[-1][1] >= rule.reaches * last:
                    break
            else:
                checkpoint = found[-1]
                tried.append((checkpoint.step, last))
    finally:
        env.close()
    step, reached = tried[-1]
    share = f"{reached / last:.0%} of the {last:.4g} of the last one, at {found[-1].step}"
    say(f"{rule.run}: the checkpoint at frame {step} is the first to reach {rule.reaches:.0%}: {reached:.4g}, {share}")
    return checkpoint, {
        "checkpoint": str(checkpoint.file), "step": step, "return_mean": reached, "last_step": found[-1].step,
        "last_return_mean": last, "measured_episodes": rule.episodes, "measured": tried,
    }  # fmt: skip


class Mixer:
    """Chooses the checkpoint of each episode so that the share of successful episodes becomes what was asked for.

    Where successes are missing, the next episode is of a checkpoint that succeeds more often, and the other way round:
    of those near to the wanted rate, the one least used so far. The choice is a function of the outcomes so far, so
    that a killed collection goes on as it would have.

    Args:
        rates: measured success rate of each checkpoint; `weight` episodes each.
        target: the share asked for.
    """

    def __init__(self, rates: list[float], weight: int, target: float) -> None:
        self.rates, self._weight, self.target = np.array(rates), weight, target
        self.successes, self.episodes = np.zeros(len(rates), int), np.zeros(len(rates), int)

    @property
    def rate(self) -> float:
        """The share of successful episodes so far."""
        return float(self.successes.sum() / max(1, self.episodes.sum()))

    def choose(self) -> int:
        """The place of the checkpoint for the next episode."""
        rates = (self.rates * self._weight + self.successes) / (self._weight + self.episodes)
        missing = self.target * self.episodes.sum() - self.successes.sum()
        wanted = np.clip(self.target + GAIN * missing, 0.0, 1.0)
        distance = np.abs(rates - wanted)
        near = np.flatnonzero(distance <= distance.min() + AROUND)
        return int(near[np.argmin(self.episodes[near])])

    def record(self, place: int, success: bool) -> None:
        """What the episode of the checkpoint at `place` came to."""
        self.successes[place] += success
        self.episodes[place] += 1


def measured_mixer(source: MixSource, recipe: BuildRecipe) -> tuple[list[Checkpoint], Mixer]:
    """The checkpoints of `source.run`, and a mixer that knows their measured success rates.

    Raises:
        CvlctlError: the task has no success, or all checkpoints succeed too seldom or too often for the request.
    """
    env = envs.make(recipe.task, EVALUATION_SEED, recipe.horizon, recipe.settings)
    try:
        found = checkpoints_of(source.run, env)
        rates: list[float] = []
        with Progress(f"measuring {source.run}", len(found), "checkpoints") as progress:
            for checkpoint in found:
                successes = [success for _, success in measure(checkpoint, env, source.measured_episodes)]
                if successes[0] is None:
                    what = f"source.success_rate: {recipe.task} has no notion of success"
                    raise CvlctlError(what, "use source: {name: policy} with checkpoints of your choice")
                rates.append(float(np.mean([bool(success) for success in successes])))
                progress.update(len(rates), f"success {rates[-1]:.0%} at {checkpoint.step}")
    finally:
        env.close()
    listed = ", ".join(f"{rate:.0%} at {one.step}" for one, rate in zip(found, rates, strict=True))
    say(f"{source.run}: success {listed} ({source.measured_episodes} episodes each)")
    if not min(rates) - source.tolerance <= source.success_rate <= max(rates) + source.tolerance:
        what = f"{source.run}: no mix of its checkpoints has success {source.success_rate:.1%}; they have {listed}"
        hint = "longer" if source.success_rate > max(rates) else "with a smaller policy_every_steps"
        raise CvlctlError(what, f"ask for another rate, or collect {hint}")
    return found, Mixer(rates, source.measured_episodes, source.success_rate)
