"""`validation`: episodes that are held out, and their losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import MOST, run, state_of
from toy_stores import moving_point

from cvlctl import checkpoints
from cvlctl.data.load import hold_out, join
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import Data, Draws, draw
from cvlctl.data.store import open_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.pictures import plot_metrics
from cvlctl.runs import read_metrics


def read(store: Path, **use: object) -> Data:
    return join([open_store(store)], [StoreUse.model_validate({"path": store, **use})], None, True)


def episodes(data: Data) -> set[int]:
    return set(data.layout.last.tolist())


def test_whole_episodes_are_held_out_and_nothing_is_lost(store: Path) -> None:
    data = read(store)
    learned, held = hold_out(data, 0.25)
    assert not episodes(learned) & episodes(held) and episodes(learned) | episodes(held) == episodes(data)
    assert len(episodes(held)) == round(0.25 * len(episodes(data)))
    assert sorted([*learned.layout.row.tolist(), *held.layout.row.tolist()]) == data.layout.row.tolist()
    assert held.observation is data.observation  # no copy
    assert episodes(hold_out(data, 0.25)[1]) == episodes(held)  # the same ones each time


def test_labels_keep_to_their_transitions(store: Path) -> None:
    """Of a store in which a third of the episodes has labels, each side has its share, and no others are drawn."""
    data = read(store, fraction=0.34)
    with_labels = set(data.layout.last[data.labelled].tolist())
    for part in hold_out(data, 0.3):
        mine = with_labels & episodes(part)
        assert mine and episodes(part) - with_labels
        assert set(part.layout.last[part.labelled].tolist()) == mine
        assert len(part.labelled) == torch.isin(part.layout.last, torch.tensor(sorted(mine))).sum()
        indices, _ = draw(part, Draws(64, 0.9, transitions=True, bank=64), [0, 1], 0, 4)
        rows = torch.cat([indices.row.flatten(), indices.bank_row.flatten() - 1])
        last = data.layout.last[torch.searchsorted(data.layout.row, rows.clamp_max(int(data.layout.row[-1])))]
        assert set(last.tolist()) <= mine


@pytest.mark.parametrize("use", [{}, {"fraction": 1e-9}])
def test_a_single_episode_cannot_be_held_out(use: dict[str, object], tmp_path: Path) -> None:
    toy = moving_point()
    store = write_store(tmp_path / "one.zarr", toy if use else toy[:1], task="point").path
    with pytest.raises(CvlctlError, match=r"validation: 0\.05 of the episodes cannot be held out: there is only one"):
        hold_out(read(store, **use), 0.05)


@pytest.mark.parametrize("name", MOST)
def test_looking_changes_no_bit_and_resumes(name: str, store: Path, tmp_path: Path, monkeypatch) -> None:
    """Held-out losses are logged beside the others, every time; how often they are looked at changes nothing."""
    run(name, store, tmp_path / "often", "steps=30", "validation=0.2")
    run(name, store, tmp_path / "once", "steps=30", "validation=0.2", "log_every_steps=30")
    often, once = state_of(tmp_path / "often"), state_of(tmp_path / "once")
    assert all(torch.equal(often[key], once[key]) for key in often)
    for line in read_metrics(tmp_path / "often"):
        own = [key for key in line if key != "step" and not key.startswith("validation/")]
        assert own and all(np.isfinite(line[f"validation/{key}"]).all() for key in own), line
        assert all(line[key] != line[f"validation/{key}"] for key in own if key.endswith(("loss", "/bc", "nce")))

    save = checkpoints.save

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        save(path, state, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(name, store, tmp_path / "cut", "steps=30", "validation=0.2", "checkpoint_seconds=1e-9")
    monkeypatch.setattr(checkpoints, "save", save)
    run(name, store, tmp_path / "cut", "steps=30", "validation=0.2", "checkpoint_seconds=1e-9")
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "often")


def test_held_out_losses_tell_learning_by_heart(tmp_path: Path) -> None:
    """Cloning noise: the loss of what it was trained on falls, that of the rest rises."""
    rng = np.random.default_rng(0)
    toy = [
        replace(episode, actions=rng.uniform(-1, 1, episode.actions.shape).astype(np.float32))
        for episode in moving_point()[:5]
    ]
    store = write_store(tmp_path / "noise.zarr", toy, task="point").path
    run("bc", store, tmp_path / "bc", "steps=600", "validation=0.3", "algorithm.hidden=[128,128]",
        "algorithm.learning_rate=0.003", "log_every_steps=50")  # fmt: skip
    first, last = (read_metrics(tmp_path / "bc")[i] for i in (0, -1))
    assert last["actor/bc"][0] < 0.7 * first["actor/bc"][0]
    assert last["validation/actor/bc"][0] > first["validation/actor/bc"][0]


def test_streaming_refuses(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvlctl.learn.loop.window_rows", lambda *_: 1_000)
    with pytest.raises(CvlctlError, match="validation: the stores are larger than memory_gb allows"):
        run("bc", store, tmp_path / "bc", "validation=0.2")


def test_a_picture_has_both_in_one_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("cvlctl.learn.pictures.save_figure", lambda figure, path: drawn.extend(
        f"{axes.get_title(loc='left')}: {[line.get_label() for line in axes.get_lines() if line.get_label()[0] != '_']}"
        for axes in figure.axes
    ))  # fmt: skip
    plot_metrics([{"step": i, "loss": [1.0, 2.0], "validation/loss": [2.0, 3.0]} for i in (1, 2)], tmp_path / "x.png")
    assert drawn == ["loss: ['training', 'held out']"]
