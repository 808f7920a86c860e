"""Collections by learners that are killed: the same command goes on to the same store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_builds import CONTRASTIVE, SAC, Killed, die_before_finish, die_in_step, recipe_for, replayed

from cvlctl import checkpoints
from cvlctl.collect.build import build
from cvlctl.collect.online import policies_dir
from cvlctl.data.store import open_store
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.play import envs
from cvlctl.runs import read_metrics, read_run


def die_before_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = StoreWriter.flush, 0

    def flush(self: StoreWriter) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the learner's state of episode 2 is written, the store still holds one episode
            raise Killed
        before(self)

    monkeypatch.setattr(StoreWriter, "flush", flush)


def die_after_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = StoreWriter.flush, 0

    def flush(self: StoreWriter) -> None:
        nonlocal calls
        before(self)
        calls += 1
        if calls == 2:  # both states are there
            raise Killed

    monkeypatch.setattr(StoreWriter, "flush", flush)


@pytest.mark.parametrize(
    ("die", "episodes"), [(die_in_step, 2), (die_before_flush, 1), (die_after_flush, 2), (die_before_finish, 4)]
)
def test_killed_and_resumed_equals_uninterrupted(
    die: Any, episodes: int, built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "pendulum.zarr"
    recipe = recipe_for(out)
    with monkeypatch.context() as patched:
        die(patched)
        with pytest.raises(Killed):
            build(recipe)
    assert not out.exists()
    assert build(recipe)["status"] == "built"
    assert f"resuming at frame {min(200 * episodes, 650)}" in capsys.readouterr().err
    resumed, whole = open_store(out), open_store(built[0])
    assert resumed.digest() == whole.digest() and resumed.label_digest() == whole.label_digest()
    assert read_metrics(policies_dir(out)) == read_metrics(policies_dir(built[0]))
    ours, theirs = (checkpoints.load(policies_dir(p) / "checkpoints" / "last.safetensors")[0] for p in (out, built[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((policies_dir(out) / "checkpoints").glob("episodes-*"))


@pytest.mark.parametrize(("calls", "frame"), [(230, 200), (430, 400)])  # before learning starts, and after
def test_contrastive_killed_and_resumed_equals_uninterrupted(
    calls: int, frame: int, contrastive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "pendulum.zarr"
    with monkeypatch.context() as patched:
        die_in_step(patched, calls)
        with pytest.raises(Killed):
            build(recipe_for(out, CONTRASTIVE))
    build(recipe_for(out, CONTRASTIVE))
    assert f"resuming at frame {frame}" in capsys.readouterr().err
    resumed, whole = open_store(out), open_store(contrastive)
    assert resumed.digest() == whole.digest() and resumed.label_digest() == whole.label_digest()
    assert read_metrics(policies_dir(out)) == read_metrics(policies_dir(contrastive))
    ours, theirs = (
        checkpoints.load(policies_dir(p) / "checkpoints" / "last.safetensors")[0] for p in (out, contrastive)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_hindsight_changes_what_is_learned_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, source = "gym/FetchReach-v4", SAC | {"steps": 120, "hindsight": 0.8}
    recipes = {name: recipe_for(tmp_path / f"{name}.zarr", source, task=task) for name in ("whole", "killed")}
    recipes["without"] = recipe_for(tmp_path / "without.zarr", source | {"hindsight": 0.0}, task=task)
    with monkeypatch.context() as patched:
        die_in_step(patched, 110)
        with pytest.raises(Killed):
            build(recipes["killed"])
    for recipe in recipes.values():
        assert build(recipe)["status"] == "built"
    replayed(open_store(recipes["whole"].out), task, 0)  # the store holds what happened, with the goals that were told
    digests = {name: open_store(recipe.out).digest() for name, recipe in recipes.items()}
    assert digests["whole"] == digests["killed"] != digests["without"]


def test_damaged_learner_starts_over(
    built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pendulum.zarr"
    with monkeypatch.context() as patched:
        die_in_step(patched)
        with pytest.raises(Killed):
            build(recipe_for(out))
    (file,) = (policies_dir(out) / "checkpoints").glob("episodes-*")
    file.write_bytes(file.read_bytes()[:-100])
    build(recipe_for(out))
    assert "starting over" in capsys.readouterr().err
    assert open_store(out).digest() == open_store(built[0]).digest()


def test_forced_and_killed_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, short = tmp_path / "x.zarr", SAC | {"steps": 210}
    build(recipe_for(out, SAC | {"steps": 50}))
    with monkeypatch.context() as patched:
        die_before_finish(patched)
        with pytest.raises(Killed):
            build(recipe_for(out, short), force=True)
    assert len(open_store(out)) == 50  # the old one, until the new one is complete
    with pytest.raises(CvlctlError, match="--force"):
        build(recipe_for(out, short))
    monkeypatch.setattr(envs.Env, "step", None)  # nothing is left to collect
    assert build(recipe_for(out, short), force=True)["transitions"] == 210


def test_sac_finished_run_is_repaired_and_forced(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "x.zarr", SAC | {"steps": 60})
    build(recipe)
    folder = policies_dir(recipe.out)
    record = read_run(folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "started"}))  # killed between store and run
    assert build(recipe)["status"] == "finished already"
    assert read_run(folder)["status"] == "finished"
    assert build(recipe, force=True)["status"] == "built"
    longer = recipe_for(tmp_path / "x.zarr", SAC | {"steps": 70})
    with pytest.raises(CvlctlError, match="--force"):
        build(longer)
    assert build(longer, force=True)["transitions"] == 70
