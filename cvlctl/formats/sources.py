"""What readers and writers share: arrays of a file, block by block; its faults in words; files replaced whole."""

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

if TYPE_CHECKING:
    import h5py

BLOCK_BYTES = 2**23  # what a column keeps in memory
MAX_ROW_BYTES = MAX_CHUNK_BYTES = 2**28
DEFLATE_RATIO = 1100  # deflate cannot do better than 1032:1; a file that promises more lies
ANY_RATIO = 100_000


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
