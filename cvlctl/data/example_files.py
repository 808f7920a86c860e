"""Success examples from files: arrays (.npy, .npz), or a folder of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.frames import fitted, opened_image
from cvlctl.types import Spec

PHOTOGRAPHS = (".png", ".jpg", ".jpeg")
IMAGES = "images/"  # in a .npz, before a camera's name


def of_file(path: Path, spec: Spec, fit: str, key: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Examples as vector (X, O) float32 and frames {camera: (X, H, W, C) uint8}, all that the file has of `spec`.

    Args:
        fit: how a photograph comes to a camera's size, as `frames.fitted` has it.
        key: what the recipe calls the file, for messages.

    Raises:
        CvlctlError: nothing there, it cannot be read, or it holds none of what is asked for.
    """
    if path.is_dir():
        return _of_folder(path, spec, fit, key)
    if not path.is_file():
        raise CvlctlError(f"{key}: no file at {path}", "check the path")
    if not spec.cameras:
        found = _vectors(path, _loaded(path, ["observations"], key)["observations"], key)
        return found, {}
    if path.suffix == ".npy":
        what = f"{key}: {path} holds one array, and here cameras are seen ({', '.join(spec.cameras)})"
        raise CvlctlError(what, "give a .npz with `images/CAMERA`, as cvlctl data examples makes it")
    names = [f"{IMAGES}{camera}" for camera in spec.cameras] + ["observations"] * (spec.observation_shape != (0,))
    arrays = _loaded(path, names, key)
    frames = {camera: arrays[f"{IMAGES}{camera}"] for camera in spec.cameras}
    for camera, size in spec.cameras.items():
        got = frames[camera]
        if got.dtype != np.uint8 or got.shape[1:] != size or len(got) == 0:
            what = f"{key}: {path}: {IMAGES}{camera} is {got.dtype} {got.shape}; expected uint8 (X, {_numbers(size)})"
            raise CvlctlError(what, "frames of the camera that the stores have")
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise CvlctlError(f"{key}: {path}: its arrays have different lengths: {counts}", "one row an example in each")
    if "observations" in arrays:
        return _vectors(path, arrays["observations"], key), frames
    return np.zeros((next(iter(counts.values())), 0), np.float32), frames


def _of_folder(path: Path, spec: Spec, fit: str, key: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Photographs in order of their names; of several cameras each in a folder of its own."""
    where = f"{key}: {path}"
    if not spec.cameras:
        what = f"{where} is a folder, of photographs it may be, and here no camera is seen"
        raise CvlctlError(what, "give a .npy of shape (X, O), or train on stores with images")
    if spec.observation_shape != (0,):
        what = f"{where}: photographs have no vector of {spec.observation_shape[0]} columns beside them"
        raise CvlctlError(what, "learn from images alone: observe: {vector: false}")
    folders = {camera: path / camera if len(spec.cameras) > 1 else path for camera in spec.cameras}
    frames = {camera: _photographs(folders[camera], spec.cameras[camera], fit, key) for camera in spec.cameras}
    counts = {camera: len(found) for camera, found in frames.items()}
    if len(set(counts.values())) > 1:
        raise CvlctlError(f"{where}: photographs by camera: {counts}", "as many in each folder, in the same order")
    return np.zeros((next(iter(counts.values())), 0), np.float32), frames


def _photographs(folder: Path, size: tuple[int, int, int], fit: str, key: str) -> np.ndarray:
    if not folder.is_dir():
        raise CvlctlError(f"{key}: no folder {folder}", "photographs of several cameras lie in a folder of each")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PHOTOGRAPHS and file.is_file())
    if not files:
        raise CvlctlError(f"{key}: no photograph in {folder}", f"files that end in {', '.join(PHOTOGRAPHS)} are read")
    found = []
    for file in files:
        with opened_image(file, str(file)) as image:
            found.append(fitted(image, size, fit))
    return np.stack(found)


def _loaded(path: Path, names: Sequence[str], key: str) -> dict[str, np.ndarray]:
    where = f"{key}: {path}"
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {names[0]: loaded}
        return {name: np.asarray(loaded[name]) for name in names}
    except Exception as error:  # zip, zlib and numpy each have their own
        held = f", or a .npz with {', '.join(names)}" if IMAGES in names[0] else ", or a .npz with `observations`"
        raise CvlctlError(f"{where}: cannot be read: {error}", f"give a .npy of shape (X, O){held}") from error


def _vectors(path: Path, found: np.ndarray, key: str) -> np.ndarray:
    where, hint = f"{key}: {path}", "give a .npy of shape (X, O), or a .npz with `observations`"
    if found.dtype.kind not in "fiub":
        raise CvlctlError(f"{where}: holds {found.dtype}, not real numbers", hint)
    if found.ndim != 2 or len(found) == 0:
        raise CvlctlError(f"{where}: has shape {found.shape}; expected (X, O) with X >= 1", hint)
    with np.errstate(over="ignore"):  # what does not fit is infinite, and said below
        array = found.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise CvlctlError(f"{where}: NaN or infinity in {len(bad)} of {len(array)} examples, first in {bad[0]}")
    return array


def _numbers(size: tuple[int, int, int]) -> str:
    return ", ".join(map(str, size))
