"""The arrays of npz files, and of whichever file it is."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from cvlctl.data.formats.hdf5 import open_hdf5
from cvlctl.data.formats.sources import DEFLATE_RATIO, Arrays, Column, kind_in_words, num_bytes, reading, regular
from cvlctl.errors import CvlctlError


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Arrays]:
    """An HDF5 or npz file, whichever it is."""
    with reading(str(path)):
        regular(path, "an HDF5 or npz file")
        with open(path, "rb") as file:
            magic = file.read(4)
    with open_npz(path) if magic.startswith(b"PK") else open_hdf5(path) as arrays:
        yield arrays


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Arrays]:
    """The arrays of an npz file, read as streams: compressed ones too are never unpacked whole."""
    with reading(str(path), "expected an npz file, whole: it may be cut short, or of another kind"):
        regular(path, "an npz file")
        archive = zipfile.ZipFile(path)
    with archive, contextlib.ExitStack() as streams:
        members = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}

        def header(name: str) -> tuple[IO[bytes], tuple[int, ...], bool, np.dtype]:
            with reading(f"{path}: {name}"):
                if members[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    what = f"{path}: {name}: is packed in another way than numpy packs"
                    raise CvlctlError(what, "save it by np.savez or np.savez_compressed")
                stream = streams.enter_context(archive.open(members[name]))
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                size = num_bytes(shape, dtype)
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
            row = num_bytes(shape[1:], dtype)

            def fetch(start: int, count: int) -> np.ndarray:
                return np.frombuffer(stream.read(count * row), dtype).reshape(-1, *shape[1:])

            if fortran and len(shape) > 1:  # its rows do not lie together
                with reading(f"{path}: {name}"):
                    whole = np.frombuffer(stream.read(num_bytes(shape, dtype)), dtype).reshape(shape, order="F")
                return Column(f"{path}: {name}", shape, dtype, lambda start, count: whole[start : start + count])
            return Column(f"{path}: {name}", shape, dtype, fetch)

        def text(name: str) -> list[str]:
            stream, shape, _, dtype = header(name)
            if dtype.kind != "U" or len(shape) > 1:
                raise CvlctlError(f"{path}: {name}: holds {kind_in_words(dtype)} of shape {shape}, not text")
            with reading(f"{path}: {name}"):
                return [str(x) for x in np.frombuffer(stream.read(num_bytes(shape, dtype)), dtype).tolist()]

        def value(name: str) -> Any:
            if name not in members:
                return None
            stream, shape, _, dtype = header(name)
            if shape not in ((), (1,)):
                raise CvlctlError(f"{path}: {name}: has shape {shape}, and should be a single value")
            with reading(f"{path}: {name}"):
                return np.frombuffer(stream.read(dtype.itemsize), dtype).item()

        yield Arrays(path, list(members), column, text, value)
