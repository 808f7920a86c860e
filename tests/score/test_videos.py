"""`evaluate` with `video`: the episodes that were scored, as files beside the scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.play.videos import name_of
from cvlctl.score.evaluate import evaluate, render
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.rows import read_rows

pytestmark = pytest.mark.usefixtures("renders")
HOPPER = "gym/Hopper-v5"


def save_run(run: Path) -> None:
    """A run of two seeds, whose actors are random."""
    generator, sizes = torch.Generator().manual_seed(0), (11, 8, 6)
    state = {"observation_mean": torch.zeros(2, 11), "observation_std": torch.ones(2, 11)}
    for i in range(2):
        state[f"actor.{i}.weight"] = torch.randn(2, sizes[i], sizes[i + 1], generator=generator)
        state[f"actor.{i}.bias"] = torch.zeros(2, 1, sizes[i + 1])
    spec = {"observation_shape": [11], "action_dim": 3, "horizon": 1000, "pixels": False}
    metadata = {"algorithm": "bc", "task": HOPPER, "seeds": [0, 1], "step": 7, "spec": spec}
    checkpoints.save(run / "checkpoints" / "last.safetensors", state, metadata)


def recipe(folder: Path, **changes: Any) -> EvaluateRecipe:
    video = {"episodes": 1, "cameras": {"track": {"size": 16}}}
    plain = {"runs": [str(folder / "runs" / "*")], "episodes": 2, "horizon": 30, "workers": 0, "out": folder / "out"}
    return EvaluateRecipe.model_validate({**plain, "video": video, "confidence": {"resamples": 50}, **changes})


def test_videos_lie_beside_the_scores_and_go_with_another_recipe(tmp_path: Path) -> None:
    save_run(tmp_path / "runs" / "a")
    found = evaluate(recipe(tmp_path))
    folder = tmp_path / "out" / "videos"
    assert [video["path"] for video in found["videos"]] == [
        str(folder / f"bc_Hopper-v5_seed-{seed}_step-7_episode-0.gif") for seed in (0, 1)
    ]
    rows = {(row.seed, row.episode): row.episode_return for row in read_rows(tmp_path / "out" / "rows.jsonl")}
    assert [video["return"] for video in found["videos"]] == [rows[seed, 0] for seed in (0, 1)]
    with Image.open(found["videos"][0]["path"]) as shown:
        assert shown.n_frames > 1 and shown.size == (128, 128)
        first = np.asarray(shown.convert("RGB"))
    assert first.std() > 10
    console = Console(width=200)
    with console.capture() as told:
        render(found, console)
    assert f"videos: {folder}" in told.get()
    before = Path(found["videos"][0]["path"]).read_bytes()
    assert evaluate(recipe(tmp_path))["videos"] == found["videos"]
    more = {"episodes": 2, "cameras": {"track": {"size": 16}, "default": {"size": [16, 24]}}}
    again = evaluate(recipe(tmp_path, video=more, workers=2))
    assert len(again["videos"]) == 4 and len(list(folder.iterdir())) == 4
    assert Path(again["videos"][0]["path"]).read_bytes() != before
    assert "videos" not in evaluate(recipe(tmp_path, video=None)) and not folder.exists()


def test_what_cannot_be_filmed_is_said_before_anything_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "runs" / "a")
    with pytest.raises(CvlctlError, match="has no camera 'corner2'"):
        evaluate(recipe(tmp_path, video={"cameras": {"corner2": {}}}))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(CvlctlError, match="videos need PyAV"):
        evaluate(recipe(tmp_path, video={"format": "mp4"}))
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    for wrong in ({"cameras": {}}, {"format": "avi"}, {"episodes": 0}, {"cameras": {"x": {"size": 1}}}):
        with pytest.raises(ValueError, match=r"video\."):
            recipe(tmp_path, video=wrong)
    with pytest.raises(ValueError, match="EnvPool renders nothing"):
        recipe(tmp_path, backend="envpool")


def test_names_of_files_hold_no_places() -> None:
    class Job:
        algorithm, task, seed, step = "../cvl lam=0.1", "py/envs/reach.py:Reach", 3, 10

    assert name_of(Job, 2, "mp4") == "..%2Fcvl%20lam=0.1_envs%2Freach.py%3AReach_seed-3_step-10_episode-2.mp4"  # type: ignore[arg-type]
