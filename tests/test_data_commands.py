"""`cvlctl data`: the numbers in the tables are those of the episodes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from rich.console import Console

from cvlctl.commands import data
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode
from cvlctl.writer import StoreWriter, write_store


def toy(length: int, reward: float, success: bool | None, terminated: bool = False) -> Episode:
    successes = None if success is None else np.arange(length) == (length - 1 if success else -1)
    return Episode(np.ones((length + 1, 2)), np.zeros((length, 1)), np.full(length, reward), successes, terminated)


# returns 4, 1, 12, 0
EPISODES = [toy(4, 1.0, True, terminated=True), toy(2, 0.5, False), toy(6, 2.0, False), toy(8, 0.0, False)]


def printed(render: Callable[[Any, Console], None], result: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    render(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_store(tmp_path / "deep" / "a.zarr", EPISODES, task="gym/Toy-v0", provenance={"recipe": {"seed": [0]}})
    return tmp_path


def test_info(root: Path) -> None:
    result = data.info(root / "deep" / "a.zarr")
    assert json.loads(json.dumps(result)) == result
    assert (result["task"], result["episodes"], result["transitions"]) == ("gym/Toy-v0", 4, 20)
    assert result["spec"] == {"observation_shape": [2], "action_dim": 1, "horizon": 8, "pixels": False}
    assert result["lengths"] == {"min": 2, "mean": 5.0, "max": 8}
    returns = result["returns"]["given"]
    assert returns == {"mean": 4.25, "min": 0.0, "q25": 0.75, "median": 2.5, "q75": 6.0, "max": 12.0}
    assert result["success_fraction"] == {"given": 0.25} and result["terminated_fraction"] == 0.25
    histogram = result["histogram"]["given"]
    assert len(histogram["edges"]) == 11 and histogram["counts"] == [2, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert result["provenance"]["recipe"] == {"seed": [0]} and 0 < result["size_mb"] < 1
    text = printed(data.render_info, result)
    for word in ("gym/Toy-v0", "25.0 %", "0 / 0.75 / 2.5 / 6 / 12", "horizon 8", "seed [0]", "█" * data.BAR):
        assert word in text


def test_a_store_with_bad_rewards_is_one_clear_error_and_does_not_hide_the_others(root: Path) -> None:
    bad = root / "deep" / "bad.zarr"
    rewards = write_store(bad, EPISODES, task="gym/Toy-v0").rewards().copy()
    rewards[3] = np.nan
    zarr.open_array(bad / "labels/given/reward", mode="r+")[:] = rewards
    with pytest.raises(CvlctlError, match=f"{bad}: labels/given/reward: NaN or infinity") as caught:
        data.info(bad)
    assert f"cvlctl data verify {bad}" in caught.value.hint
    good, other = data.ls(root)
    assert good["problem"] is None and other["problem"] == "labels/given/reward: NaN or infinity"


def test_info_of_equal_returns_and_of_no_labels(tmp_path: Path) -> None:
    same = [toy(3, 1.0, None), toy(3, 1.0 + 1e-7, None)]
    result = data.info(write_store(tmp_path / "a.zarr", same, task="toy").path)
    assert sum(result["histogram"]["given"]["counts"]) == 2 and result["success_fraction"] == {}
    bare = [Episode(np.ones((3, 2)), np.zeros((2, 1)))]
    result = data.info(write_store(tmp_path / "b.zarr", bare, task="toy").path)
    assert result["returns"] == result["histogram"] == result["success_fraction"] == {}
    assert "returns (" not in printed(data.render_info, result)


def test_ls_lists_sound_broken_and_unfinished_stores(root: Path) -> None:
    broken = write_store(root / "b.zarr", EPISODES, task="toy").path
    (broken / "labels/given/reward/c/0").write_bytes(b"x")
    with StoreWriter(root / "c.zarr", task="toy") as writer:
        writer.append(EPISODES[0])
        writer.flush()
    (root / "notes").mkdir()
    rows = data.ls(root)
    assert json.loads(json.dumps(rows)) == rows
    assert [Path(row["path"]).name for row in rows] == ["b.zarr", "c.zarr.partial", "a.zarr"]
    good = rows[2]
    assert (good["task"], good["episodes"], good["transitions"], good["return_mean"]) == ("gym/Toy-v0", 4, 20, 4.25)
    assert good["success_fraction"] == 0.25 and good["problem"] is None and good["labels"] == ["given"]
    assert "labels/given/reward chunk 0" in rows[0]["problem"] and "not finished" in rows[1]["problem"]
    text = printed(data.render_ls, rows)
    assert "gym/Toy-v0" in text and "not finished" in text and "chunk 0" in text


def test_ls_of_nothing(tmp_path: Path) -> None:
    assert data.ls(tmp_path) == []
    assert "no stores here" in printed(data.render_ls, [])
    with pytest.raises(CvlctlError, match="no directory"):
        data.ls(tmp_path / "nowhere")


def test_verify(root: Path) -> None:
    path = root / "deep" / "a.zarr"
    result = data.verify(path)
    assert result == {"path": str(path), "problems": [], "ok": True}
    assert "sound" in printed(data.render_verify, result)
    (path / "data/action/c/0/0").unlink()
    result = data.verify(path)
    assert not result["ok"] and len(result["problems"]) == 1
    assert "data/action chunk 0 (rows 0-23)" in printed(data.render_verify, result)
    with pytest.raises(CvlctlError, match="no store at"):
        data.verify(root / "none.zarr")
