"""HDF5 files: datasets as columns, attributes; what is read is bounded by the file, whatever its header claims."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvlctl.errors import CvlctlError

if TYPE_CHECKING:
    import h5py
from cvlctl.data.formats.sources import (
    ANY_RATIO,
    DEFLATE_RATIO,
    MAX_CHUNK_BYTES,
    Arrays,
    Column,
    num_bytes,
    reading,
    same_length,
)


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
        if num_bytes(dataset.shape or (), dataset.dtype) > ratio * dataset.id.get_storage_size():
            what = f"{where}: holds less than its shape {dataset.shape} says"
            raise CvlctlError(what, "the file was not written to its end")
        if num_bytes(dataset.chunks or (), dataset.dtype) > MAX_CHUNK_BYTES:
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
