"""Files that mean no good, and disks that are full: one error that names the place, nothing run, nothing left."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cvlctl.data import formats
from cvlctl.data.formats import hdf5, minari
from cvlctl.data.store import Store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

WRITTEN = {"d4rl": "out.hdf5", "minari": "out-v0", "ogbench": "out.npz", "npz": "out.npz"}


pytestmark = pytest.mark.usefixtures("no_fsync")


def store_at(path: Path, count: int = 2, length: int = 4) -> Store:
    rng = np.random.default_rng(0)
    made = [
        Episode(rng.normal(size=(length + 1, 3)), rng.uniform(-1, 1, (length, 2)), rng.normal(size=length))
        for _ in range(count)
    ]
    return write_store(path, made, task="toy")


def minari_folder(folder: Path, observations: np.ndarray, **metadata: Any) -> Path:
    (folder / "data").mkdir(parents=True)
    steps = len(observations) - 1
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for name, values in {"observations": observations, "actions": np.zeros((steps, 1)), "rewards": np.zeros(steps),
                             "terminations": np.zeros(steps, bool)}.items():  # fmt: skip
            file[f"episode_0/{name}"] = values
    about = {"total_episodes": 1, "total_steps": steps, "dataset_id": "some/set-v0"}
    (folder / "data" / "metadata.json").write_text(json.dumps(about | metadata))
    return folder


def import_into(tmp_path: Path, format: str, path: Path, **options: Any) -> Store:
    return formats.import_store(format, path, tmp_path / "imported.zarr", task="toy", **options)


# ------------------------------------------------------------------------------------------------------------- decoders


def test_a_frame_that_is_no_jpeg_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS is a program: Pillow would run it by gs."""
    from PIL import Image

    marker = tmp_path / "ran"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    space = json.dumps({"type": "Box", "dtype": "uint8", "shape": [8, 8, 3]})
    for kind in ("EPS", "PNG", "BMP", "TIFF"):
        coded = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(coded, format=kind)
        frames = np.stack([np.frombuffer(coded.getvalue(), np.uint8)] * 2)
        folder = minari_folder(tmp_path / kind, frames, observation_space=space)
        with pytest.raises(CvlctlError, match=r"episode_0/observations\[0\]: is no JPEG"):
            import_into(tmp_path, "minari", folder)
    assert not marker.exists()


def plain_arrays(count: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"observations": rng.normal(size=(count + 1, 3)), "actions": np.zeros((count, 1)),
            "episode_ends": np.array([count])}  # fmt: skip


def test_an_archive_that_numpy_did_not_pack_is_not_unpacked(tmp_path: Path) -> None:
    """LZMA's header asks for as much memory as it likes."""
    np.savez(tmp_path / "a.npz", **plain_arrays())
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "a.npz") as source, zipfile.ZipFile(tmp_path / "b.npz", "w", method) as packed:
            for name in source.namelist():
                packed.writestr(name, source.read(name))
        with pytest.raises(CvlctlError, match=r"b\.npz: .*: is packed in another way than numpy packs"):
            import_into(tmp_path, "npz", tmp_path / "b.npz")


def test_an_array_in_columns_that_is_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    arrays = plain_arrays()
    arrays["observations"] = np.asfortranarray(arrays["observations"])
    np.savez(tmp_path / "a.npz", **arrays)
    store = import_into(tmp_path, "npz", tmp_path / "a.npz")
    np.testing.assert_array_equal(store.observations(), arrays["observations"].astype(np.float32))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(arrays["observations"].tobytes(order="F")[:64]) + 5] ^= 255
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(CvlctlError, match=r"b\.npz: observations.*: cannot be read"):
        import_into(tmp_path, "npz", tmp_path / "b.npz", force=True)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_pipe_or_a_device_is_no_file(tmp_path: Path, format: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever, and /dev/zero has no end
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CvlctlError, match=r"is a device or a pipe; expected|is not a Minari dataset"):
            import_into(tmp_path, format, path)


# --------------------------------------------------------------------------------------------------- numbers and texts


def test_a_task_that_is_no_text(tmp_path: Path) -> None:
    out = formats.export_store("minari", store_at(tmp_path / "a.zarr"), tmp_path / "a-v0")
    for value in (5, 0, np.nan, True):
        with h5py.File(out / "data" / "main_data.hdf5", "a") as file:
            file["episode_1"].attrs["task"] = value
        with pytest.raises(CvlctlError, match=r"main_data\.hdf5: episode_1: an episode's task is .*, not text"):
            import_into(tmp_path, "minari", out)
    with pytest.raises(CvlctlError, match=r"an episode's task is .*, not text"):
        Episode(np.zeros((2, 1)), np.zeros((1, 1)), task="\udcff")  # would be found when somebody prints it


