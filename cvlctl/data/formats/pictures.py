"""Images of other projects' files as the frames of cameras: which ones, called what, in which size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvlctl.data.formats.cutting import with_final
from cvlctl.data.formats.hdf5 import dataset_column, dataset_in, datasets
from cvlctl.data.formats.sources import MAX_ROW_BYTES, Arrays, Column, Told
from cvlctl.errors import CvlctlError
from cvlctl.frames import decoded, fitted

if TYPE_CHECKING:
    import h5py

KEY = "images/"  # before a camera's name, among the columns of a file
BLOCK = 2**23  # bytes of frames that are fitted at a time


class Cameras:
    """Which images of a file are imported, settled by the first episode.

    Args:
        path: the file's, for messages.
        wanted: names of images as the file has them, whole or their last part, or OURS=THEIRS; "all": every one.
        size: height and width of the frames in the store; None: as they are.
    """

    def __init__(self, path: Path, wanted: Sequence[str], size: Sequence[int] | None, told: Told) -> None:
        self._path, self._wanted, self._told = path, list(wanted), told
        self.size = (int(size[0]), int(size[1])) if size else None
        self._theirs: dict[str, str] | None = None
        if self.size and not wanted:
            raise CvlctlError("--image-size is of images, and none is imported", "--camera NAME, or --camera all")
        if self.size and not all(0 < side <= 4096 for side in self.size):
            raise CvlctlError(f"--image-size {self.size[0]} {self.size[1]} is no size", "such as --image-size 64 64")

    def choose(self, there: Sequence[str]) -> dict[str, str]:
        """Name of each camera -> the file's, of the images that are there.

        Raises:
            CvlctlError: one that is wanted is not there, or none is.
        """
        if self._theirs is None:
            self._theirs = self._chosen(there)
        for name in self._theirs.values():
            if name not in there:
                raise CvlctlError(f"{self._path}: the images {name!r} are not in every episode", "leave them out")
        return self._theirs

    def left_out(self, there: Iterable[str]) -> list[str]:
        """The images that are not imported, by name; people are told of them."""
        rest = sorted(set(there) - set((self._theirs or {}).values()))
        if rest:
            self._told.remarks.append(f"images are not imported: {', '.join(rest)} (--camera NAME takes them)")
        return rest

    def fitted(self, where: str, frames: np.ndarray) -> np.ndarray:
        """(N, H, W, C) uint8, in the size that was asked for, of frames as a file has them.

        Raises:
            CvlctlError: they are no frames.
        """
        frames = _bytes(where, frames[..., None] if frames.ndim == 3 else frames)
        if frames.ndim != 4 or 0 in frames.shape[1:]:
            raise CvlctlError(f"{where}: has shape {frames.shape}; expected (N, height, width, channels)")
        if frames.shape[1] in (1, 3, 4) and frames.shape[3] not in (1, 3, 4):
            frames = frames.transpose(0, 2, 3, 1)  # as torch has them
        if self.size is None or frames.shape[1:3] == self.size:
            return frames
        if frames.shape[3] not in (1, 3, 4):
            what = f"{where}: frames of {frames.shape[3]} channels cannot be scaled"
            raise CvlctlError(what, "leave --image-size out, or give frames of 1, 3 or 4")
        from PIL import Image

        size = (*self.size, frames.shape[3])
        images = (Image.fromarray(frame[..., 0] if size[2] == 1 else np.ascontiguousarray(frame)) for frame in frames)
        return np.stack([fitted(image, size) for image in images]) if len(frames) else np.zeros((0, *size), np.uint8)

    def of_column(self, column: Column) -> np.ndarray:
        """All that is left of a column of frames, (N, H, W, C): block by block, so that the large ones come and go."""
        size, parts = max(1, BLOCK // column.row_bytes), []
        left = column.left
        while left:
            parts.append(self.fitted(column.where, column.take(min(size, left))))
            left -= len(parts[-1])
        return np.concatenate(parts) if parts else self.fitted(column.where, np.zeros((0, *column.shape[1:]), np.uint8))

    def of_files(self, where: str, pictures: Iterable[bytes], formats: Sequence[str] = ("PNG", "JPEG")) -> np.ndarray:
        """(N, H, W, C) uint8 of encoded pictures, all of one size."""
        found: list[np.ndarray] = []
        for i, picture in enumerate(pictures):
            frame = self.fitted(f"{where}[{i}]", decoded(picture, f"{where}[{i}]", formats)[None])[0]
            if found and frame.shape != found[0].shape:
                raise CvlctlError(f"{where}[{i}]: is {frame.shape}, the frames before it are {found[0].shape}",
                                  "--image-size H W brings all to one size")  # fmt: skip
            found.append(frame)
        return np.stack(found) if found else np.zeros((0, 1, 1, 1), np.uint8)

    def _chosen(self, there: Sequence[str]) -> dict[str, str]:
        short = {name: _last(name) for name in there}
        if self._wanted == ["all"]:
            alone = [name for name in there if list(short.values()).count(short[name]) == 1]
            found = {_plain(short[name] if name in alone else name): name for name in there}
        else:
            found = {}
            for one in self._wanted:
                ours, _, theirs = one.rpartition("=")
                alike = [name for name in there if theirs in (name, short[name])]
                if len(alike) != 1:
                    listed = ", ".join(list(there)[:20]) or "none"
                    what = "several images are called" if alike else "no images"
                    raise CvlctlError(f"{self._path}: {what} {theirs!r}", f"--camera NAME: there are {listed}")
                found[ours or _plain(short[alike[0]])] = alike[0]
        if self._wanted and not found:
            raise CvlctlError(f"{self._path}: there are no images in it", "leave --camera out")
        return found


def hdf5_images(path: Path, group: h5py.Group) -> list[str]:
    """The arrays of a group that are frames, a row a step: by their shape, or as JPEGs."""
    found = datasets(path, group)
    shapes = {name: tuple(dataset.shape or ()) for name, dataset in found.items()}
    names = image_names(shapes, {name: dataset.dtype for name, dataset in found.items()})
    return names + [name for name, dataset in found.items() if name not in names and coded(dataset)]


def hdf5_frames(
    path: Path, group: h5py.Group, chosen: Mapping[str, str], cameras: Cameras, last: bool = False
) -> dict[str, np.ndarray]:
    """(N, H, W, C) uint8 of each camera that is chosen; `last`: (1, H, W, C), of the last row alone."""
    found = {}
    for camera, name in chosen.items():
        dataset, where = dataset_in(path, group, name), f"{path}: {group.name.strip('/')}/{name}"
        if coded(dataset):
            rows = dataset[-1:] if last else dataset
            found[camera] = cameras.of_files(where, (bytes(bytearray(row)) for row in rows), ["JPEG"])
        elif last:
            found[camera] = cameras.fitted(where, np.asarray(dataset[-1:]))
        else:
            found[camera] = cameras.of_column(dataset_column(path, group, name))
    return found


def coded(dataset: h5py.Dataset) -> bool:
    """Whether each row is the bytes of a JPEG."""
    import h5py

    inner = h5py.check_vlen_dtype(dataset.dtype)
    if not ((dataset.ndim == 2 and dataset.dtype == np.uint8) or (dataset.ndim == 1 and inner == np.uint8)):
        return False
    return len(dataset) > 0 and bytes(bytearray(dataset[0][:3])) == b"\xff\xd8\xff"


def framed(
    rows: dict[str, np.ndarray], names: Sequence[str], terminated: bool, steps: int
) -> tuple[dict[str, np.ndarray], int]:
    """Frames by camera, of the columns `names` taken out of an episode's rows, as `cutting.with_final` has them; and
    the number of transitions that this leaves."""
    found, left = {}, steps
    for name in names:
        found[name.removeprefix(KEY)], left = with_final(rows.pop(name), None, terminated, steps)
    return found, left


def image_names(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, np.dtype]) -> list[str]:
    """The arrays, one row a step, that are frames by their shape: bytes of two dimensions, any numbers of three."""
    return [name for name, shape in shapes.items()
            if len(shape) == 4 or (len(shape) == 3 and types[name] == np.uint8)]  # fmt: skip


def fitted_column(column: Column, cameras: Cameras) -> Column:
    """A column of frames as the store has them, read and fitted as they are taken."""
    sample = cameras.fitted(column.where, np.zeros((1, *column.shape[1:]), column.dtype))

    def fetch(_: int, count: int) -> np.ndarray:
        return cameras.fitted(column.where, column.take(count))

    return Column(column.where, (len(column), *sample.shape[1:]), np.dtype(np.uint8), fetch)


def images_of(arrays: Arrays, keys: Mapping[str, str]) -> list[str]:
    """Our names of a file's frames, images/CAMERA: those that `keys` name, and those that are called so."""
    return sorted({name for name in (*keys, *arrays.names) if name.startswith(KEY)})


