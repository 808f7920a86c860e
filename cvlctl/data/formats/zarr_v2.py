"""Arrays of Zarr's version 2, in a folder or a zip, a row of chunks at a time: what Diffusion Policy and UMI write.

Only what holds plain numbers is read, packed by blosc, zstd, lz4, zlib or gzip: other codecs may run code, or unpack
without a bound. Memory is for what a chunk is to hold, whatever its bytes say.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl.data.formats.sources import (
    DEFLATE_RATIO,
    MAX_CHUNK_BYTES,
    Arrays,
    Column,
    kind_in_words,
    num_bytes,
    reading,
    regular,
)
from cvlctl.data.formats.tables import blocks
from cvlctl.errors import CvlctlError

Get = Callable[[str], bytes | None]  # a file of the archive by its name; None where there is none
META = 2**20  # bytes of a .zarray


class _Array(NamedTuple):
    """What a .zarray says."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    order: str
    codec: dict[str, Any] | None
    fill: Any
    separator: str


@contextlib.contextmanager
def open_zarr(path: Path) -> Iterator[Arrays]:
    """The arrays of a Zarr folder or zip, under their full names."""
    with _archive(path) as (names, get):
        arrays = sorted(name.removesuffix("/.zarray") for name in names if name.endswith("/.zarray"))
        if not arrays and any(name.rpartition("/")[2] == "zarr.json" for name in names):
            hint = "only version 2 is read here: write it with zarr_format=2; a store of cvlctl is used as it is"
            raise CvlctlError(f"{path} is of Zarr's version 3", hint)

        def column(name: str) -> Column:
            if name not in arrays:
                raise CvlctlError(f"{path}: no array {name!r}", f"there are: {', '.join(arrays[:20]) or 'none'}")
            where = f"{path}: {name}"
            about = _described(where, get(f"{name}/.zarray") or b"")
            return Column(where, about.shape, about.dtype, blocks(_rows(where, name, about, get)))

        yield Arrays(path, arrays, column, lambda name: [], lambda name: None)


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[tuple[list[str], Get]]:
    """Names of the files in it, and how one is read."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.glob("*/*/.zarray")]
        names += [file.name for file in path.glob("zarr.json")]

        def read(name: str) -> bytes | None:
            with reading(f"{path / name}"):
                file = path / name
                if not file.exists():
                    return None
                regular(file, "a file of a Zarr array")
                return file.read_bytes() if file.stat().st_size <= MAX_CHUNK_BYTES else b""

        yield names, read
        return
    with reading(str(path), "expected a Zarr folder, or one as a zip"):
        regular(path, "a Zarr folder, or one as a zip")
        archive = zipfile.ZipFile(path)
    with archive:
        members = {info.filename: info for info in archive.infolist()}

        def unpack(name: str) -> bytes | None:
            with reading(f"{path}: {name}"):
                if (info := members.get(name)) is None:
                    return None
                plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                size, packed = info.file_size, info.compress_size
                if not plain or size > min(MAX_CHUNK_BYTES, DEFLATE_RATIO * packed + 1000):
                    raise ValueError(f"{size:,} bytes, packed as {packed:,}, are not unpacked")
                with archive.open(info) as file:
                    return file.read(size)

        yield list(members), unpack


def _described(where: str, content: bytes) -> _Array:
    with reading(f"{where}/.zarray"):
        if not 0 < len(content) <= META:
            raise ValueError("it is empty, or too large to be true")
        found = json.loads(content)
        if not isinstance(found["dtype"], str) or not re.fullmatch(r"[<>|][fiub][1-8]", found["dtype"]):
            kind = kind_in_words(np.dtype(str(found["dtype"])[:8])) if isinstance(found["dtype"], str) else "records"
            raise CvlctlError(f"{where}: holds {kind}, not numbers", "save it as an array of plain numbers")
        if found.get("zarr_format") != 2 or found.get("filters") or found.get("order", "C") not in ("C", "F"):
            raise ValueError("it is not of version 2, or has filters, which are not read")
        dtype, separator = np.dtype(found["dtype"]), found.get("dimension_separator", ".")
        shape, chunks = (tuple(int(size) for size in found[key]) for key in ("shape", "chunks"))
        if len(shape) != len(chunks) or min((*shape, 0)) < 0 or min(chunks, default=0) < 1 or separator not in "./":
            raise ValueError(f"shape {shape} in chunks of {chunks}")
        if num_bytes(chunks, dtype) > MAX_CHUNK_BYTES:
            raise ValueError(f"chunks of shape {chunks} are too large")
        return _Array(
            shape, chunks, dtype, found.get("order", "C"), found["compressor"], found.get("fill_value"), separator
        )


def _rows(where: str, name: str, about: _Array, get: Get) -> Iterator[np.ndarray]:
    """The rows that lie in one row of chunks, one after the other."""
    counts = [-(-size // chunk) for size, chunk in zip(about.shape, about.chunks, strict=True)]
    for first in range(counts[0]):
        rows = min(about.chunks[0], about.shape[0] - first * about.chunks[0])
        made = np.empty((rows, *about.shape[1:]), about.dtype)
        for rest in itertools.product(*(range(count) for count in counts[1:])):
            key = about.separator.join(map(str, (first, *rest)))
            at = tuple(slice(i * c, (i + 1) * c) for i, c in zip(rest, about.chunks[1:], strict=True))
            part = made[(slice(None), *at)]
            chunk = _chunk(f"{where}: chunk {key}", about, get(f"{name}/{key}"))
            part[...] = chunk[tuple(slice(size) for size in part.shape)]
        yield made


def _chunk(where: str, about: _Array, content: bytes | None) -> np.ndarray:
    """A chunk's values, unpacked; what is missing is what Zarr takes it for."""
    if content is None:
        if about.fill is None:
            raise CvlctlError(f"{where} is missing", "the array was not written, or not fetched, to its end")
        with reading(f"{where}: fill_value"):
            return np.full(about.chunks, float(about.fill)).astype(about.dtype)
    size = num_bytes(about.chunks, about.dtype)
    with reading(where):
        unpacked = _unpacked(where, about.codec, content, size)
        if len(unpacked) != size:
            raise ValueError(f"it has {len(unpacked):,} bytes, and should have {size:,}")
        return np.frombuffer(unpacked, about.dtype).reshape(about.chunks, order=about.order)  # type: ignore[call-overload]


