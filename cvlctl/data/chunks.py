"""The arrays of a store on disk: whole chunks, each with its checksum, decoded to where their rows belong.

Sizes that the metadata declares are compared with the files before memory is taken or anything is listed.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from cvlctl.errors import CvlctlError
from cvlctl.files import SHORTAGES, read_regular

NATIVE = (BytesCodec(), BytesCodec(endian=None))  # bytes as they lie in this machine's memory
LOST = 20  # so many missing chunks are named one by one; beyond, it is the declared number that is wrong
RATIO = 2**15  # zstd's smallest block takes 4 bytes and holds 2**17: no file holds more than this times its size
LARGEST = 2**24  # bytes of an array's zarr.json: ten thousand times the usual


class Chunk(NamedTuple):
    store: Path
    name: str  # for messages
    file: Path
    rows: slice
    crc: str | None  # the crc32c that the store lists for it, 8 hexadecimal digits; None: it lists none


class Foreign(CvlctlError):
    """A chunk that is sound by itself, but not the one that was written; `rows` are what it holds."""

    def __init__(self, chunk: Chunk, crc: str, rows: np.ndarray) -> None:
        what = f"{chunk.name}: {chunk.file} is sound by itself, but not the chunk that was written there: its crc32c is"
        error = damaged(chunk.store, f"{what} {crc}, the store lists {(chunk.crc or '')[:8]}", chunk.file)
        super().__init__(error.what, error.hint)
        self.rows = rows


def open_array(path: Path, name: str) -> zarr.Array:
    """Array `name` of the store, finished or partial, at `path`.

    Raises:
        CvlctlError: it is missing, its metadata cannot be read, or declare more than there is.
    """
    metadata = path / name / "zarr.json"
    if not metadata.is_file():
        raise damaged(path, f"{name}: the array is missing", path / name)
    try:
        if metadata.stat().st_size > LARGEST:
            raise ValueError(f"its zarr.json has {metadata.stat().st_size:,} bytes")
        array = zarr.open_array(path / name, mode="r", zarr_format=3)
        if array.ndim < 1 or array.shards or array.chunks[1:] != array.shape[1:] or array.chunks[0] < 1:
            raise ValueError("its chunks divide another axis than the first, or lie in shards")
        if max(_bytes(shape, array.dtype) for shape in (array.shape, array.chunks)) >= 2**63:
            raise ValueError("it declares more bytes than any machine has")
    except Exception as error:  # garbled metadata: zarr raises many kinds
        if _is_shortage(error):
            raise
        raise damaged(path, f"{name}: the array cannot be opened: {_said(error)}", path / name) from error
    folder = path / name / "c"
    declared, there = _count(array), len(os.listdir(folder)) if folder.is_dir() else 0
    if declared - there > LOST:
        what = f"{name}: {array.shape[0]:,} rows are declared, in {declared:,} chunks, but {folder} holds {there:,}"
        raise damaged(path, what, path / name)
    return array


def listed(array: zarr.Array, crcs: Sequence[str]) -> bool:
    """Whether the store's list tells of each chunk of the array. If not, only the sha256 of the whole can."""
    return _as_documented(array) and len(crcs) == _count(array)


def chunks(path: Path, name: str, array: zarr.Array, crcs: Sequence[str] = ()) -> Iterator[Chunk]:
    """The array's chunks in order; `crcs` are what the store lists for them."""
    size, known = array.chunks[0], listed(array, crcs)
    for i, start in enumerate(range(0, array.shape[0], size)):
        stop = min(start + size, array.shape[0])
        file = path / name / "/".join(["c", str(i), *["0"] * (array.ndim - 1)])
        about = f"{name} chunk {i} (rows {start}-{stop - 1})"
        yield Chunk(path, about, file, slice(start, stop), crcs[i] if known else None)


class Sliced:
    """Rows of an array, read chunk by chunk; the last one is kept, so that each is read once in ascending order."""

    def __init__(self, found: Sequence[Chunk], read: Callable[[Chunk], np.ndarray]) -> None:
        self._chunks, self._read = found, read
        self._size = found[0].rows.stop if found else 1
        self._held: tuple[int, np.ndarray] = (-1, np.empty(0))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, ...) rows."""
        parts = []
        for i in range(start // self._size, (stop - 1) // self._size + 1):
            values = self._chunk(i)
            parts.append(values[max(start - i * self._size, 0) : stop - i * self._size])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _chunk(self, i: int) -> np.ndarray:
        if self._held[0] != i:
            self._held = (-1, np.empty(0))  # two of them are never held
            self._held = (i, self._read(self._chunks[i]))
        return self._held[1]


def read_chunk(array: zarr.Array, chunk: Chunk, out: np.ndarray | None = None) -> np.ndarray:
    """A chunk's rows, in `out` if that is given; a damaged, missing or foreign one is named."""
    _check_file(array, chunk)
    if out is None:
        out = _memory(chunk.store, chunk.name, (chunk.rows.stop - chunk.rows.start, *array.shape[1:]), array.dtype)
    try:
        if not _unpack(array, chunk, out):
            out[...] = array[chunk.rows]
    except CvlctlError:
        raise
    except Exception as error:  # crc32c, zstd and the file system each raise their own
        if _is_shortage(error):
            raise
        what = f"{chunk.name}: checksum/crc fails in {chunk.file}: {_said(error)}"
        raise damaged(chunk.store, what, chunk.file) from error
    return out


