"""The nouns that pass between modules. Frozen; the shapes are part of the type (E = members/seeds, B = batch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np

from cvlctl.errors import CvlctlError

if TYPE_CHECKING:
    from torch import Tensor


class _Strict:
    """Tells pydantic, where a schema is made of the type, to take no other type for it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(source) | {"strict": True}


class _NoFlag:
    """Tells pydantic, where a schema is made of the type, to take no true and false for it."""

    def __init__(self, expected: str) -> None:
        self._expected = expected

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        check = {"type": "no-info", "function": self._check}
        return {"type": "function-before", "function": check, "schema": handler(source)}

    def _check(self, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"expected {self._expected}, given {str(value).lower()}")
        return value


Flag = Annotated[bool, _Strict()]  # true or false: pydantic would read "yes" and 1 as true
Whole = Annotated[int, _NoFlag("a whole number")]  # pydantic would read true as 1
Number = Annotated[float, _NoFlag("a number")]


def check_widths(hidden: Sequence[int], name: str = "hidden") -> None:
    """Raise a ValueError where these are no widths of a network's hidden layers."""
    if min(hidden, default=0) < 1:
        raise ValueError(f"{name} must be one width or more, and each at least 1")


@dataclass(frozen=True)
class Spec:
    """What a policy sees and does: observation shape, action dimensions (each in [-1, 1]), longest episode."""

    observation_shape: tuple[int, ...]
    action_dim: int
    horizon: int
    pixels: bool = False


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode with its final observation.

    Args:
        observations: (T+1, *observation_shape), float32; uint8 for pixels, which have two dimensions or more (a row of
            bytes is a row of numbers).
        actions: (T, A) floats in [-1, 1]; whole numbers and booleans are taken for those of a discrete task.
        rewards: (T,) or None; `rewards[t]` is received on arriving at `observations[t+1]`.
        successes: (T,) bool or None; likewise on arriving at `observations[t+1]`.
        terminated: True where the environment ended the episode; False where a time limit cut it off (truncation).
        task: name of the task, "" to take the store's.
        collected_at: environment step of the collector at which the episode began.
        seed: seed of the collector.

    Raises:
        CvlctlError: on an empty episode, mismatched lengths, values that are not finite, actions outside [-1, 1] or
            discrete, or a task that is no text.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None = None
    successes: np.ndarray | None = None
    terminated: bool = False
    task: str = ""
    collected_at: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_text("an episode's task", self.task)
        observations = np.asarray(self.observations)
        if observations.dtype != np.uint8 or observations.ndim == 2:
            observations = _floats("observations", observations)
        actions = _floats("actions", self.actions)
        if (given := np.asarray(self.actions).dtype).kind in "biu":
            raise CvlctlError(
                f"an episode's actions are {given}: discrete actions are not supported",
                "cvlctl learns continuous ones, (T, A); if these are such, give them as floats",
            )
        if actions.ndim != 2 or len(actions) == 0:
            raise CvlctlError(
                f"an episode's actions have shape {actions.shape}; expected (T, A) with T >= 1",
                "drop empty episodes; give a single action dimension as (T, 1)",
            )
        if observations.ndim == 1 and len(observations) == len(actions) + 1:
            raise CvlctlError(
                f"an episode's observations have shape {observations.shape}; expected (T+1, ...)",
                f"give a single number a step as a row of one: ({len(observations)}, 1)",
            )
        if observations.ndim < 2 or len(observations) != len(actions) + 1:
            raise CvlctlError(
                f"an episode has observations of shape {observations.shape} for {len(actions)} actions; "
                f"expected ({len(actions) + 1}, ...)",
                "store every episode's final observation: T actions need T+1 observations",
            )
        low, high = float(actions.min()), float(actions.max())
        if low < -1.0 or high > 1.0:
            raise CvlctlError(
                f"actions lie in [{low:.4g}, {high:.4g}], outside [-1, 1]", "scale the actions to [-1, 1]"
            )
        object.__setattr__(self, "observations", observations)
        object.__setattr__(self, "actions", actions)
        for name in ("rewards", "successes"):
            value = getattr(self, name)
            if value is None:
                continue
            value = np.asarray(value).astype(bool) if name == "successes" else _floats(name, value)
            if value.shape != (len(actions),):
                raise CvlctlError(f"an episode's {name} have shape {value.shape}; expected ({len(actions)},)")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "terminated", bool(self.terminated))

    def __len__(self) -> int:
        """Number of transitions T."""
        return len(self.actions)


