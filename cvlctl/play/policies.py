"""Policies that run on numpy alone: read from a checkpoint by worker processes that never import torch.

A checkpoint is a safetensors file with a leading member axis E (one member a seed). The actor's part of it, float:
`actor.<i>.weight` (E, in, out), `actor.<i>.bias` (E, 1, out), i = 0, 1, ...; the last layer emits 2A numbers, the mean
and the logarithm of the standard deviation before the squashing tanh. `observation_mean`, `observation_std` are (E, O).
The header's key "cvlctl" holds JSON: format, algorithm, task, spec, seeds, step, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl.checkpoints import Saved, checkpoint_file, read
from cvlctl.errors import CvlctlError
from cvlctl.play.sights import GOAL_LEARNERS, LEARNERS, SeeingPolicy, encoder_names, seen_by
from cvlctl.types import Spec, require_finite
from cvlctl.units import Bounds, Units, limits, read_units

UNITS = ("normalised", "physical")


def policy_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training state makes its policy: the actor, the normaliser, and the encoder by which it sees, as the
    actor's own."""
    encoder = {f"actor.{name.partition('.')[2]}": state[name] for name in encoder_names(state)}
    return {name: value for name, value in state.items() if name.startswith(("actor.", "observation_"))} | encoder


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
        units: what its numbers stand for.
        bounds: what actions are answered in; None: in [-1, 1].
        data_range: (2, O) lowest and highest value of each column in the data; None: not known.
    """

    def __init__(
        self,
        layers: Sequence[tuple[np.ndarray, np.ndarray]],
        mean: np.ndarray,
        std: np.ndarray,
        spec: Spec,
        goals: GoalColumns | None = None,
        units: Units = Units(),  # noqa: B008 - it is frozen
        bounds: Bounds | None = None,
        data_range: np.ndarray | None = None,
    ) -> None:
        self.layers = [(np.ascontiguousarray(w, np.float32), np.ascontiguousarray(b, np.float32)) for w, b in layers]
        self.mean = np.asarray(mean, np.float32)
        self.std = np.asarray(std, np.float32)
        self.spec = spec
        self.goals = goals
        self.units = units
        self.data_range = data_range
        self.varies = self.std <= 1e20  # (O,) bool: columns that never varied in the data have 2^100
        self._width = np.where(self.varies, self.std, np.float32(np.inf))
        self._scale = None if bounds is None else _centre_and_half(bounds, spec.action_dim)

    @property
    def needs_goal(self) -> bool:
        """Whether the goal must follow the observation: see `command`."""
        return self.goals is not None and not self.goals.command

    @property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre and half width (A,) of what actions lie in; 0 and 1 of normalised ones."""
        size = self.spec.action_dim
        return (np.zeros(size, np.float32), np.ones(size, np.float32)) if self._scale is None else self._scale

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
        """Actions (N, A) for observations (N, O), (A,) for a single observation (O,): float32, in [-1, 1] or, if it was
        loaded so, in the robot's own units.

        Args:
            noise: standard normal, shaped like the actions: sampled actions. None: greedy, tanh of the mean.

        Raises:
            CvlctlError: where the observations have another width, or hold NaN or infinity.
        """
        x = self._checked(observations)
        x = np.minimum(np.maximum((x - self.mean) / self.std, -10.0), 10.0)
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight + bias, 0.0)
        weight, bias = self.layers[-1]
        x = x @ weight + bias
        mean = x[..., : self.spec.action_dim]
        if noise is not None:
            mean = mean + np.exp(np.clip(x[..., self.spec.action_dim :], -5.0, 2.0)) * np.asarray(noise, np.float32)
        action = np.tanh(mean)
        return action if self._scale is None else self._scale[0] + self._scale[1] * action

    def outside(self, observations: np.ndarray) -> np.ndarray:
        """How far observations lie outside the data that the policy learned from: (N,) for (N, O), a number for (O,).

        0 where every column lies between its lowest and highest value there; else the distance to that range of the
        column that is furthest, in standard deviations of it. Columns that never varied do not count: the policy does
        not see them.

        Raises:
            CvlctlError: as a call does; or the run is of an earlier version, which did not keep these values.
        """
        if self.data_range is None:
            raise CvlctlError("the policy does not know the range of its data", "train its run again with this version")
        x = self._checked(observations)
        beyond = np.maximum(self.data_range[0] - x, x - self.data_range[1]) / self._width
        return np.maximum(beyond.max(axis=-1), np.float32(0.0))

    def _checked(self, observations: np.ndarray) -> np.ndarray:
        x = np.asarray(observations, dtype=np.float32)
        if x.ndim not in (1, 2) or x.shape[-1] != len(self.mean):
            raise CvlctlError(f"observations have shape {x.shape}; this policy expects (N, {len(self.mean)})")
        require_finite("observations", x, self.units.observation_columns)
        return x


