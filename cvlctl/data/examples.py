"""States that show success: by rule from a store, or from a file; and `cvlctl data examples`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl import files
from cvlctl.data.derive import command_line
from cvlctl.data.example_files import IMAGES, of_file
from cvlctl.data.recipe import SuccessExamples
from cvlctl.data.shown import stacks
from cvlctl.data.store import Column, Store, open_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Spec


class Examples(NamedTuple):
    """Success examples, and where they are from."""

    observations: np.ndarray  # (X, O) float32; O may be 0
    rows: np.ndarray  # (X,) ascending: of the store, or of the file
    store: Store | None  # None: a file
    images: dict[str, np.ndarray] = {}  # of each camera (X, H, W, C) uint8; stacked (X, S, H, W, C)


def success_examples(source: SuccessExamples, spec: Spec, key: str = "success_examples") -> np.ndarray:
    """Success examples (X, O), by rule from a store or from a file; a seeded choice of at most `num`."""
    return found_examples(source, spec, key).observations


def found_examples(source: SuccessExamples, spec: Spec, key: str = "success_examples", stack: int = 0) -> Examples:
    """As `success_examples`, with their origin, and with the frames of the cameras of `spec`.

    Args:
        spec: what is learned from: its vector, and of the stores' cameras those that are seen.
        stack: above 0, frames are (X, stack, H, W, C): each with those before it, the oldest first. Before an
            episode's first frame stands that one again, and all of a stack from a file are the same frame.
    """
    if source.file is not None:
        where, store = f"{key}.file: {source.file}", None
        found, frames = of_file(source.file, spec, source.fit, f"{key}.file")
        rows = _choice(len(found), source.num)
        found, frames = found[rows], {camera: of[rows] for camera, of in frames.items()}
        if stack:
            frames = {camera: of[:, None].repeat(stack, axis=1) for camera, of in frames.items()}
    else:
        assert source.from_ is not None
        store = open_store(source.from_)
        if missing := [camera for camera in spec.cameras if camera not in store.spec.cameras]:
            has = f"it has {', '.join(store.spec.cameras)}" if store.spec.cameras else "it holds no frames"
            hint = f"{has}; take a store with that camera, or draw it by cvlctl data render"
            raise CvlctlError(f"{key}.from: {source.from_} has no camera {missing[0]!r}, which is seen here", hint)
        ends = store.episode_ends()
        if source.rule == "last":
            rows = np.concatenate(
                [
                    np.arange(max(start + 1, end - source.k), end)
                    for start, end in zip([0, *ends[:-1]], ends, strict=True)
                ]
            )
        else:
            # a success at row t is that of arriving at row t + 1
            rows = np.flatnonzero(store.successes(source.label)) + 1
            if len(rows) == 0:
                raise CvlctlError(
                    f"{source.from_}: no step is labelled a success",
                    "take rule: last, or examples from another store or file",
                )
        where = f"{key}.from: {source.from_}"
        rows = rows[_choice(len(rows), source.num)]
        found = Column(store, "data/observation").take(rows)
        found = found[:, :0] if spec.observation_shape == (0,) else found
        frames = {camera: _frames(store, camera, rows, stack) for camera in spec.cameras}
    if found.shape[1:] != tuple(spec.observation_shape):
        what = f"{where}: the examples have shape {found.shape}; expected (X, {spec.observation_shape[0]})"
        raise CvlctlError(what, "take examples from the robot and task that the stores are of")
    for camera, size in spec.cameras.items():
        if frames[camera].shape[-3:] != size:
            what = f"{where}: camera {camera} has frames of {frames[camera].shape[-3:]}; expected {size}"
            raise CvlctlError(what, "take examples from stores with cameras of the same sizes")
    return Examples(np.ascontiguousarray(found, dtype=np.float32), rows, store, frames)


def _frames(store: Store, camera: str, rows: np.ndarray, stack: int) -> np.ndarray:
    """(X, [stack,] H, W, C) of rows that ascend, read chunk by chunk."""
    column = Column(store, store.camera_array(camera))
    return stacks(column, store.episode_ends(), rows, stack) if stack else column.take(rows)


def _choice(count: int, num: int) -> np.ndarray:
    """At most `num` of `count`, the same for every seed, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:num])


def array_digest(*arrays: np.ndarray) -> str:
    """sha256 of the bytes of arrays, one after the other."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def examples(
    path: Path,
    out: Path,
    *,
    rule: str = "successes",
    num: int = 200,
    k: int = 1,
    label: str = "given",
    picks: Sequence[str] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Write success examples (X, O) for `success_examples: {file: ...}`: a .npy, or a .npz that says whence they came.

    Of a store with images a .npz, with the frames of each camera, (X, H, W, C), as `images/CAMERA`.

    Args:
        rule: "successes" or "last" (`k` states an episode), at most `num` of them: what a recipe would take.
        picks: instead of a rule: frames as "episode:step"; step 0 is the first observation, -1 the final one.
    """
    store, out = open_store(path), Path(out)
    if out.suffix not in (".npy", ".npz"):
        raise CvlctlError(f"{out}: success examples are kept in a .npy or a .npz", "name the file so")
    if store.spec.cameras and out.suffix == ".npy":
        raise CvlctlError(f"{out}: {path} has images, which a .npy has no place for", "name the file .npz")
    if picks:
        rows = _picked(store, picks)
        vector, images = (
            _taken(store, "data/observation", rows),
            {camera: _taken(store, store.camera_array(camera), rows) for camera in store.spec.cameras},
        )
        command = command_line("examples", path, out=out, pick=picks)
    else:
        source = {"from": Path(path), "rule": rule, "num": num, "k": k, "label": label}
        found = found_examples(SuccessExamples.model_validate(source), store.spec)
        vector, images = found.observations, found.images
        command = command_line("examples", path, out=out, rule=rule, num=num, k=k, label=label)
    data = io.BytesIO()
    if out.suffix == ".npy":
        np.save(data, vector, allow_pickle=False)
    else:
        origin = {"parents": [{"path": str(path), "digest": store.digest()}], "command": command}
        arrays = {f"{IMAGES}{camera}": frames for camera, frames in images.items()}
        np.savez(data, allow_pickle=False, observations=vector, provenance=np.array(json.dumps(origin)), **arrays)
    status = files.write_result(out, data.getbuffer(), force=force)
    shapes = {camera: list(frames.shape) for camera, frames in images.items()}
    result = {"status": status, "path": str(out), "examples": len(vector), "shape": list(vector.shape)}
    return result | ({"images": shapes} if shapes else {})


def _picked(store: Store, picks: Sequence[str]) -> np.ndarray:
    """(X,) rows, in the order in which they are named as "episode:step"."""
    lengths = store.lengths()
    starts = store.episode_ends() - lengths - 1
    rows = []
    for pick in picks:
        try:
            episode, step = (int(word) for word in pick.split(":"))
        except ValueError:
            raise CvlctlError(f"--pick {pick} is not episode:step", "such as --pick 3:120 or --pick 3:-1") from None
        if not 0 <= episode < store.num_episodes:
            raise CvlctlError(f"--pick {pick}: {store.path} has episodes 0 to {store.num_episodes - 1}")
        length = int(lengths[episode])
        if not -length - 1 <= step <= length:
            raise CvlctlError(f"--pick {pick}: episode {episode} has observations 0 to {length}", "-1 is the final one")
        rows.append(int(starts[episode]) + step % (length + 1))
    return np.array(rows, np.int64)


def _taken(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of an array, in whatever order."""
    column = Column(store, name)
    return np.concatenate([column.rows(row, row + 1) for row in rows.tolist()])
