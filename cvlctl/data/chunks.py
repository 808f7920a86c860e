"""The arrays of a store on disk: whole chunks, each with its checksum, decoded to where their rows belong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from cvlctl.errors import CvlctlError

NATIVE = (BytesCodec(), BytesCodec(endian=None))  # bytes as they lie in this machine's memory


def open_array(path: Path, name: str) -> zarr.Array:
    """Array `name` of the store, finished or partial, at `path`."""
    if not (path / name / "zarr.json").is_file():
        raise damaged(path, f"{name}: the array is missing", path / name)
    try:
        return zarr.open_array(path / name, mode="r", zarr_format=3)
    except Exception as error:  # garbled metadata: zarr raises many kinds
        raise damaged(path, f"{name}: the array cannot be opened: {error}", path / name) from error


class Chunk(NamedTuple):
    store: Path
    name: str  # for messages
    file: Path
    rows: slice


def chunks(path: Path, name: str, array: zarr.Array) -> Iterator[Chunk]:
    size = array.chunks[0]
    for i, start in enumerate(range(0, array.shape[0], size)):
        stop = min(start + size, array.shape[0])
        file = path / name / "/".join(["c", str(i), *["0"] * (array.ndim - 1)])
        yield Chunk(path, f"{name} chunk {i} (rows {start}-{stop - 1})", file, slice(start, stop))


def read_chunk(array: zarr.Array, chunk: Chunk, out: np.ndarray | None = None) -> np.ndarray:
    """A chunk's rows, in `out` if that is given; a damaged or missing one is named."""
    if not chunk.file.is_file():  # zarr would read a lost chunk as zeros
        raise damaged(chunk.store, f"{chunk.name}: the chunk {chunk.file} is missing", chunk.file)
    if out is None:
        out = np.empty((chunk.rows.stop - chunk.rows.start, *array.shape[1:]), array.dtype)
    try:
        if not _unpack(array, chunk.file, out):
            out[...] = array[chunk.rows]
    except Exception as error:  # crc32c, zstd and the file system each raise their own
        said = " ".join(str(error).split())
        what = f"{chunk.name}: checksum/crc fails in {chunk.file}: {said}"
        raise damaged(chunk.store, what, chunk.file) from error
    return out


def _unpack(array: zarr.Array, file: Path, out: np.ndarray) -> bool:
    """Decode a chunk to where its rows belong. False: not sound, or not encoded as docs/store.md says: zarr's turn.

    Zarr takes new memory for every step of every chunk, and hands it to another thread: that costs more than decoding.
    """
    plain = array.serializer in NATIVE and not array.filters
    if not plain or [type(codec) for codec in array.compressors] != [ZstdCodec, Crc32cCodec]:
        return False
    content = file.read_bytes()
    packed = np.frombuffer(content, np.uint8)[:-4]
    whole = out if len(out) == array.chunks[0] else np.empty(array.chunks, array.dtype)  # the last chunk is padded
    sound = google_crc32c.value(packed) == int.from_bytes(content[-4:], "little")
    if not sound or _unpacked_bytes(content) != whole.nbytes:  # what is too short would leave `whole` as it was found
        return False
    Zstd().decode(packed, whole)
    if whole is not out:
        out[...] = whole[: len(out)]
    return True


def _unpacked_bytes(frame: bytes) -> int:
    """How long the content of a zstd frame is, by its header (RFC 8878, 3.1.1.1); 0 where that does not tell."""
    flags = frame[4] if len(frame) > 4 else 0
    start = 5 + (not flags & 32) + (0, 1, 2, 4)[flags & 3]
    size = (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
    return int.from_bytes(frame[start : start + size], "little") + (256 if size == 2 else 0)


def read_array(path: Path, name: str, array: zarr.Array) -> np.ndarray:
    """All of an array; the first chunk that is damaged or missing is named."""
    values = np.empty(array.shape, array.dtype)
    for chunk in chunks(path, name, array):  # threads cost more than they save: half of the time is taking memory
        read_chunk(array, chunk, values[chunk.rows])
    return values


def damaged(path: Path, what: str, file: Path) -> CvlctlError:
    hint = (
        f"`cvlctl data verify {path}` lists all that is damaged; restore {file} from a copy, or write the store again"
    )
    return CvlctlError(f"{path}: {what}", hint)
