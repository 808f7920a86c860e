"""What readers and writers share: arrays of a file block by block, rows cut into episodes, faults in words."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.files import disk, sync
from cvlctl.types import Episode

if TYPE_CHECKING:
    import h5py

BLOCK_BYTES = 2**23  # what a column keeps in memory
BLOCK_ROWS = 2**16  # rows that are cut into episodes at a time
MAX_ROW_BYTES = MAX_CHUNK_BYTES = 2**28
DEFLATE_RATIO = 1100  # deflate cannot do better than 1032:1; a file that promises more lies
ANY_RATIO = 100_000
ROUNDING = 1e-5  # actions beyond [-1, 1] by no more than float32's rounding of a scaled action are cut off

Bounds = tuple[float | Sequence[float], float | Sequence[float]]


class Facts(NamedTuple):
    """What a file says of itself before its arrays are read; transitions may be an estimate, for the progress bar."""

    transitions: int
    task: str = ""
    horizon: int | None = None
    provenance: dict[str, Any] = {}
    data: Path | None = None  # the file that holds the arrays, where the path is a folder


@contextlib.contextmanager
def reading(where: str, hint: str = "the file may be cut short or damaged: fetch or write it again") -> Iterator[None]:
    """Turn whatever a library raises on a file that is not sound into a CvlctlError that begins with `where`."""
    try:
        yield
    except (CvlctlError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # HDF5, zip, zlib, JSON and numpy each have their own
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise CvlctlError(f"{where}: cannot be read: {said}", hint) from error


class Column:
    """One array of a file, taken from its first row to its last; memory holds one block of it.

    Args:
        where: file and array, for messages.
        fetch: (start, count) -> these rows; called in order, without gaps.

    Raises:
        CvlctlError: it holds no plain numbers, or single rows too large to be true.
    """

    def __init__(
        self, where: str, shape: tuple[int, ...], dtype: np.dtype, fetch: Callable[[int, int], np.ndarray]
    ) -> None:
        self.where, self.shape, self.dtype, self._fetch = where, shape, dtype, fetch
        if dtype.kind not in "fiub":
            raise CvlctlError(f"{where}: holds {_kind(dtype)}, not numbers", "save it as an array of plain numbers")
        if not shape:
            raise CvlctlError(f"{where}: is a single value, not an array with a row a step")
        if 0 in shape[1:]:
            raise CvlctlError(f"{where}: rows of shape {shape[1:]} hold nothing")
        self.row_bytes = _bytes(shape[1:], dtype)
        if self.row_bytes > MAX_ROW_BYTES:
            raise CvlctlError(f"{where}: rows of shape {shape[1:]} are too large to be true")
        self._at, self._block, self._used = 0, np.empty((0, *shape[1:]), dtype), 0

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows."""
        parts = []
        while count:
            if self._used == len(self._block):
                self._next_block(count)
            part = self._block[self._used : self._used + count]
            self._used += len(part)
            count -= len(part)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def rest(self) -> np.ndarray:
        """All rows that were not taken yet."""
        return self.take(len(self) - self._at + len(self._block) - self._used)

    def _next_block(self, wanted: int) -> None:
        size = min(max(1, BLOCK_BYTES // max(1, self.row_bytes)), len(self) - self._at)
        if size <= 0:
            raise CvlctlError(f"{self.where}: has {len(self)} rows, fewer than the others need")
        with reading(f"{self.where}, rows {self._at}-{self._at + size - 1}"):
            block = self._fetch(self._at, size)
        if block.shape != (size, *self.shape[1:]):
            raise CvlctlError(f"{self.where}: ends before row {self._at + size}", "the file is cut short")
        self._block, self._used = block, 0
        self._at += size


class Arrays(NamedTuple):
    """The arrays of an open file."""

    path: Path
    names: list[str]
    column: Callable[[str], Column]
    text: Callable[[str], list[str]]  # the strings of an array of them
    attribute: Callable[[str], Any]  # of the file; None where it has none of that name

    def need(self, *names: str) -> None:
        """Raise a CvlctlError that lists what there is, unless the file has all these arrays."""
        for name in names:
            if name not in self.names:
                there = ", ".join(self.names[:20]) or "nothing"
                raise CvlctlError(f"{self.path}: no array {name!r}", f"the file has {there}")


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Arrays]:
    """An HDF5 or npz file, whichever it is."""
    with reading(str(path)):
        if path.is_dir():
            raise CvlctlError(f"{path} is a directory; expected an HDF5 or npz file")
        with open(path, "rb") as file:
            magic = file.read(4)
    with open_npz(path) if magic.startswith(b"PK") else open_hdf5(path) as arrays:
        yield arrays


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Arrays]:
    """The datasets of an HDF5 file, under their full names."""
    with hdf5_file(path) as file:
        with reading(str(path)):
            names = list(_datasets(file))
        yield Arrays(
            path,
            names,
            lambda name: dataset_column(path, file, name),
            lambda name: [],
            lambda name: attribute(file, name),
        )