def read_array(path: Path, name: str, array: zarr.Array, crcs: Sequence[str] = ()) -> np.ndarray:
    """All of an array; the first chunk that is damaged, missing or foreign is named."""
    found = list(chunks(path, name, array, crcs))
    for chunk in found:
        _check_file(array, chunk)
    values = _memory(path, name, array.shape, array.dtype)
    for chunk in found:  # threads cost more than they save: half of the time is taking memory
        read_chunk(array, chunk, values[chunk.rows])
    return values


def damaged(path: Path, what: str, file: Path) -> CvlctlError:
    hint = (
        f"`cvlctl data verify {path}` lists all that is damaged; restore {file} from a copy, or write the store again"
    )
    return CvlctlError(f"{path}: {what}", hint)


def _is_shortage(error: Exception) -> bool:
    """Of open files, say: the store may well be sound."""
    return isinstance(error, OSError) and error.errno in SHORTAGES


def _check_file(array: zarr.Array, chunk: Chunk) -> None:
    """That a chunk is a file which may hold what is declared: from what the file system says, without opening it."""
    try:
        about = chunk.file.stat()
    except OSError as error:  # zarr would read a lost chunk as zeros
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        problem = f"the chunk {chunk.file} is missing" if gone else f"{chunk.file}: {error.strerror}"
        raise damaged(chunk.store, f"{chunk.name}: {problem}", chunk.file) from error
    if not stat.S_ISREG(about.st_mode):
        raise damaged(chunk.store, f"{chunk.name}: {chunk.file} is no regular file", chunk.file)
    holds = _bytes(array.chunks, array.dtype)
    if about.st_size * RATIO < holds or about.st_size > _most(holds):
        what = f"{chunk.name}: checksum/crc fails in {chunk.file}: {about.st_size:,} bytes cannot hold {holds:,}"
        raise damaged(chunk.store, what, chunk.file)


def _unpack(array: zarr.Array, chunk: Chunk, out: np.ndarray) -> bool:
    """Decode a chunk to where its rows belong. False: not sound, or not encoded as docs/store.md says: zarr's turn.

    Zarr takes new memory for every step of every chunk, and hands it to another thread: that costs more than decoding.
    """
    if not _as_documented(array):
        return False
    content = read_regular(chunk.file, _most(_bytes(array.chunks, array.dtype)))
    packed = np.frombuffer(content, np.uint8)[:-4]
    if google_crc32c.value(packed) != int.from_bytes(content[-4:], "little"):
        return False
    if _unpacked_bytes(content) != _bytes(array.chunks, array.dtype):  # too short would leave memory as it was found
        return False
    padded = len(out) != array.chunks[0]  # the last chunk is
    whole = _memory(chunk.store, chunk.name, array.chunks, array.dtype) if padded else out
    Zstd().decode(packed, whole)
    if padded:
        out[...] = whole[: len(out)]
    crc = hexadecimal(content[-4:])
    if chunk.crc is not None and chunk.crc != crc:
        raise Foreign(chunk, crc, out)
    return True


def _as_documented(array: zarr.Array) -> bool:
    plain = array.serializer in NATIVE and not array.filters
    return plain and [type(codec) for codec in array.compressors] == [ZstdCodec, Crc32cCodec]


def _unpacked_bytes(frame: bytes) -> int:
    """How long the content of a zstd frame is, by its header (RFC 8878, 3.1.1.1); 0 where that does not tell."""
    flags = frame[4] if len(frame) > 4 else 0
    start = 5 + (not flags & 32) + (0, 1, 2, 4)[flags & 3]
    size = (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
    return int.from_bytes(frame[start : start + size], "little") + (256 if size == 2 else 0)


def _memory(path: Path, name: str, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        what = f"{path}: {name}: {_bytes(shape, dtype) / 1e9:,.1f} GB do not fit in this machine's memory"
        raise CvlctlError(what, "take a part of the store (cvlctl data subsample), or a larger machine") from error


def _count(array: zarr.Array) -> int:
    return -(-array.shape[0] // array.chunks[0])


def _bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _most(holds: int) -> int:
    """Bytes of the largest file that a chunk of so many bytes makes; codecs add little to what they cannot compress."""
    return 2 * holds + 2**16


def hexadecimal(trailer: bytes) -> str:
    """The crc32c that ends a chunk's file, as the store lists it: eight digits."""
    return f"{int.from_bytes(trailer, 'little'):08x}"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
