"""Actions between [-1, 1], as stores hold them, and the units of their environment, as files of other projects do.

Where actions were scaled, a store's provenance says from what: `action_bounds`, low and high, each a number or a list
of one a dimension. What is exported is scaled back into these bounds, and says them where it is imported again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from cvlctl.data.formats.sources import Bounds
from cvlctl.data.store import Store, json_digest
from cvlctl.errors import CvlctlError
from cvlctl.progress import say

ROUNDING = 1e-5  # actions beyond [-1, 1] by no more than float32's rounding of a scaled action are cut off
KEY = "action_bounds"


def scaled(actions: np.ndarray, bounds: Bounds | None, clip: bool) -> np.ndarray:
    """Actions (..., A) in [-1, 1]: scaled from `bounds` if given, cut off if asked, or if beyond by rounding alone.

    Raises:
        CvlctlError: bounds that are no two ascending numbers, or lists of one number a dimension.
    """
    if bounds is not None:
        low, high = _limits(bounds, actions.shape[1:])
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
    low, high = _limits(bounds, actions.shape[1:])
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
        low, high = _limits(bounds, ())
    except CvlctlError as error:
        raise CvlctlError(f"{where}: {error.what}" if where else error.what, error.hint) from error
    if (low == low.flat[0]).all() and (high == high.flat[0]).all():
        return [float(low.flat[0]), float(high.flat[0])]
    return [side.tolist() for side in np.broadcast_arrays(low, high)]


def bounds_of(store: Store) -> Bounds | None:
    """The bounds that a store's actions were scaled from; None where they were not, or nothing tells.

    A store that says nothing, and was not imported, holds what an environment was given: then gymnasium tells, if it
    has that environment.
    """
    recorded, shape = _recorded(store.provenance), (store.spec.action_dim,)
    if recorded is None:
        return None if _imported(store.provenance) else _environment(store.task, *shape)
    try:
        low, high = _limits(recorded, shape)
    except CvlctlError as error:
        raise CvlctlError(f"{store.path}: provenance: {error.what}", "write the store again") from error
    return np.broadcast_to(low, shape).tolist(), np.broadcast_to(high, shape).tolist()


def export_digest(format: str, store: Store, label: str) -> str:
    """By which a file that we wrote is known again: the same for the same format, content, label and units."""
    labels = store.label_digest(label) if label in store.labels else ""
    return json_digest([format, store.digest(), label, labels, plain(bounds_of(store))])


def say_units(store: Store) -> None:
    """A line for people where an export's actions are not the numbers of the store."""
    if (found := plain(bounds_of(store))) not in (None, [-1.0, 1.0]):
        say(f"{store.path}: actions are written in the units of their environment, {found}, not in [-1, 1]")


def _limits(bounds: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    try:
        low, high = (np.asarray(bound, np.float64) for bound in bounds)
        if np.broadcast_shapes(low.shape, high.shape, shape) != shape and shape:  # more bounds than dimensions
            raise ValueError
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError
        if low.ndim > 1 or high.ndim > 1:
            raise ValueError
    except (TypeError, ValueError) as error:
        what = f"action_bounds {bounds} are no (low, high) for actions of shape {shape}"
        raise CvlctlError(what, "give two numbers, or two lists of one number a dimension") from error
    return low, high


def _recorded(provenance: Mapping[str, Any]) -> Any:
    """The bounds in a store's provenance; imports of earlier versions have them among what they say of their file."""
    source = provenance.get("source")
    said = source if isinstance(source, dict) else {}
    options = said.get("options")
    given = options.get(KEY) if isinstance(options, dict) else None
    return next((found for found in (provenance.get(KEY), given, said.get(KEY)) if found is not None), None)


def _imported(provenance: Mapping[str, Any]) -> bool:
    """Whether a store's episodes came from files of other projects, itself or through its parents."""
    if "source" in provenance:
        return True
    parents = provenance.get("parents")
    found = [one.get("provenance") for one in parents if isinstance(one, dict)] if isinstance(parents, list) else []
    return any(_imported(one) for one in found if isinstance(one, dict))


@cache
def _environment(task: str, action_dim: int) -> Bounds | None:
    """The bounds of gymnasium's environment of that name; None where it has none such, or it cannot be made here."""
    name = task.removeprefix("gym/")
    with contextlib.suppress(Exception):  # packages that are missing, environments that are broken
        import gymnasium

        if task != name and name in gymnasium.registry:  # never a name that gymnasium would import
            env = gymnasium.make(name, disable_env_checker=True)
            space: Any = env.action_space
            env.close()
            bounds, _ = finite(space.low, space.high)
            return bounds if space.shape == (action_dim,) else None
    return None
