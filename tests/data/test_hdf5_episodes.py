"""HDF5 with a group or a file an episode, and robomimic's relatives: by hand, and what is amiss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from toy_files import robomimic_file

from cvlctl.data import formats
from cvlctl.data.formats import hdf5_episodes, robomimic
from cvlctl.data.units import units_of
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

Arrays = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_fsync")


def write(path: Path, groups: dict[str, Arrays]) -> Path:
    with h5py.File(path, "w") as file:
        for group, arrays in groups.items():
            for name, values in arrays.items():
                if values is not None:
                    file[f"{group}/{name}"] = values
    return path


def aloha(length: int, start: int = 0, **changes: Any) -> Arrays:
    """Steps whose first joint counts on from `start`; images as bytes in rows, as they are compressed."""
    rows = np.arange(start, start + length, dtype=np.float32)
    made = {"observations/qpos": np.stack([rows, rows + 0.5], axis=1), "observations/qvel": -rows[:, None],
            "observations/images/top": np.zeros((length, 900), np.uint8), "action": rows[:, None] / 100,
            "compress_len": np.zeros((1, length))}  # fmt: skip
    return made | changes


def maniskill(length: int, **changes: Any) -> Arrays:
    rows, last = np.arange(length + 1.0), np.arange(length) == length - 1
    made = {"obs/agent/qpos": rows[:, None], "obs/extra/goal": np.ones((length + 1, 2)),
            "obs/sensor_data/cam/rgb": np.zeros((length + 1, 4, 4, 3), np.uint8), "actions": np.zeros((length, 3)),
            "terminated": last, "truncated": ~last & False, "success": last, "env_states/x": rows}  # fmt: skip
    return made | changes


def states(found: list[Episode]) -> list[list[float]]:
    return [episode.observations[:, 0].tolist() for episode in found]


def test_aloha_a_file_an_episode(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, start in ((2, 0), (10, 50)):
        write(tmp_path / "in" / f"episode_{i}.hdf5", {"/": aloha(4, start)})
    store = formats.import_store("hdf5", tmp_path / "in", tmp_path / "a.zarr", task="aloha")
    found = list(store.episodes())
    assert states(found) == [[0, 1, 2, 3], [50, 51, 52, 53]]
    assert [(len(e), e.terminated, e.rewards) for e in found] == [(3, False, None)] * 2
    np.testing.assert_array_equal(found[1].actions, np.float32([[0.5], [0.51], [0.52]]))
    units = units_of(store)
    assert list(units.observation_columns) == ["qpos[0]", "qpos[1]", "qvel"]
    assert list(units.dropped_columns) == ["images/top"]
    assert store.collected_at().tolist() == [0, 3]
    (only,) = hdf5_episodes.read(tmp_path / "in" / "episode_2.hdf5", observation_keys=["qvel"])
    assert only.observations.tolist() == [[0], [-1], [-2], [-3]]


def test_maniskill_with_the_final_observation(tmp_path: Path) -> None:
    path = write(tmp_path / "t.h5", {"traj_10": maniskill(2), "traj_2": maniskill(3, rewards=np.arange(3.0))})
    about = {"env_info": {"env_id": "PickCube-v1", "max_episode_steps": 50}, "episodes": []}
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(CvlctlError, match="rewards"):  # of one episode alone
        formats.import_store("hdf5", path, tmp_path / "a.zarr")
    write(path, {"traj_10": maniskill(2), "traj_2": maniskill(3)})
    store = formats.import_store("hdf5", path, tmp_path / "a.zarr")
    assert (store.task, store.spec.horizon) == ("PickCube-v1", 50)
    found = list(store.episodes())
    assert states(found) == [[0, 1, 2, 3], [0, 1, 2]]
    assert [e.successes.tolist() for e in found if e.successes is not None] == [[False, False, True], [False, True]]
    assert [e.terminated for e in found] == [True, True]
    assert found[0].observations[0].tolist() == [0, 1, 1]


def test_d3rlpy(tmp_path: Path) -> None:
    """As its io.dump lays it out: names with a number, an episode's end as a single value."""
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["columns"], file["num_episodes"], file["version"] = ["observations"], 11, "2.1"
        for i in range(11):
            length, rows = i + 2, np.arange(i + 2, dtype=np.float32)[:, None] + 100 * i
            file[f"observations_{i}"], file[f"actions_{i}"] = rows, np.full((length, 2), 0.5, np.float32)
            file[f"rewards_{i}"], file[f"terminated_{i}"] = rows, bool(i % 2)
    found = list(hdf5_episodes.read(tmp_path / "d.h5"))
    assert [len(e) for e in found] == [1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11]
    assert states(found)[:2] == [[0, 1], [100, 101, 102, 102]]
    assert found[1].rewards is not None and found[1].rewards.tolist() == [100, 101, 102]
    assert [e.terminated for e in found] == [bool(i % 2) for i in range(11)]


