"""LeRobot's folders, v2.1 and v3.0: values by hand, what meta/ says, and what is amiss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_datasets import LENGTHS, frames, lerobot_folder

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data.formats import lerobot, tables
from cvlctl.data.units import units_of
from cvlctl.errors import CvlctlError

pytest.importorskip("pyarrow", reason="pip install 'cvlctl[lerobot]'")
pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_states_actions_names_tasks_bounds_and_the_period(tmp_path: Path, version: str) -> None:
    store = formats.import_store("lerobot", lerobot_folder(tmp_path / "so100", version), tmp_path / "a.zarr")
    rows, start = frames(), 0
    for episode, length, task in zip(store.episodes(), LENGTHS, ("push", "pull 机", "push"), strict=True):
        assert (len(episode), episode.terminated, episode.rewards, episode.task) == (length - 1, False, None, task)
        state, velocity = (rows[f"observation.{name}"][start : start + length] for name in ("state", "velocity"))
        np.testing.assert_array_equal(episode.observations, np.concatenate([state, velocity], axis=1))
        wanted = rows["action"][start : start + length - 1] * np.float32([1 / 6, 2]) - np.float32([1 / 3, 1])
        np.testing.assert_allclose(episode.actions, wanted, atol=1e-6)
        start += length
    assert store.collected_at().tolist() == [0, 3, 8]
    assert store.task == "so100"
    units = units_of(store)
    assert units.action_bounds == [[-4.0, 0.0], [8.0, 1.0]]
    assert list(units.observation_columns) == ["pan", "lift", "observation.velocity"]
    assert (units.control_period, list(units.dropped_columns)) == (0.1, ["observation.images.top"])
    assert list(units.remarks) == ["images are not imported: observation.images.top (--camera NAME takes them)"]
    source = store.provenance["source"]
    assert (source["files"], source["codebase_version"], source["robot_type"]) == (
        2 if version == "v3.0" else 3, version, "so100",
    )  # fmt: skip


def test_rewards_successes_and_ends_of_simulated_data(tmp_path: Path) -> None:
    last = np.isin(np.arange(12), np.cumsum(LENGTHS) - 1)
    changes = {"next.reward": np.arange(12.0), "next.success": last, "next.done": last}
    found = list(lerobot.read(lerobot_folder(tmp_path / "a", changes=changes)))
    assert [(len(e), e.terminated) for e in found] == [(3, True), (5, True), (4, True)]
    assert found[1].rewards is not None and found[1].rewards.tolist() == [3, 4, 5, 6, 7]
    assert found[1].successes is not None and found[1].successes.tolist() == [False] * 4 + [True]
    np.testing.assert_array_equal(found[1].observations[-1], found[1].observations[-2])  # stands in for the final one
    only_done = list(lerobot.read(lerobot_folder(tmp_path / "b", changes={"next.done": last})))
    assert [(len(e), e.terminated) for e in only_done] == [(2, False), (4, False), (3, False)]


def test_chosen_features_and_actions_that_need_no_bounds(tmp_path: Path) -> None:
    folder = lerobot_folder(tmp_path / "a", changes={"action": np.linspace(-0.5, 0.5, 12, dtype=np.float32)[:, None]})
    store = formats.import_store("lerobot", folder, tmp_path / "a.zarr", observation_keys=["observation.state"])
    assert store.spec.observation_shape == (2,)
    assert units_of(store).action_bounds is None
    assert list(units_of(store).dropped_columns) == ["observation.images.top", "observation.velocity"]
    np.testing.assert_allclose(next(iter(store.episodes())).actions[:, 0], np.linspace(-0.5, 0.5, 12)[:2], atol=1e-7)
    with pytest.raises(CvlctlError, match=r"no observation 'observation\.stat'"):
        list(lerobot.read(folder, observation_keys=["observation.stat"]))


def test_some_episodes_of_a_dataset(tmp_path: Path) -> None:
    folder = lerobot_folder(tmp_path / "a")
    (folder / "data" / "chunk-000" / "episode_000001.parquet").unlink()
    store = formats.import_store("lerobot", folder, tmp_path / "a.zarr")
    assert store.lengths().tolist() == [2, 3]
    assert "meta/info.json counts 3 episodes: 2 are in this folder" in units_of(store).remarks


def test_blocks_and_row_groups_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lerobot_folder(tmp_path / "a", "v3.0")
    wanted = list(lerobot.read(folder))
    monkeypatch.setattr(tables, "BATCH", 1)
    monkeypatch.setattr("cvlctl.data.formats.sources.BLOCK_BYTES", 8)
    monkeypatch.setattr("cvlctl.data.formats.cutting.BATCH_ROWS", 2)
    for a, b in zip(lerobot.read(folder), wanted, strict=True):
        np.testing.assert_array_equal(a.observations, b.observations)
        np.testing.assert_array_equal(a.actions, b.actions)


WRONG_PATHS = [
    "../data/*.parquet", "/etc/{episode_index}", "data/../../x{episode_index}.parquet", "data/{x}.parquet", None,
    "data/{episode_index.__class__}.parquet", "data/{episode_index:>99999999}.parquet", "data/rows.parquet", 5, "",
    "{", "~/{episode_index}",
]  # fmt: skip


@pytest.mark.parametrize("path", WRONG_PATHS)
def test_a_data_path_leads_to_files_of_the_folder(tmp_path: Path, path: Any) -> None:
    with pytest.raises(CvlctlError, match=r"a/meta/info\.json"):
        formats.import_store("lerobot", lerobot_folder(tmp_path / "a", data_path=path), tmp_path / "x.zarr")
    assert not list(tmp_path.glob("x*"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


FIRST = "data/chunk-000/episode_000000.parquet"
BAD: dict[str, tuple[Any, str]] = {
    "no frame 1": ({"frame_index": np.array([0, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3])}, "000.parquet: frame_index"),
    "shuffled": ({"episode_index": np.array([0, 1, 0, *[1] * 5, *[2] * 4])}, "an episode goes on after"),
    "no action": ({"action": None}, "000.parquet: no column 'action'"),
    "text": ({"action": [["a"]] * 12}, "000.parquet: action: holds text"),
    "discrete": ({"action": np.ones((12, 2), int)}, "discrete actions are not supported"),
    "ragged": ({"action": [[0.5, 0.5], [0.5], *[[0.5, 0.5]] * 10]}, "action.*row 1: the list has another"),
    "nothing in a list": ({"action": [[]] * 12}, "action: holds values of type .*, not numbers"),
    "missing": ({"action": [[0.5], None, *[[0.5]] * 10]}, "000.parquet: action"),
    "no index": ({"episode_index": [0, None, *[0] * 10]}, "episode_index: values are missing among rows 0-2"),
    "NaN": ({"observation.velocity": np.full((12, 1), np.nan, np.float32)}, "episode 0.*NaN"),
    "width": ({"observation.state": np.zeros((12, 3), np.float32)}, "has rows of 3, in meta/info.json"),
    "a task of no number": ({"task_index": np.full(12, 7)}, "task 7 is none of the 2"),
    "cut short": (lambda f: _cut(f / FIRST), "000.parquet: cannot be read"),
    "info cut short": (lambda f: _cut(f / "meta/info.json"), "info.json: cannot be read"),
    "tasks": (lambda f: (f / "meta/tasks.jsonl").write_text('{"task_index": "x", "task": 3}'), "tasks.jsonl"),
    "stats": (lambda f: (f / "meta/stats.json").write_text('{"action": {"min": [9], "max": [1]}}'), "stats.json"),
    "no info": (lambda f: (f / "meta/info.json").unlink(), "no folder of a LeRobot dataset"),
    "features": (lambda f: (f / "meta/info.json").write_text('{"features": {"a": 3}}'), "info.json: cannot be read"),
    "old": (lambda f: (f / "meta/info.json").write_text('{"features": {}, "codebase_version": "v1.6"}'), "v1.6"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_amiss_is_one_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]  # of rows, or of a sound folder
    folder = lerobot_folder(tmp_path / "a", changes=change if isinstance(change, dict) else None)
    if not isinstance(change, dict):
        change(folder)
    with pytest.raises(CvlctlError, match=message) as caught:
        formats.import_store("lerobot", folder, tmp_path / "x.zarr")
    assert str(folder) in caught.value.what
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lerobot_folder(tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(CvlctlError, match="parquet is read by pyarrow") as caught:
        list(lerobot.read(folder))
    assert caught.value.hint == "pip install 'cvlctl[lerobot]'"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lerobot_folder(tmp_path / "a")
    command = ["data", "import", "lerobot", str(folder), "--out", str(tmp_path / "a.zarr"), "--json"]
    assert execute(app.app, command) == 0
    assert json.loads(capsys.readouterr().out)["transitions"] == 9
    assert execute(app.app, command) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished already"
