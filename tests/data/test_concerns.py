"""What `data info`, `verify` and training tell of data that are sound and yet seem amiss."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import cvlctl
from cvlctl.data import columns, look
from cvlctl.data.concerns import concerns
from cvlctl.data.store import Store, open_store
from cvlctl.learn.finetune import finetune
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")

NAMES = ("x", "battery", "gripper", "force", "mode")


def episodes(count: int = 4, length: int = 50, seed: int = 0, terminated: bool = False) -> list[Episode]:
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        rows = rng.normal(size=(length + 1, 5))
        rows[:, 1] = 24.1
        rows[:, 2] = rng.integers(0, 2, length + 1)
        rows[:, 3] = np.minimum(rows[:, 3], 1.0)  # a sensor at its limit, one time in six
        rows[:, 4] = np.where(rng.random(length + 1) < 0.04, rng.normal(size=length + 1), 3.0)
        made.append(Episode(rows, rng.uniform(-0.5, 0.5, (length, 2)), terminated=terminated))
    return made


def written(path: Path, made: list[Episode], **about: Any) -> Store:
    return cvlctl.write_store(path, made, task="robot", **{"observation_columns": NAMES} | about)


def printed(result: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    look.render_info(result, console)
    return console.export_text()


def test_columns_are_those_that_numpy_finds_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = written(tmp_path / "a.zarr", episodes(), action_bounds=([-2, -1], [2, 1]))
    monkeypatch.setattr(columns, "BLOCK_ROWS", 37)
    rows = store.observations().astype(np.float64)
    found = columns.observation_columns(store)
    for key, wanted in {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}.items():
        np.testing.assert_allclose([one[key] for one in found], wanted, atol=1e-9)
    assert [one["name"] for one in found] == list(NAMES)
    notes = [one["note"] for one in found]
    assert notes[:3] == ["", "constant", "two values"]
    assert notes[3].startswith("saturated: 1") and notes[3].endswith("% at max") and notes[4] == "95 % are 3"
    actions = np.concatenate([episode.actions for episode in store.episodes()])  # no padding among them
    one, other = columns.action_columns(store)
    assert one["mean"] == pytest.approx(actions[:, 0].mean()) and one["std"] == pytest.approx(actions[:, 0].std())
    assert one["physical"] == pytest.approx([2 * actions[:, 0].min(), 2 * actions[:, 0].max()])
    assert other["physical"] == pytest.approx([actions[:, 1].min(), actions[:, 1].max()])


@pytest.mark.parametrize("width", [60, 80])
def test_info_begins_with_the_data_and_ends_with_versions(tmp_path: Path, width: int) -> None:
    store = written(tmp_path / "a.zarr", episodes(), control_period=0.05, action_bounds=(-2, 2))
    text = printed(look.info(store.path), width)
    places = [text.index(word) for word in ("battery", "action 1", "warning:", "steps a second", "versions")]
    assert places == sorted(places) and "20" in text and "constant" in text
    assert max(map(len, text.splitlines())) <= width


def test_many_columns_are_cut_short_but_for_those_with_a_note(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 300))
    rows[:, 222] = 7.0
    cvlctl.write_store(tmp_path / "a.zarr", [Episode(rows, np.zeros((29, 1)))], task="robot")
    result = look.info(tmp_path / "a.zarr")
    text = printed(result, 80)
    assert len(result["columns"]) == 300 and "column 222" in text and "column 100" not in text
    assert "61 of 300; --json has all" in text


def test_what_seems_amiss_is_told_by_verify_and_by_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = episodes(terminated=True)
    store = written(tmp_path / "a.zarr", [*made, made[1]])
    (tmp_path / "a.yaml").write_text(
        f"{{stores: ['{store.path}'], steps: 1, threads: 1, compile: false, batch_size: 8, out: '{tmp_path / 'run'}', "
        "algorithm: {name: bc, hidden: [8]}}"
    )
    found = look.verify(store.path)
    assert found["ok"] and len(found["warnings"]) == 3
    from cvlctl.experiments import commands

    finetune(commands.load(tmp_path / "a.yaml", [], "finetune"))
    said = capsys.readouterr().err
    for words in (
        "1 of 5 columns never varied, and are zeroed before a policy sees them: battery (24.1)",
        "all 5 episodes are terminated, each after 50 steps",
        "1 of 5 episodes are copies of others, step for step: episode 4 is episode 1",
    ):
        assert any(words in line for line in found["warnings"]) and words in said


def test_sound_data_are_told_nothing_of(tmp_path: Path) -> None:
    one, two = episodes(2, terminated=True)
    nearly = Episode(one.observations.copy(), one.actions.copy(), terminated=True)
    nearly.observations[20, 0] += 1.0  # begins and ends as the first one does
    short = Episode(two.observations[:9], two.actions[:8], terminated=True)
    assert concerns(written(tmp_path / "a.zarr", [one, nearly, short])) == []
    steps = [Episode(np.zeros((2, 5)), np.zeros((1, 2)), terminated=True)] * 3  # a task of one step
    assert concerns(written(tmp_path / "b.zarr", steps)) == []
    assert concerns(open_store(tmp_path / "a.zarr"), duplicates=False) == []
