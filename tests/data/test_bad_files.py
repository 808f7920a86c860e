"""Bad files of every format: one error that names file and array, and nothing is left behind."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from toy_files import WRITTEN, Arrays, changed, episodes, hdf5, npz, plain, read, robomimic_file, rows, sb3_arrays

from cvlctl.data import formats
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


class Bomb:
    """What a pickle would do on loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def nan_at(values: np.ndarray, row: int) -> np.ndarray:
    values = values.astype(float)
    values[row] = np.nan
    return values


OBJECTS = np.array([Bomb()] * 33, dtype=object)


WORDS = np.array([b"x"] * 33)


BAD: dict[str, tuple[str, Callable[[], Arrays], str]] = {
    "d4rl: no rewards": ("d4rl", lambda: changed(rows(), rewards=None), "no array 'rewards'"),
    "d4rl: lengths": ("d4rl", lambda: changed(rows(), rewards=np.zeros(7)), "rewards 7"),
    "d4rl: NaN": ("d4rl", lambda: changed(rows(), rewards=nan_at(rows()["rewards"], 4)), "rows 1-6.*rewards hold NaN"),
    "d4rl: NaN terminal": ("d4rl", lambda: changed(rows(), terminals=nan_at(rows()["terminals"], 4)), "terminals.*NaN"),
    "d4rl: words": ("d4rl", lambda: changed(rows(), actions=WORDS), "actions: holds text"),
    "d4rl: complex": ("d4rl", lambda: changed(rows(), actions=np.zeros((33, 2), complex)), "actions: holds complex"),
    "d4rl: nothing": ("d4rl", lambda: {k: v[:0] for k, v in rows().items()}, "no episodes"),
    "d4rl: empty rows": ("d4rl", lambda: changed(rows(), actions=np.zeros((33, 0))), "actions: rows of shape"),
    "d4rl: wide rewards": ("d4rl", lambda: changed(rows(), rewards=np.zeros((33, 2))), r"rewards: has shape \(N, 2\)"),
    "d4rl: next (N, 4)": ("d4rl", lambda: changed(rows(), next_observations=np.zeros((33, 4))), "next_observations"),
    "d4rl: scalar": ("d4rl", lambda: changed(rows(), rewards=1.0), "rewards: is a single value"),
    "d4rl: too large for float32": (
        "d4rl", lambda: changed(rows(), rewards=np.full(33, 1e300)), "episode 0.*rewards hold NaN or infinity"
    ),
    "d4rl: discrete actions": ("d4rl", lambda: changed(rows(), actions=np.ones(33, int)), "actions have shape"),
    "npz: pickle": ("npz", lambda: changed(plain(), actions=OBJECTS), "actions: holds pickled Python objects"),
    "npz: pickled task": ("npz", lambda: changed(plain(), task=OBJECTS), "task: holds pickled"),
    "npz: no ends": ("npz", lambda: changed(plain(), episode_ends=None), "no array 'episode_ends'"),
    "npz: ends too far": ("npz", lambda: changed(plain(), episode_ends=[1, 99]), "episode_ends"),
    "npz: ends backwards": ("npz", lambda: changed(plain(), episode_ends=[1, 7, 5, 23, 33]), "episode 2 has -2"),
    "npz: an empty episode": (
        "npz",
        lambda: changed(plain(4), episode_ends=[1, 7, 7, 18, 23], observations=np.zeros((28, 3))),
        "episode 2 has 0",
    ),
    "npz: ends as floats": ("npz", lambda: changed(plain(), episode_ends=[1.0, 33.0]), "episode_ends: holds float64"),
    "npz: none": ("npz", lambda: {k: v[:0] for k, v in plain().items()}, "0 episodes"),
    "npz: table too short": ("npz", lambda: changed(plain(), terminated=[True]), "terminated: has 1 values"),
    "npz: task is a number": ("npz", lambda: changed(plain(), task=3), "task: holds values of type int64"),
    "npz: NaN": ("npz", lambda: changed(plain(), observations=nan_at(plain()["observations"], 3)), "episode 1: .*NaN"),
    "npz: huge action": ("npz", lambda: changed(plain(), actions=plain()["actions"] * 9), "episode 0: actions lie in"),
    "ogbench: empty episode": (
        "ogbench",
        lambda: {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "terminals": [0, 1, 1, 0]},
        r"episode 1 \(rows 2-2\) has no transition",
    ),
    "ogbench: table of others": (
        "ogbench",
        lambda: {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "terminals": [0, 1, 0, 1],
                 "seeds": [1, 2, 3]},
        "seeds: has 3 values for 2 episodes",
    ),
    "sb3: no environments": ("sb3", lambda: {k: v[:, 0] for k, v in sb3_arrays().items()}, "expected .N, environments"),
    "sb3: no timeouts": ("sb3", lambda: changed(sb3_arrays(), timeouts=None), "no array 'timeouts'"),
    "arrays: lengths": ("arrays", lambda: changed(rows(), actions=np.zeros((3, 2))), "actions 3"),
    "arrays: nothing that ends": (
        "arrays", lambda: changed(rows(), timeouts=None, next_observations=None), "neither timeouts"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_error_that_names_file_and_array_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    format, make, message = BAD[case]
    made = make()
    if format in ("d4rl", "arrays"):
        path = hdf5(tmp_path / "bäd $(x).hdf5", made)
    else:
        path = npz(tmp_path / "bäd $(x).npz", {name: np.asarray(values) for name, values in made.items()})
    with pytest.raises(CvlctlError, match=rf"bäd \$\(x\).*{message}"):
        formats.import_store(format, path, tmp_path / "out.zarr", task="toy")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", [*WRITTEN, "robomimic", "sb3", "arrays"])
def test_cut_short_or_of_another_kind(tmp_path: Path, format: str) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy")
    if format in WRITTEN:
        path = formats.export_store(format, store, tmp_path / WRITTEN[format])
        path = path / "data" / "main_data.hdf5" if path.is_dir() else path
    else:
        path = robomimic_file(tmp_path / "r.hdf5") if format == "robomimic" else npz(tmp_path / "r.npz", sb3_arrays())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30], b"", b"PK\x03\x04", b"not a file of arrays" * 50):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(CvlctlError, match=re.escape(str(path))):
            formats.import_store(format, path, tmp_path / "b.zarr", task="toy")
    assert not list(tmp_path.glob("b.zarr*"))


