"""What stores say of their numbers (`cvlctl.units`): attributes, and of older stores action bounds in the provenance.

What is exported is scaled back into the bounds of its store, and says them where it is imported again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from cvlctl.data.store import Store, json_digest
from cvlctl.errors import CvlctlError
from cvlctl.progress import say
from cvlctl.units import KEY, Bounds, Units, finite, limits, plain, read_units, wide

AGREED = (KEY, "observation_columns", "control_period")


def units_of(store: Store) -> Units:
    """What a store itself says of its numbers; its action bounds may lie in the provenance, as earlier versions had it.

    Raises:
        CvlctlError: it says what cannot be.
    """
    recorded = _recorded(store.provenance)
    if KEY not in store.attributes and recorded is not None:
        return read_units(f"{store.path}: provenance", {**store.attributes, KEY: recorded}, store.spec)
    return read_units(str(store.path), store.attributes, store.spec)


def bounds_of(store: Store) -> Bounds | None:
    """The bounds that a store's actions were scaled from; None where they were not, or nothing tells.

    A store that says nothing, and was not imported, holds what an environment was given: then gymnasium tells, if it
    has that environment.
    """
    said, shape = units_of(store).action_bounds, (store.spec.action_dim,)
    if said is None:
        return None if _imported(store.provenance) else _environment(store.task, *shape)
    low, high = limits(said, shape)
    return np.broadcast_to(low, shape).tolist(), np.broadcast_to(high, shape).tolist()


def agreed(stores: Sequence[Store]) -> Units:
    """What several stores say of their numbers together: bounds, columns and period where all say the same, of the
    rest what any of them says."""
    found = [units_of(store) for store in stores]
    sizes = [store.num_transitions for store in stores]
    cut = sum(size * (one.clipped_fraction or 0.0) for size, one in zip(sizes, found, strict=True)) / sum(sizes)
    common = [{key: json_digest(one.attributes().get(key)) for key in AGREED} for one in found]
    same = {key: getattr(found[0], key) for key in AGREED if all(one[key] == common[0][key] for one in common)}
    return Units(
        **same,
        dropped_columns=list(dict.fromkeys(name for one in found for name in one.dropped_columns)),
        clipped_fraction=cut if any(one.clipped_fraction is not None for one in found) else None,
        remarks=list(dict.fromkeys(remark for one in found for remark in one.remarks)),
    )


def require_alike(found: Sequence[tuple[object, Units]], action_dim: int, way_out: str) -> None:
    """Hold what is used together to one scale of actions, and to the same columns in the same order.

    Args:
        found: of each store or run its path, and what it says.
        way_out: what to do about other bounds.

    Raises:
        CvlctlError: two of them say different things. Where one says nothing of its bounds, that is said alone.
    """
    bounds = [(path, units.action_bounds) for path, units in found if units.action_bounds is not None]
    for path, other in bounds[1:]:
        first_path, first = bounds[0]
        if not np.allclose(wide(other, action_dim), wide(first, action_dim), rtol=1e-6):
            what = f"{path} has action bounds {plain(other)}, {first_path} has {plain(first)}"
            raise CvlctlError(f"{what}: 1 is not the same in both", way_out)
    if bounds and len(bounds) < len(found):
        silent = next(path for path, units in found if units.action_bounds is None)
        say(f"{silent} does not say its action bounds, {bounds[0][0]} does: they may be others")
    columns = [(path, units.observation_columns) for path, units in found if units.observation_columns]
    for path, names in columns[1:]:
        for i, (name, first) in enumerate(zip(names, columns[0][1], strict=False)):
            if name != first:
                what = f"{path}: column {i} is {name}, in {columns[0][0]} it is {first}"
                raise CvlctlError(what, "import them with the same columns in the same order")


def widest(bounds: Sequence[Bounds | None], action_dim: int) -> Bounds:
    """Bounds that hold all others; what nobody knows counts as [-1, 1]."""
    all_of_them = np.stack([wide(one or (-1.0, 1.0), action_dim) for one in bounds])
    return all_of_them[:, 0].min(axis=0).tolist(), all_of_them[:, 1].max(axis=0).tolist()


def column_names(units: Units, width: int) -> list[str]:
    """Names of an observation's columns, for people: their own, or "column 3"."""
    return list(units.observation_columns) or [f"column {i}" for i in range(width)]


def export_digest(format: str, store: Store, label: str) -> str:
    """By which a file that we wrote is known again: the same for the same format, content, label and units."""
    labels, more = store.label_digest(label) if label in store.labels else "", exported_units(store)
    content = [format, store.digest(), label, labels, plain(bounds_of(store)), *([more] if more else [])]
    return json_digest(content)


def exported_units(store: Store) -> dict[str, Any]:
    """What a file of another format takes along beside the bounds, which each has a place for."""
    return {key: value for key, value in units_of(store).attributes().items() if key != KEY}


def say_units(store: Store) -> None:
    """A line for people where an export's actions are not the numbers of the store."""
    if (found := plain(bounds_of(store))) not in (None, [-1.0, 1.0]):
        say(f"{store.path}: actions are written in the units of their environment, {found}, not in [-1, 1]")


def recorded_attributes(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that a writer makes of a provenance: `action_bounds`, so that they need be said but once."""
    return {KEY: provenance[KEY]} if provenance.get(KEY) is not None else {}


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