def fitted_columns(path: Path, columns: Mapping[str, Column], size: Sequence[int] | None) -> dict[str, Column]:
    """Columns of frames as the store has them."""
    cameras = Cameras(path, ["all"] if columns else [], size, Told())
    return {name: fitted_column(column, cameras) for name, column in columns.items()}


def frames_column(
    where: str, length: int, size: tuple[int, int, int], cameras: Cameras, fetch: Callable[[int, int], np.ndarray]
) -> Column:
    """A column of frames that `fetch` reads, fitted; `size` is what the file declares."""
    if min(size) < 1 or int(np.prod([int(n) for n in size], dtype=object)) > MAX_ROW_BYTES:
        raise CvlctlError(f"{where}: frames of {size} are too large to be true, or none")
    return fitted_column(Column(where, (length, *size), np.dtype(np.uint8), fetch), cameras)


def _bytes(where: str, frames: np.ndarray) -> np.ndarray:
    """uint8 of what is such in other types: whole numbers from 0 to 255."""
    if frames.dtype == np.uint8:
        return frames
    if frames.size and not (frames.min() >= 0 and frames.max() <= 255 and (frames == np.floor(frames)).all()):
        what = f"{where}: holds {frames.dtype} that are not whole numbers from 0 to 255"
        raise CvlctlError(what, "save frames as uint8")
    return frames.astype(np.uint8)


def _last(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".") or "camera"
