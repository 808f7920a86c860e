"""OGBench, robomimic, Stable-Baselines3's buffers and arrays of your own: by hand, and by their own readers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_files import Arrays, episodes, hdf5, npz, package_functions, read, robomimic_file, rows, same, sb3_arrays

from cvlctl.data import formats
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


# -------------------------------------------------------------------------------------------------------------- OGBench


def test_ogbench_by_hand(tmp_path: Path) -> None:
    arrays = {
        "observations": np.arange(7.0)[:, None], "actions": np.linspace(-1, 1, 7)[:, None],
        "terminals": np.array([0, 0, 1, 0, 0, 0, 1], np.float32), "qpos": np.zeros((7, 2)),
    }  # fmt: skip
    found = read("ogbench", npz(tmp_path / "a.npz", arrays))
    assert [e.observations[:, 0].tolist() for e in found] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [len(e) for e in found] == [2, 3]
    assert [(e.rewards, e.terminated, e.collected_at) for e in found] == [(None, False, 0), (None, False, 2)]


@pytest.mark.parametrize("own", [False, True], ids=["as documented", "ogbench's own code"])
def test_ogbench_reads_our_file_as_we_meant_it(tmp_path: Path, own: bool) -> None:
    made = episodes()
    path = formats.export_store("ogbench", write_store(tmp_path / "a.zarr", made, task="toy"), tmp_path / "a.npz")
    if own:
        found = package_functions("ogbench", "ogbench/utils.py", "load_dataset")["load_dataset"](str(path))
    else:
        with np.load(path, allow_pickle=False) as file:
            row = np.flatnonzero(file["terminals"] == 0)  # the last row of a trajectory starts no transition
            found = {"observations": file["observations"][row], "actions": file["actions"][row],
                     "next_observations": file["observations"][row + 1]}  # fmt: skip
    np.testing.assert_array_equal(found["observations"], np.concatenate([e.observations[:-1] for e in made]))
    np.testing.assert_array_equal(found["next_observations"], np.concatenate([e.observations[1:] for e in made]))
    np.testing.assert_array_equal(found["actions"], np.concatenate([e.actions for e in made]))


# ------------------------------------------------------------------------------------------------------------ robomimic


def test_robomimic(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "low_dim.hdf5")
    store = formats.import_store("robomimic", path, tmp_path / "a.zarr")
    assert store.task == "Lift"
    assert store.provenance["source"]["env_args"]["type"] == 1
    assert store.lengths().tolist() == list(range(2, 13))  # demo_10 after demo_9
    for i, episode in enumerate(store.episodes()):
        states = np.random.default_rng(i).normal(size=(i + 3, 5)).astype(np.float32)
        np.testing.assert_array_equal(episode.observations, np.concatenate([states[:, 3:], states[:, :3]], axis=1))
        assert episode.terminated == bool(i % 2)
    pixels = read("robomimic", path, observation_keys=["image"])
    assert pixels[3].images["pixels"].shape == (6, 8, 9, 3)
    assert (pixels[3].images["pixels"].dtype, pixels[3].images["pixels"][-1].max()) == (np.uint8, 4)
    with pytest.raises(CvlctlError, match="an image does not join"):
        read("robomimic", path, observation_keys=["a", "image"])


def test_robomimic_without_next_obs_or_observations(tmp_path: Path) -> None:
    none = dict.fromkeys(["next_obs/a", "next_obs/b", "next_obs/image"])
    found = read("robomimic", robomimic_file(tmp_path / "a.hdf5", 3, **none))
    assert [(len(e), e.terminated) for e in found] == [(1, False), (3, True), (3, False)]
    none |= dict.fromkeys(["obs/a", "obs/b", "obs/image"])
    with pytest.raises(CvlctlError, match="no observations") as caught:
        read("robomimic", robomimic_file(tmp_path / "b.hdf5", 3, **none))
    assert "dataset_states_to_obs" in caught.value.hint


# ---------------------------------------------------------------------------------------------------- Stable-Baselines3


def test_sb3_environments_side_by_side(tmp_path: Path) -> None:
    arrays = sb3_arrays()
    found = read("sb3", npz(tmp_path / "a.npz", arrays))
    assert [(len(e), e.terminated, e.collected_at) for e in found] == [
        (5, True, 0), (5, False, 10), (2, False, 20), (5, True, 1), (5, False, 11), (2, False, 21)
    ]  # fmt: skip
    np.testing.assert_array_equal(found[4].actions, arrays["actions"][5:10, 1].astype(np.float32))
    np.testing.assert_array_equal(found[4].observations[-1], arrays["next_observations"][9, 1].astype(np.float32))


def test_sb3_buffer_saved_by_the_lines_in_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "replay_buffer" in block]
    monkeypatch.chdir(tmp_path)
    model = sb3.SAC("MlpPolicy", "Pendulum-v1", buffer_size=450, learning_starts=10**6, device="cpu", seed=0)
    model.learn(700)  # random actions: the buffer has come round, and begins within the second episode
    exec(code, {"model": model})
    found = read("sb3", tmp_path / "replay.npz")
    assert [(len(e), e.terminated) for e in found] == [(150, False), (200, False), (100, False)]
    buffer = model.replay_buffer
    at = (buffer.pos + 150) % buffer.buffer_size
    np.testing.assert_array_equal(found[1].observations[0], buffer.observations[at, 0])
    assert np.concatenate([e.actions for e in found]).min() < -0.9


# --------------------------------------------------------------------------------------------------- arrays of your own


@pytest.mark.parametrize("write", [npz, hdf5])
def test_arrays_of_your_own(tmp_path: Path, write: Callable[[Path, Arrays], Path]) -> None:
    ours = rows()
    keys = {"observations": "log/state" if write is hdf5 else "state", "actions": "cmd", "terminals": "fell"}
    arrays = {keys.get(name, name): values for name, values in ours.items()}
    path = write(tmp_path / ("a.npz" if write is npz else "a.h5"), arrays | {"successes": ours["rewards"] > 0})
    store = formats.import_store("arrays", path, tmp_path / "a.zarr", task="robot", keys=keys)
    found = list(store.episodes())
    same(found, episodes())
    assert found[1].successes is not None
    assert found[1].rewards is not None
    assert found[1].successes.tolist() == (found[1].rewards > 0).tolist()
    assert store.provenance["source"]["options"]["keys"] == keys
    with pytest.raises(CvlctlError, match="no array 'stat'"):
        read("arrays", path, keys=keys | {"observations": "stat"})
    with pytest.raises(CvlctlError, match="no array 'action'") as caught:
        read("arrays", path, keys={"action": "cmd"})
    assert "did you mean actions?" in caught.value.hint
