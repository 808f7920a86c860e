"""Actions between [-1, 1], as stores and networks have them, and the units of a robot: what -1 and 1 stand for there.

Also what else a store says of its numbers, and every run and policy of it takes along (`Units`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.types import Spec

ROUNDING = 1e-5  # actions beyond [-1, 1] by no more than float32's rounding of a scaled action are cut off
KEY = "action_bounds"

Bounds = tuple[float | Sequence[float], float | Sequence[float]]  # (low, high) of actions, or a list of each


class Units(NamedTuple):
    """What the numbers of a store stand for: attributes of it, each of which may lack (None, or empty).

    action_bounds: low and high, numbers or lists of one a dimension: what actions of -1 and 1 are on the robot.
    observation_columns: a name for each column of an observation, in their order.
    dropped_columns: names of those that were there, and were left out.
    clipped_fraction: share of the actions' values that lay outside [-1, 1] and were cut off.
    control_period: seconds from one step to the next.
    remarks: what was said of the data when they were imported, and is true of them ever since.
    """

    action_bounds: Any = None
    observation_columns: Sequence[str] = ()
    dropped_columns: Sequence[str] = ()
    clipped_fraction: float | None = None
    control_period: float | None = None
    remarks: Sequence[str] = ()

    def attributes(self) -> dict[str, Any]:
        """As JSON has them, less what lacks."""
        found = {KEY: plain(self.action_bounds), **{k: v for k, v in self._asdict().items() if k != KEY}}
        told = {key: value for key, value in found.items() if value is not None and value != () and value != []}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}


def read_units(where: str, found: Mapping[str, Any], spec: Spec | None) -> Units:
    """The units among the attributes of a store, in a checkpoint's header or another file.

    Args:
        where: whose they are, for messages.
        spec: what they are to fit; None: not known yet.

    Raises:
        CvlctlError: one of them is not what `Units` says, or does not fit the spec.
    """
    checks = {
        KEY: lambda x: limits(x, (spec.action_dim,) if spec else ()) is not None,
        "observation_columns": lambda x: _texts(x) and (not spec or len(x) in (0, *spec.observation_shape[:1])),
        "dropped_columns": _texts,
        "clipped_fraction": lambda x: _number(x) and 0 <= x <= 1,
        "control_period": lambda x: _number(x) and x > 0,
        "remarks": _texts,
    }
    told: dict[str, Any] = {key: found[key] for key in Units._fields if found.get(key) is not None}
    for key, value in told.items():
        try:
            right = checks[key](value)
        except CvlctlError as error:
            raise CvlctlError(f"{where}: {error.what}", error.hint) from error
        if not right:
            what = f"{where}: {key} is {str(value)[:80]}"
            if spec and key == "observation_columns" and _texts(value):
                what = f"{where}: {len(value)} observation columns are named, of observations {spec.observation_shape}"
            raise CvlctlError(what, "docs/store.md says what it may be")
    return Units(**told)


def scaled(actions: np.ndarray, bounds: Bounds | None, clip: bool) -> np.ndarray:
    """Actions (..., A) in [-1, 1]: scaled from `bounds` if given, cut off if asked, or if beyond by rounding alone.

    Raises:
        CvlctlError: bounds that are no two ascending numbers, or lists of one number a dimension.
    """
    if bounds is not None:
        low, high = limits(bounds, actions.shape[1:])
        actions = ((actions - (low + high) / 2.0) / ((high - low) / 2.0)).astype(np.float32)
    if actions.size and actions.dtype.kind == "f":
        most = np.abs(actions).max()
        if clip or 1.0 < most <= 1.0 + ROUNDING:
            return np.clip(actions, -1.0, 1.0)
    return np.clip(actions, -1, 1) if clip else actions


def physical(actions: np.ndarray, bounds: Bounds | None) -> np.ndarray:
    """The inverse of `scaled`: actions (..., A) in [-1, 1] as float32 within `bounds`."""
    if bounds is None:
        return actions
    low, high = limits(bounds, actions.shape[-1:])
    return ((low + high) / 2.0 + (high - low) / 2.0 * actions.astype(np.float64)).astype(np.float32)


def finite(low: Any, high: Any) -> tuple[Bounds | None, list[int]]:
    """Bounds by which to scale, of those that an action space has; and the dimensions that have no finite ones.

    Such a dimension counts as [-1, 1]: its actions stay as they are. None where this is so of all of them.
    """
    low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    open_ended = ~(np.isfinite(low) & np.isfinite(high))
    low, high = np.where(open_ended, -1.0, low), np.where(open_ended, 1.0, high)
    which = np.flatnonzero(open_ended).tolist()
    return (None if (low == -1).all() and (high == 1).all() else (low.tolist(), high.tolist())), which


def plain(bounds: Any, where: str = "") -> Any:
    """Bounds as JSON has them, the same for the same bounds: two numbers where all dimensions are alike, else lists.

    Args:
        where: what says them, for messages.

    Raises:
        CvlctlError: as `scaled` does.
    """
    if bounds is None:
        return None
    try:
        low, high = limits(bounds, ())
    except CvlctlError as error:
        raise CvlctlError(f"{where}: {error.what}" if where else error.what, error.hint) from error
    if (low == low.flat[0]).all() and (high == high.flat[0]).all():
        return [float(low.flat[0]), float(high.flat[0])]
    return [side.tolist() for side in np.broadcast_arrays(low, high)]


def limits(bounds: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Low and high of bounds, float64, each of which fits actions whose rows have `shape` (): of any number.

    Raises:
        CvlctlError: as `scaled` does.
    """
    try:
        low, high = (np.asarray(bound, np.float64) for bound in bounds)
        if np.broadcast_shapes(low.shape, high.shape, shape) != shape and shape:  # more bounds than dimensions
            raise ValueError
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError
        if low.ndim > 1 or high.ndim > 1:
            raise ValueError
    except (TypeError, ValueError) as error:
        fit = f" for actions of shape {shape}" if shape else ""
        what = f"action_bounds {bounds} are no finite (low, high){fit}"
        raise CvlctlError(what, "give two numbers, or two lists of one number a dimension") from error
    return low, high


def wide(bounds: Bounds, action_dim: int) -> np.ndarray:
    """`limits` of actions (..., A) as (2, A)."""
    return np.stack([np.broadcast_to(side, action_dim) for side in limits(bounds, (action_dim,))])


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