def test_shapes_that_a_file_cannot_hold_are_not_believed(tmp_path: Path) -> None:
    huge = (10**12, 3)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name in ("observations", "actions", "next_observations"):
            file.create_dataset(name, huge, np.float32, chunks=(1000, 3), compression="gzip")
        for name in ("rewards", "terminals", "timeouts"):
            file.create_dataset(name, huge[:1], np.float32, chunks=(1000,), compression="gzip")
    with pytest.raises(CvlctlError, match="observations: holds less than its shape"):
        read("d4rl", tmp_path / "a.hdf5")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": huge})
    npz(tmp_path / "a.npz", plain())
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as out, zipfile.ZipFile(tmp_path / "a.npz") as source:
        for name in source.namelist():
            out.writestr(name, buffer.getvalue() if name == "actions.npy" else source.read(name))
    with pytest.raises(CvlctlError, match="actions: holds less than its shape"):
        read("npz", tmp_path / "b.npz")


def test_data_in_other_files_are_not_followed(tmp_path: Path) -> None:
    secret = hdf5(tmp_path / "secret.hdf5", rows())
    arrays = rows()
    actions = arrays.pop("actions")
    for name in ("link", "external", "virtual"):
        path = hdf5(tmp_path / f"{name}.hdf5", arrays)
        with h5py.File(path, "a") as file:
            if name == "link":
                file["actions"] = h5py.ExternalLink(str(secret), "/actions")
            elif name == "external":
                file.create_dataset("actions", actions.shape, actions.dtype, external=[(str(secret), 0, 10**6)])
            else:
                layout = h5py.VirtualLayout(actions.shape, actions.dtype)
                layout[:] = h5py.VirtualSource(str(secret), "actions", actions.shape)
                file.create_virtual_dataset("actions", layout)
        with pytest.raises(CvlctlError, match=r"no array 'actions'|actions: lies in another file"):
            read("d4rl", path)


def test_names_that_would_climb_out_are_only_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(npz(tmp_path / "a.npz", plain()), "a") as file:
        file.writestr("../../climbed.npy", b"x")
    inside = {p.name for p in tmp_path.parent.iterdir()}
    store = formats.import_store("npz", tmp_path / "a.npz", tmp_path / "a.zarr", task="../../etc/ö")
    assert store.task == "../../etc/ö"
    assert {p.name for p in tmp_path.parent.iterdir()} == inside
    assert verify_store(store.path) == []
