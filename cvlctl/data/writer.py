"""Writes trajectory stores: atomically, durably, resumable after a kill (`docs/store.md`, "Written atomically")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr

from cvlctl import files, folders
from cvlctl.data import tails
from cvlctl.data.arrays import Waiting, described, form, trailers, write_arrays
from cvlctl.data.arrays import checksum as _checksum
from cvlctl.data.attributes import FORMAT, VERSION, read_attributes, spec_attribute
from cvlctl.data.layout import ACTION, IMAGES, LABEL_ARRAYS, META, OBSERVATION, SIM, cameras_of, rows_of, split
from cvlctl.data.provenance import environment, jsonable
from cvlctl.data.store import Store, json_digest, open_store
from cvlctl.data.tails import TAIL, Tail
from cvlctl.data.units import recorded_attributes
from cvlctl.errors import CvlctlError, Exists
from cvlctl.folders import LOCK, MARKER, Folder, put_in_place
from cvlctl.types import Episode, Spec, check_name
from cvlctl.units import Bounds, Units, read_units

CHUNK_ROWS = 100_000  # 500k rows load in tens of ms; chunks of 1k rows take ten times as long
CHUNK_BYTES = 2**26  # wide observations get fewer rows a chunk
FRAME_BYTES = 2**24  # and so do frames: of a chunk of each camera, all is held in memory


def write_store(
    path: str | Path,
    episodes: Iterable[Episode],
    *,
    task: str,
    horizon: int | None = None,
    provenance: dict[str, Any] | None = None,
    label: str = "given",
    action_bounds: Bounds | None = None,
    observation_columns: Sequence[str] = (),
    control_period: float | None = None,
    force: bool = False,
) -> Store:
    """Write `episodes` to a new store, all or nothing: where anything fails, no trace is left and the old store stays.

    Args:
        task: name of the task, for the store and for episodes that carry none.
        horizon: longest possible episode; default: the longest one seen.
        provenance: JSON values to record; versions of python and packages are added.
        label: name under which rewards and successes are kept.
        action_bounds: low and high, numbers or one a dimension: what actions of -1 and 1 stand for on the robot.
        observation_columns: names of the observations' columns, in their order.
        control_period: seconds from one step to the next.
        force: replace a store that is already there, once the new one is complete.

    Raises:
        CvlctlError: the episodes are not alike, the units do not fit them, the store exists, or the disk refuses.
    """
    given = Units(action_bounds, tuple(observation_columns), control_period=control_period)
    read_units(str(path), given.attributes(), None)
    about: dict[str, Any] = {
        "task": task, "horizon": horizon, "provenance": provenance, "label": label, "force": force,
    }  # fmt: skip
    return write_all(path, episodes, lambda: given, **about)


def write_all(
    path: str | Path,
    episodes: Iterable[Episode],
    units: Callable[[], Units],
    attributes: dict[str, Any] | None = None,
    **about: Any,
) -> Store:
    """`write_store`, where only the last episode tells all of the store's `units`; `attributes` are further ones of the
    store, `about` are StoreWriter's."""
    if not isinstance(episodes, Iterable):
        what = f"episodes is of type {type(episodes).__name__}, not a list or another iterable of episodes"
        raise CvlctlError(what, "a single episode goes into a list: [episode]")
    writer = StoreWriter(path, resume=False, **about)
    try:
        for episode in episodes:
            writer.append(episode)
        return writer.finish(**(attributes or {}), **units().attributes())
    except BaseException:
        writer.close(discard=True)
        raise


def check_label(name: str) -> None:
    """Raise a CvlctlError unless the label's name will do as a directory's."""
    check_name("label", name)