def _unpacked(where: str, codec: dict[str, Any] | None, content: bytes, size: int) -> bytes:
    """The bytes of a chunk of `size`; never more are unpacked."""
    if codec is None:
        return content
    name = str(codec["id"])
    if name in ("zlib", "gzip"):
        return zlib.decompressobj(47).decompress(content, size + 1)
    if name not in SIZES:
        what = f"{where}: is packed by {name[:40]!r}, which is not unpacked here"
        raise CvlctlError(what, "write it with blosc, zstd, lz4, zlib or gzip")
    if (said := SIZES[name](content)) != size:
        raise ValueError(f"it says that it has {said:,} bytes, and should have {size:,}")
    import numcodecs

    return bytes(numcodecs.get_codec({"id": name}).decode(content))


def _zstd_size(content: bytes) -> int:
    """What the frame of zstd says that it unpacks to; -1 where it says nothing."""
    flags = content[4]
    single, width = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6]
    width = width or single
    at = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    said = int.from_bytes(content[at : at + width], "little") + (256 if width == 2 else 0)
    return said if width else -1


SIZES: dict[str, Callable[[bytes], int]] = {  # what packed bytes say of themselves
    "blosc": lambda content: int.from_bytes(content[4:8], "little"),
    "lz4": lambda content: int.from_bytes(content[:4], "little"),
    "zstd": _zstd_size,
}
