"""Policies that run on numpy alone: read from a checkpoint by worker processes that never import torch.

A checkpoint is a safetensors file with a leading member axis E (one member a seed). The actor's part of it, float:
`actor.<i>.weight` (E, in, out), `actor.<i>.bias` (E, 1, out), i = 0, 1, ...; the last layer emits 2A numbers, the mean
and the logarithm of the standard deviation before the squashing tanh. `observation_mean`, `observation_std` are (E, O).
The header's key "cvlctl" holds JSON: format, algorithm, task, spec, seeds, step, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl.checkpoints import Saved, checkpoint_file, read
from cvlctl.errors import CvlctlError
from cvlctl.types import Spec


def policy_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training state makes its policy: the actor and the normaliser."""
    return {name: value for name, value in state.items() if name.startswith(("actor.", "observation_"))}


class GoalColumns(NamedTuple):
    """How a goal-conditioned policy is told its goal, a state (O,) to arrive at."""

    goal: tuple[int, ...]  # the columns of a state that make a goal
    command: tuple[int, ...]  # the columns of the observation that state it; (): it follows the observation


class NumpyPolicy:
    """A tanh-Gaussian actor: ReLU layers on normalised observations.

    Args:
        layers: (weight (in, out), bias (out,)) of each layer; the last has out = 2A.
        mean, std: (O,) of the observations; the network sees clip((observation - mean) / std, -10, 10). (O + G,) for
            a goal-conditioned policy whose observations are followed by the goal.
        spec: what it sees (less the goal) and does.
        goals: how it is told its goal; None: it has none.
    """

    def __init__(
        self,
        layers: Sequence[tuple[np.ndarray, np.ndarray]],
        mean: np.ndarray,
        std: np.ndarray,
        spec: Spec,
        goals: GoalColumns | None = None,
    ) -> None:
        self.layers = [(np.ascontiguousarray(w, np.float32), np.ascontiguousarray(b, np.float32)) for w, b in layers]
        self.mean = np.asarray(mean, np.float32)
        self.std = np.asarray(std, np.float32)
        self.spec = spec
        self.goals = goals

    @property
    def needs_goal(self) -> bool:
        """Whether the goal must follow the observation: see `command`."""
        return self.goals is not None and not self.goals.command

    def command(self, observations: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """Observations (..., O) as the policy is to see them when sent to `state` (O,); None: as they are."""
        if self.goals is None or state is None:
            return observations
        goal = np.asarray(state, np.float32)[list(self.goals.goal)]
        if not self.goals.command:
            return np.concatenate([observations, np.broadcast_to(goal, (*observations.shape[:-1], len(goal)))], axis=-1)
        commanded = np.array(observations)
        commanded[..., list(self.goals.command)] = goal
        return commanded

    def __call__(self, observations: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Actions (N, A), float32 in [-1, 1], for observations (N, O); (A,) for a single observation (O,).

        Args:
            noise: standard normal, shaped like the actions: sampled actions. None: greedy, tanh of the mean.

        Raises:
            CvlctlError: where the observations have another width.
        """
        x = np.asarray(observations, dtype=np.float32)
        if x.ndim not in (1, 2) or x.shape[-1] != len(self.mean):
            raise CvlctlError(f"observations have shape {x.shape}; this policy expects (N, {len(self.mean)})")
        x = np.minimum(np.maximum((x - self.mean) / self.std, -10.0), 10.0)
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight + bias, 0.0)
        weight, bias = self.layers[-1]
        x = x @ weight + bias
        mean = x[..., : self.spec.action_dim]
        if noise is not None:
            mean = mean + np.exp(np.clip(x[..., self.spec.action_dim :], -5.0, 2.0)) * np.asarray(noise, np.float32)
        return np.tanh(mean)


class RandomPolicy:
    """Uniform actions in [-1, 1]: the action is a pure function of (seed, episode, step)."""

    def __init__(self, spec: Spec, seed: int, episode: int = 0) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, episode]))
        self._actions = rng.uniform(-1.0, 1.0, (spec.horizon, spec.action_dim)).astype(np.float32)

    def __call__(self, observation: np.ndarray, step: int) -> np.ndarray:
        """The action (A,) of step 0 <= `step` < horizon; the observation is not looked at."""
        return self._actions[step]


def load_policy(path: str | Path, seed: int = 0, checkpoint: str | int = "last") -> NumpyPolicy:
    """The policy of one seed of a run.

    Args:
        path: a run directory, or a checkpoint file (.safetensors).
        seed: the training seed, as named in the recipe.
        checkpoint: in a run directory: "last", or a step such as 5000.

    Raises:
        CvlctlError: no such run, checkpoint or seed; no actor in it; or a file that is damaged or not a checkpoint.
    """
    return policy_of(read(checkpoint_file(Path(path), checkpoint)), seed)


def policy_of(found: Saved, seed: int) -> NumpyPolicy:
    """The policy of one seed of a checkpoint that was read; raises as `load_policy` does."""
    file, header = found.path, _header(found)
    names = _actor_names(found, header)
    if seed not in header["seeds"]:
        raise CvlctlError(f"{file} has no seed {seed}", f"its seeds: {', '.join(map(str, header['seeds']))}")
    member = header["seeds"].index(seed)
    arrays = {name: _member(found, name, member) for name in names}
    std = arrays["observation_std"]
    if not (std > 0).all():
        raise CvlctlError(f"{file}: observation_std holds values that are not positive")
    depth = (len(names) - 2) // 2
    layers = [(arrays[f"actor.{i}.weight"], arrays[f"actor.{i}.bias"].reshape(-1)) for i in range(depth)]
    mean, goals = arrays["observation_mean"], header["goals"]
    if goals and not goals.command:  # a goal is normalised as what it is, a part of a state
        mean, std = (np.concatenate([x, x[list(goals.goal)]]) for x in (mean, std))
    return NumpyPolicy(layers, mean, std, header["spec"], goals)


def _header(found: Saved) -> dict[str, Any]:
    """The checkpoint's own JSON, checked as far as a policy needs it; `spec` as a Spec."""
    file, header = found.path, found.metadata
    try:
        raw = header["spec"]
        shape, seeds = raw["observation_shape"], header["seeds"]
        spec = Spec(tuple(shape), raw["action_dim"], raw["horizon"], bool(raw.get("pixels", False)))
        goals = _goal_columns(header, spec)
        numbers = [*spec.observation_shape, spec.action_dim, spec.horizon]
        if not all(type(n) is int and n > 0 for n in numbers) or not all(type(s) is int for s in seeds) or not seeds:
            raise ValueError("spec or seeds are not whole numbers")
        if spec.pixels or len(spec.observation_shape) != 1:
            raise CvlctlError(
                f"{file}: its policy sees observations of shape {spec.observation_shape}; only flat ones run here"
            )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CvlctlError(
            f"{file} has no readable cvlctl header ({type(error).__name__}: {error})",
            "it is not a checkpoint of cvlctl",
        ) from error
    return {"seeds": list(seeds), "spec": spec, "goals": goals}


def _goal_columns(header: dict[str, Any], spec: Spec) -> GoalColumns | None:
    """What the header of a goal-conditioned run says of goals (its critic's columns); None for any other method."""
    algorithm = (header.get("recipe") or {}).get("algorithm")
    if not isinstance(algorithm, dict) or algorithm.get("name") != "goal_conditioned":
        return None
    (width,), critic = spec.observation_shape, header["critic"]
    goal, command = critic["future_columns"], critic["command_columns"]
    found = GoalColumns(tuple(range(width) if goal is None else goal), tuple(command))
    if not all(type(column) is int and 0 <= column < width for column in (*found.goal, *found.command)):
        raise ValueError("future_columns or command_columns are not columns of an observation")
    return found


def _actor_names(found: Saved, header: dict[str, Any]) -> list[str]:
    """Names of the actor's arrays, after checking that all are there and that their shapes fit together."""
    file, shapes = found.path, {name: place.shape for name, place in found.places.items()}
    spec, members = header["spec"], len(header["seeds"])
    weights = {int(m[1]) for name in shapes if (m := re.fullmatch(r"actor\.(\d{1,3})\.weight", name))}
    if not weights:
        raise CvlctlError(f"{file} holds no actor", "it is of a pretrained critic: finetune it to get a policy")
    width = spec.observation_shape[0]
    expected: dict[str, tuple[int, ...]] = {f"observation_{what}": (members, width) for what in ("mean", "std")}
    goals = header["goals"]
    width += len(goals.goal) if goals and not goals.command else 0
    for i in range(max(weights) + 1):
        shape = shapes.get(f"actor.{i}.weight", ())
        out = 2 * spec.action_dim if i == max(weights) else (shape[2] if len(shape) == 3 else -1)
        expected[f"actor.{i}.weight"] = (members, width, out)
        expected[f"actor.{i}.bias"] = (members, 1, out)
        width = out
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise CvlctlError(f"{file}: {name} has shape {shapes.get(name, 'none: it is missing')}; expected {shape}")
    return list(expected)


def _member(found: Saved, name: str, member: int) -> np.ndarray:
    dtype = found.places[name].dtype
    if dtype not in ("F16", "F32", "F64"):
        raise CvlctlError(f"{found.path}: {name} has type {dtype}; expected F32")
    array = np.asarray(found.array(name, member), dtype=np.float32)
    if not np.isfinite(array).all():
        raise CvlctlError(
            f"{found.path}: {name} holds NaN or infinity", "its training diverged: lower the learning rate"
        )
    return array