class StoreWriter:
    """Writes a store episode by episode in `<path>.partial`, and resumes what it finds flushed there.

    A kill at any instant loses only what was appended after the last `flush`. As a context manager it lets go of the
    partial store on leaving; only `finish` puts the store in place.

    Args:
        resume: another writer may go on with what this one flushes, and this one with what an earlier one did. Without,
            a kill leaves what the next command at `path` discards.
        in_place: False: `finish` leaves the complete store in `partial`, for `folders.put_in_place` with others.

    Raises:
        CvlctlError: the store exists (and no `force`), another writer is at work, or what may be resumed there is not
            to be (no `resume`), or of another task, horizon, label or recipe (`provenance["recipe"]`); `force` discards
            it.
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
        in_place: bool = True,
    ) -> None:
        self.path = Path(path)
        self._task, self._horizon, self._force, self._resume, self._in_place = task, horizon, force, resume, in_place
        self._label_arrays = [f"labels/{label}/{array}" for array in LABEL_ARRAYS]
        check_label(label)
        if not isinstance(task, str) or not task.strip():
            raise CvlctlError(f"task {task!r} is not the name of a task", "give a name such as metaworld/reach-v3")
        given = jsonable("provenance", provenance or {})
        recipe = json_digest(given.get("recipe"))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self._provenance = {**environment(), "created": created, **given}
        self._identity = {"task": task, "horizon": horizon, "label": label, "recipe": recipe}
        folders.put_right(self.path)
        self._refuse_existing()
        self._waiting: dict[str, Waiting] = {}  # of each row array
        self._table: list[tuple[int, ...]] = []  # one row of store.META an episode
        self._tasks: dict[str, int] = {}  # number of each name, in order of first appearance
        self.folder = Folder(self.path)
        self.partial = self.folder.partial
        try:
            self._refuse_existing()  # another process may have finished it before the folder was ours
            with files.disk(self.partial):
                self._restore()
                self.folder.mark(resumes=resume)
        except BaseException:
            self.folder.close(discard=not (self.partial / TAIL).exists())  # else it is somebody's work
            raise

    @property
    def num_episodes(self) -> int:
        """Episodes so far, the resumed ones included."""
        return len(self._table)

    @property
    def num_transitions(self) -> int:
        """Transitions so far, the resumed ones included."""
        return self._num_rows - self.num_episodes

    @property
    def _num_rows(self) -> int:
        return self._table[-1][0] if self._table else 0

    def append(self, episode: Episode) -> None:
        """Take one episode. It is durable after the next `flush`; full chunks are written at once.

        Raises:
            CvlctlError: the episode does not fit the others (it is not taken), or the disk fails (it is taken: its rows
                wait in memory for the next `flush`).
        """
        self._require_open()
        where = f"episode {self.num_episodes}"
        if not isinstance(episode, Episode):
            raise CvlctlError(f"{where} is a {type(episode).__name__}", "give cvlctl.Episode objects")
        if self._horizon is not None and len(episode) > self._horizon:
            raise CvlctlError(f"{where} has {len(episode)} steps; the horizon is {self._horizon}", "raise the horizon")
        rows = rows_of(episode, self._label_arrays)
        earlier = {name: waiting.like for name, waiting in self._waiting.items()} or rows
        for name in rows | earlier:
            if form(name, rows) != form(name, earlier):
                here, before = described(name, rows), described(name, earlier)
                hint = "the episodes of a store are alike: write others to a store of their own"
                raise CvlctlError(f"{where} has {here}; those before it have {before}", hint)
        task, end = episode.task or self._task, self._num_rows + len(episode) + 1
        number = self._tasks.get(task, len(self._tasks))
        try:
            entry = np.array([end, episode.terminated, number, episode.collected_at, episode.seed], np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise CvlctlError(f"{where}: collected_at or seed is no 64-bit integer: {error}") from error
        if not self._table:
            self._waiting = {name: Waiting(name, value, _chunk_rows(name, rows)) for name, value in rows.items()}
        self._tasks[task] = number
        self._table.append(tuple(entry.tolist()))
        for name, value in rows.items():
            self._waiting[name].add(value)
        try:
            with files.disk(self.partial):
                self._write_full_chunks()
        finally:
            for waiting in self._waiting.values():
                waiting.keep()

    def add_array(self, name: str, episode_rows: Iterable[np.ndarray]) -> None:
        """Add a whole row array, such as "labels/given/reward", after the last episode; `finish` comes next.

        Args:
            episode_rows: (T+1, ...) of every episode. As in `append`, full chunks are written at once.
        """
        self._require_open()
        waiting, total = None, 0
        with files.disk(self.partial):
            for rows in episode_rows:
                if waiting is None:
                    waiting = Waiting(name, rows, self._chunk_rows_beside(name, rows))
                waiting.add(rows)
                waiting.write_full(self.partial)
                waiting.keep()
                total += len(rows)
        if waiting is None or total != self._num_rows:
            what = f"{self.path}: {name} has {total:,} rows, the episodes have {self._num_rows:,}"
            raise CvlctlError(what, "give T+1 rows for each episode of T steps, in order")
        self._waiting[name] = waiting

    def flush(self) -> None:
        """Make every episode so far durable: afterwards neither a kill nor a loss of power loses any of them."""
        self._require_open()
        with files.disk(self.partial):
            self._write_full_chunks()
            files.sync_all(self.partial)
            chunk_rows = {name: waiting.chunk_rows for name, waiting in self._waiting.items()}
            written = {name: waiting.written for name, waiting in self._waiting.items()}
            rest = {name: waiting.rest() for name, waiting in self._waiting.items()}
            tail = Tail(self._identity, self._table, list(self._tasks), chunk_rows, written, rest)
            tails.save(self.partial, tail)

    def episodes(self, *, frames: bool = True) -> Iterator[Episode]:
        """The episodes so far, in order: what a collector needs to fill its replay buffer on resuming. Without `frames`
        neither they nor states of a simulator are read."""
        left = () if frames else (IMAGES, SIM)
        rows = {
            name: waiting.reader(self.partial) for name, waiting in self._waiting.items() if not name.startswith(left)
        }
        yield from split(rows, self._table, list(self._tasks), self._label_arrays)

    def finish(self, **extra_attributes: Any) -> Store:
        """Write what is left, checksums and attributes (yours too), and put the store in place by one rename."""
        self._require_open()
        extra = jsonable("extra attributes", recorded_attributes(self._provenance) | extra_attributes)
        if not self._table:
            raise CvlctlError(f"{self.path}: no episodes to write", "a store holds at least one episode")
        self._refuse_existing()
        self.flush()
        with files.disk(self.partial):
            columns = zip(META.items(), np.array(self._table, np.int64).T, strict=True)
            meta = {name: column.astype(dtype) for (name, dtype), column in columns}
            for waiting in self._waiting.values():
                waiting.write_rest(self.partial)
            write_arrays(self.partial, 0, meta, CHUNK_ROWS)
            own, spec = self._attributes()
            read_units(str(self.path), extra, spec)
            own["checksums"] = {name: _checksum(self.partial, name) for name in (*self._waiting, *meta)}
            own["chunk_crc32c"] = {name: trailers(self.partial, name) for name in own["checksums"]}
            if clash := sorted(set(extra) & set(own)):
                raise CvlctlError(f"the store's own attribute {clash[0]!r} cannot be given to finish()")
            zarr.open_group(self.partial, mode="r+", zarr_format=3).attrs.put(jsonable("attributes", {**extra, **own}))
            files.sync_all(self.partial)
        if not self._in_place:
            return open_store(self.partial)
        put_in_place([self.folder])
        return open_store(self.path)

    def close(self, discard: bool = False) -> None:
        """Let go of the partial store. What was flushed stays, to be resumed (unless `discard`)."""
        kept = self._resume and not discard and (self.partial / TAIL).exists()
        self.folder.close(discard=not kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self.folder.is_open:
            raise CvlctlError(f"the writer of {self.path} is closed", "open another StoreWriter")

    def _refuse_existing(self) -> None:
        if self.path.exists():
            if not self._force:
                hint = "choose another path; --force (in Python, force=True) replaces it when the new one is done"
                raise Exists(self.path, hint)
            read_attributes(self.path)  # --force replaces stores, never a folder of something else

    def _restore(self) -> None:
        """Take up what was flushed, and remove what was not."""
        if (self.partial / TAIL).exists():
            try:
                self._read_tail()
                return
            except CvlctlError:
                if not self._force:
                    raise
        self.folder.empty()

    def _read_tail(self) -> None:
        tail = tails.load(self.partial)
        other = [key for key, value in self._identity.items() if tail.identity.get(key) != value]
        if other or not self._resume:
            what = f"{self.partial} holds {len(tail.table)} episodes of an unfinished store"
            what += f" with another {', '.join(other)}" if other else ""
            raise CvlctlError(what, tails.discard_hint(self.partial))
        if OBSERVATION in tail.rest and tail.rest[OBSERVATION].dtype == np.uint8:
            what = f"{self.partial} holds frames as an earlier version kept them"
            raise CvlctlError(what, tails.discard_hint(self.partial))
        self._table, self._tasks = tail.table, {task: number for number, task in enumerate(tail.tasks)}
        flushed = set[Path]()
        for name, rows in tail.rest.items():
            self._waiting[name] = Waiting(name, rows, tail.chunk_rows[name], tail.written[name])
            self._waiting[name].add(rows)
            full = range(tail.written[name] // tail.chunk_rows[name])
            flushed |= {self.partial / name / "c" / str(i) for i in full}
        tails.prune(self.partial, {*flushed, *(self.partial / name for name in (LOCK, MARKER, TAIL))})
        for name, waiting in self._waiting.items():
            if waiting.written:
                write_arrays(self.partial, waiting.written, {name: waiting.like}, waiting.chunk_rows)

    def _chunk_rows_beside(self, name: str, rows: np.ndarray) -> int:
        """Rows of a chunk of an array that comes after the episodes."""
        if not self._table:
            raise CvlctlError(f"{self.path}: no episodes to write", "a store holds at least one episode")
        most = self._waiting[ACTION].chunk_rows
        return min(most, _chunk_rows(name, {name: rows}))

    def _write_full_chunks(self) -> None:
        for waiting in self._waiting.values():
            waiting.write_full(self.partial)

    def _attributes(self) -> tuple[dict[str, Any], Spec]:
        shapes = {name: waiting.like.shape[1:] for name, waiting in self._waiting.items()}
        longest = int(np.diff([end for end, *_ in self._table], prepend=0).max()) - 1
        cameras: Any = {camera: shapes[name] for camera, name in cameras_of(shapes).items()}
        shape, horizon = shapes.get(OBSERVATION, (0,)), self._horizon or longest
        spec = Spec(shape, shapes[ACTION][0], horizon, cameras)
        counts = {"episodes": self.num_episodes, "transitions": self.num_transitions, "rows": self._num_rows}
        told = {"task": self._task, "tasks": list(self._tasks), "spec": spec_attribute(spec), "counts": counts}
        version = VERSION if cameras or SIM in shapes else 1
        return {"format": FORMAT, "version": version, **told, "provenance": self._provenance}, spec


def _chunk_rows(name: str, rows: dict[str, np.ndarray]) -> int:
    """Rows of a chunk: of a store's arrays all alike, but for frames and states of a simulator, which are wide."""
    if name.startswith((IMAGES, SIM)):
        return min(CHUNK_ROWS, max(1, FRAME_BYTES // rows[name][0].nbytes))
    row = rows[OBSERVATION][0].nbytes if OBSERVATION in rows else 1
    return min(CHUNK_ROWS, max(1, CHUNK_BYTES // max(1, row)))