def _centre_and_half(bounds: Bounds, action_dim: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.broadcast_to(side, action_dim) for side in limits(bounds, (action_dim,)))
    return ((low + high) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)


Policy = NumpyPolicy | SeeingPolicy


class RandomPolicy:
    """Uniform actions in [-1, 1]: the action is a pure function of (seed, episode, step)."""

    def __init__(self, spec: Spec, seed: int, episode: int = 0) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, episode]))
        self._actions = rng.uniform(-1.0, 1.0, (spec.horizon, spec.action_dim)).astype(np.float32)

    def __call__(self, observation: np.ndarray, step: int) -> np.ndarray:
        """The action (A,) of step 0 <= `step` < horizon; the observation is not looked at."""
        return self._actions[step]


def load_policy(
    path: str | Path,
    seed: int = 0,
    checkpoint: str | int = "last",
    *,
    units: str = "normalised",
    action_bounds: Bounds | None = None,
) -> Policy:
    """The policy of one seed of a run; of one that learned from frames, a `SeeingPolicy`.

    Args:
        path: a run directory, or a checkpoint file (.safetensors).
        seed: the training seed, as named in the recipe.
        checkpoint: in a run directory: "last", or a step such as 5000.
        units: of the actions: "normalised", in [-1, 1], or "physical", in the action bounds of the data, a robot's own.
        action_bounds: (low, high), numbers or one a dimension, where the run does not say them; with "physical" alone.

    Raises:
        CvlctlError: no such run, checkpoint or seed; no actor in it; a file that is damaged or not a checkpoint; or
            physical units of a run whose data did not say their action bounds.
    """
    if units not in UNITS:
        raise CvlctlError(f"units {units!r} are none of {', '.join(UNITS)}", "physical: the robot's own")
    if action_bounds is not None and units != "physical":
        raise CvlctlError("action_bounds are of no use to normalised actions", 'add units="physical"')
    policy = policy_of(read(checkpoint_file(Path(path), checkpoint)), seed)
    return policy if units == "normalised" else in_units(policy, action_bounds, str(path))


def in_units(policy: Policy, action_bounds: Bounds | None, path: str) -> Policy:
    """The same policy, whose actions are in the robot's units; raises as `load_policy` does."""
    if isinstance(policy, SeeingPolicy):
        assert isinstance(policy.head, NumpyPolicy)
        head = head_in_units(policy.head, action_bounds, path)
        return SeeingPolicy(policy.arrays, head, policy.spec, policy.observe, policy.goals_by)
    return head_in_units(policy, action_bounds, path)


def head_in_units(policy: NumpyPolicy, action_bounds: Bounds | None, path: str) -> NumpyPolicy:
    """The same of a policy that sees a vector."""
    bounds = policy.units.action_bounds if action_bounds is None else action_bounds
    if bounds is None:
        what = f"{path}: the data of this run do not say what actions of -1 and 1 stand for"
        here = "action_bounds=(low, high) (cvlctl export: --action-bounds LOW HIGH, or --units normalised)"
        raise CvlctlError(what, f"say it here, {here}; or in the store, by write_store or cvlctl data import")
    return NumpyPolicy(
        policy.layers, policy.mean, policy.std, policy.spec, policy.goals, policy.units, bounds, policy.data_range
    )


