"""How an environment of one's own is made and read: what `env:` of a recipe says, as workers are handed it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from cvlctl.errors import CvlctlError

Side = float | tuple[float, ...]  # of bounds: one number for all dimensions, or one each


@dataclass(frozen=True)
class Settings:
    """Frozen and hashable: environments, and the episodes played in them, are known again by it."""

    kwargs: str = "{}"  # of whatever makes it, as JSON with sorted keys
    success: str | None = None  # key of `info`; None: success or is_success, where there is one
    keys: tuple[str, ...] = ()  # of a Dict of observations, in this order; (): all but images, by name
    action_bounds: tuple[Side, Side] | None = None  # (low, high); None: the action space's own
    code: str | None = None  # where the module lies that the task names; None: nobody named it, and none is imported
    limit: int | None = None  # steps after which episodes are cut off where the environment has no limit of its own

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """From plain values, such as `asdict` and JSON make of it; kwargs may be a mapping.

        Raises:
            CvlctlError: they are no settings: a store or run may say anything.
        """
        known = {field.name: plain[field.name] for field in fields(cls) if plain.get(field.name) is not None}
        try:
            if not isinstance(known.get("kwargs", ""), str):
                known["kwargs"] = json.dumps(dict(known["kwargs"]), sort_keys=True)
            known["keys"] = tuple(_text(key) for key in known.get("keys", ()))
            if "success" in known:
                _text(known["success"])
            if "action_bounds" in known:
                low, high = known["action_bounds"]
                known["action_bounds"] = (_side(low), _side(high))
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise CvlctlError(f"these are no settings of an environment: {plain}", str(error)) from error

    def about(self) -> dict[str, Any]:
        """What is worth recording of it: plain values, less what is left to its default and what this machine has."""
        said = {"kwargs": json.loads(self.kwargs), "success": self.success, "keys": list(self.keys)}
        bounds = self.action_bounds and [list(side) if isinstance(side, tuple) else side for side in self.action_bounds]
        return {name: value for name, value in (said | {"action_bounds": bounds}).items() if value}

    def as_json(self) -> str:
        """For workers."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.of(json.loads(text))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _side(value: Any) -> Side:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(float(one) for one in value)
    return float(value)
