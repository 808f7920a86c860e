"""Minari: its layout by hand, its own reader on our folder and ours on its, and bad datasets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from toy_files import Arrays, episodes, minari_episode, minari_folder, read, same

from cvlctl.data import formats
from cvlctl.data.units import units_of
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_minari_environment_dict_observations_and_bounds(tmp_path: Path) -> None:
    first = minari_episode(3, actions=np.array([[-2.0], [0.0], [2.0]]))
    del first["observations"]
    first |= {"observations/goal": np.full((4, 1), 5.0), "observations/achieved/x": np.arange(8.0).reshape(4, 2)}
    box = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-2.0], "high": [2.0]}
    env = {"id": "Toy-v3", "max_episode_steps": 50}
    folder = minari_folder(tmp_path / "m", [first], action_space=json.dumps(box), env_spec=json.dumps(env))
    store = formats.import_store("minari", folder, tmp_path / "m.zarr")
    assert (store.task, store.spec.horizon, store.spec.observation_shape) == ("gym/Toy-v3", 50, (3,))
    (found,) = store.episodes()
    assert found.actions[:, 0].tolist() == [-1, 0, 1]
    assert found.observations[1].tolist() == [2, 3, 5]  # achieved/x, goal
    assert (found.seed, found.terminated) == (7, True)
    assert store.provenance["source"]["action_bounds"] == [[-2.0], [2.0]]
    (chosen,) = read("minari", folder, observation_keys=["goal"])
    assert chosen.observations.shape == (4, 1)
    with pytest.raises(CvlctlError, match="no observation 'gaol'"):
        read("minari", folder, observation_keys=["gaol"])


def test_minari_images_coded_as_jpeg(tmp_path: Path) -> None:
    from PIL import Image

    def jpeg(level: int) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(np.full((32, 40, 3), level, np.uint8)).save(buffer, format="JPEG")
        return np.frombuffer(buffer.getvalue(), np.uint8)

    space = {"type": "Box", "dtype": "uint8", "shape": [32, 40, 3], "low": 0, "high": 255}
    for levels in ((100, 100, 100), (0, 100, 200)):  # those of unlike size are kept as ragged rows
        coded = [jpeg(level) for level in levels]
        frames: Any = np.empty(3, object)
        frames[:] = coded
        frames = np.stack(coded) if len(set(levels)) == 1 else frames.astype(h5py.vlen_dtype(np.uint8))
        folder = minari_folder(
            tmp_path / str(levels), [minari_episode(2, observations=frames)], observation_space=json.dumps(space)
        )
        (found,) = read("minari", folder)
        assert found.images["pixels"].shape == (3, 32, 40, 3)
        assert tuple(found.images["pixels"][:, 5, 5, 0].tolist()) == levels


def test_minari_opens_our_folder_and_we_open_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    made = episodes()
    store = write_store(tmp_path / "a.zarr", made, task="gym/Hopper-v5")
    formats.export_store("minari", store, tmp_path / "root" / "mine" / "toy-v2")
    assert list(package.list_local_datasets()) == ["mine/toy-v2"]
    dataset = package.load_dataset("mine/toy-v2")
    assert (dataset.total_episodes, dataset.total_steps) == (store.num_episodes, store.num_transitions)
    assert dataset.env_spec.id == "Hopper-v5"
    for theirs, ours in zip(dataset.iterate_episodes(), made, strict=True):
        np.testing.assert_array_equal(theirs.observations, ours.observations)
        np.testing.assert_array_equal(theirs.actions, ours.actions)
        np.testing.assert_array_equal(theirs.rewards, ours.rewards)
        assert (theirs.terminations[-1], theirs.truncations[-1]) == (ours.terminated, not ours.terminated)
        assert theirs.infos["success"].shape == theirs.observations.shape[:1]
    buffers = [
        EpisodeBuffer(
            id=None, seed=e.seed, observations=e.observations, actions=e.actions, rewards=list(e.rewards),
            terminations=[False] * (len(e) - 1) + [e.terminated], infos={},
            truncations=[False] * (len(e) - 1) + [not e.terminated],
        ) for e in made if e.rewards is not None
    ]  # fmt: skip
    package.create_dataset_from_buffers(
        "their/toy-v0", buffers, observation_space=Box(-9, 9, (3,)), action_space=Box(-1, 1, (2,))
    )
    found = formats.import_store("minari", tmp_path / "root" / "their" / "toy-v0", tmp_path / "b.zarr")
    same(list(found.episodes()), made, "observations", "actions", "rewards", "terminated", "seed")
    assert found.task == "their/toy-v0"
    assert units_of(found).action_bounds == [-1, 1]  # so says its action space
    formats.export_store("minari", store, tmp_path / "silent-v0")
    assert units_of(formats.import_store("minari", tmp_path / "silent-v0", tmp_path / "c.zarr")).action_bounds is None


def test_minari_names_that_it_could_not_open_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy")
    for name in ("toy", "tö y-v0", "toy-vx"):
        with pytest.raises(CvlctlError, match="no name that Minari could open"):
            formats.export_store("minari", store, tmp_path / name)
        assert not (tmp_path / name).exists()
    formats.export_store("minari", store, tmp_path / "elsewhere" / "toy-v1")
    metadata = json.loads((tmp_path / "elsewhere" / "toy-v1" / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == "toy-v1"


MINARI_BAD: dict[str, tuple[Arrays, Arrays, str]] = {
    "empty episode": (minari_episode(4, **{k: v[:0] for k, v in minari_episode(4).items()}), {}, r"actions have shape"),
    "no truncations needed, no terminations": ({"actions": np.zeros((2, 1))}, {}, "episode_1/rewards.*missing"),
    "lengths": (minari_episode(4, rewards=np.zeros(3)), {}, "rewards 3"),
    "observations": (minari_episode(4, observations=np.zeros((4, 2))), {}, "observations of shape"),
    "discrete": (minari_episode(4, actions=np.zeros(4, int)), {}, "episode_1/actions: int64"),
    "NaN": (minari_episode(4, rewards=np.full(4, np.nan)), {}, "episode_1: .*rewards hold NaN"),
    "counts": (minari_episode(), {"total_episodes": 10**15}, "has 2 episodes"),
    "format": (minari_episode(), {"data_format": "arrow"}, "not of an HDF5 dataset"),
    "discrete space": (minari_episode(), {"action_space": '{"type": "Discrete", "n": 3}'}, "Discrete space"),
    "metadata": (minari_episode(), {"total_steps": "many"}, "metadata.json"),
    "names": (minari_episode(), {"env_spec": "{"}, "metadata.json"),
}


@pytest.mark.parametrize("case", MINARI_BAD)
def test_bad_minari_datasets(tmp_path: Path, case: str) -> None:
    arrays, metadata, message = MINARI_BAD[case]
    folder = minari_folder(tmp_path / "bad", [minari_episode(), arrays], **metadata)
    with pytest.raises(CvlctlError, match=f"bad/data/.*{message}"):
        formats.import_store("minari", folder, tmp_path / "out.zarr", task="toy")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("name", ["success", "is_success"])
def test_successes_of_infos(tmp_path: Path, name: str) -> None:
    """With a value of the reset, or without one; elsewhere in infos nothing is looked for."""
    with_reset = minari_episode(4, **{f"infos/{name}": np.array([1, 0, 0, 1, 1.0]), "infos/x": np.zeros(3)})
    without = minari_episode(3, **{f"infos/{name}": np.array([False, True, False])})
    store = formats.import_store("minari", minari_folder(tmp_path / "a", [with_reset, without]), tmp_path / "a.zarr")
    solved = [episode.successes.tolist() for episode in store.episodes() if episode.successes is not None]
    assert solved == [[False, False, True, True], [False, True, False]]
    for wrong, told in ((np.zeros(2), "has 2 values for 4 steps"), (np.full(4, np.nan), "NaN"), (None, "is missing")):
        bad = minari_episode(4, **({} if wrong is None else {f"infos/{name}": wrong}))
        folder = minari_folder(tmp_path / told[:3], [with_reset, bad])
        with pytest.raises(CvlctlError, match=rf"episode_1/infos/{name}: .*{told}"):
            formats.import_store("minari", folder, tmp_path / "b.zarr")