def policy_of(found: Saved, seed: int) -> Policy:
    """The policy of one seed of a checkpoint that was read, in normalised units; raises as `load_policy` does."""
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
    mean, goals, data_range, spec = arrays["observation_mean"], header["goals"], header["data_range"], header["spec"]
    if (observe := header["observe"]) is not None:
        width = observe.features * len(observe.cameras)  # of features, which are as they are
        mean, std = np.append(mean, np.zeros(width)), np.append(std, np.ones(width))
        if goals:
            mean, std = np.tile(mean, 2), np.tile(std, 2)
        if data_range is not None:
            rest = np.ones(len(mean) - data_range.shape[1])  # features lie in (-1, 1)
            data_range = np.concatenate([data_range, [-rest, rest]], axis=1)
        of_all = replace(spec, observation_shape=(len(mean),))
        head = NumpyPolicy(layers, mean, std, of_all, units=header["units"], data_range=data_range)
        seen = _encoder_names(found, header, LEARNERS)
        told = _encoder_names(found, header, GOAL_LEARNERS) if goals else []
        encoders = {name.removeprefix("ema/"): _member(found, name, member) for name in [*seen, *told]}
        goals_by = told[0].removeprefix("ema/").partition(".")[0] if told else None
        return SeeingPolicy(encoders, head, spec, observe, goals_by)
    if goals and not goals.command:  # a goal is normalised as what it is, a part of a state
        mean, std = (np.concatenate([x, x[list(goals.goal)]]) for x in (mean, std))
        data_range = (
            None if data_range is None else np.concatenate([data_range, data_range[:, list(goals.goal)]], axis=1)
        )
    return NumpyPolicy(layers, mean, std, spec, goals, header["units"], data_range=data_range)


def vector_policy_of(found: Saved, seed: int) -> NumpyPolicy:
    """As `policy_of`. CvlctlError where the policy sees frames, which nothing here could show it."""
    policy = policy_of(found, seed)
    if isinstance(policy, SeeingPolicy):
        what = f"{found.path}: its policy sees frames of {', '.join(policy.observe.cameras)}"
        raise CvlctlError(what, "cvlctl evaluate plays it; here name a policy that sees a vector")
    return policy


def _header(found: Saved) -> dict[str, Any]:
    """The checkpoint's own JSON, checked as far as a policy needs it; `spec` as a Spec."""
    file, header = found.path, found.metadata
    try:
        (spec, observe), seeds = seen_by(header), header["seeds"]
        goals, data_range = _goal_columns(header, spec), _range_of(header, spec)
        least = 1 if observe is None else 0
        if not all(type(n) is int and n >= least for n in spec.observation_shape):
            raise ValueError("observation_shape is not whole numbers")
        numbers = [spec.action_dim, spec.horizon]
        if not all(type(n) is int and n > 0 for n in numbers) or not all(type(s) is int for s in seeds) or not seeds:
            raise ValueError("spec or seeds are not whole numbers")
        if len(spec.observation_shape) != 1:
            raise CvlctlError(
                f"{file}: its policy sees observations of shape {spec.observation_shape}; only flat ones run here"
            )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CvlctlError(
            f"{file} has no readable cvlctl header ({type(error).__name__}: {error})",
            "it is not a checkpoint of cvlctl",
        ) from error
    units = read_units(str(file), header.get("units") or {}, spec)
    told = {"spec": spec, "observe": observe, "goals": goals, "units": units, "data_range": data_range}
    return {"seeds": list(seeds), **told}


def _range_of(header: dict[str, Any], spec: Spec) -> np.ndarray | None:
    """(2, O) float32, the range of the data; None where an earlier version kept none."""
    if header.get("observation_range") is None:
        return None
    found = np.array(header["observation_range"], np.float32)
    if found.shape != (2, *spec.observation_shape) or not np.isfinite(found).all():
        raise ValueError("observation_range is not low and high of each column")
    return found


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
    goals, observe = header["goals"], header["observe"]
    seen = 0 if observe is None else observe.features * len(observe.cameras)
    width += seen + (len(goals.goal) + seen if goals and not goals.command else 0)
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


def _encoder_names(found: Saved, header: dict[str, Any], learners: Sequence[str]) -> list[str]:
    """Names of the arrays of the encoders that one of `learners` has, after checking their shapes."""
    from cvlctl.play.convolutions import shapes  # and with it torch

    names, observe, spec = encoder_names(found.places, learners), header["observe"], header["spec"]
    stem = names[0].partition(".")[0] if names else learners[0]
    for i, camera in enumerate(observe.cameras):
        sizes = shapes(observe.encoder, spec.cameras[camera], observe.stack, observe.features)
        for j, size in enumerate(sizes):
            out = size[0] if len(size) == 4 else size[1]
            for part, wanted in (("weight", size), ("bias", (out,))):
                name = f"{stem}.camera{i}.{observe.encoder}.{j}.{part}"
                there = found.places[name].shape if name in found.places else "none: it is missing"
                if there != (len(header["seeds"]), *wanted):
                    raise CvlctlError(f"{found.path}: {name} has shape {there}; expected {wanted} of each member")
    return names


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
