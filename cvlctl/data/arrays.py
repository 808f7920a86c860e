"""The arrays of a store as they are written: whole chunks, encoded as `docs/store.md` says."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync as zarr_sync

from cvlctl.data.chunks import Sliced, chunks, hexadecimal, open_array, read_chunk
from cvlctl.data.layout import IMAGES, Rows

AT_ONCE = 4  # chunks, which zarr encodes side by side


class Waiting:
    """Rows of one array that no chunk holds yet.

    Attributes:
        like: (0, ...) rows of the array's shape and type.
        chunk_rows: rows of a chunk.
        written: rows that lie in full chunks.
    """

    def __init__(self, name: str, like: np.ndarray, chunk_rows: int, written: int = 0) -> None:
        self.name, self.like, self.chunk_rows, self.written = name, like[:0].copy(), chunk_rows, written
        self._parts: list[np.ndarray] = []
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        """Take more of them; they are the caller's until `keep`."""
        self._parts.append(rows)
        self._count += len(rows)

    def keep(self) -> None:
        """Copy what is left of the rows that came last: their array may change, or be large."""
        if self._parts:
            self._parts[-1] = self._parts[-1].copy()

    def rest(self) -> np.ndarray:
        """All of them as one array."""
        return np.concatenate([self.like, *self._parts])

    def write_full(self, folder: Path) -> None:
        """Write the full chunks among them, some at a time. Where that fails, the rows are still here."""
        while ready := min(self._count // self.chunk_rows, AT_ONCE):
            size = ready * self.chunk_rows
            write_arrays(folder, self.written, {self.name: self._first(size)}, self.chunk_rows)
            self._drop(size)
            self.written += size

    def write_rest(self, folder: Path) -> None:
        """Write what is left as the last chunk, or the array's metadata alone."""
        write_arrays(folder, self.written, {self.name: self.rest()}, self.chunk_rows)

    def reader(self, folder: Path) -> Rows:
        """All rows so far, from chunks and from what waits for one."""
        rest, written, sliced = self.rest(), self.written, None
        if written:
            array = open_array(folder, self.name)
            sliced = Sliced(list(chunks(folder, self.name, array)), partial(read_chunk, array))

        def rows(start: int, stop: int) -> np.ndarray:
            waits = rest[max(start - written, 0) : max(stop - written, 0)]
            if sliced is None or start >= written:
                return waits
            return np.concatenate([sliced.rows(start, min(stop, written)), waits])

        return rows

    def _first(self, size: int) -> np.ndarray:
        taken, missing = [], size
        for part in self._parts:
            taken.append(part[:missing])
            missing -= len(taken[-1])
            if not missing:
                break
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def _drop(self, size: int) -> None:
        self._count -= size
        gone = 0
        while size and size >= len(self._parts[gone]):
            size -= len(self._parts[gone])
            gone += 1
        del self._parts[:gone]
        if size:
            self._parts[0] = self._parts[0][size:]


def write_arrays(folder: Path, start: int, rows: dict[str, np.ndarray], chunk_rows: int) -> None:
    """Let arrays end in `rows`, from a chunk's first row on; their metadata is written anew over earlier chunks.

    Args:
        start: row of each array at which its `rows` begin: a multiple of `chunk_rows`.
    """
    try:
        for name, values in rows.items():
            (folder / name / "zarr.json").unlink(missing_ok=True)
            end, shape = start + len(values), values.shape[1:]
            array = zarr.create_array(
                folder, name=name, shape=(end, *shape), dtype=values.dtype, chunks=(min(chunk_rows, end), *shape),
                compressors=[_zstd(values.dtype), Crc32cCodec()], fill_value=0,
                config={"write_empty_chunks": True},  # a missing chunk is then a lost one
            )  # fmt: skip
            if len(values):
                array[start:] = values
    except BaseException:
        zarr_sync(_settled())  # of several writes at once one failed: the others would make anew what is removed
        raise


def checksum(folder: Path, name: str) -> str:
    """sha256 of an array's values, read back from its chunks."""
    array, total = open_array(folder, name), hashlib.sha256()
    for chunk in chunks(folder, name, array):
        total.update(read_chunk(array, chunk).tobytes())
    return total.hexdigest()


def trailers(folder: Path, name: str) -> list[str]:
    """The crc32c at the end of each chunk's file, as `docs/store.md` lists it."""
    return [hexadecimal(chunk.file.read_bytes()[-4:]) for chunk in chunks(folder, name, open_array(folder, name))]


def _zstd(dtype: np.dtype) -> ZstdCodec:
    """Below level 1 there is no entropy coding: floats, whose low bits are noise, are read in half the time for a tenth
    more bytes. Pixels gain much by it."""
    return ZstdCodec(level=3 if dtype == np.uint8 else -1)


async def _settled() -> None:
    """Wait for whatever zarr has under way."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def form(name: str, rows: dict[str, np.ndarray]) -> tuple[tuple[int, ...], np.dtype] | None:
    """What all episodes of a store agree in."""
    return (rows[name].shape[1:], rows[name].dtype) if name in rows else None


def described(name: str, rows: dict[str, np.ndarray]) -> str:
    """The same in words."""
    last = name.rpartition("/")[2]
    if name.startswith(IMAGES):
        return f"frames of camera {last!r} of shape {rows[name].shape[1:]}" if name in rows else f"no camera {last!r}"
    what = last + ("es" if last.endswith("s") else "s")
    if name not in rows:
        return f"no {what}"
    shape = rows[name].shape[1:]
    return f"{what} of shape {shape} {rows[name].dtype}" if shape else what
