"""Images of other projects' files as frames of cameras: the right ones beside the right rows, in the size asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from toy_datasets import rlds_folder, rlds_steps, zarr_folder
from toy_files import minari_episode, minari_folder, read, robomimic_file, same_store

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data.store import open_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")


def levels(count: int, *size: int, first: int = 0, step: int = 10) -> np.ndarray:
    """(count, *size) uint8 frames of one value each."""
    values = first + step * np.arange(count)
    return np.broadcast_to(values.reshape(-1, *[1] * len(size)), (count, *size)).astype(np.uint8)


def jpeg(frame: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(frame).save(data, format="JPEG", quality=95)
    return data.getvalue()


def test_robomimic(tmp_path: Path) -> None:
    """The final frame comes from next_obs; images that nobody asked for are said."""
    path = robomimic_file(tmp_path / "a.hdf5", count=3)
    with h5py.File(path, "a") as file:
        for i in range(3):
            file[f"data/demo_{i}/obs/wrist"] = levels(i + 2, 6, 6, 3)
            file[f"data/demo_{i}/next_obs/wrist"] = levels(i + 2, 6, 6, 3, first=10)
    found = read("robomimic", path, cameras=["wrist"])
    assert [e.images["wrist"][:, 0, 0, 0].tolist() for e in found] == [
        [0, 10, 20],
        [0, 10, 20, 30],
        [*range(0, 50, 10)],
    ]
    assert found[0].observations.shape == (3, 5)
    small = read("robomimic", path, cameras=["w=wrist", "image"], image_size=[2, 2])
    assert {name: frames.shape for name, frames in small[0].images.items()} == {
        "w": (3, 2, 2, 3),
        "image": (3, 2, 2, 3),
    }
    store = formats.import_store("robomimic", path, tmp_path / "a.zarr", cameras=["wrist"])
    assert store.attributes["dropped_columns"] == ["image"]
    assert store.attributes["remarks"] == ["images are not imported: image (--camera NAME takes them)"]
    with pytest.raises(CvlctlError, match="no images 'top'") as error:
        read("robomimic", path, cameras=["top"])
    assert "image, wrist" in str(error.value.hint)
    with pytest.raises(CvlctlError, match="none is imported"):
        read("robomimic", path, image_size=[2, 2])


def test_robomimic_without_vectors(tmp_path: Path) -> None:
    gone = {f"{group}/{name}": None for group in ("obs", "next_obs") for name in ("a", "b")}
    path = robomimic_file(tmp_path / "a.hdf5", count=2, **gone)
    with pytest.raises(CvlctlError, match="nothing but images"):
        read("robomimic", path)
    assert read("robomimic", path, cameras=["all"])[1].observations.shape == (4, 0)
    path = robomimic_file(tmp_path / "b.hdf5", count=2, **gone, **{"next_obs/image": None})
    found = read("robomimic", path, cameras=["all"])
    assert [(len(e), e.terminated) for e in found] == [(1, False), (3, True)]  # as `cutting.with_final` says


@pytest.mark.parametrize("coded", [False, True])
def test_hdf5_episodes_as_aloha_has_them(tmp_path: Path, coded: bool) -> None:
    (tmp_path / "set").mkdir()
    for i in range(2):
        with h5py.File(tmp_path / "set" / f"episode_{i}.hdf5", "w") as file:
            file["action"], file["observations/qpos"] = np.full((4, 2), 0.1 * i), np.full((4, 3), float(i))
            for camera in ("top", "left_wrist"):
                frames = levels(4, 16, 24, 3, first=100 * i)
                if coded:  # padded to one length, as ALOHA does
                    pictures = [jpeg(frame) for frame in frames]
                    longest = max(map(len, pictures))
                    frames = np.stack([np.frombuffer(one.ljust(longest, b"\0"), np.uint8) for one in pictures])
                file[f"observations/images/{camera}"] = frames
    found = read("hdf5", tmp_path / "set", cameras=["top"], image_size=[8, 8])
    assert [e.images["top"].shape for e in found] == [(4, 8, 8, 3)] * 2 and len(found[0]) == 3
    assert np.abs(found[1].images["top"][:, 4, 4, 1].astype(int) - [100, 110, 120, 130]).max() <= 1
    assert set(read("hdf5", tmp_path / "set", cameras=["all"])[0].images) == {"top", "left_wrist"}
    assert not read("hdf5", tmp_path / "set")[0].images


def test_minari_with_a_dict_of_spaces(tmp_path: Path) -> None:
    frames = levels(5, 16, 16, 3)
    coded = np.empty(5, object)
    coded[:] = [np.frombuffer(jpeg(frame), np.uint8) for frame in frames]
    made = minari_episode(4)
    episode = {k: v for k, v in made.items() if k != "observations"} | {
        "observations/state": made["observations"], "observations/top": frames,
        "observations/side": coded.astype(h5py.vlen_dtype(np.uint8)),
    }  # fmt: skip
    folder = minari_folder(tmp_path / "set", [episode])
    (found,) = read("minari", folder, cameras=["all"])
    assert found.observations.shape == (5, 2)
    np.testing.assert_array_equal(found.images["top"], frames)
    assert np.abs(found.images["side"].astype(int) - frames).max() <= 2
    assert not read("minari", folder, observation_keys=["state"])[0].images


def test_rlds_pictures_of_either_kind(tmp_path: Path) -> None:
    def png(frame: np.ndarray) -> bytes:
        data = io.BytesIO()
        Image.fromarray(frame).save(data, format="PNG")
        return data.getvalue()

    episodes = []
    for n in (4, 3):
        frames = levels(n, 12, 16, 3, first=n)
        coded = {"observation/image": [png(f) if i % 2 else jpeg(f) for i, f in enumerate(frames)]}
        episodes.append(rlds_steps(n, **coded))
    folder = rlds_folder(tmp_path / "set", episodes)
    found = read("rlds", folder, cameras=["observation/image"])
    for n, episode in zip((4, 3), found, strict=True):  # the last step means nothing: its picture is the final frame
        assert episode.images["image"].shape == (n, 12, 16, 3) and len(episode) == n - 1
        assert np.abs(episode.images["image"][:, 6, 8, 0] - (n + 10.0 * np.arange(n))).max() <= 1
    assert read("rlds", folder, cameras=["all"], image_size=[4, 4])[0].images["image"].shape == (4, 4, 4, 3)
    bad = rlds_folder(tmp_path / "bad", [rlds_steps(4)])
    with pytest.raises(CvlctlError, match=r"observation/image\[0\]: (is no PNG or JPEG|cannot be read|is damaged)"):
        read("rlds", bad, cameras=["all"])
    odd = rlds_steps(4, **{"observation/image": [png(levels(1, 4 + i // 3, 4, 3)[0]) for i in range(4)]})
    with pytest.raises(CvlctlError, match=r"image\[3\]: is \(5, 4, 3\), the frames before it are \(4, 4, 3"):
        read("rlds", rlds_folder(tmp_path / "odd", [odd]), cameras=["all"])


def test_zarr_replay_buffers_keep_frames_as_floats(tmp_path: Path) -> None:
    import zarr

    path = zarr_folder(tmp_path / "a.zarr")
    group = zarr.open_group(path, mode="a", zarr_format=2)
    frames = levels(90, 6, 6, 3, step=2).astype(np.float32)
    group.create_array("data/img", shape=frames.shape, dtype=frames.dtype, chunks=(30, 6, 6, 3))[...] = frames
    found = read("zarr", path, cameras=["img"])
    assert [len(e) for e in found] == [39, 9, 39] and found[1].observations.shape == (10, 2)
    assert found[1].images["img"][:, 0, 0, 0].tolist() == list(range(80, 100, 2))
    group["data/img"][41] = 0.5
    with pytest.raises(CvlctlError, match="not whole numbers from 0 to 255"):
        read("zarr", path, cameras=["img"])


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_arrays_of_ones_own(tmp_path: Path, kind: str, vector: bool) -> None:
    arrays: dict[str, Any] = {
        "actions": np.zeros((9, 1)), "episode_lengths": np.array([4, 5]), "images/top": levels(9, 4, 4, 3),
        "rgb": levels(9, 3, 12, 12, first=3).astype(np.uint8), **({"observations": np.zeros((9, 2))} if vector else {}),
    }  # fmt: skip
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    found = read("arrays", path, keys={"images/side": "rgb"}, image_size=[6, 6])
    assert {name: frames.shape for name, frames in found[1].images.items()} == {
        "side": (5, 6, 6, 3), "top": (5, 6, 6, 3),
    }  # fmt: skip
    assert found[1].images["side"][:, 0, 0, 0].tolist() == [43, 53, 63, 73, 83]  # channels came first in the file
    assert found[1].observations.shape == (5, 2 * vector)
    if kind == "npz":
        np.savez(path, **(arrays | {"images/two": levels(9, 5, 5, 2)}))
        with pytest.raises(CvlctlError, match="images/two: frames of 2 channels cannot be scaled"):
            read("arrays", path, image_size=[6, 6])
        assert read("arrays", path)[0].images["two"].shape == (4, 5, 5, 2)
    with pytest.raises(CvlctlError, match="no array 'nothing'"):
        read("arrays", path, keys={"images/side": "nothing"})


@pytest.mark.parametrize("vector", [True, False])
def test_npz_there_and_back(tmp_path: Path, vector: bool, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = []
    for i in range(3):
        images = {"a": levels(5, 4, 6, 3, first=i), "b.1": levels(5, 3, 3, first=50 + i)}
        episodes.append(Episode(np.full((5, 2), i) if vector else None, np.zeros((4, 1)), np.ones(4), images=images))
    store = write_store(tmp_path / "a.zarr", episodes, task="toy")
    out = formats.export_store("npz", store, tmp_path / "a.npz")
    same_store(formats.import_store("npz", out, tmp_path / "b.zarr"), store)
    assert execute(app, ["data", "export", str(store.path), "d4rl", "--out", str(tmp_path / "x.hdf5")]) == 2
    assert "has cameras (a, b.1), for which this format has no place" in capsys.readouterr().err
    assert not (tmp_path / "x.hdf5").exists()
    number = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]["counts"]["rows"]
    with np.load(out) as arrays:
        whole = dict(arrays)
    for changes, message in (
        ({"images/a": whole["images/a"][:-1]}, "12 actions and 14 images/a, but 3 episodes"),
        ({"images/a": whole["images/a"].astype(np.float32) / 255}, "not whole numbers from 0 to 255"),
        ({"images/../x": whole["images/a"]}, "is not a plain name"),
    ):
        np.savez(tmp_path / "bad.npz", **(whole | changes))
        with pytest.raises(CvlctlError, match=message):
            read("npz", tmp_path / "bad.npz")
    assert open_store(store.path).num_rows == number == 15
