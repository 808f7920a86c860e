"""Policies that see frames, and what a checkpoint says of what its networks see. Torch is imported when one is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.types import Observe, Spec, require_finite
from cvlctl.units import Units

LEARNERS = ("actor", "phi", "critic", "feature")  # whose encoder a policy sees by: its own, or else a critic's
GOAL_LEARNERS = ("actor", "ema/psi", "psi")  # by which it sees goals
VECTOR = "vector"  # the key of the vector in what a policy is shown
Shown = Mapping[str, np.ndarray]  # by camera (N, H, W, C) or (N, S, H, W, C) uint8; "vector": (N, O)
Seen = np.ndarray | Shown  # (N, O), of what sees the vector alone
FRAMES_AT_ONCE = 256  # stacks that are encoded at a time: bounds memory


class Head(Protocol):
    """The actor of a `SeeingPolicy`, a `policies.NumpyPolicy`."""

    units: Units
    mean: np.ndarray

    def outside(self, observations: np.ndarray) -> np.ndarray: ...

    @property
    def scale(self) -> tuple[np.ndarray, np.ndarray]: ...

    def __call__(self, observations: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray: ...


class SeeingPolicy:
    """A tanh-Gaussian actor on the features of frames, and on a vector where it sees one.

    Args:
        arrays: the encoders' weights, without a member axis, by name: "actor.camera0.small.0.weight".
        head: the actor, on the vector followed by the features of each camera, and where it is told a goal on the same
            of that.
        spec, observe: what it sees and does.
        goals_by: whose encoder goals are seen by, in the names of `arrays`; None: it is told none.
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], head: Head, spec: Spec, observe: Observe, goals_by: str | None = None
    ) -> None:
        import torch

        self.arrays, self.head, self.spec, self.observe, self.goals_by = dict(arrays), head, spec, observe, goals_by
        self._weights = {name: torch.from_numpy(value) for name, value in self.arrays.items()}
        self._name, self._device = next(iter(arrays)).partition(".")[0], "cpu"

    def to(self, device: str) -> Self:
        """The same policy, which encodes frames on `device` from now on."""
        self._weights = {name: value.to(device) for name, value in self._weights.items()}
        self._device = device
        return self

    @property
    def units(self) -> Units:
        """What its numbers stand for."""
        return self.head.units

    @property
    def needs_goal(self) -> bool:
        """Whether a goal must be given beside what is seen."""
        return self.goals_by is not None

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of one of what it is shown: (S, H, W, C) by camera, and "vector" (O,) where it is seen."""
        stacks: dict[str, tuple[int, ...]] = {
            name: (self.observe.stack, *self.spec.cameras[name]) for name in self.observe.cameras
        }
        return {**stacks, VECTOR: self.spec.observation_shape} if self.observe.vector else stacks

    def __call__(
        self, shown: Shown, noise: np.ndarray | None = None, goal: Shown | np.ndarray | None = None
    ) -> np.ndarray:
        """Actions (N, A) float32 for N observations, in [-1, 1] or in the robot's own units.

        Args:
            shown: by camera (N, H, W, C) uint8, or (N, S, H, W, C) of stacks, the latest frame last; "vector" (N, O)
                where the policy sees it.
            noise: (N, A) standard normal: sampled actions. None: greedy.
            goal: where a goal-conditioned policy is sent, as `shown`: N of them, or one for all; or what `told` made of
                that.

        Raises:
            CvlctlError: where a camera or the goal is missing, or frames have another size or type.
        """
        seen = self.features(shown)
        if self.goals_by is not None:
            if goal is None:
                what = "the policy is told a goal beside what it sees, and none is given"
                raise CvlctlError(what, f'give goal={{"{self.observe.cameras[0]}": frames of the goal, ...}}')
            told = goal if isinstance(goal, np.ndarray) else self.told(goal)
            seen = np.concatenate([seen, np.broadcast_to(told, seen.shape)], axis=1)
        return self.head(seen, noise)

    def told(self, goal: Shown) -> np.ndarray:
        """What the actor is told of goals (N, O + F), which are shown as observations are."""
        assert self.goals_by is not None
        return self._features(goal, self.goals_by)

    def outside(self, shown: Shown) -> np.ndarray:
        """How far the vector (N,) lies outside the data that the policy learned from, as `NumpyPolicy.outside` has it.
        Of frames nothing is known: a camera that is covered, or has been moved, is not noticed.

        Raises:
            CvlctlError: the policy sees frames alone; or as a call does.
        """
        if not self.observe.vector:
            what = f"the policy sees frames of {', '.join(self.observe.cameras)} alone, and no range tells of these"
            raise CvlctlError(what, "ask a policy that sees the vector, beside them or alone")
        (width,), columns = self.spec.observation_shape, self.units.observation_columns
        vector = checked(shown, self.observe, self.spec.cameras, width, columns)[VECTOR]
        return self.head.outside(np.pad(vector, ((0, 0), (0, len(self.head.mean) - width))))

    def features(self, shown: Shown) -> np.ndarray:
        """What the actor is computed from (N, O + F): the vector as it is, and the features of each camera."""
        return self._features(shown, self._name)

    def _features(self, shown: Shown, name: str) -> np.ndarray:
        import torch

        from cvlctl.play import convolutions

        (width,), columns = self.spec.observation_shape, self.units.observation_columns
        seen = checked(shown, self.observe, self.spec.cameras, width, columns)
        found = [seen[VECTOR]]
        for i, camera in enumerate(self.observe.cameras):
            kind, layers = convolutions.layers_of(self._weights, f"{name}.camera{i}")
            with torch.inference_mode():
                parts = torch.from_numpy(np.require(seen[camera], requirements=("C", "W"))).split(FRAMES_AT_ONCE)
                encoded = [convolutions.encode(kind, layers, part.to(self._device)) for part in parts]
                found.append(torch.cat(encoded).cpu().numpy())
        return np.concatenate(found, axis=1)


def part(seen: Seen, rows: slice | np.ndarray) -> Seen:
    """Some of N observations, or one of them several times."""
    return {name: of[rows] for name, of in seen.items()} if isinstance(seen, Mapping) else seen[rows]


def encoder_names(names: Iterable[str], learners: Sequence[str] = LEARNERS) -> list[str]:
    """Of a state's names those of the encoders that its policy sees by, or with GOAL_LEARNERS its goals: of the first
    learner that has any. None where it sees a vector alone."""
    found = {learner: [name for name in names if name.startswith(f"{learner}.camera")] for learner in learners}
    return next(filter(None, found.values()), [])


def seen_by(metadata: Mapping[str, Any]) -> tuple[Spec, Observe | None]:
    """What the networks of a checkpoint see, by its header. Raises a ValueError, KeyError or TypeError if garbled."""
    raw, told = metadata["spec"], metadata.get("observe")
    sizes = {str(name): tuple(size) for name, size in (raw.get("cameras") or {}).items()}
    if not all(len(size) == 3 and all(type(n) is int and n > 0 for n in size) for size in sizes.values()):
        raise ValueError("spec.cameras is not height, width and channels of each")
    spec = Spec(tuple(raw["observation_shape"]), raw["action_dim"], raw["horizon"], cameras=sizes)
    if told is None:
        return spec, None
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    observe = Observe(**plain)
    if set(observe.cameras) != set(sizes):
        raise ValueError("observe and spec name other cameras")
    return spec, observe


def checked(
    shown: object,
    observe: Observe,
    sizes: Mapping[str, tuple[int, int, int]],
    width: int,
    columns: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """What a policy is shown, as arrays: "vector" (N, O) float32, which may have no columns, and by camera (N, S, H, W,
    C) uint8, where a single frame stands for a whole stack.

    Args:
        sizes: (H, W, C) of each camera.
        width: O.
        columns: the vector's names, for messages.

    Raises:
        CvlctlError: something is missing, or of another shape or type.
    """
    wanted = [*observe.cameras, *([VECTOR] if observe.vector else [])]
    forms = {VECTOR: f"(N, {width})"} | {name: _form(size, observe.stack) for name, size in sizes.items()}
    hint = "give " + ", ".join(f'"{name}": {forms[name]}' for name in wanted)
    if not isinstance(shown, Mapping):
        raise CvlctlError(f"observations are a {type(shown).__name__}; this policy sees {', '.join(wanted)}", hint)
    if lacking := [name for name in wanted if name not in shown]:
        raise CvlctlError(f"observations lack {', '.join(lacking)}", hint)
    found: dict[str, np.ndarray] = {}
    for camera in observe.cameras:
        frames, size = np.asarray(shown[camera]), sizes[camera]
        if frames.ndim == 4 and frames.shape[1:] == size:
            frames = np.broadcast_to(frames[:, None], (len(frames), observe.stack, *size))
        if frames.dtype != np.uint8 or frames.shape[1:] != (observe.stack, *size):
            raise CvlctlError(f"frames of {camera} are {frames.dtype} of shape {frames.shape}", hint)
        found[camera] = frames
    count = len(found[observe.cameras[0]])
    vector = np.asarray(shown[VECTOR], np.float32) if observe.vector else np.zeros((count, 0), np.float32)
    if vector.shape[1:] != (width,):
        raise CvlctlError(f"{VECTOR} has shape {vector.shape}", hint)
    require_finite(VECTOR, vector, columns)
    found[VECTOR] = vector
    if len({len(array) for array in found.values()}) > 1:
        raise CvlctlError("observations are of " + ", ".join(f"{len(a)} ({n})" for n, a in found.items()), hint)
    return found


def _form(size: tuple[int, int, int], stack: int) -> str:
    frame = ", ".join(map(str, size))
    return f"(N, {frame}) uint8" if stack == 1 else f"(N, {stack}, {frame}) uint8, stacks, or (N, {frame})"
