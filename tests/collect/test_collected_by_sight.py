"""Stores collected by policies that see frames, which are rendered as they play."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_filmed import RANDOM, recipe_of
from toy_builds import Killed, die_in_step
from toy_runs import load

import cvlctl
from cvlctl import checkpoints
from cvlctl.collect.build import build
from cvlctl.errors import CvlctlError
from cvlctl.learn.finetune import finetune
from cvlctl.play import envpool

pytestmark = pytest.mark.usefixtures("no_fsync", "renders")
TRACK = {"track": {"size": 16}}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, hardly trained, of Hopper's camera."""
    folder = tmp_path_factory.mktemp("seeing")
    build(recipe_of(folder / "hopper.zarr", RANDOM, TRACK), workers=1)
    text = "steps: 3, algorithm: {name: bc, hidden: [8]}, observe: {cameras: [track], stack: 3, features: 4, shift: 0}"
    finetune(load("finetune", folder / "hopper.zarr", folder / "run", text))
    return folder / "run"


def source_of(run: Path, **more: Any) -> dict[str, Any]:
    return {"name": "policy", "checkpoints": [run / "checkpoints" / "last.safetensors"], "episodes": 2, **more}


def test_actions_are_those_of_the_frames_that_are_recorded(seeing: Path, tmp_path: Path) -> None:
    build(recipe_of(tmp_path / "seen.zarr", source_of(seeing, greedy=True), TRACK), workers=1)
    store, policy = cvlctl.open_store(tmp_path / "seen.zarr"), cvlctl.load_policy(seeing)
    for episode in store.episodes():
        frames, rows = episode.images["track"], np.arange(len(episode))
        stacks = frames[np.maximum(rows[:, None] - [2, 1, 0], 0)]
        np.testing.assert_allclose(episode.actions, policy({"track": stacks}), atol=1e-5)
    assert store.actions().std(axis=0).max() > 0.01
    build(recipe_of(tmp_path / "unseen.zarr", source_of(seeing, greedy=True), {}))
    unseen = cvlctl.open_store(tmp_path / "unseen.zarr")
    assert np.array_equal(unseen.actions(), store.actions()) and not unseen.spec.cameras


def test_a_killed_collection_goes_on_as_it_would_have(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (recipe_of(tmp_path / f"{name}.zarr", source_of(seeing, noise=0.2), {}) for name in ("whole", "cut"))
    build(whole)
    with monkeypatch.context() as patched:
        die_in_step(patched, len(next(cvlctl.open_store(whole.out).episodes())) + 3)
        with pytest.raises(Killed):
            build(cut)
    build(cut)
    assert cvlctl.open_store(whole.out).digest() == cvlctl.open_store(cut.out).digest()


def test_what_a_policy_cannot_be_shown_is_said_before_anything_is_collected(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, metadata = checkpoints.load(seeing / "checkpoints" / "last.safetensors")
    checkpoints.save(tmp_path / "checkpoints" / "last.safetensors", state, {**metadata, "cameras": {}})
    out = tmp_path / "x.zarr"
    with pytest.raises(CvlctlError, match=r"do not say where track stands\n.*cameras: \{track: \{size: 16\}\}"):
        build(recipe_of(out, source_of(tmp_path), {}))
    with pytest.raises(CvlctlError, match="frames of track were 16x16x3, and here are 24x24x3"):
        build(recipe_of(out, source_of(tmp_path), {"track": {"size": 24}}), workers=1)
    monkeypatch.setattr(envpool, "announced_versions", lambda task, out: {})  # as if it were installed
    with pytest.raises(CvlctlError, match="sees frames, and EnvPool renders nothing"):
        build(recipe_of(out, source_of(seeing, backend="envpool"), {}))
    assert not out.exists() and not out.with_name("x.zarr.partial").exists()
