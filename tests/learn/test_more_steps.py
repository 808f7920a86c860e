"""A finished run whose recipe says more steps goes on to the bits of the longer one; another label is just a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from toy_runs import run, state_of

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.runs import read_metrics, read_run

KEPT = ("checkpoint_every_steps=10", "validation=0.2", "label=first")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["occupancy", "cvl"])
def test_more_steps_end_with_the_bits_of_the_longer_run(name: str, store: Path, tmp_path: Path) -> None:
    """Also where the first end is no multiple of what is logged, in a folder that was moved, and of another label."""
    kept = KEPT[: 2 if name == "occupancy" else 3]
    run(name, store, tmp_path / "long", "steps=40", *kept)
    run(name, store, tmp_path / "first", "steps=15", *kept)
    (tmp_path / "first").rename(tmp_path / "moved")
    label = [] if name == "occupancy" else ["label=other"]
    assert run(name, store, tmp_path / "moved", "steps=40", *kept, *label)["status"] == "trained"
    assert run(name, store, tmp_path / "moved", "steps=40", *kept, *label)["status"] == "finished already"
    for file in sorted((tmp_path / "long" / "checkpoints").glob("*.safetensors")):
        long, moved = (
            checkpoints.load(folder / file.name)[0] for folder in (file.parent, tmp_path / "moved" / "checkpoints")
        )
        assert long.keys() == moved.keys() and all(torch.equal(long[key], moved[key]) for key in long), file.name
    assert read_metrics(tmp_path / "moved") == read_metrics(tmp_path / "long")
    record = read_run(tmp_path / "moved")
    assert (record["steps"], record["recipe"]["steps"]) == (40, 40)
    assert yaml.safe_load((tmp_path / "moved" / "recipe.yaml").read_text()) == record["recipe"]


def test_more_steps_interrupted_go_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("bc", store, tmp_path / "run", "steps=15")
    save = checkpoints.save

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", die)  # nothing of the longer run is on the disk but its record
    with pytest.raises(KeyboardInterrupt):
        run("bc", store, tmp_path / "run", "steps=30")
    assert read_run(tmp_path / "run")["status"] == "started"
    monkeypatch.setattr(checkpoints, "save", save)
    assert run("bc", store, tmp_path / "run", "steps=30")["status"] == "trained"
    run("bc", store, tmp_path / "whole", "steps=30")
    assert all(
        torch.equal(a, b)
        for a, b in zip(state_of(tmp_path / "run").values(), state_of(tmp_path / "whole").values(), strict=True)
    )
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_what_has_no_way_on_says_why_and_stays(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "run", "steps=15")
    before = contents(tmp_path / "run")
    for overrides, why, hint in (
        (["steps=14"], "steps was 15, now 14", "never back to fewer"),
        (["steps=30", "batch_size=16"], "batch_size was 32, now 16", "choose another out"),
        (["steps=30", "seeds=[1]"], "seeds was", "choose another out"),
    ):
        with pytest.raises(CvlctlError, match=why) as raised:
            run("bc", store, tmp_path / "run", *overrides)
        assert hint in raised.value.hint
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / "checkpoints" / "last.safetensors").unlink()
    with pytest.raises(CvlctlError, match="its last checkpoint is gone"):
        run("bc", store, tmp_path / "run", "steps=30")
    assert read_run(tmp_path / "run")["status"] == "finished"


def test_another_label_trains_nothing(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("bc", store, out, "steps=10", "label=before")
    before = contents(out / "checkpoints")
    for label, name in (("after", "after"), ("null", "bc")):
        result = run("bc", store, out, "steps=10", f"label={label}")
        assert (result["status"], result["algorithm"]) == ("finished already", name)
        record = read_run(out)
        assert (record["status"], record["algorithm"]) == ("finished", name)
        assert yaml.safe_load((out / "recipe.yaml").read_text()) == record["recipe"]
    assert contents(out / "checkpoints") == before


def test_no_schedule_depends_on_the_total() -> None:
    """Else more steps would not end with the bits of the longer run: such a schedule is counted in steps of its own."""
    for module in ALGORITHMS.values():
        assert not hasattr(module.Config, "steps")