@pytest.mark.parametrize("value", ["1e999", "-3", "0", "2.5", "NaN", '"long"', "[]", "1" + "0" * 400])
def test_a_horizon_that_is_no_number_of_steps(tmp_path: Path, value: str) -> None:
    store = store_at(tmp_path / "a.zarr")
    d4rl = formats.export_store("d4rl", store, tmp_path / "a.hdf5")
    with h5py.File(d4rl, "a") as file:
        file.attrs["cvlctl"] = np.bytes_(f'{{"task": "toy", "tasks": ["toy"], "rewards": true, "horizon": {value}}}')
    with pytest.raises(CvlctlError, match=r"a\.hdf5.*horizon.* is no number of steps"):
        import_into(tmp_path, "d4rl", d4rl)
    exported = formats.export_store("minari", store, tmp_path / "a-v0") / "data" / "metadata.json"
    ours = exported.read_text().replace('"horizon": 4', f'"horizon": {value}')
    theirs = json.dumps({"total_episodes": 2, "total_steps": 8, "dataset_id": "x-v0",
                         "env_spec": f'{{"id": "Toy-v0", "max_episode_steps": {value}}}'})  # fmt: skip
    for text in (ours, theirs):
        if text is theirs and value in ("0", "[]"):
            continue  # no limit
        exported.write_text(text)
        with pytest.raises(CvlctlError, match=r"metadata\.json.*horizon.* is no number of steps"):
            import_into(tmp_path, "minari", exported.parents[1])
    assert not list(tmp_path.glob("imported*"))


def test_what_is_remembered_of_a_download_may_be_damaged(tmp_path: Path) -> None:
    name = "hopper_medium-v2.hdf5"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        mirror = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for value in ("abc", [], {}, -1, float("inf"), float("nan"), True, 1.5, 10**400):
            (tmp_path / f"{name}.part").write_bytes(b"x")
            (tmp_path / f"{name}.part.json").write_text(json.dumps({"bytes": value, "version": value}))
            with pytest.raises(CvlctlError, match="cannot be fetched: Connection refused"):
                formats.fetch("d4rl/relocate-human-v1", tmp_path / name, mirror=mirror)
            with pytest.raises(CvlctlError, match="cannot be fetched: Connection refused"):
                formats.fetch("d4rl/hopper-medium-v2", tmp_path / name, mirror=mirror)
            assert (tmp_path / f"{name}.part").read_bytes() == b"x"


# ----------------------------------------------------------------------------------------------------------- HDF5 links


def linked(path: Path, links: dict[str, Any], **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name.replace("__", "/")] = values
        for name, link in links.items():
            file[name] = link
    return path


def flat_rows() -> dict[str, np.ndarray]:
    return {"actions": np.linspace(-1, 1, 6)[:, None], "rewards": np.arange(6.0), "terminals": np.arange(6) % 3 == 2}


def test_soft_links_inside_a_file_are_followed(tmp_path: Path) -> None:
    states = np.arange(12.0).reshape(6, 2)
    way = {"observations": h5py.SoftLink("/second"), "second": h5py.SoftLink("log/state"), "all": h5py.SoftLink("/log")}
    path = linked(tmp_path / "a.h5", way, log__state=states, **flat_rows())
    store = import_into(tmp_path, "d4rl", path, horizon=9)
    assert store.observations()[:3].tolist() == states[:3].tolist()
    keys = {"observations": "all/state"}  # through a group that is a link
    found = list(formats.FORMATS["arrays"].read(path, keys=keys, horizon=9))
    assert [len(episode) for episode in found] == [3, 3]
    demo = linked(
        tmp_path / "r.h5", {"data/demo_0/obs": h5py.SoftLink("/log"), "data/demo_0/actions": h5py.SoftLink("/actions")},
        log__state=states, actions=flat_rows()["actions"], data__demo_0__rewards=np.zeros(6),
        data__demo_0__dones=np.arange(6) == 5,
    )  # fmt: skip
    (episode,) = formats.FORMATS["robomimic"].read(demo)
    assert episode.observations[:6].tolist() == states.tolist()


def test_links_that_lead_nowhere_round_in_a_circle_or_out(tmp_path: Path) -> None:
    secret = linked(tmp_path / "secret.h5", {}, data__observations=np.zeros((6, 2)))
    outside = h5py.ExternalLink(str(secret), "/data")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    cases: dict[str, dict[str, Any]] = {
        "nowhere": {"observations": h5py.SoftLink("/none")},
        "circle": {"observations": h5py.SoftLink("/other"), "other": h5py.SoftLink("/observations")},
        "deep circle": {"observations": h5py.SoftLink("/self/self/observations"), "self": h5py.SoftLink("/")},
        "out": {"out": outside, "observations": h5py.SoftLink("/out/observations")},
        "pipe": {"observations": h5py.ExternalLink(str(tmp_path / "pipe"), "/x")},
        "root": {"again": h5py.SoftLink("/"), "self": h5py.SoftLink(".")},
    }
    for case, links in cases.items():
        path = linked(tmp_path / f"{case}.h5", links, **flat_rows())
        for format, options in (("d4rl", {"horizon": 9}), ("arrays", {"horizon": 9})):
            with pytest.raises(CvlctlError, match=r"\.h5: (no array 'observations'|.*lies in another file)"):
                list(formats.FORMATS[format].read(path, **options))
    for link in (outside, h5py.ExternalLink(str(tmp_path / "pipe"), "/x")):
        path = linked(tmp_path / "robomimic.h5", {"data": link})
        with pytest.raises(CvlctlError, match="data: lies in another file"):
            list(formats.FORMATS["robomimic"].read(path))
        folder = minari_folder(tmp_path / f"m-{link.path.strip('/')}", np.zeros((3, 1)))
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            del file["episode_0"]
            file["episode_0"] = link
        with pytest.raises(CvlctlError, match="episode_0: lies in another file"):
            list(formats.FORMATS["minari"].read(folder))


