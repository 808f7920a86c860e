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
from cvlctl.data.recipe import SuccessExamples
from cvlctl.data.store import Column, Store, open_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Spec


class Examples(NamedTuple):
    """Success examples, and where they are from."""

    observations: np.ndarray  # (X, O) float32
    rows: np.ndarray  # (X,) ascending: of the store, or of the file
    store: Store | None  # None: a file


def success_examples(source: SuccessExamples, spec: Spec, key: str = "success_examples") -> np.ndarray:
    """Success examples (X, O), by rule from a store or from a file; a seeded choice of at most `num`."""
    return found_examples(source, spec, key).observations


def found_examples(source: SuccessExamples, spec: Spec, key: str = "success_examples") -> Examples:
    """As `success_examples`, with their origin."""
    if source.file is not None:
        found, where, store = _examples_file(source.file, f"{key}.file"), f"{key}.file: {source.file}", None
        rows = _choice(len(found), source.num)
        found = found[rows]
    else:
        assert source.from_ is not None
        store = open_store(source.from_)
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
    if found.shape[1:] != tuple(spec.observation_shape):
        what = f"{where}: the examples have shape {found.shape}; expected (X, {spec.observation_shape[0]})"
        raise CvlctlError(what, "take examples from the robot and task that the stores are of")
    return Examples(np.ascontiguousarray(found, dtype=np.float32), rows, store)


def _choice(count: int, num: int) -> np.ndarray:
    """At most `num` of `count`, the same for every seed, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:num])


def _examples_file(path: Path, key: str) -> np.ndarray:
    where, hint = f"{key}: {path}", "give a .npy of shape (X, O), or a .npz with `observations`"
    if not path.is_file():
        raise CvlctlError(f"{key}: no file at {path}", "check the path")
    try:
        loaded = np.load(path, allow_pickle=False)
        found = np.asarray(loaded if isinstance(loaded, np.ndarray) else loaded["observations"])
    except Exception as error:  # zip, zlib and numpy each have their own
        raise CvlctlError(f"{where}: cannot be read: {error}", hint) from error
    if found.dtype.kind not in "fiub":
        raise CvlctlError(f"{where}: holds {found.dtype}, not real numbers", hint)
    if found.ndim != 2 or len(found) == 0:
        raise CvlctlError(f"{where}: has shape {found.shape}; expected (X, O) with X >= 1", hint)
    with np.errstate(over="ignore"):  # what does not fit is infinite, and said below
        array = found.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise CvlctlError(f"{where}: NaN or infinity in {len(bad)} of {len(array)} examples, first in {bad[0]}")
    return array


def array_digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes."""
    return hashlib.sha256(array.tobytes()).hexdigest()


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

    Args:
        rule: "successes" or "last" (`k` states an episode), at most `num` of them: what a recipe would take.
        picks: instead of a rule: frames as "episode:step"; step 0 is the first observation, -1 the final one.
    """
    store, out = open_store(path), Path(out)
    if out.suffix not in (".npy", ".npz"):
        raise CvlctlError(f"{out}: success examples are kept in a .npy or a .npz", "name the file so")
    if picks:
        found = _picked(store, picks)
        command = command_line("examples", path, out=out, pick=picks)
    else:
        source = {"from": Path(path), "rule": rule, "num": num, "k": k, "label": label}
        found = success_examples(SuccessExamples.model_validate(source), store.spec)
        command = command_line("examples", path, out=out, rule=rule, num=num, k=k, label=label)
    data = io.BytesIO()
    if out.suffix == ".npy":
        np.save(data, found, allow_pickle=False)
    else:
        origin = {"parents": [{"path": str(path), "digest": store.digest()}], "command": command}
        np.savez(data, allow_pickle=False, observations=found, provenance=np.array(json.dumps(origin)))
    status = files.write_result(out, data.getbuffer(), force=force)
    return {"status": status, "path": str(out), "examples": len(found), "shape": list(found.shape)}


def _picked(store: Store, picks: Sequence[str]) -> np.ndarray:
    """(X, O) float32: the frames named "episode:step"."""
    column, lengths = Column(store, "data/observation"), store.lengths()
    starts = store.episode_ends() - lengths - 1
    frames = []
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
        row = int(starts[episode]) + step % (length + 1)
        frames.append(column.rows(row, row + 1)[0])
    return np.ascontiguousarray(np.stack(frames), dtype=np.float32)