@contextlib.contextmanager
def hdf5_file(path: Path) -> Iterator[h5py.File]:
    """An open HDF5 file."""
    import h5py

    with reading(str(path), "expected an HDF5 file, whole: it may be cut short, or of another kind"):
        if path.is_dir():
            raise CvlctlError(f"{path} is a directory; expected an HDF5 file")
        file = h5py.File(path, "r", locking="best-effort")
    try:
        yield file
    finally:
        with contextlib.suppress(Exception):  # a damaged file may fail to close; what matters was said before
            file.close()


def dataset_column(path: Path, group: h5py.Group, name: str) -> Column:
    """A dataset of an HDF5 file as a column; raises as `dataset_in` does."""
    dataset = dataset_in(path, group, name)

    def fetch(start: int, count: int) -> np.ndarray:
        return np.asarray(dataset[start : start + count])

    return Column(f"{path}: {dataset.name.strip('/')}", dataset.shape or (), dataset.dtype, fetch)


def dataset_in(path: Path, group: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset of the HDF5 file at `path`.

    Raises:
        CvlctlError: it is missing, lies in another file, or its storage cannot hold what its shape says: what is read
            is bounded by the file, whatever its header claims.
    """
    import h5py

    where = f"{path}: {'/'.join(part for part in (group.name.strip('/'), name) if part)}"
    elsewhere = CvlctlError(f"{where}: lies in another file", "write the data themselves into one file")
    with reading(where):
        link = group.get(name, getlink=True)
        if link is None:
            raise CvlctlError(f"{where}: the array is missing")
        if isinstance(link, h5py.ExternalLink):
            raise elsewhere
        dataset = group[name]
        if not isinstance(dataset, h5py.Dataset):
            raise CvlctlError(f"{where}: is a group, not an array")
        if dataset.external or dataset.is_virtual or dataset.file.filename != str(path):
            raise elsewhere
        ratio = ANY_RATIO if dataset.id.get_create_plist().get_nfilters() else 1
        if dataset.compression in ("gzip", "lzf", "szip"):
            ratio = DEFLATE_RATIO
        if _bytes(dataset.shape or (), dataset.dtype) > ratio * dataset.id.get_storage_size():
            what = f"{where}: holds less than its shape {dataset.shape} says"
            raise CvlctlError(what, "the file was not written to its end")
        if _bytes(dataset.chunks or (), dataset.dtype) > MAX_CHUNK_BYTES:
            what = f"{where}: chunks of shape {dataset.chunks} are too large"
            raise CvlctlError(what, "write it with smaller chunks")
    return dataset


def attribute(item: h5py.Group, name: str, *, ragged: bool = False) -> Any:
    """A single number or text of fixed length that an HDF5 file has as an attribute; None where there is none.

    Args:
        ragged: also text of no fixed length. HDF5 keeps it on a heap, and never returns from some damaged ones.
    """
    with reading(f"{item.file.filename}: attribute {name!r}"):
        if name not in item.attrs:
            return None
        found = item.attrs.get_id(name)
        if found.shape != () or (found.dtype.kind not in "iufbS" and not ragged):
            return None
        value = item.attrs[name]
        return value.decode() if isinstance(value, bytes) else value


def fixed_text(value: str) -> np.bytes_:
    """Text as an attribute of fixed length."""
    return np.bytes_(value.encode())


def _datasets(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """The datasets anywhere below a group, by their names from there."""
    import h5py

    found: dict[str, h5py.Dataset] = {}

    def visit(name: str | bytes, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):  # a name that is no UTF-8 comes as bytes
            found[name if isinstance(name, str) else name.decode(errors="replace")] = item

    group.visititems(visit)
    return found


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Arrays]:
    """The arrays of an npz file, read as streams: compressed ones too are never unpacked whole."""
    with reading(str(path), "expected an npz file, whole: it may be cut short, or of another kind"):
        archive = zipfile.ZipFile(path)
    with archive, contextlib.ExitStack() as streams:
        members = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}

        def header(name: str) -> tuple[IO[bytes], tuple[int, ...], bool, np.dtype]:
            with reading(f"{path}: {name}"):
                stream = streams.enter_context(archive.open(members[name]))
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                size = _bytes(shape, dtype)
                if dtype.hasobject:
                    what = f"{path}: {name}: holds pickled Python objects, which are never loaded"
                    raise CvlctlError(what, "save it as an array of plain numbers")
                unpacked, packed = members[name].file_size, members[name].compress_size
                if min(shape, default=0) < 0 or size > unpacked or unpacked > DEFLATE_RATIO * packed + 1000:
                    raise CvlctlError(f"{path}: {name}: holds less than its shape {shape} says", "write it again")
            return stream, shape, fortran, dtype

        def column(name: str) -> Column:
            if name not in members:
                raise CvlctlError(f"{path}: no array {name!r}", f"the file has {', '.join(list(members)[:20])}")
            stream, shape, fortran, dtype = header(name)
            row = _bytes(shape[1:], dtype)

            def fetch(start: int, count: int) -> np.ndarray:
                return np.frombuffer(stream.read(count * row), dtype).reshape(-1, *shape[1:])

            if fortran and len(shape) > 1:  # its rows do not lie together
                whole = np.frombuffer(stream.read(), dtype).reshape(shape, order="F")
                return Column(f"{path}: {name}", shape, dtype, lambda start, count: whole[start : start + count])
            return Column(f"{path}: {name}", shape, dtype, fetch)

        def text(name: str) -> list[str]:
            stream, shape, _, dtype = header(name)
            if dtype.kind != "U" or len(shape) > 1:
                raise CvlctlError(f"{path}: {name}: holds {_kind(dtype)} of shape {shape}, not text")
            with reading(f"{path}: {name}"):
                return [str(x) for x in np.frombuffer(stream.read(), dtype).tolist()]

        yield Arrays(path, list(members), column, text, lambda name: None)


def _kind(dtype: np.dtype) -> str:
    kinds = {"O": "objects", "U": "text", "S": "text", "c": "complex numbers", "V": "records"}
    return kinds.get(dtype.kind, f"values of type {dtype}")


def same_length(path: Path, columns: dict[str, Column]) -> int:
    """The number of rows that all columns have."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        what = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise CvlctlError(f"{path}: the arrays differ in their number of rows: {what}")
    return next(iter(lengths.values()))


def flat(values: np.ndarray, where: str) -> np.ndarray:
    """(N,) of what may be (N, 1)."""
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise CvlctlError(f"{where}: has shape (N, {', '.join(map(str, values.shape[1:]))}); expected (N,) or (N, 1)")
    return values


def flags(values: np.ndarray, where: str) -> np.ndarray:
    """(N,) bool of 0 and 1 in whatever type."""
    values = flat(values, where)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise CvlctlError(f"{where}: holds NaN or infinity where 0 and 1 are expected")
    return values != 0


def cut(
    columns: dict[str, Column], length: int, ends: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Rows cut into episodes: (number of the first row, arrays); the last one may be unfinished.

    Args:
        ends: (rows that begin with an episode's first) -> (n,) bool, true at an episode's last row.
    """
    rows: dict[str, np.ndarray] = {}
    first = done = 0
    size = max(1, min(BLOCK_ROWS, 4 * BLOCK_BYTES // max(1, sum(column.row_bytes for column in columns.values()))))
    while done < length:
        count = min(size, length - done)
        block = {name: column.take(count) for name, column in columns.items()}
        rows = {name: np.concatenate([rows[name], block[name]]) for name in block} if rows else block
        done, start = done + count, 0
        for stop in (np.flatnonzero(ends(rows)) + 1).tolist():
            yield first + start, {name: values[start:stop] for name, values in rows.items()}
            start = stop
        left = len(next(iter(rows.values()))) - start
        rows = {name: values[start:] for name, values in rows.items()} if left else {}
        first += start
    if rows:
        yield first, rows


def cut_at(horizon: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from (n,) terminal flags to (n,) ends: there, and wherever an episode has `horizon` rows."""

    def ends(terminal: np.ndarray) -> np.ndarray:
        found, start = terminal.copy(), 0
        for stop in [*(np.flatnonzero(terminal) + 1).tolist(), len(terminal)]:
            found[start + horizon - 1 : stop : horizon] = True
            start = stop
        return found

    return ends


def with_final(
    observations: np.ndarray, after: np.ndarray | None, terminated: bool, steps: int
) -> tuple[np.ndarray, int]:
    """Observations with the final one that rows lack, and the number of transitions that this leaves.

    Where the file has no observation `after` the last step, two ways are left. If the environment ended the episode,
    the last observation stands in for the final one: the transition tells that the episode ends. If it was cut off,
    the last transition is dropped, and the observation before it is the final one.
    """
    if after is not None:
        return np.concatenate([observations, after]), steps
    if terminated:
        return np.concatenate([observations, observations[-1:]]), steps
    return observations, steps - 1


def joined(path: Path, group: h5py.Group, keys: Sequence[str]) -> np.ndarray:
    """Observations that lie in several datasets of a group, side by side: (N, sum of sizes).

    Args:
        keys: those to join, in this order; none: all of at most two dimensions, in alphabetical order. A single one
            of more dimensions (an image) is taken as it is.
    """
    there = _datasets(group)
    chosen = list(keys) or sorted(name for name, dataset in there.items() if len(dataset.shape or ()) <= 2)
    where = f"{path}: {group.name.strip('/')}"
    for name in chosen:
        if name not in there:
            raise CvlctlError(f"{where}: no observation {name!r}", f"it has: {', '.join(sorted(there)[:20])}")
    if not chosen:
        raise CvlctlError(
            f"{where}: nothing but images", f"choose one by observation_keys: {', '.join(sorted(there)[:20])}"
        )
    columns = {name: dataset_column(path, group, name) for name in chosen}
    length = same_length(path, columns)
    if len(columns) > 1 and any(len(column.shape) > 2 for column in columns.values()):
        shapes = ", ".join(f"{name} {column.shape[1:]}" for name, column in columns.items())
        raise CvlctlError(f"{where}: an image does not join with others: {shapes}", "choose by observation_keys")
    parts = [column.rest() for column in columns.values()]
    if len(parts) == 1 and parts[0].ndim > 1:
        return parts[0]
    return np.concatenate([part.reshape(length, -1) for part in parts], axis=1, dtype=np.float32, casting="unsafe")


def make(where: str, bounds: Bounds | None, clip: bool, **parts: Any) -> Episode:
    """An episode, its actions scaled from `bounds` to [-1, 1]; what is wrong with it begins with `where`."""
    try:
        parts["actions"] = scaled(parts["actions"], bounds, clip)
        return Episode(**parts)
    except CvlctlError as error:
        hint = error.hint
        if "outside [-1, 1]" in error.what:
            hint = "say in which bounds they lie by action_bounds=(low, high), or cut them off by clip_actions"
        raise CvlctlError(f"{where}: {error.what}", hint) from error


def scaled(actions: np.ndarray, bounds: Bounds | None, clip: bool) -> np.ndarray:
    """Actions in [-1, 1]: scaled from `bounds` if given, cut off if asked, or if beyond by rounding alone."""
    if bounds is not None:
        try:
            low, high = (np.asarray(bound, np.float64) for bound in bounds)
            np.broadcast_shapes(low.shape, high.shape, actions.shape[1:])
            if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
                raise ValueError
        except (TypeError, ValueError) as error:
            what = f"action_bounds {bounds} are no (low, high) for actions of shape {actions.shape[1:]}"
            raise CvlctlError(what, "give two numbers, or two lists of one number a dimension") from error
        actions = ((actions - low) * (2.0 / (high - low)) - 1.0).astype(np.float32)
    if actions.size and actions.dtype.kind == "f":
        most = np.abs(actions).max()
        if clip or 1.0 < most <= 1.0 + ROUNDING:
            return np.clip(actions, -1.0, 1.0)
    return np.clip(actions, -1, 1) if clip else actions


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A path beside `out` for a file or folder, which takes the place of `out` at the end, or leaves no trace."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with disk(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            for file in [temporary, *temporary.rglob("*")]:
                sync(file)
            if out.is_dir():
                old = out.with_name(f".{out.name}.{os.getpid()}.old")
                os.replace(out, old)
                os.replace(temporary, out)
                shutil.rmtree(old)
            else:
                os.replace(temporary, out)
            sync(out.parent)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
