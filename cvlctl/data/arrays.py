"""The arrays of a store as they are written: whole chunks, encoded as `docs/store.md` says."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync as zarr_sync

from cvlctl.data.chunks import chunks, hexadecimal, open_array, read_chunk


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
    what = name.rsplit("/")[-1] + ("es" if name.endswith("s") else "s")
    if name not in rows:
        return f"no {what}"
    shape = rows[name].shape[1:]
    return f"{what} of shape {shape} {rows[name].dtype}" if shape else what
