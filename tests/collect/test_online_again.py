"""An online collection that is begun anew, or whose learner's state is damaged: as if nothing had been before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_stopping import CONTRASTIVE, SAC, digests, recipe_of

from cvlctl import checkpoints
from cvlctl.collect import online
from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.writer import StoreWriter
from cvlctl.runs import read_metrics, read_run

pytestmark = pytest.mark.usefixtures("no_fsync")
SMALL = {"steps": 60, "learning_starts": 30}
FRAMES = [20, 40, 60]


def small(out: Path, source: dict[str, Any] = SAC) -> BuildRecipe:
    return recipe_of(out, source | SMALL, horizon=20, checkpoint_seconds=1e-9)


class Killed(BaseException):
    """Nothing catches it, as nothing does a kill."""


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRecipe:
    """A collection that was killed after its last checkpoint, before its store was finished."""
    recipe = small(tmp_path / "sac.zarr")

    def dies(self: StoreWriter, **more: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(StoreWriter, "finish", dies)
        build(recipe)
    assert [line["step"] for line in read_metrics(online.policies_dir(recipe.out))] == FRAMES
    return recipe


def test_force_after_a_kill_writes_its_metrics_once(killed: BuildRecipe) -> None:
    build(killed, force=True)
    policies = online.policies_dir(killed.out)
    assert [line["step"] for line in read_metrics(policies)] == FRAMES
    assert read_run(policies)["status"] == "finished"
    assert not list(policies.glob("checkpoints/episodes-*")) and not list(policies.rglob(".*.tmp"))


@pytest.mark.parametrize("damage", ["flipped", "lacking", "of another learner", "metrics"])
def test_a_damaged_state_is_told_and_the_collection_starts_over(
    damage: str, killed: BuildRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = online.policies_dir(killed.out)
    file = policies / "checkpoints" / "episodes-000000003.safetensors"
    state, metadata = checkpoints.load(file)
    if damage == "flipped":
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes(damaged)
    elif damage == "lacking":
        del state[next(name for name in state if name.startswith("adam/"))]
        checkpoints.save(file, state, metadata)
    elif damage == "of another learner":
        build(small(tmp_path / "other.zarr", CONTRASTIVE))
        (tmp_path / "other.policies" / "checkpoints" / "last.safetensors").rename(file)
    else:
        file.unlink()
        (policies / "metrics.jsonl").write_bytes(b"\xff\n[]\n")
    build(killed)
    assert "the learner's state for it is lost; starting over" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(policies)] == FRAMES
    if damage == "lacking":
        assert digests(killed.out) == digests(Path(build(small(tmp_path / "whole.zarr"))["path"]))


def test_leftovers_of_a_kill_in_a_checkpoint_go_with_the_next_command(killed: BuildRecipe) -> None:
    left = online.policies_dir(killed.out) / "checkpoints" / ".episodes-000000002.safetensors.4711.tmp"
    left.write_bytes(b"half")
    build(killed)
    assert not left.exists()
