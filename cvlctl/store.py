"""The trajectory store: Zarr v3 on one time axis, written atomically. `docs/store.md` is the format's contract.

This is the only file that imports zarr. Pretraining opens `data/` and `meta/` alone; labels live apart, in `labels/`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from cvlctl.errors import CvlctlError
from cvlctl.types import Episode, Spec

FORMAT, VERSION = "cvlctl-store", 1
LABEL_ARRAYS = ("reward", "success")
CHUNK_ROWS = 100_000  # 500k rows load in tens of ms; chunks of 1k rows take ten times as long
CHUNK_BYTES = 2**26  # pixels get fewer rows a chunk
META = {
    "meta/episode_ends": np.int64,
    "meta/terminated": np.bool_,
    "meta/task": np.int32,
    "meta/collected_at": np.int64,
    "meta/seed": np.int64,
}
_PACKAGES = ("cvlctl", "numpy", "torch", "zarr", "mujoco", "gymnasium", "metaworld")


class Store:
    """A finished store. Arrays are read once, whole, and kept: treat them as read-only.

    Only `labels`, `has_label`, `rewards`, `successes`, `label_digest`, `futures` and `episodes` look into `labels/`.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes
        self._cache: dict[str, np.ndarray] = {}
        try:
            spec = attributes["spec"]
            self.spec = Spec(
                tuple(int(n) for n in spec["observation_shape"]),
                int(spec["action_dim"]),
                int(spec["horizon"]),
                bool(spec["pixels"]),
            )
            self.task = str(attributes["task"])
            self.provenance: dict[str, Any] = dict(attributes["provenance"])
            self.task_names = [str(name) for name in attributes["tasks"]]
            self.num_episodes, self.num_transitions, self._rows = (
                int(attributes["counts"][key]) for key in ("episodes", "transitions", "rows")
            )
            self._checksums = {str(name): str(value) for name, value in attributes["checksums"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CvlctlError(
                f"{path / 'zarr.json'}: the store's attributes lack or garble {error}", "write the store again"
            ) from error

    def __len__(self) -> int:
        """Number of transitions."""
        return self.num_transitions

    def __repr__(self) -> str:
        shape = (self._rows, *self.spec.observation_shape)
        return f"Store({str(self.path)!r}, task={self.task!r}, episodes={self.num_episodes}, observations={shape})"

    def observations(self) -> np.ndarray:
        """(rows, *observation_shape) float32, uint8 for pixels; an episode's last row is its final observation."""
        return self._array("data/observation")

    def actions(self) -> np.ndarray:
        """(rows, A) float32 in [-1, 1]; zero in the row of a final observation."""
        return self._array("data/action")

    def episode_ends(self) -> np.ndarray:
        """(episodes,) int64: cumulative row counts; an episode of T transitions has T+1 rows."""
        return self._array("meta/episode_ends")

    def lengths(self) -> np.ndarray:
        """(episodes,) int64: transitions of each episode."""
        return np.diff(self.episode_ends(), prepend=0) - 1

    def terminated(self) -> np.ndarray:
        """(episodes,) bool: the environment ended the episode (False: it was cut off)."""
        return self._array("meta/terminated")

    def collected_at(self) -> np.ndarray:
        """(episodes,) int64: the collector's environment step at which the episode began."""
        return self._array("meta/collected_at")

    def seeds(self) -> np.ndarray:
        """(episodes,) int64: the collector's seed."""
        return self._array("meta/seed")

    def episode_tasks(self) -> list[str]:
        """Task name of each episode."""
        return [self.task_names[i] for i in self._array("meta/task")]

    @property
    def labels(self) -> list[str]:
        """Names of the reward labels that lie in the store."""
        folder = self.path / "labels"
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def has_label(self, name: str, array: str = "reward") -> bool:
        """Whether label `name` has the array: "reward" or "success"."""
        return (self.path / "labels" / name / array / "zarr.json").is_file()

    def rewards(self, label: str = "given") -> np.ndarray:
        """(rows,) float32: row t of an episode holds the reward of its transition t; 0 in the final row."""
        return self._label(label, "reward")

    def successes(self, label: str = "given") -> np.ndarray:
        """(rows,) bool, laid out as `rewards`."""
        return self._label(label, "success")

    def episodes(self, label: str = "given") -> Iterator[Episode]:
        """The episodes in order; rewards and successes are None where the label lacks them."""
        if label != "given" and label not in self.labels:
            self._label(label, "reward")
        rewards = self.rewards(label) if self.has_label(label) else None
        successes = self.successes(label) if self.has_label(label, "success") else None
        table = [self._array(name) for name in META]
        yield from _split(self.observations(), self.actions(), (rewards, successes), table, self.task_names)

    def futures(self, num: int, gamma: float, seed: int, label: str = "given") -> tuple[np.ndarray, np.ndarray]:
        """Draw `num` future states from the sampler's marginal: a uniform transition, then its discounted future.

        Returns:
            observations (num, *observation_shape), and rewards (num,) float32 received on arriving there. Beyond a
            terminal state stands the absorbing state: the final observation, with reward 0.

        Raises:
            CvlctlError: gamma outside [0, 1), num < 1, a negative seed, or a label without rewards.
        """
        import torch

        from cvlctl import samplers

        for wrong, what in (
            (num < 1, f"num is {num}; futures are drawn at least one at a time"),
            (not 0.0 <= gamma < 1.0, f"gamma is {gamma}; a discount lies in [0, 1)"),
            (seed < 0, f"seed is {seed}; seeds are not negative"),
        ):
            if wrong:
                raise CvlctlError(what)
        rewards = self.rewards(label)
        where = samplers.layout(self.episode_ends(), self.terminated())
        generator = samplers.generator(seed, "futures", 0)
        transition = torch.randint(len(where.row), (num,), generator=generator)
        u = torch.rand(num, dtype=torch.float64, generator=generator)
        drawn = samplers.future(where, transition, u, gamma)
        received = np.where(drawn.absorbed.numpy(), np.float32(0), rewards[drawn.reward_row.numpy()])
        return self.observations()[drawn.row.numpy()], received

    def digest(self) -> str:
        """sha256 over the checksums of the reward-free arrays (`data/`, `meta/`): equal content, equal digest."""
        names = [name for name in self._checksums if name.startswith(("data/", "meta/"))]
        return self._digest(names, {"tasks": self.task_names})

    def label_digest(self, label: str = "given") -> str:
        """sha256 of one label's arrays."""
        names = [name for name in self._checksums if name.startswith(f"labels/{label}/")]
        if not names or label not in self.labels:
            raise self._no_label(label, "arrays")
        return self._digest(names, {})

    def _digest(self, names: list[str], extra: dict[str, Any]) -> str:
        shapes = {"spec": [self.spec.observation_shape, self.spec.action_dim, self.spec.pixels], "rows": self._rows}
        return _sha({**{name: self._checksums[name] for name in names}, **shapes, **extra})

    def _label(self, label: str, array: str) -> np.ndarray:
        if not self.has_label(label, array):
            raise self._no_label(label, f"a {array} array")
        return self._array(f"labels/{label}/{array}")

    def _no_label(self, label: str, wanted: str) -> CvlctlError:
        found = [f"{name}/{array}" for name in self.labels for array in LABEL_ARRAYS if self.has_label(name, array)]
        hint = f"the store has {', '.join(found)}" if found else "the store holds no labels at all"
        return CvlctlError(f"{self.path}: no label {label!r} with {wanted}", hint)

    def _array(self, name: str) -> np.ndarray:
        if name not in self._cache:
            value, (dtype, shape) = _read(self.path, name), self._expected(name)
            if value.dtype != dtype or value.shape != shape:
                raise CvlctlError(
                    f"{self.path}: array {name} is {value.dtype} {value.shape}; its attributes say {dtype} {shape}",
                    "the store was changed after it was written: write it again",
                )
            self._cache[name] = value
        return self._cache[name]

    def _expected(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        if name in META:
            return np.dtype(META[name]), (self.num_episodes,)
        if name == "data/observation":
            return np.dtype(np.uint8 if self.spec.pixels else np.float32), (self._rows, *self.spec.observation_shape)
        if name == "data/action":
            return np.dtype(np.float32), (self._rows, self.spec.action_dim)
        return np.dtype(np.bool_ if name.endswith("/success") else np.float32), (self._rows,)


def open_store(path: str | Path) -> Store:
    """Open a finished store. Arrays are read on first use.

    Raises:
        CvlctlError: nothing there, not a store, still being written, written by a newer version, or arrays missing.
    """
    store = Store(Path(path), _attributes(Path(path)))
    for name in ("data/observation", "data/action", *META):
        if not (store.path / name / "zarr.json").is_file():
            raise CvlctlError(f"{path}: array {name} is missing", "restore it from a copy, or write the store again")
    return store


def _attributes(path: Path) -> dict[str, Any]:
    partial = _beside(path, ".partial")
    if not path.exists() and partial.exists():
        kept = f"; the store that it replaces is {_beside(path, '.old')}" if _beside(path, ".old").exists() else ""
        raise CvlctlError(
            f"{path} is not finished: it is still being written, or its writer was stopped",
            f"wait, or run the same command again to resume {partial}{kept}",
        )
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.zarr")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.0)
        raise CvlctlError(f"no store at {path}", f"did you mean {path.parent / near[0]}?" if near else "check the path")
    try:
        found = json.loads((path / "zarr.json").read_text())["attributes"]
        known, version = found["format"] == FORMAT, int(found["version"])
    except (OSError, ValueError, KeyError, TypeError):
        known, version, found = False, 0, {}
    if not known:
        raise CvlctlError(f"{path} is not a cvlctl store", f"its zarr.json should carry the attribute format: {FORMAT}")
    if version > VERSION:
        raise CvlctlError(f"{path} is a store of version {version}; this cvlctl reads {VERSION}", "update cvlctl")
    return dict(found)


def write_store(
    path: str | Path,
    episodes: Iterable[Episode],
    *,
    task: str,
    horizon: int | None = None,
    provenance: dict[str, Any] | None = None,
    label: str = "given",
    force: bool = False,
) -> Store:
    """Write `episodes` to a new store, all or nothing: where anything fails, no trace is left and the old store stays.

    Args:
        task: name of the task, for the store and for episodes that carry none.
        horizon: longest possible episode; default: the longest one seen.
        provenance: JSON values to record; versions of python and packages are added.
        label: name under which rewards and successes are kept.
        force: replace a store that is already there, once the new one is complete.
    """
    writer = StoreWriter(
        path, task=task, horizon=horizon, provenance=provenance, label=label, force=force, resume=False
    )
    try:
        for episode in episodes:
            writer.append(episode)
        return writer.finish()
    except BaseException:
        writer.close(discard=True)
        raise


class StoreWriter:
    """Writes a store episode by episode in `<path>.partial`, and resumes what it finds flushed there.

    A kill at any instant loses only what was appended after the last `flush`. As a context manager it lets go of the
    partial store on leaving; only `finish` puts the store in place.

    Raises:
        CvlctlError: the store exists (and no `force`), another writer is at work, or the partial store is of another
            task, horizon, label or recipe (`provenance["recipe"]`; `force` discards it).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        task: str,
        horizon: int | None = None,
        provenance: dict[str, Any] | None = None,
        label: str = "given",
        force: bool = False,
        resume: bool = True,
    ) -> None:
        self.path, self.partial = Path(path), _beside(Path(path), ".partial")
        self._force, self._horizon, self._label = force, horizon, label
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", label):
            raise CvlctlError(f"label {label!r} is not a plain name", "use letters, digits, '_', '-' and '.'")
        given = _jsonable("provenance", provenance or {})
        self._provenance = {**_environment(), **given}
        self._identity = {"task": task, "horizon": horizon, "label": label, "recipe": _sha(given.get("recipe"))}
        self._refuse_existing()
        self._layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}  # row arrays; known from the first episode on
        self._pending: dict[str, list[np.ndarray]] = {}  # rows of each array that no chunk holds yet
        self._index: list[tuple[int, ...]] = []  # one row of META an episode
        self._tasks: list[str] = []
        self._chunk_rows, self._chunks, self._synced = CHUNK_ROWS, 0, 0
        self._lock: int | None = _lock(self.partial)
        try:
            with _disk(self.partial):
                self._restore(resume)
        except BaseException:
            self.close()
            raise

    @property
    def num_episodes(self) -> int:
        """Episodes so far, the resumed ones included."""
        return len(self._index)

    @property
    def num_transitions(self) -> int:
        """Transitions so far, the resumed ones included."""
        return self._num_rows - self.num_episodes

    @property
    def _num_rows(self) -> int:
        return self._index[-1][0] if self._index else 0

    def append(self, episode: Episode) -> None:
        """Take one episode. It is durable after the next `flush`; full chunks are written at once.

        Raises:
            CvlctlError: the episode does not fit the others (it is not taken), or the disk fails (it is taken: its rows
                wait in memory for the next `flush`).
        """
        self._require_open()
        rows = _rows_of(episode, self._label, self.num_episodes)
        self._agree({name: (value.dtype, value.shape[1:]) for name, value in rows.items()}, len(episode))
        task, end = episode.task or str(self._identity["task"]), self._num_rows + len(episode) + 1
        tasks = self._tasks if task in self._tasks else [*self._tasks, task]
        try:
            entry = np.array([end, episode.terminated, tasks.index(task), episode.collected_at, episode.seed], np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise CvlctlError(
                f"episode {self.num_episodes}: collected_at or seed is no 64-bit integer: {error}"
            ) from error
        if not self._index:
            self._chunk_rows = min(CHUNK_ROWS, max(1, CHUNK_BYTES // max(1, rows["data/observation"][0].nbytes)))
        self._tasks = tasks
        self._index.append(tuple(entry.tolist()))
        for name, value in rows.items():
            self._pending.setdefault(name, []).append(value)
        with _disk(self.partial):
            self._write_full_chunks()

    def flush(self) -> None:
        """Make every episode so far durable: afterwards neither a kill nor a loss of power loses any of them."""
        self._require_open()
        with _disk(self.partial):
            self._write_full_chunks()
            if self._synced != self._chunks:
                _sync(self.partial)
                self._synced = self._chunks
            state = {"tasks": self._tasks, "chunks": self._chunks, "chunk_rows": self._chunk_rows}
            text = np.frombuffer(json.dumps({**self._identity, **state}).encode(), np.uint8)
            temporary = self.partial / "tail.tmp"
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **self._rest(), state=text, episodes=self._table())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.partial / "tail.npz")
            _sync_path(self.partial)

    def episodes(self) -> Iterator[Episode]:
        """The episodes so far, in order: what a collector needs to fill its replay buffer on resuming."""
        if not self._index:
            return
        rows, done = self._rest(), self._chunks * self._chunk_rows
        if done:
            rows = {name: np.concatenate([_read(self.partial, name)[:done], rest]) for name, rest in rows.items()}
        labels = [rows.get(f"labels/{self._label}/{name}") for name in LABEL_ARRAYS]
        yield from _split(rows["data/observation"], rows["data/action"], labels, self._table().T, self._tasks)

    def finish(self, **extra_attributes: Any) -> Store:
        """Write what is left, checksums and attributes (yours too), and put the store in place by one rename."""
        self._require_open()
        extra = _jsonable("extra attributes", extra_attributes)
        if not self._index:
            raise CvlctlError(f"{self.path}: no episodes to write", "a store holds at least one episode")
        self._refuse_existing()
        self.flush()
        with _disk(self.partial):
            self._write_rest()
            checksums = {name: _checksum(_zarr_array(self.partial, name)) for name in (*self._layout, *META)}
            own = self._attributes(checksums)
            if clash := sorted(set(extra) & set(own)):
                raise CvlctlError(f"the store's own attribute {clash[0]!r} cannot be given to finish()")
            zarr.open_group(self.partial, mode="r+", zarr_format=3).attrs.put({**extra, **own})
            _sync(self.partial)
            old = _beside(self.path, ".old")
            if self.path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.path, old)
            os.rename(self.partial, self.path)
            _sync_path(self.path.parent)
            shutil.rmtree(old, ignore_errors=True)
            for name in ("tail.npz", "lock"):  # only now: until the rename they were what a resume needs
                (self.path / name).unlink(missing_ok=True)
        self.close()
        return open_store(self.path)

    def close(self, discard: bool = False) -> None:
        """Let go of the partial store. What was flushed stays, to be resumed (unless `discard`)."""
        if self._lock is None:
            return
        if discard or not (self.partial / "tail.npz").exists():  # nothing was ever flushed
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._lock is None:
            raise CvlctlError(f"the writer of {self.path} is closed", "open another StoreWriter")

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self._force:
            raise CvlctlError(
                f"{self.path} exists", "choose another path, or --force to replace it when the new one is done"
            )
        if self.path.exists():
            _attributes(self.path)  # --force replaces stores, never a folder of something else

    def _restore(self, resume: bool) -> None:
        tail = self.partial / "tail.npz"
        if not tail.exists():
            self._clear()
            return
        state, rows, fault = _read_tail(tail)
        other = [key for key, value in self._identity.items() if state.get(key) != value]
        if not fault and (other or not resume):
            fault = f"{self.partial} holds {len(rows['episodes'])} episodes of an unfinished store"
            fault += f" with another {', '.join(other)}" if other else ""
        if fault and not self._force:
            raise CvlctlError(fault, f"delete {self.partial}, or use --force to discard it")
        if fault:
            self._clear()
            return
        self._index = [tuple(row) for row in rows.pop("episodes").tolist()]
        self._tasks, self._chunks, self._chunk_rows = state["tasks"], state["chunks"], state["chunk_rows"]
        self._synced = self._chunks
        self._pending = {name: [value] for name, value in rows.items()}
        self._layout = {name: (value.dtype, value.shape[1:]) for name, value in rows.items()}
        for name in self._layout:  # cut back to what was committed
            for chunk in (self.partial / name / "c").glob("*"):
                if not (chunk.name.isdigit() and int(chunk.name) < self._chunks):
                    shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()
        if self._chunks:
            self._row_arrays(self._chunks * self._chunk_rows)

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def _agree(self, layout: dict[str, tuple[np.dtype, tuple[int, ...]]], length: int) -> None:
        where = f"episode {self.num_episodes}"
        if self._horizon is not None and length > self._horizon:
            raise CvlctlError(f"{where} has {length} steps; the horizon is {self._horizon}", "raise the horizon")
        self._layout = self._layout or layout
        for name in sorted({*layout, *self._layout}):
            here, before = layout.get(name), self._layout.get(name)
            what = name.rsplit("/")[-1].replace("success", "successe") + "s"
            if here is None or before is None:
                fault = "has no {}; those before it have" if here is None else "has {}; those before it have none"
                raise CvlctlError(f"{where} {fault.format(what)}", f"give {what} with all episodes of a store, or none")
            if here != before:
                said = f"{where} has {what} of shape {here[1]} {here[0]}"
                raise CvlctlError(f"{said}; those before it {before[1]} {before[0]}", "write them to separate stores")

    def _table(self) -> np.ndarray:
        return np.array(self._index, np.int64).reshape(-1, len(META))

    def _rest(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self._pending.items()}

    def _write_full_chunks(self) -> None:
        size = self._chunk_rows
        while self._num_rows - self._chunks * size >= size:
            rest, start = self._rest(), self._chunks * size
            for name, array in self._row_arrays(start + size).items():
                array[start:] = rest[name][:size]
            self._pending = {name: [value[size:].copy()] for name, value in rest.items()}
            self._chunks += 1  # last: where a write failed, the rows are still here and the next flush tries again

    def _write_rest(self) -> None:
        rest, start = self._rest(), self._chunks * self._chunk_rows
        for name, array in self._row_arrays(self._num_rows).items():
            if start < self._num_rows:
                array[start:] = rest[name]
        group = zarr.open_group(self.partial, mode="r+", zarr_format=3)
        for (name, dtype), column in zip(META.items(), self._table().T, strict=True):
            shutil.rmtree(self.partial / name, ignore_errors=True)
            _create(group, name, (len(column),), np.dtype(dtype), CHUNK_ROWS)[:] = column.astype(dtype)

    def _row_arrays(self, rows: int) -> dict[str, zarr.Array]:
        """The row arrays with `rows` rows, over whatever chunks lie there: their metadata is written anew."""
        group, size = zarr.open_group(self.partial, mode="a", zarr_format=3), self._chunk_rows
        arrays = {}
        for name, (dtype, shape) in self._layout.items():
            (self.partial / name / "zarr.json").unlink(missing_ok=True)
            arrays[name] = _create(group, name, (rows, *shape), dtype, size)
        return arrays

    def _attributes(self, checksums: dict[str, str]) -> dict[str, Any]:
        dtype, shape = self._layout["data/observation"]
        longest = int(np.diff(self._table()[:, 0], prepend=0).max()) - 1
        spec = {"observation_shape": list(shape), "action_dim": self._layout["data/action"][1][0]}
        spec |= {"horizon": self._horizon or longest, "pixels": bool(dtype == np.uint8)}
        counts = {"episodes": self.num_episodes, "transitions": self.num_transitions, "rows": self._num_rows}
        described = {"task": self._identity["task"], "tasks": self._tasks, "spec": spec, "counts": counts}
        own = {"format": FORMAT, "version": VERSION, **described}
        return {**own, "checksums": checksums, "provenance": self._provenance}


def verify_store(path: str | Path) -> list[str]:
    """Re-read a store chunk by chunk and compare it with its checksums and its contract; one line a problem."""
    store = Store(Path(path), _attributes(Path(path)))
    found = [f"labels/{n}/{a}" for n in store.labels for a in LABEL_ARRAYS if store.has_label(n, a)]
    recorded = [n for n in store._checksums if n.startswith("labels/") and n.split("/")[1] in store.labels]
    problems: list[str] = []
    for name in dict.fromkeys(["data/observation", "data/action", *META, *found, *recorded]):
        problems += _verify_array(store, name)
    try:
        ends, lengths, tasks = store.episode_ends(), store.lengths(), store._array("meta/task")
    except CvlctlError:  # said above
        return problems
    if len(ends) == 0 or (lengths < 1).any():
        at = int(np.argmax(lengths < 1)) if len(ends) else 0
        problems.append(f"meta/episode_ends: episode {at} has fewer than 2 rows")
    elif int(ends[-1]) != store._rows:
        problems.append(f"meta/episode_ends: the last episode ends at row {int(ends[-1])} of {store._rows}")
    elif int(lengths.sum()) != store.num_transitions:
        problems.append(f"attributes: {store.num_transitions} transitions recorded, {int(lengths.sum())} found")
    elif int(lengths.max()) > store.spec.horizon:
        problems.append(f"attributes: horizon {store.spec.horizon}, but an episode has {int(lengths.max())} steps")
    if len(tasks) and (tasks.min() < 0 or tasks.max() >= len(store.task_names)):
        problems.append(f"meta/task: indices outside the {len(store.task_names)} task names")
    return problems


def _verify_array(store: Store, name: str) -> list[str]:
    if not (store.path / name / "zarr.json").is_file():
        return [f"{name}: the array is missing"]
    try:
        array = _zarr_array(store.path, name)
    except CvlctlError as error:
        return [f"{name}: {error.what}"]
    dtype, shape = store._expected(name)
    if array.dtype != dtype or array.shape != shape:
        return [f"{name}: is {array.dtype} {array.shape}, expected {dtype} {shape}"]
    problems, total, readable = [], hashlib.sha256(), True
    for start in range(0, array.shape[0], array.chunks[0]):
        where = _where(array, name, start)
        try:
            rows = _chunk(store.path, array, name, start)
        except CvlctlError as error:
            problems.append(error.what)
            readable = False
            continue
        total.update(rows.tobytes())
        if rows.dtype == np.float32 and not np.isfinite(rows).all():
            problems.append(f"{where}: NaN or infinity")
        elif name == "data/action" and rows.size and np.abs(rows).max() > 1.0:
            problems.append(f"{where}: actions outside [-1, 1]")
    if readable and store._checksums.get(name) != total.hexdigest():
        problems.append(f"{name}: the content is not what the recorded checksum says (each chunk reads well by itself)")
    return problems


def _create(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype, chunk_rows: int) -> zarr.Array:
    """Empty chunks are written too, so that a chunk that is not there is a chunk that was lost."""
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(min(chunk_rows, shape[0]), *shape[1:]),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )


def _zarr_array(path: Path, name: str) -> zarr.Array:
    try:
        return zarr.open_array(path / name, mode="r", zarr_format=3)
    except Exception as error:  # missing or garbled metadata: zarr raises many kinds
        what = f"{path}: array {name} cannot be opened: {error}"
        raise CvlctlError(what, "restore it from a copy, or write the store again") from error


def _where(array: zarr.Array, name: str, start: int) -> str:
    size = array.chunks[0]
    return f"{name} chunk {start // size} (rows {start}-{min(start + size, array.shape[0]) - 1})"


def _chunk_file(path: Path, array: zarr.Array, name: str, start: int) -> Path:
    return path / name / "/".join(["c", str(start // array.chunks[0]), *["0"] * (array.ndim - 1)])


def _chunk(path: Path, array: zarr.Array, name: str, start: int) -> np.ndarray:
    """Rows of the chunk that begins at row `start`; a damaged or missing one is named."""
    size, file = array.chunks[0], _chunk_file(path, array, name, start)
    hint = "restore the file from a copy, or write the store again; `cvlctl data verify` lists all that is damaged"
    if not file.is_file():
        raise CvlctlError(f"{_where(array, name, start)}: the chunk {file} is missing", hint)
    try:
        return np.asarray(array[start : start + size])
    except MemoryError:
        raise
    except Exception as error:  # crc32c, zstd and the file system each raise their own
        said = " ".join(str(error).split())
        raise CvlctlError(f"{_where(array, name, start)}: checksum/crc fails in {file}: {said}", hint) from error


def _read(path: Path, name: str) -> np.ndarray:
    array = _zarr_array(path, name)
    starts = range(0, array.shape[0], array.chunks[0])
    try:
        if all(_chunk_file(path, array, name, start).is_file() for start in starts):  # zarr reads a lost chunk as zeros
            with contextlib.suppress(Exception):  # all chunks at once: they are read and decoded side by side
                return np.asarray(array[:])
        return np.concatenate([_chunk(path, array, name, start) for start in starts])  # finds and names the damage
    except MemoryError as error:
        raise CvlctlError(
            f"{path}: {name} needs {array.nbytes / 1e9:.1f} GB of memory", "use a smaller store"
        ) from error


def _checksum(array: zarr.Array) -> str:
    total = hashlib.sha256()
    for start in range(0, array.shape[0], array.chunks[0]):
        total.update(np.asarray(array[start : start + array.chunks[0]]).tobytes())
    return total.hexdigest()


def _read_tail(tail: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """State, arrays, and what is wrong with the file ("" where it is sound)."""
    try:
        with np.load(tail, allow_pickle=False) as file:
            rows = {name: file[name] for name in file.files}
        return json.loads(rows.pop("state").tobytes()), rows, ""
    except Exception as error:  # zip, JSON and numpy each have their own; the file is not sound whichever it is
        return {}, {}, f"{tail} cannot be read: {error}"


def _rows_of(episode: Episode, label: str, index: int) -> dict[str, np.ndarray]:
    """The T+1 rows of an episode for each array: a zero row is added beside the final observation. Copies."""
    if not isinstance(episode, Episode):
        raise CvlctlError(f"item {index} of the episodes is a {type(episode).__name__}", "give cvlctl.Episode objects")
    rows = {"data/observation": np.array(episode.observations)}
    rest = {"data/action": episode.actions, f"labels/{label}/reward": episode.rewards}
    for name, value in {**rest, f"labels/{label}/success": episode.successes}.items():
        if value is not None:
            rows[name] = np.concatenate([value, np.zeros((1, *value.shape[1:]), value.dtype)])
    return rows


def _split(
    observation_rows: np.ndarray,
    action_rows: np.ndarray,
    label_rows: Sequence[np.ndarray | None],
    table: Iterable[np.ndarray],
    tasks: list[str],
) -> Iterator[Episode]:
    start = 0
    for end, terminated, task, collected_at, seed in zip(*(column.tolist() for column in table), strict=True):
        observations, actions = observation_rows[start:end], action_rows[start : end - 1]
        rewards, successes = (None if rows is None else rows[start : end - 1] for rows in label_rows)
        yield Episode(observations, actions, rewards, successes, bool(terminated), tasks[task], collected_at, seed)
        start = end


def _environment() -> dict[str, Any]:
    """What wrote the store, found without importing any of it."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    found = {"versions": versions, "platform": platform.platform(), "created": created}
    root = Path(__file__).parent.parent
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            found["git_commit"] = done.stdout.strip()
    return found


def _lock(partial: Path) -> int:
    """Take the partial store for this process alone; the lock dies with the process, however it dies."""
    while True:
        with _disk(partial):
            partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise CvlctlError(
                f"another process is writing {partial}", "wait until it is done, or choose another path"
            ) from error
        with contextlib.suppress(OSError):  # a writer that finished meanwhile took the file with it: then try again
            if os.path.samestat(os.fstat(handle), os.stat(partial / "lock")):
                return handle
        os.close(handle)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CvlctlError(
            f"cannot write {path}: {error.strerror or error}",
            "free some space and run the same command again: nothing that was flushed is lost"
            if full
            else "check that the path is a directory that you may write to",
        ) from error


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_path(Path(root) / name)
        _sync_path(Path(root))


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _jsonable(what: str, value: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise CvlctlError(f"the {what} of a store cannot be written as JSON: {error}") from error
