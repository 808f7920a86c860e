"""What readers of files share: arrays, block by block, and faults in words."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.play.spaces import natural
from cvlctl.units import Bounds

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
    data: Sequence[Path] = ()  # the files that hold the arrays, where the path is a folder
    action_bounds: Bounds | None = None  # what its actions lie in; None: [-1, 1], or it does not say
    environment: dict[str, Any] | None = None  # that it came from, as the store's attribute of that name says it
    exported: str = ""  # `units.export_digest` of what we wrote it from
    units: Mapping[str, Any] = {}  # what else it says of its numbers: by the names of `cvlctl.units.Units`
    videos: Sequence[Path] = ()  # files beside those of `data`, which are read where cameras are imported


@dataclass
class Told:
    """What a reader tells of a file beside its episodes: whole after the last, columns from the first on."""

    columns: list[str] = field(default_factory=list)  # names of an observation's
    dropped: list[str] = field(default_factory=list)  # observations that were left out
    remarks: list[str] = field(default_factory=list)  # for people, and for the store: what seems amiss
    values: int = 0  # of actions that were held to [-1, 1]
    clipped: int = 0  # of those, how many were cut off
    drop_nan: bool = False  # asked of the reader: leave episodes out that hold NaN or infinity
    bad: list[str] = field(default_factory=list)  # which ones were
    episodes: int = 0  # that came by, with those


def steps_of(value: Any, where: str) -> int:
    """A horizon that a file names, as a whole number of steps."""
    try:
        found = int(value)
        if found == value and 1 <= found < 2**63:
            return found
    except (TypeError, ValueError, OverflowError):  # text, None, infinity
        pass
    raise CvlctlError(f"{where}: the horizon {value!r} is no number of steps", "write the file again, with 1 or more")


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


def regular(path: Path, wanted: str) -> None:
    """Raise a CvlctlError where a directory, a device or a pipe is in a file's place: some are read for ever."""
    if path.is_dir():
        raise CvlctlError(f"{path} is a directory; expected {wanted}")
    if path.exists() and not path.is_file():
        raise CvlctlError(f"{path} is a device or a pipe; expected {wanted}", "write its content into a file first")


def files_in(path: Path, suffixes: Collection[str], wanted: str) -> list[Path]:
    """The file itself, or a folder's files with these suffixes in the order of their names, numbers as numbers."""
    if not path.is_dir():
        regular(path, f"{wanted}, or a folder of such")
        return [path]
    return sorted((file for file in path.iterdir() if file.suffix in suffixes), key=lambda file: natural(file.name))


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
            raise CvlctlError(
                f"{where}: holds {kind_in_words(dtype)}, not numbers", "save it as an array of plain numbers"
            )
        if not shape:
            raise CvlctlError(f"{where}: is a single value, not an array with a row a step")
        if 0 in shape[1:]:
            raise CvlctlError(f"{where}: rows of shape {shape[1:]} hold nothing")
        self.row_bytes = num_bytes(shape[1:], dtype)
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

    @property
    def left(self) -> int:
        """How many rows were not taken yet."""
        return len(self) - self._at + len(self._block) - self._used

    def rest(self) -> np.ndarray:
        """All rows that were not taken yet."""
        return self.take(self.left)

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
    value: Callable[[str], Any]  # a single one of the file: HDF5's attribute, npz's array; None where there is none

    def need(self, *names: str) -> None:
        """Raise a CvlctlError that lists what there is, unless the file has all these arrays."""
        for name in names:
            if name not in self.names:
                there = ", ".join(self.names[:20]) or "nothing"
                raise CvlctlError(f"{self.path}: no array {name!r}", f"the file has {there}")


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def kind_in_words(dtype: np.dtype) -> str:
    kinds = {"O": "objects", "U": "text", "S": "text", "c": "complex numbers", "V": "records"}
    return kinds.get(dtype.kind, f"values of type {dtype}")


def same_length(where: Path | str, columns: Mapping[str, Sized]) -> int:
    """The number of rows that all columns have."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        what = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise CvlctlError(f"{where}: the arrays differ in their number of rows: {what}")
    return next(iter(lengths.values()))
