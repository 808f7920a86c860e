"""What a file or folder is by its look, and which formats read that: so that the wrong one of them can say it."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path
from typing import NamedTuple

from cvlctl.errors import CvlctlError

PICKLES = (
    "no pickle is ever loaded, for it can hide any code: where you trust it, the lines under Pickles in docs/formats.md"
    " make an npz of it: np.savez_compressed('out.npz', **arrays), and cvlctl data import npz or arrays reads that"
)


class Kind(NamedTuple):
    """What something is, in words, the formats that read it, and what to do where none does."""

    words: str
    formats: tuple[str, ...] = ()
    hint: str = ""


KINDS = {
    "npz": Kind("an npz, arrays of numpy", ("npz", "arrays", "ogbench", "sb3", "imitation")),
    "hdf5": Kind("an HDF5 file", ("hdf5", "d4rl", "robomimic", "arrays", "minari")),
    "parquet": Kind("a parquet table", ("table",)),
    "csv": Kind("a CSV table", ("table",)),
    "tfrecord": Kind("a TFRecord file", ("rlds",)),
    "zarr": Kind("a Zarr folder", ("zarr",)),
    "zarr zip": Kind("a Zarr folder as a zip", ("zarr",)),
    "lerobot": Kind("a LeRobot dataset", ("lerobot",)),
    "rlds": Kind("an RLDS dataset", ("rlds",)),
    "minari": Kind("a Minari dataset", ("minari",)),
    "store": Kind("a store of cvlctl already", hint="use it as it is: cvlctl data info shows it"),
    "pickle": Kind("a pickle", hint=PICKLES),
    "torch": Kind("a file of torch.save, which is a pickle", hint=PICKLES),
    "zip": Kind("a zip of other files", hint="unpack it, and import what is in it"),
    "gzip": Kind("packed by gzip", hint="unpack it first: gunzip, or tar xzf"),
    "npy": Kind("a single array of numpy", hint="save all as one file: np.savez('out.npz', observations=..., "
                "actions=..., episode_ends=...), which npz and arrays read"),
    "arrow": Kind("a folder of Hugging Face's datasets", hint="load_from_disk(...).to_parquet('rows.parquet'), "
                  "which the format table reads where each row is a step"),
    "mcap": Kind("a recording of MCAP", hint="save a row a step as CSV or parquet, which the format table reads"),
    "rosbag": Kind("a recording of ROS", hint="save a row a step as CSV or parquet, which the format table reads"),
    "matlab": Kind("a file of MATLAB", hint="scipy.io.loadmat reads it; save its arrays with np.savez, for the format "
                   "arrays"),
}  # fmt: skip
MAGIC = {b"\x89HDF": "hdf5", b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"\x93NUM": "npy", b"\x89MCA": "mcap",
         b"#ROS": "rosbag", b"MATL": "matlab"}  # fmt: skip
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".parquet": "parquet",
    ".db3": "rosbag",
}
INSIDE = {"meta/info.json": "lerobot", "features.json": "rlds", "data/metadata.json": "minari", ".zgroup": "zarr",
          ".zattrs": "zarr", "state.json": "arrow", "dataset_dict.json": "arrow"}  # fmt: skip


def kind_of(path: Path) -> str:
    """A key of `KINDS`, or "" where the look of it tells nothing. A pipe or a device is never opened."""
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        if path.is_dir():
            if (path / "zarr.json").is_file():
                return "store" if (path / "data" / "observation").is_dir() else "zarr"
            return next((kind for name, kind in INSIDE.items() if (path / name).is_file()), "")
        if not path.is_file():
            return ""
        with open(path, "rb") as file:
            head = file.read(8)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                return _zipped(archive.namelist())
        found = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "")
        if not found and head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return "pickle"
        if not found and ".tfrecord" in path.name:
            return "tfrecord"
        return found or SUFFIXES.get(path.suffix.lower(), "")
    return ""


def _zipped(names: list[str]) -> str:
    last = {name.rpartition("/")[2] for name in names}
    if {".zgroup", ".zarray", "zarr.json"} & last:
        return "zarr zip"
    if "data.pkl" in last:
        return "torch"
    return "npz" if any(name.endswith(".npy") for name in names) else "zip"


def refuse_another(format: str, path: Path) -> None:
    """Raise a CvlctlError that says what `path` is, and what reads it, where that is not this format."""
    if not (found := kind_of(path)) or format in KINDS[found].formats:
        return
    kind = KINDS[found]
    readers = ", ".join(kind.formats)
    hint = kind.hint or f"cvlctl data import {kind.formats[0]} reads it" + (
        f" (or, by what is in it, {readers.partition(', ')[2]}; cvlctl data formats tells)"
        if len(kind.formats) > 1
        else ""
    )
    raise CvlctlError(f"{path} is {kind.words}, which the format {format} does not read", hint)
