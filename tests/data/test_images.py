"""Stores of frames: layout, memory, what is refused, what version 1 had, and that only `sim_state` opens `sim/`."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from toy_stores import assert_holds, assert_same, flip

from cvlctl import Episode
from cvlctl.data import writer as writer_module
from cvlctl.data.store import Column, open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Spec

pytestmark = pytest.mark.usefixtures("no_fsync")
SIZES = {"corner": (4, 6, 3), "wrist": (3, 3, 1)}


def seen(seed: int, length: int = 7, vector: bool = True, states: bool = True, sizes: Any = SIZES) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        rng.normal(size=(length + 1, 3)) if vector else None, rng.uniform(-1, 1, (length, 2)), rng.normal(size=length),
        images={name: rng.integers(0, 256, (length + 1, *size), np.uint8) for name, size in sizes.items()},
        sim_state=rng.normal(size=(length + 1, 5)) if states else None,
    )  # fmt: skip


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 20)
    monkeypatch.setattr(writer_module, "FRAME_BYTES", 72 * 5)  # 5 frames of `corner`, 20 rows of `wrist`


@pytest.mark.usefixtures("small_frames")
@pytest.mark.parametrize("vector", [True, False])
def test_layout(tmp_path: Path, vector: bool) -> None:
    episodes = [seen(i, 5 + i, vector) for i in range(4)]
    store = write_store(tmp_path / "a.zarr", episodes, task="toy")
    assert store.spec == Spec((3,) if vector else (0,), 2, 8, SIZES)
    assert store.attributes["version"] == 2 and store.attributes["spec"]["cameras"] == {
        "corner": [4, 6, 3], "wrist": [3, 3, 1],
    }  # fmt: skip
    chunks = {name: zarr.open_array(store.path / name, mode="r").chunks[0] for name in store.arrays}
    assert (chunks["data/images/corner"], chunks["data/images/wrist"], chunks["data/action"]) == (5, 20, 20)
    assert (store.path / "data/observation").exists() == vector
    assert_holds(store, episodes)
    rows = sum(len(episode) + 1 for episode in episodes)
    assert store.observations().shape == Column(store, "data/observation").rows(0, rows).shape == (rows, 3 * vector)
    for camera in SIZES:
        frames = np.concatenate([episode.images[camera] for episode in episodes])
        np.testing.assert_array_equal(store.images(camera), frames)
        np.testing.assert_array_equal(Column(store, f"data/images/{camera}").rows(3, 17), frames[3:17])
        np.testing.assert_array_equal(Column(store, f"data/images/{camera}").take(np.array([0, 9])), frames[[0, 9]])
    np.testing.assert_array_equal(store.sim_state(), np.concatenate([e.sim_state for e in episodes]))
    with pytest.raises(CvlctlError, match="no camera 'top'") as error:
        store.images("top")
    assert "corner, wrist" in str(error.value.hint)


def test_a_store_without_frames_is_still_version_1(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", [Episode(np.ones((3, 2)), np.zeros((2, 1)))], task="toy")
    assert store.attributes["version"] == 1 and not store.has_sim_state
    assert store.attributes["spec"] == {"observation_shape": [2], "action_dim": 1, "horizon": 2, "pixels": False}
    assert store.digest() == "e0fca0f73477e0e3578671a7041c865856e0cac9c66fce2cad010724cf21fbfe"
    with pytest.raises(CvlctlError, match="no camera"):
        store.images("pixels")
    with pytest.raises(CvlctlError, match="no states of the simulator"):
        store.sim_state()


def test_the_digest_tells_frames_and_cameras_apart_but_not_states(tmp_path: Path) -> None:
    def digest(episode: Episode) -> str:
        return write_store(tmp_path / "a.zarr", [episode], task="toy", force=True).digest()

    one = seen(0)
    plain = Episode(one.observations, one.actions, one.rewards)
    states = Episode(one.observations, one.actions, one.rewards, sim_state=one.sim_state)
    assert digest(plain) == digest(states)
    renamed = {"corner": one.images["corner"], "top": one.images["wrist"]}
    changed = {**one.images, "wrist": one.images["wrist"] ^ 1}
    others = [{"corner": one.images["corner"]}, renamed, changed]
    made = [Episode(one.observations, one.actions, images=images) for images in (one.images, *others)]
    assert len({digest(plain), *map(digest, made)}) == 5
    assert digest(one) == digest(made[0])


@pytest.mark.usefixtures("small_frames")
def test_damage_to_frames_and_states_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", [seen(i, 9) for i in range(3)], task="toy")
    flip(store.path / "data/images/corner/c/2/0/0/0")
    flip(store.path / "sim/state/c/0/0")
    problems = verify_store(store.path)
    assert len(problems) == 2 and "data/images/corner chunk 2 (rows 10-14)" in problems[0]
    assert "sim/state chunk 0" in problems[1]
    column = Column(open_store(store.path), "data/images/corner")
    column.rows(0, 10)
    with pytest.raises(CvlctlError, match="data/images/corner chunk 2"):
        column.rows(9, 11)


def test_without_sim_a_store_is_still_whole_and_training_never_looks_there(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", [seen(0)], task="toy")
    digest = store.digest()
    shutil.rmtree(store.path / "sim")
    (store.path / "sim").write_text("not a folder")  # whoever opens it fails
    again = open_store(store.path)
    assert again.digest() == digest and verify_store(store.path) == [] and not again.has_sim_state
    for array in (again.observations(), again.actions(), again.images("corner"), again.episode_ends()):
        assert len(array)
    assert next(again.episodes()).sim_state is None


@pytest.mark.usefixtures("small_frames")
def test_a_killed_writer_goes_on(tmp_path: Path) -> None:
    episodes = [seen(i, 3 + i) for i in range(6)]
    for i, episode in enumerate(episodes):
        with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
            assert_same(writer.episodes(), episodes[:i])
            writer.append(episode)
            writer.flush()
            writer.append(episode)  # lost
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        store = writer.finish()
    assert_holds(store, episodes)
    assert store.digest() == write_store(tmp_path / "b.zarr", episodes, task="toy").digest()


def test_memory_is_that_of_an_episode_and_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FRAME_BYTES", 2**20)
    sizes, count = {"a": (64, 64, 3), "b": (64, 64, 3)}, 16  # 2.5 MB an episode

    def peak(work: Any) -> float:
        tracemalloc.start()
        result = work()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found / 1e6 + 0 * len(result)

    made = (seen(i, 99, False, False, sizes) for i in range(count))
    assert peak(lambda: [write_store(tmp_path / "a.zarr", made, task="toy")]) < 25  # all of it is 39
    store = open_store(tmp_path / "a.zarr")
    assert peak(lambda: [0 for _ in store.episodes()]) < 10


REFUSED: list[tuple[Any, str]] = [
    ({"c": np.zeros((3, 2, 2, 3))}, r"camera 'c' are float64 \(3, 2, 2, 3\); expected \(3, height"),
    ({"c": np.zeros((2, 2, 2, 3), np.uint8)}, "camera 'c': there are 2; expected"),
    ({"c": np.zeros((3, 2), np.uint8)}, r"camera 'c' have shape \(3, 2\)"),
    ({"c": np.zeros((3, 2, 0, 3), np.uint8)}, r"have shape \(3, 2, 0, 3\)"),
    ({"c": np.zeros((3, 4, 2, 2, 3), np.uint8)}, r"have shape \(3, 4, 2, 2, 3\)"),
    ({"a/b": np.zeros((3, 2, 2, 3), np.uint8)}, "camera 'a/b' is not a plain name"),
    ({"zarr.json": np.zeros((3, 2, 2, 3), np.uint8)}, "camera 'zarr.json' is not a plain name"),
    ({5: np.zeros((3, 2, 2, 3), np.uint8)}, "camera 5 is not a plain name"),
    (np.zeros((3, 2, 2, 3), np.uint8), "images are a ndarray"),
    ({}, "neither observations nor images"),
]


@pytest.mark.parametrize(("images", "message"), REFUSED)
def test_what_is_no_frames(images: Any, message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        Episode(None, np.zeros((2, 1)), images=images)


@pytest.mark.parametrize("states", [np.zeros(3), np.zeros((2, 4)), np.zeros((3, 0)), np.full((3, 1), np.nan), ["x"]])
def test_what_is_no_states(states: Any) -> None:
    with pytest.raises(CvlctlError, match="sim_state"):
        Episode(np.zeros((3, 1)), np.zeros((2, 1)), sim_state=states)


def test_frames_for_observations_are_those_of_a_camera(tmp_path: Path) -> None:
    frames = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    grey = Episode(frames, np.zeros((2, 1)))
    assert grey.observations.shape == (3, 0) and grey.images["pixels"].shape == (3, 4, 5, 1)
    assert np.shares_memory(grey.images["pixels"], frames)  # never copied, never floats
    with pytest.raises(CvlctlError, match="and images beside them"):
        Episode(frames, np.zeros((2, 1)), images={"c": frames})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (seen(1, sizes={"corner": (4, 6, 3)}), "episode 1 has no camera 'wrist'; those before it have frames of"),
        (seen(1, sizes=SIZES | {"top": (1, 1, 1)}), "episode 1 has frames of camera 'top' .*; those before it have no"),
        (seen(1, sizes=SIZES | {"corner": (6, 4, 3)}), r"camera 'corner' of shape \(6, 4, 3\); .* \(4, 6, 3\)"),
        (seen(1, vector=False), "episode 1 has no observations; those before"),
        (seen(1, states=False), "episode 1 has no states; those before"),
    ],
)
def test_cameras_of_episodes_agree(tmp_path: Path, second: Episode, message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        write_store(tmp_path / "a.zarr", [seen(0), second], task="toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cameras", [5, {"c": [4, 4]}, {"c": [4, 0, 3]}, {"c": [4, 4, 2.0]}, {"../x": [4, 4, 3]}])
def test_garbled_cameras_are_one_clear_error(tmp_path: Path, cameras: Any) -> None:
    store = write_store(tmp_path / "a.zarr", [seen(0)], task="toy")
    root = json.loads((store.path / "zarr.json").read_text())
    root["attributes"]["spec"]["cameras"] = cameras
    (store.path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CvlctlError, match=r"zarr\.json"):
        open_store(store.path)


# ------------------------------------------------------------------------------------------------------------ version 1


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "pixels.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "size", "digest"),
    [
        ("rgb", (5, 4, 3), "6f4403a0abb9c76620024623d41f9adf84be1c734672b23bb200bbc4b952bb5e"),
        ("grey", (5, 4, 1), "adf0c345bf3698f26dba0827f6b7023423ae82db82d1d1ff133457a7496f8afe"),
    ],
)
def test_pixels_of_version_1_are_a_camera(
    earlier: Path, name: str, size: tuple[int, ...], digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(earlier / f"{name}.zarr")
    assert verify_store(store.path) == [] and store.digest() == digest
    assert store.spec == Spec((0,), 2, 4, {"pixels": size}) and store.observations().shape == (9, 0)
    frames, episodes = store.images("pixels"), list(store.episodes())
    assert hashlib.sha256(frames.tobytes()).hexdigest() == store.attributes["checksums"]["data/observation"]
    assert frames.shape == (9, *size)
    np.testing.assert_array_equal(Column(store, "data/images/pixels").rows(2, 6), store.images("pixels")[2:6])
    np.testing.assert_array_equal(episodes[1].images["pixels"], store.images("pixels")[4:])
    again = write_store(earlier / "again.zarr", episodes, task="camera")
    assert again.attributes["version"] == 2 and again.spec == store.spec
    assert_same(again.episodes(), episodes, "camera")


def test_an_unfinished_store_of_pixels_of_version_1_is_refused(earlier: Path) -> None:
    with pytest.raises(CvlctlError, match="as an earlier version kept them"):
        StoreWriter(earlier / "half.zarr", task="camera")
    with StoreWriter(earlier / "half.zarr", task="camera", force=True) as writer:
        assert writer.num_episodes == 0