def test_groups_that_link_to_groups_are_not_listed_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5, "MAX_NAMES", 500)
    links = {f"g{i}/{side}": h5py.SoftLink(f"/g{i + 1}") for i in range(60) for side in "ab"}
    path = linked(tmp_path / "a.h5", links, **flat_rows())
    with h5py.File(path, "a") as file:
        file.create_group("g60")
    with pytest.raises(CvlctlError, match="more arrays and groups than can be listed"):
        list(formats.FORMATS["d4rl"].read(path, horizon=9))


# ------------------------------------------------------------------------------------------------------------ full disk

FULL = """
import resource, sys
from pathlib import Path
from cvlctl.data import formats
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError

path, out = Path(sys.argv[1]), Path(sys.argv[2])
store = open_store(path)
store.observations(), store.actions(), store.rewards()
names = dict(zip(sys.argv[3::2], sys.argv[4::2]))
for format, name in names.items():
    whole = formats.export_store(format, store, out / "whole" / format / name)
    size = max(p.stat().st_size for p in [whole, *whole.rglob("*")] if p.is_file())
    for share in (0.0, 0.1, 0.5, 0.9, 0.9999):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), resource.RLIM_INFINITY))
        try:
            formats.export_store(format, store, out / "full" / name)
        except CvlctlError as error:
            print(format, share, error.what)
        else:
            sys.exit(f"{format} {share}: written")
        assert not list((out / "full").iterdir()), (format, share)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_full_disk_is_one_error_whatever_the_format(tmp_path: Path) -> None:
    """In a process of its own: HDF5's library ended it by a segmentation fault."""
    store = store_at(tmp_path / "a.zarr", count=6, length=300)
    (tmp_path / "full").mkdir()
    names = [word for pair in WRITTEN.items() for word in pair]
    command = [sys.executable, "-P", "-c", FULL, str(store.path), str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == 5 * len(WRITTEN)
    assert all("cannot write" in line and "File too large" in line for line in told)


def test_what_hdf5_writes_after_the_disk_is_full_is_what_it_reads_back(tmp_path: Path) -> None:
    """Then it closes the file as if nothing were, and the error comes in words."""
    from cvlctl.data.formats.hdf5_out import _Taker

    class Full:
        def __init__(self) -> None:
            self.inside = io.BytesIO()

        def write(self, data: memoryview) -> int:
            room = max(0, 10 - self.inside.tell())
            if not room:
                raise OSError(28, "No space left on device")
            return self.inside.write(data[:room])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inside, name)

    rng, taker, plain = np.random.default_rng(0), _Taker(Full()), io.BytesIO()
    for _ in range(200):
        at, size = int(rng.integers(0, 40)), int(rng.integers(1, 12))
        data = rng.integers(0, 256, size, np.uint8).tobytes()
        for file in (taker, plain):
            file.seek(at)
            file.write(data)
        back = bytearray(60)
        taker.seek(0)
        count = taker.readinto(back)
        assert bytes(back[:count]) == plain.getvalue()
        assert taker.seek(0, os.SEEK_END) == len(plain.getvalue())
    with pytest.raises(OSError, match="No space"):
        taker.check()


def test_ctrl_c_in_an_export_to_hdf5_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path / "a.zarr")
    written, write = [], minari._write_episode

    def slow(*arguments: Any) -> None:
        write(*arguments)
        written.append(1)
        signal.raise_signal(signal.SIGINT)
        written.append(2)  # it is obeyed between two episodes, never inside HDF5

    monkeypatch.setattr(minari, "_write_episode", slow)
    with pytest.raises(KeyboardInterrupt):
        formats.export_store("minari", store, tmp_path / "out" / "a-v0")
    assert written == [1, 2]
    assert list((tmp_path / "out").iterdir()) == []


def test_an_exported_file_can_be_opened_by_its_group(tmp_path: Path) -> None:
    """As every file that is written here: by the umask, and as h5py opens files that it wrote itself."""
    out = formats.export_store("d4rl", store_at(tmp_path / "a.zarr"), tmp_path / "a.hdf5")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~mask
    with h5py.File(out) as file:
        assert file["observations"].shape == (8, 3)