def test_d3rlpy_writes_what_we_read(tmp_path: Path) -> None:
    d3rlpy = pytest.importorskip("d3rlpy")
    rng = np.random.default_rng(0)
    states, ends = rng.normal(size=(9, 3)).astype(np.float32), np.isin(np.arange(9), (3, 8)) * 1.0
    made = d3rlpy.dataset.MDPDataset(states, rng.uniform(-1, 1, (9, 2)).astype(np.float32), np.arange(9.0), ends)
    with open(tmp_path / "d.h5", "w+b") as file:
        made.dump(file)
    found = list(hdf5_episodes.read(tmp_path / "d.h5"))
    assert [(len(e), e.terminated) for e in found] == [(4, True), (5, True)]
    np.testing.assert_array_equal(found[1].observations[:-1], states[4:])


def test_names_of_your_own(tmp_path: Path) -> None:
    group = {"state": np.arange(3.0)[:, None], "cmd/arm": np.zeros((2, 1)), "r": np.ones(2), "fell": [0, 1]}
    path = write(tmp_path / "a.h5", {"data/run 1": group, "data/run 2": group, "notes": {"x": 1}})
    keys = {"observations": "state", "actions": "cmd/arm", "rewards": "r", "terminals": "fell"}
    found = list(hdf5_episodes.read(path, keys=keys))
    assert [(len(e), e.terminated) for e in found] == [(2, True)] * 2
    assert found[0].observations[:, 0].tolist() == [0, 1, 2]


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no actions": (lambda p: write(p, {"a": {"x": [1.0]}}), "no actions, neither in the file nor in its groups"),
    "no observations": (lambda p: write(p, {"t": maniskill(2) | dict.fromkeys(
        ["obs/agent/qpos", "obs/extra/goal", "obs/sensor_data/cam/rgb"])}), "t: no observations"),
    "only images": (lambda p: write(p, {"t": maniskill(2) | dict.fromkeys(["obs/agent/qpos", "obs/extra/goal"])}),
                    "t/obs: nothing but images"),
    "lengths": (lambda p: write(p, {"t": maniskill(2, success=[1])}), "t/success: has 1 values for 2 actions"),
    "three more": (lambda p: write(p, {"/": aloha(4, action=np.zeros((2, 1)))}), r"shape \(4, 3\) for 2 actions"),
    "unlike": (lambda p: write(p, {"a": maniskill(2), "b": maniskill(2, **{"obs/extra/goal": np.ones((3, 5))})}),
               "b/obs: is unlike the first"),
    "discrete": (lambda p: write(p, {"t": maniskill(2, actions=np.zeros((2, 1), int))}), "discrete actions"),
    "text": (lambda p: write(p, {"t": maniskill(2, actions=np.array([b"a", b"b"]))}), "actions: holds text"),
    "NaN": (lambda p: write(p, {"t": maniskill(2, actions=np.full((2, 1), np.nan))}), "t: .*NaN"),
    "a group for actions": (lambda p: write(p, {"t": {"actions/a": [0.0], "obs": [[0.0]]}}), "actions: is a group"),
    "an episode of d3rlpy's too few": (lambda p: write(p, {"/": {"columns": [1], "num_episodes": 9}}), "no actions_8"),
    "its json": (lambda p: write(p, {"t": maniskill(2)}).with_suffix(".json").write_text("{"), "json: cannot be read"),
    "no HDF5": (lambda p: p.write_text("no"), "expected an HDF5 file|cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_amiss_is_one_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    make, told = BAD[case]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / "a.h5")
    with pytest.raises(CvlctlError, match=told) as caught:
        formats.import_store("hdf5", tmp_path / "in" / "a.h5", tmp_path / "x.zarr", task="toy")
    assert str(tmp_path / "in" / "a.") in caught.value.what
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="expected HDF5 files in it, and there are none"):
        formats.import_store("hdf5", tmp_path, tmp_path / "x.zarr", task="toy")


# ------------------------------------------------------------------------------------------------ robomimic's relatives

NO_NEXT = dict.fromkeys(["next_obs/a", "next_obs/b", "next_obs/image"])


def test_libero(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "a.hdf5", 3, **NO_NEXT)
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "put the bowl on the plate"})
    store = formats.import_store("robomimic", path, tmp_path / "a.zarr")
    assert store.episode_tasks() == ["put the bowl on the plate"] * 3
    assert store.lengths().tolist() == [1, 3, 3]


def test_isaaclab_has_neither_rewards_nor_dones(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "a.hdf5", 3, rewards=None, dones=None, **NO_NEXT)
    with h5py.File(path, "a") as file:
        for i, solved in enumerate((True, False, True)):
            file[f"data/demo_{i}"].attrs["success"] = solved
    store = formats.import_store("robomimic", path, tmp_path / "a.zarr")
    found = list(store.episodes())
    assert [(len(e), e.terminated, e.rewards) for e in found] == [(2, True, None), (2, False, None), (4, True, None)]
    solved = [e.successes.tolist() for e in found if e.successes is not None]
    assert solved == [[False, True], [False, False], [False, False, False, True]]
    bare = robomimic_file(tmp_path / "b.hdf5", 3, rewards=None, dones=None, **NO_NEXT)
    assert [(len(e), e.terminated, e.successes) for e in robomimic.read(bare)] == [
        (1, False, None), (2, False, None), (3, False, None)
    ]  # fmt: skip
