"""The nouns that pass between modules. Frozen; the shapes are part of the type (E = members/seeds, B = batch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union

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
    """What a policy sees and does: observation shape, action dimensions (each in [-1, 1]), longest episode, and the
    frames' height, width and channels of each camera, by name. (0,) is the shape of no vector at all."""

    observation_shape: tuple[int, ...]
    action_dim: int
    horizon: int
    cameras: Mapping[str, tuple[int, int, int]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        cameras = {name: (h, w, c) for name, (h, w, c) in sorted(self.cameras.items())}
        object.__setattr__(self, "cameras", cameras)

    def plain(self) -> dict[str, Any]:
        """As JSON has it, for headers of checkpoints; without cameras nothing is said of them."""
        found = asdict(self)
        return found if self.cameras else {key: value for key, value in found.items() if key != "cameras"}


@dataclass(frozen=True)
class Observe:
    """What of cameras is seen, and by what."""

    __pydantic_config__ = {"extra": "forbid"}

    cameras: tuple[str, ...] = ()  # of the stores, or of what is built; one or more
    vector: Flag = False  # whether the vector is seen too
    stack: Whole = 1  # frames of each camera, the latest and those before it
    encoder: Literal["small", "drq", "impala"] = "small"  # small: for a CPU, eight times as fast as drq; impala: CVL's
    features: Whole = 64  # that it makes of each camera
    shift: Whole = 4  # pixels by which frames are shifted at random while one learns; 0: not at all
    actor_encoder: Literal["critic", "own"] = "critic"  # the actor takes the critic's features, or learns its own

    def __post_init__(self) -> None:
        if not self.cameras:
            raise ValueError("cameras must name one or more; to see the vector alone, leave observe out")
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError("cameras names one of them twice")
        if "vector" in self.cameras:
            raise ValueError("a camera called vector cannot be told from the vector: name it otherwise in its store")
        if min(self.stack, self.features) < 1 or self.shift < 0:
            raise ValueError("stack and features must be at least 1, and shift at or above 0")


@dataclass(frozen=True, kw_only=True)
class Seeing(Spec):
    """A Spec for networks behind encoders: `observation_shape` is the width of the vector and of all features."""

    observe: Observe


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode with its final observation.

    Args:
        observations: (T+1, O) floats (of more axes, too: nothing trains on those); None: frames are all there is, and
            the vector has no columns. Frames of uint8, (T+1, H, W) or (T+1, H, W, C), are those of a camera "pixels".
        actions: (T, A) floats in [-1, 1]; whole numbers and booleans are taken for those of a discrete task.
        rewards: (T,) or None; `rewards[t]` is received on arriving at `observations[t+1]`.
        successes: (T,) bool or None; likewise on arriving at `observations[t+1]`.
        terminated: True where the environment ended the episode; False where a time limit cut it off (truncation).
        task: name of the task, "" to take the store's.
        collected_at: environment step of the collector at which the episode began.
        seed: seed of the collector.
        images: (T+1, H, W, C) uint8 for each camera by its name, or (T+1, H, W), which is one channel; None: no camera.
        sim_state: (T+1, n) float64: what brings the simulator back to each observation; None: not known.

    Raises:
        CvlctlError: on an empty episode, mismatched lengths, values that are not finite, actions outside [-1, 1] or
            discrete, a task that is no text, or frames that are none.
    """

    observations: Any  # kept as (T+1, ...) float32; None and frames leave (T+1, 0)
    actions: np.ndarray
    rewards: np.ndarray | None = None
    successes: np.ndarray | None = None
    terminated: bool = False
    task: str = ""
    collected_at: int = 0
    seed: int = 0
    images: Mapping[str, np.ndarray] | None = None
    sim_state: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_text("an episode's task", self.task)
        observations, images = _seen(self.observations, self.images, len(np.asarray(self.actions)) + 1)
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
        object.__setattr__(self, "images", images or None)
        if self.sim_state is not None:
            object.__setattr__(self, "sim_state", _states(self.sim_state, len(actions) + 1))

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


PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


def check_name(what: str, name: object) -> None:
    """Raise a CvlctlError unless `name` will do as a folder's in a store; `what` says what it is of."""
    plain = isinstance(name, str) and 0 < len(name) <= 100 and set(name) <= PLAIN and name[0] != "."
    if not plain or name == "zarr.json":  # a file that lies beside such folders
        raise CvlctlError(f"{what} {name!r} is not a plain name", "use letters, digits, '_', '-' and '.'")


def require_finite(name: str, values: np.ndarray, columns: Sequence[str] = ()) -> None:
    """Raise a CvlctlError that names the first column (by `columns`, else by number) with NaN or infinity."""
    if np.isfinite(values).all():
        return
    column = int(np.argwhere(~np.isfinite(values))[0, -1])
    which = columns[column] if column < len(columns) else f"column {column}"
    raise CvlctlError(f"{name} hold NaN or infinity in {which}", "a sensor may have failed: give the last sound value")


def _seen(observations: Any, images: Any, rows: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An episode's vector (rows, O) and frames {camera: (rows, H, W, C)}; frames are never copied nor made floats."""
    if images is not None and not isinstance(images, Mapping):
        what = f"an episode's images are a {type(images).__name__}"
        raise CvlctlError(what, 'give frames by camera: images={"corner": (T+1, H, W, C) uint8}')
    found = {name: np.asarray(frames) for name, frames in (images or {}).items()}
    vector = None if observations is None else np.asarray(observations)
    if vector is not None and vector.dtype == np.uint8 and vector.ndim > 2:
        if found:
            what = f"an episode has frames of uint8 {vector.shape} for observations, and images beside them"
            raise CvlctlError(what, "give all frames as images, and numbers or None as observations")
        found, vector = {"pixels": vector}, None
    vector = np.zeros((rows, 0), np.float32) if vector is None else _floats("observations", vector)
    cameras = {name: _frames(name, frames, rows) for name, frames in found.items()}
    if not cameras and vector.ndim > 1 and vector.shape[1] == 0:
        raise CvlctlError("an episode has neither observations nor images", "a policy sees one of them, or both")
    return vector, dict(sorted(cameras.items()))


def _frames(camera: str, frames: np.ndarray, rows: int) -> np.ndarray:
    check_name("camera", camera)
    where, expected = f"an episode's frames of camera {camera!r}", f"expected ({rows}, height, width, channels) uint8"
    if frames.dtype != np.uint8:
        raise CvlctlError(f"{where} are {frames.dtype} {frames.shape}; {expected}", "values are 0 to 255")
    if frames.ndim == 3:
        frames = frames[..., None]
    if frames.ndim != 4 or 0 in frames.shape[1:]:
        raise CvlctlError(f"{where} have shape {frames.shape}; {expected}", "a frame alone, not a stack of them")
    if len(frames) != rows:
        what = f"{where}: there are {len(frames)}; {expected}"
        raise CvlctlError(what, "store every episode's final frame: T actions need T+1 frames")
    return frames


def _states(states: object, rows: int) -> np.ndarray:
    try:
        found = np.asarray(states, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CvlctlError(f"an episode's sim_state is no array of numbers: {error}") from error
    if found.ndim != 2 or len(found) != rows or found.shape[1] == 0:
        what = f"an episode's sim_state has shape {found.shape}; expected ({rows}, n)"
        raise CvlctlError(what, "one row for each observation")
    require_finite("an episode's sim_state", found)
    return found


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


class Views(NamedTuple):
    """Observations from cameras."""

    vector: Tensor  # (E, B, O); O may be 0
    frames: tuple[Tensor, ...]  # of each camera (E, B, S, H, W, C) uint8, stacks of S; or features of them, (E, B, F)


Observation = Union["Tensor", Views]  # (E, B, O), or from cameras


class TransitionBatch(NamedTuple):
    """Transitions for behaviour cloning and TD learners; `discount` is gamma * (1 - terminated)."""

    observation: Observation
    action: Tensor  # (E, B, A)
    reward: Tensor  # (E, B)
    discount: Tensor  # (E, B)
    next_observation: Observation


class OccupancyBatch(NamedTuple):
    """State-action pairs with one future each, and a bank of futures with rewards; (E, 0, ...) where not asked for."""

    observation: Observation
    action: Tensor  # (E, B, A)
    future_observation: Observation  # drawn from the discounted occupancy of (observation, action)
    bank_observation: Observation  # M a member, drawn from the marginal p(s+) or from the success examples
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
