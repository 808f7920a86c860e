"""What a store says of itself: its root attributes, each held to the type that `docs/store.md` gives it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cvlctl import files
from cvlctl.errors import CvlctlError
from cvlctl.folders import partial_of, put_aside
from cvlctl.types import Spec, check_name

FORMAT, VERSION = "cvlctl-store", 2  # 2: of cameras, or of simulator states; all others are still written as 1
# the format's own root attributes; any other is free
KEYS = ("format", "version", "task", "tasks", "spec", "counts", "checksums", "chunk_crc32c", "provenance")
LARGEST = 2**28  # bytes of a zarr.json: ten thousand times the usual

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)  # 1.0, "1" and true are no counts


class SpecAttribute(_Strict):
    observation_shape: list[Count]
    action_dim: Count
    horizon: Count
    pixels: bool  # version 1: `data/observation` holds frames; they are those of a camera "pixels"
    cameras: dict[str, Annotated[list[Size], Field(min_length=3, max_length=3)]] = {}  # height, width, channels


class Counts(_Strict):
    episodes: Count
    transitions: Count
    rows: Count


class Attributes(_Strict):
    spec: SpecAttribute
    task: str
    tasks: list[str]  # names that `meta/task` counts through
    counts: Counts
    checksums: dict[str, str]  # array name -> sha256 of its values
    chunk_crc32c: dict[str, list[str]] = {}  # array name -> that of each chunk's file; earlier versions wrote none
    provenance: dict[str, Any]


def read_attributes(path: Path) -> dict[str, Any]:
    """The root attributes of what must be a finished store that this version can read."""
    if not path.exists():
        partial, old = partial_of(path), put_aside(path)
        if partial.exists():
            kept = f"; the store that it replaces is {old}" if old else ""
            what = f"{path} is not finished: it is still being written, or its writer was stopped"
            raise CvlctlError(what, f"wait, or run the same command again to resume {partial}{kept}")
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.zarr")], n=1, cutoff=0.0)
        raise CvlctlError(f"no store at {path}", f"did you mean {path.parent / near[0]}?" if near else "check the path")
    try:
        found = dict(json.loads(files.read_regular(path / "zarr.json", LARGEST))["attributes"])
        version = int(found["version"]) if found["format"] == FORMAT else 0
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):  # RecursionError: nested deep
        version = 0
    if version < 1:
        raise CvlctlError(f"{path} is not a cvlctl store", f"its zarr.json should carry the attribute format: {FORMAT}")
    if version > VERSION:
        raise CvlctlError(f"{path} is a store of version {version}; this cvlctl reads {VERSION}", "update cvlctl")
    return found


def spec_attribute(spec: Spec) -> dict[str, Any]:
    """The attribute `spec` of a store that is written now."""
    cameras = {name: list(size) for name, size in spec.cameras.items()}
    return {
        "observation_shape": list(spec.observation_shape), "action_dim": spec.action_dim, "horizon": spec.horizon,
        "pixels": False, **({"cameras": cameras} if cameras else {}),
    }  # fmt: skip


def parsed(path: Path, attributes: dict[str, Any]) -> Attributes:
    """The attributes of the store at `path`, checked.

    Raises:
        CvlctlError: one is missing, or not what docs/store.md says.
    """
    try:
        found = Attributes.model_validate(attributes)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name, *inside = first["loc"]
        place = f" ({'.'.join(map(str, inside))})" if inside else ""
        what = f"{path / 'zarr.json'}: the store's attributes lack or garble {name!r}{place}: {first['msg']}"
        raise CvlctlError(what, "restore that file from a copy, or write the store again") from None
    if found.spec.pixels and len(found.spec.observation_shape) < 2:
        what = f"{path / 'zarr.json'}: spec: pixels of shape {found.spec.observation_shape} are no frames"
        raise CvlctlError(what, "restore that file from a copy, or write the store again")
    for camera in found.spec.cameras:
        check_name(f"{path / 'zarr.json'}: camera", camera)  # it is a folder's
    return found
