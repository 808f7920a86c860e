"""Gymnasium's spaces as we have them: flat float32 observations with columns that have names, actions in bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cvlctl.errors import CvlctlError


class Misfit(ValueError):
    """What came out of an environment is not what its spaces say."""


class Part(NamedTuple):
    """A part of the observations that is a space of its own: all of them, or what lies at `keys` of a Dict."""

    name: str  # "camera/depth"; "" where it is all
    keys: tuple[Any, ...]
    space: Any
    width: int


class Flattener:
    """Observations of a space as rows of numbers (O,): Box flattened, Discrete one-hot, MultiBinary as 0 and 1,
    MultiDiscrete one-hot one after the other, Dict and Tuple part by part.

    Args:
        keys: of a Dict, in this order; none: all but images, by name.

    Attributes:
        keys: those that were joined; () where the observations are no Dict.
        columns: a name each, such as "joints[2]"; () where there is a single part without a name.
        left_out: names of images that were not asked for.

    Raises:
        CvlctlError: a space that is none of these, an image (no policy sees them yet), a key that is not there.
    """

    def __init__(self, task: str, space: Any, keys: Sequence[str]) -> None:
        self._task = task
        found = {part.name: part for part in _parts(task, space, ())}
        images = [name for name, part in found.items() if _is_image(part.space)]
        for key in keys:
            if key not in found or "" in found:
                there = f"they are: {', '.join(found)}" if "" not in found else "its observations are one array"
                raise CvlctlError(f"{task}: env.keys: no observation {key!r}", there)
        if len(set(keys)) < len(keys):
            raise CvlctlError(f"{task}: env.keys names an observation twice: {', '.join(keys)}")
        chosen = list(keys) or [name for name in sorted(found, key=natural) if name not in images]
        if not chosen or set(chosen) & set(images):
            shape = found[images[0]].space.shape
            what = f"{task}: {images[0] or 'its'} observations are images {shape}, which no policy here sees yet"
            raise CvlctlError(what, "env.keys chooses others, where there are any; or give features of them")
        self._chosen = [found[name] for name in chosen]
        self.left_out = [] if keys else images
        self.keys = () if "" in found else tuple(chosen)
        self.columns = tuple(column for part in self._chosen for column in _columns(part)) if self.keys else ()
        self.width = sum(part.width for part in self._chosen)

    def __call__(self, observation: Any) -> np.ndarray:
        """(O,) float32 of one observation.

        Raises:
            Misfit: it is not in the space (a shape, a missing key, a number out of range), or not finite.
        """
        flat = [_flat(part, _taken(part, observation)) for part in self._chosen]
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
            row = np.concatenate(flat).astype(np.float32)
        if not np.isfinite(row).all():
            place = int(np.flatnonzero(~np.isfinite(row))[0])
            name = self.columns[place] if self.columns else f"observation[{place}]"
            raise Misfit(f"{name} is {row[place]}")
        return row


def bounds_of(task: str, space: Any, given: Any) -> tuple[np.ndarray, np.ndarray]:
    """Low and high (A,) that actions in [-1, 1] are scaled to: those given, or the action space's own.

    Raises:
        CvlctlError: discrete actions; a space without finite bounds and none given; given ones that do not fit.
    """
    kind = type(space).__name__
    if kind != "Box" or space.dtype.kind != "f":
        named = f"{space}" if kind != "Box" else f"a Box of {space.dtype}"
        what = f"{task}: actions of {named}: discrete actions are not supported"
        raise CvlctlError(what, "cvlctl learns continuous ones: a gymnasium.spaces.Box of floats")
    low, high = (np.asarray(side, np.float64).reshape(-1) for side in (space.low, space.high))
    if given is None:
        open_ended = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high))).tolist()
        if open_ended:
            what = f"{task}: actions have no finite bounds (dimensions {', '.join(map(str, open_ended))})"
            raise CvlctlError(what, "say between which they lie: env: {action_bounds: [-1, 1]}")
        if stuck := np.flatnonzero(low >= high).tolist():
            what = f"{task}: actions have no range (dimensions {', '.join(map(str, stuck))}: low is not below high)"
            raise CvlctlError(what, "leave out of its action space what cannot be chosen")
        return low.astype(np.float32), high.astype(np.float32)
    try:
        sides = [np.broadcast_to(np.asarray(side, np.float64), low.shape) for side in given]
    except ValueError:
        what = f"{task}: env.action_bounds are not of {len(low)} action dimensions"
        raise CvlctlError(what, "two numbers, or two lists of one a dimension") from None
    if not (np.isfinite(sides).all() and (sides[0] < sides[1]).all()):
        raise CvlctlError(f"{task}: env.action_bounds {list(given)} are no finite low and high", "such as [-1, 1]")
    if (sides[0] < low).any() or (sides[1] > high).any():
        what = f"{task}: env.action_bounds {list(given)} reach beyond those of the environment"
        raise CvlctlError(what, f"its actions lie between {low.tolist()} and {high.tolist()}")
    return sides[0].astype(np.float32), sides[1].astype(np.float32)


def _parts(task: str, space: Any, keys: tuple[Any, ...]) -> Iterator[Part]:
    kind = type(space).__name__
    if kind in ("Dict", "Tuple"):
        inner = space.spaces.items() if kind == "Dict" else enumerate(space.spaces)
        for key, one in inner:
            yield from _parts(task, one, (*keys, key))
        return
    if kind == "Box":
        width = int(np.prod(space.shape))
    elif kind == "Discrete":
        width = int(space.n)
    elif kind == "MultiBinary":
        width = int(np.prod(space.shape))
    elif kind == "MultiDiscrete":
        width = int(space.nvec.sum())
    else:
        where = f"{'/'.join(map(str, keys))} is " if keys else ""
        what = f"{task}: observations: {where}a {kind} space, which has no fixed number of columns"
        raise CvlctlError(what, "wrap it into Box, Discrete, MultiBinary, MultiDiscrete, or a Dict of them")
    yield Part("/".join(map(str, keys)), keys, space, width)


def _is_image(space: Any) -> bool:
    """Bytes from 0 to 255 in two dimensions or more."""
    if type(space).__name__ != "Box" or space.dtype != np.uint8 or len(space.shape) < 2:
        return False
    return bool((space.low == 0).all() and (space.high == 255).all())


def _columns(part: Part) -> list[str]:
    return [part.name] if part.width == 1 else [f"{part.name}[{i}]" for i in range(part.width)]


def _taken(part: Part, observation: Any) -> Any:
    for key in part.keys:
        try:
            observation = observation[key]
        except (KeyError, IndexError, TypeError):
            raise Misfit(f"the observation lacks {part.name!r}") from None
    return observation


def _flat(part: Part, value: Any) -> np.ndarray:
    space, kind = part.space, type(part.space).__name__
    name = part.name or "the observation"
    array = np.asarray(value)
    if array.shape != (space.shape or ()):
        raise Misfit(f"{name} has shape {array.shape}; its space says {space.shape or ()}")
    if array.dtype.kind not in "fiub":
        raise Misfit(f"{name} holds {array.dtype}, not numbers")
    if kind in ("Box", "MultiBinary"):
        return array.reshape(-1)
    starts, sizes = np.atleast_1d(space.start).reshape(-1), np.atleast_1d(space.n if kind == "Discrete" else space.nvec)
    rows = []
    for number, start, size in zip(array.reshape(-1), starts, sizes.reshape(-1), strict=True):
        if not 0 <= number - start < size:
            raise Misfit(f"{name} is {number}; its space says {start} to {start + size - 1}")
        rows.append(np.arange(size) == number - start)
    return np.concatenate(rows)


def natural(name: str) -> list[str | int]:
    """By which names are sorted, numbers in them as numbers: joint_2 before joint_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", name))]
