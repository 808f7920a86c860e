"""Policies that see frames, played: workers draw, one process answers; the rows are the same for any number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_robots
from PIL import Image

import cvlctl
from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn.finetune import finetune
from cvlctl.play import videos
from cvlctl.play.rollout import roll


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lamp")
    task = f"py/{toy_robots.write(folder)}:Lamp"
    rng, episodes = np.random.default_rng(0), []
    for _ in range(40):
        side = rng.integers(2, size=7)
        frames = np.zeros((7, 8, 8, 3), np.uint8)
        for frame, one in zip(frames, side, strict=True):
            frame[2:6, 4 * one : 4 * one + 4] = 255, 200, 0
        actions = (0.95 * (2 * side[:-1, None] - 1)).astype(np.float32)
        episodes.append(cvlctl.Episode(None, actions, np.ones(6), images={"default": frames}))
    cvlctl.write_store(folder / "lamp.zarr", episodes, task=task)
    (folder / "bc.yaml").write_text(
        f"{{stores: ['{folder}/lamp.zarr'], out: '{folder}/bc', observe: {{cameras: [default], stack: 2, shift: 0}}, "
        "algorithm: {name: bc, hidden: [16], learning_rate: 3e-3}, steps: 120, batch_size: 32, compile: false, "
        "threads: 1, seeds: [0, 1]}"
    )
    finetune(load(folder / "bc.yaml", [], "finetune"))
    return folder


def scores(robot: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    return toy_robots.scores(robot / "bc", f"py/{robot}/robots.py:Lamp", out, "episodes=11", *overrides)


def test_the_policy_sees_and_rows_are_the_same_for_any_number_of_workers(robot: Path, tmp_path: Path) -> None:
    alone, two = scores(robot, tmp_path / "one", "workers=0"), scores(robot, tmp_path / "two", "workers=2")
    assert alone == two and len(alone) == 22
    assert {row["episode"] for row in alone} == set(range(11))
    assert min(row["episode_return"] for row in alone) > 4.5, "who sees nothing gets 0 on average"


def test_videos_are_of_the_episodes_that_were_scored(
    robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[float] = []

    def recorded(*args: Any) -> Any:
        found = roll(*args)
        played.append(sum(found[2]))
        return found

    monkeypatch.setattr(videos, "roll", recorded)
    film = ("episodes=2", "video={episodes: 2, cameras: {default: {size: 32}}}")
    rows = {(row["seed"], row["episode"]): row for row in scores(robot, tmp_path / "here", *film, "workers=0")}
    assert played == [rows[seed, episode]["episode_return"] for seed in (0, 1) for episode in (0, 1)]
    scores(robot, tmp_path / "there", *film, "workers=2")
    here, there = (sorted((tmp_path / name / "videos").iterdir()) for name in ("here", "there"))
    assert [file.name for file in here] == [file.name for file in there] and len(here) == 4
    assert [file.read_bytes() for file in here] == [file.read_bytes() for file in there]
    with Image.open(here[0]) as shown:
        assert shown.n_frames > 1  # type: ignore[attr-defined]


def test_where_cameras_stand_must_be_known(robot: Path, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match=r"sees cameras default; its data do not say where default stands\n.*size: 8"):
        scores(robot, tmp_path / "none", "cameras={}")
    with pytest.raises(CvlctlError, match="frames of default were 8x8x3, and here are 16x16x3"):
        scores(robot, tmp_path / "large", "cameras={default: {size: 16}}")
    with pytest.raises(CvlctlError, match="draws no frames: its render_mode is None"):
        scores(robot, tmp_path / "dark", "env=null", "workers=2")


def test_load_policy_takes_frames_and_says_what_it_wants(robot: Path, tmp_path: Path) -> None:
    policy = cvlctl.load_policy(robot / "bc", seed=1)
    frames = cvlctl.open_store(robot / "lamp.zarr").images("default")[:6]
    actions = policy({"default": frames})
    assert actions.shape == (6, 1) and actions.dtype == np.float32
    assert np.array_equal(actions, policy({"default": np.repeat(frames[:, None], 2, axis=1)}))
    assert np.array_equal(actions[:3], policy({"default": frames[:3]}))
    assert policy({"default": frames[:0]}).shape == (0, 1)
    with pytest.raises(CvlctlError, match="sees frames of default alone, and no range"):
        policy.outside({"default": frames})
    with pytest.raises(CvlctlError, match=r"bc \(bc\) has no occupancy critic"):
        cvlctl.explain(robot / "bc")
    lit = frames[:, 3, 6, 0] > 0
    assert (np.sign(actions[:, 0]) == np.where(lit, 1, -1)).all()
    for shown, says in (
        (frames, r"observations are a ndarray; this policy sees default\n.*\(N, 2, 8, 8, 3\) uint8"),
        ({"left": frames}, "observations lack default"),
        ({"default": frames.astype(np.float32)}, r"frames of default are float32 of shape"),
        ({"default": frames[:, :7]}, r"shape \(6, 7, 8, 3\)"),
    ):
        with pytest.raises(CvlctlError, match=says):
            policy(shown)
    file = tmp_path / "cut.safetensors"
    state, metadata = checkpoints.load(robot / "bc" / "checkpoints" / "last.safetensors")
    checkpoints.save(file, {k: v for k, v in state.items() if k != "actor.camera0.small.2.bias"}, metadata)
    with pytest.raises(CvlctlError, match=r"actor.camera0.small.2.bias has shape none: it is missing"):
        cvlctl.load_policy(file)
    broken = {**state, "actor.camera0.small.2.weight": state["actor.camera0.small.2.weight"] * torch.nan}
    checkpoints.save(file, broken, metadata)
    with pytest.raises(CvlctlError, match="holds NaN or infinity"):
        cvlctl.load_policy(file)
