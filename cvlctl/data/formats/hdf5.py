"""HDF5 files: datasets as columns, attributes; what is read is bounded by the file, whatever its header claims."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvlctl.data.formats.sources import (
    ANY_RATIO,
    DEFLATE_RATIO,
    MAX_CHUNK_BYTES,
    Arrays,
    Column,
    num_bytes,
    reading,
    regular,
)
from cvlctl.errors import CvlctlError

if TYPE_CHECKING:
    import h5py

MAX_NAMES, MAX_DEPTH = 20_000, 100  # of arrays and groups that are listed
MAX_LINKS = 16  # soft links on the way to an array


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Arrays]:
    """The datasets of an HDF5 file, under their full names."""
    with hdf5_file(path) as file:
        with reading(str(path)):
            names = list(datasets(path, file))
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
        regular(path, "an HDF5 file")
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
    with reading(where):
        dataset = member(path, group, name)
        if dataset is None:
            raise CvlctlError(f"{where}: the array is missing")
        if not isinstance(dataset, h5py.Dataset):
            raise CvlctlError(f"{where}: is a group, not an array")
        if dataset.external or dataset.is_virtual:
            raise _elsewhere(where)
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


def names_in(path: Path, group: h5py.Group) -> list[str]:
    """What lies in a group, by name. CvlctlError where the file is damaged."""
    with reading(f"{path}: {group.name}"):
        found = list(group)
        if any(not isinstance(name, str) for name in found):
            raise ValueError("a name in it is no text")
        return found


def member(path: Path, group: h5py.Group, name: str, links: list[str] | None = None) -> Any:
    """What lies in the file at `path` under a group's `name`, soft links followed; None where there is nothing.

    HDF5 itself would open whatever file a link names, a device or a pipe too.

    Args:
        links: the soft links that led here.

    Raises:
        CvlctlError: it lies in another file, the file is damaged, or links lead from one to the next without an end.
    """
    at: Any = group.file["/"] if name.startswith("/") else group
    links = [] if links is None else links
    with reading(f"{path}: {name}"):
        for part in name.strip("/").split("/"):
            if part not in ("", "."):
                at = _child(path, at, part, links)
    return at


def _child(path: Path, group: Any, name: str | bytes, links: list[str]) -> Any:
    """`member` of a single name."""
    import h5py

    link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
    if link is None:
        return None
    where = f"{path}: {group.name.strip('/')}/{name!s}"
    if isinstance(link, h5py.ExternalLink):
        raise _elsewhere(where)
    if isinstance(link, h5py.SoftLink):
        links.append(link.path)
        if len(links) > MAX_LINKS:
            raise CvlctlError(f"{where}: links lead round in a circle", "write the data themselves there")
        return member(path, group, link.path, links)
    return group[name]


def _elsewhere(where: str) -> CvlctlError:
    return CvlctlError(f"{where}: lies in another file", "write the data themselves into one file")


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


def datasets(path: Path, group: h5py.Group) -> dict[str, h5py.Dataset]:
    """The datasets anywhere below a group, by their names from there; soft links count as what they lead to.

    Raises:
        CvlctlError: there are more than `MAX_NAMES`, as where links lead to groups that hold links.
    """
    import h5py

    found: dict[str, h5py.Dataset] = {}
    visited = 0

    def visit(at: h5py.Group, prefix: str, above: tuple[int, ...]) -> None:
        nonlocal visited
        for key in at:
            visited += 1
            if visited > MAX_NAMES or len(above) > MAX_DEPTH:
                raise CvlctlError(f"{path}: more arrays and groups than can be listed", "write fewer into one file")
            item = None
            with contextlib.suppress(CvlctlError):  # what lies elsewhere is not listed
                item = _child(path, at, key, [])
            name = prefix + (key if isinstance(key, str) else key.decode(errors="replace"))  # bytes: it is no UTF-8
            if isinstance(item, h5py.Dataset):
                found[name] = item
            elif isinstance(item, h5py.Group) and (address := h5py.h5o.get_info(item.id).addr) not in above:
                visit(item, f"{name}/", (*above, address))

    visit(group, "", (h5py.h5o.get_info(group.id).addr,))
    return found
