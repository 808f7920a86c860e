"""What a file is by its look, said where another format was asked for; options in the words of the command line."""

from __future__ import annotations

import gzip
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_files import episodes, hdf5, minari_episode, minari_folder, npz, rows

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data.formats import kinds
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


def text(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return write


def inside(*names: str) -> Callable[[Path], Path]:
    return lambda folder: [text(f"set/{name}", "{}")(folder) for name in names] and folder / "set"


def zipped(name: str, *members: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member in members:
                archive.writestr(member, "{}")
        return folder / name

    return write


LOOKS: dict[str, tuple[Callable[[Path], Any], str, str]] = {  # written, what it is, what reads it or what to do
    "npz": (lambda p: npz(p / "a.npz", rows()), "an npz", "import npz reads it"),
    "hdf5": (lambda p: hdf5(p / "a.npz", rows()), "an HDF5 file", "import hdf5 reads it (or"),
    "csv": (text("a.csv", "x,y\n1,2\n"), "a CSV table", "import table reads it"),
    "parquet": (text("a.bin", b"PAR1...."), "a parquet table", "import table reads it"),
    "tfrecord": (text("x-train.tfrecord-00000-of-00001", b"...."), "a TFRecord file", "import rlds reads it"),
    "zarr zip": (zipped("a.zip", ".zgroup", "data/action/.zarray"), "a Zarr folder as a zip", "import zarr reads it"),
    "zarr": (inside(".zgroup"), "a Zarr folder", "import zarr reads it"),
    "lerobot": (inside("meta/info.json"), "a LeRobot dataset", "import lerobot reads it"),
    "rlds": (inside("features.json"), "an RLDS dataset", "import rlds reads it"),
    "minari": (lambda p: minari_folder(p / "m", [minari_episode()]), "a Minari dataset", "import minari reads it"),
    "store": (lambda p: write_store(p / "s.zarr", episodes(), task="t").path, "a store of cvlctl", "use it as it is"),
    "pickle": (text("a.dat", pickle.dumps([1])), "a pickle", "no pickle is ever loaded"),
    "old pickle": (text("a.pkl", pickle.dumps([1], protocol=0)), "a pickle", "np.savez_compressed"),
    "torch": (zipped("a.pt", "archive/data.pkl"), "torch.save", "no pickle is ever loaded"),
    "zip": (zipped("a.zip", "a.csv"), "a zip of other files", "unpack it"),
    "gzip": (text("a.gz", gzip.compress(b"x")), "packed by gzip", "unpack it"),
    "npy": (lambda p: np.save(p / "a.npy", np.zeros(3)) or p / "a.npy", "a single array", "np.savez"),
    "arrow": (inside("state.json"), "Hugging Face", "to_parquet"),
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_what_something_is_and_what_reads_it(tmp_path: Path, look: str) -> None:
    write, words, told = LOOKS[look]
    path = write(tmp_path)
    for format in set(formats.FORMATS) - set(kinds.KINDS[kinds.kind_of(path)].formats):
        with pytest.raises(CvlctlError, match=f"is .*{words}.*, which the format {format} does not read") as caught:
            formats.import_store(format, path, tmp_path / "out.zarr", task="toy")
        assert told in caught.value.hint and str(path) in caught.value.what
    assert not (tmp_path / "out.zarr").exists()


def test_every_format_reads_a_kind_and_every_kind_tells_what_to_do() -> None:
    read = {format for kind in kinds.KINDS.values() for format in kind.formats}
    assert read == set(formats.FORMATS)
    assert all(kind.formats or kind.hint for kind in kinds.KINDS.values())


def test_what_tells_nothing_is_left_to_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert kinds.kind_of(tmp_path / "pipe") == kinds.kind_of(tmp_path) == kinds.kind_of(tmp_path / "none") == ""
    assert kinds.kind_of(text("a", b"")(tmp_path)) == kinds.kind_of(text("b", b"PK\x03\x04")(tmp_path)) == ""


def test_options_in_the_users_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hdf5(tmp_path / "a.h5", {"obs": np.zeros((4, 1)), "actions": np.zeros((4, 1)), "cmd": np.zeros((4, 1))})
    command = ["data", "import", "arrays", str(path), "--out", str(tmp_path / "a.zarr")]
    for words, told in (
        ([], "--task NAME"),
        (["--task", "a"], "--key observations=NAME says which array it is: the file has actions, cmd, obs"),
        (["--task", "a", "--key", "observations=ob"], "did you mean obs? --key observations=NAME"),
        (["--task", "a", "--key", "observations=obs"], "--horizon: the number of steps"),
        (["--task", "a", "--observation-key", "obs"], "the format arrays has no --observation-key (observation_keys)"),
        (["--task", "a", "--split", "val"], "it takes: --key (keys), --horizon (horizon)"),
    ):
        assert execute(app.app, [*command, *words]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