def check_text(what: str, value: object) -> None:
    """Raise a CvlctlError unless `value` is text that can be written in UTF-8; `what` says what it is."""
    try:
        if isinstance(value, str):
            value.encode()
            return
    except UnicodeEncodeError:
        pass
    raise CvlctlError(f"{what} is {value!r}, not text", "give a name such as metaworld/reach-v3")


def require_finite(name: str, values: np.ndarray, columns: Sequence[str] = ()) -> None:
    """Raise a CvlctlError that names the first column (by `columns`, else by number) with NaN or infinity."""
    if np.isfinite(values).all():
        return
    column = int(np.argwhere(~np.isfinite(values))[0, -1])
    which = columns[column] if column < len(columns) else f"column {column}"
    raise CvlctlError(f"{name} hold NaN or infinity in {which}", "a sensor may have failed: give the last sound value")


def _floats(name: str, value: object) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
            array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise CvlctlError(f"an episode's {name} are not numbers: {error}") from error
    if not np.isfinite(array).all():
        raise CvlctlError(f"an episode's {name} hold NaN or infinity", "remove or repair the episode")
    return array


class Goals(NamedTuple):
    """Of a task that is told its goal: which columns of an observation say what it has reached, and what it is to."""

    achieved: slice
    desired: slice
    dense: bool
    radius: float = 0.05  # within which it counts as reached: metres, in Fetch

    def reward(self, achieved: Tensor, desired: Tensor) -> Tensor:
        """Of having reached `achieved` (..., 3): minus the distance to the goal, or -1 outside the radius, else 0."""
        distance = (achieved - desired).square().sum(dim=-1).sqrt()
        return -distance if self.dense else -(distance > self.radius).float()


class TransitionBatch(NamedTuple):
    """Transitions for behaviour cloning and TD learners; `discount` is gamma * (1 - terminated)."""

    observation: Tensor  # (E, B, O)
    action: Tensor  # (E, B, A)
    reward: Tensor  # (E, B)
    discount: Tensor  # (E, B)
    next_observation: Tensor  # (E, B, O)


class OccupancyBatch(NamedTuple):
    """State-action pairs with one future each, and a bank of futures with rewards; (E, 0, ...) where not asked for."""

    observation: Tensor  # (E, B, O)
    action: Tensor  # (E, B, A)
    future_observation: Tensor  # (E, B, O), drawn from the discounted occupancy of (observation, action)
    bank_observation: Tensor  # (E, M, O), drawn from the marginal p(s+) or from the success examples
    bank_reward: Tensor  # (E, M)
    time: Tensor  # (E, B) int64: steps since the episode began
    bank_time: Tensor  # (E, M) int64: the same of the transitions whose futures the bank holds
    next_action: (
        Tensor  # (E, B, A), logged at the next observation, which is then `future_observation`; 0 where none is
    )
    ended: Tensor  # (E, B) bool: the next observation is terminal
    cut: Tensor  # (E, B) bool: the episode was cut off there, and no action follows


@dataclass(frozen=True)
class EpisodeResult:
    """One evaluated episode: one row of the score file. `success` is None where the task has no notion of it.

    `discounted_return` is there for policies with an offline estimate of it (fitted Q evaluation), else None.
    """

    algorithm: str
    task: str
    seed: int
    step: int
    episode: int
    episode_return: float
    length: int
    success: bool | None
    discounted_return: float | None = None
