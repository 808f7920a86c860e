"""The front doors of learning: which run a directory holds, what it starts from, and what is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import load, recipe_of, run, state_of, without
from toy_stores import moving_point

import cvlctl
from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.learn.finetune import finetune
from cvlctl.runs import Run, read_run

# ------------------------------------------------------------------------------------------------------ which run it is


def test_finished_run_says_so_and_another_recipe_is_refused(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("bc", store, out)
    before = state_of(out)
    assert run("bc", store, out)["status"] == "finished already"
    with pytest.raises(CvlctlError, match=r"steps was 100, now 50.*\n.*--force"):
        run("bc", store, out, "steps=50")
    assert all(torch.equal(before[k], v) for k, v in state_of(out).items())
    assert finetune(recipe_of("bc", store, out, "steps=50"), force=True)["status"] == "trained"
    assert read_run(out)["steps"] == 50


def test_force_deletes_a_runs_own_files_and_nothing_else(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("bc", store, out)
    (out / "mine").mkdir()
    (out / "mine" / "notes.txt").write_text("kept")
    assert finetune(recipe_of("bc", store, out, "steps=50"), force=True)["steps"] == 50
    assert (out / "mine" / "notes.txt").read_text() == "kept"
    (out / "run.json").write_text("{torn")
    with pytest.raises(CvlctlError, match=r"damaged(.|\n)*--force"):
        run("bc", store, out)
    assert finetune(recipe_of("bc", store, out), force=True)["status"] == "trained"
    for force in (False, True):
        with pytest.raises(CvlctlError, match="mine is not empty and not a run") as caught:
            finetune(recipe_of("bc", store, out / "mine"), force=force)
        assert "--force" not in caught.value.hint
        with pytest.raises(CvlctlError, match=r"notes\.txt is not a directory"):
            finetune(recipe_of("bc", store, out / "mine" / "notes.txt"), force=force)
    assert (out / "mine" / "notes.txt").read_text() == "kept"


def test_a_moved_run_is_the_same_run(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run("bc", store, tmp_path / "moved")["status"] == "finished already"


def test_a_run_that_has_no_checkpoint_yet_may_become_another(store: Path, tmp_path: Path) -> None:
    assert Run(tmp_path / "run", {"steps": 7}, {}).open() == "fresh"
    assert run("bc", store, tmp_path / "run")["status"] == "trained"


def test_a_run_of_an_earlier_version_is_the_same_run(store: Path, tmp_path: Path) -> None:
    """A recipe key that came since, left at its default, changes nothing; another value of it does."""
    run("cvl", store, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["recipe"]["algorithm"]["actor_form"], record["recipe"]["label"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert run("cvl", store, tmp_path / "run")["status"] == "finished already"
    with pytest.raises(CvlctlError, match='actor_form was "reparameterised", now "sampled"'):
        run("cvl", store, tmp_path / "run", "algorithm.actor_form=sampled", "algorithm.num_actions=2")


def test_changed_data_are_another_run(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    cvlctl.write_store(store, moving_point(), task="point")
    run("bc", store, tmp_path / "run")
    cvlctl.write_store(store, moving_point(seed=1), task="point", force=True)
    with pytest.raises(CvlctlError, match="holds another run"):
        run("bc", store, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- its data


def test_pretraining_never_opens_a_label(store: Path, tmp_path: Path) -> None:
    """With the labels gone, the run is the same bit for bit; finetuning from rewards is one clear error."""
    import shutil

    bare = tmp_path / "bare.zarr"
    shutil.copytree(store, bare)
    shutil.rmtree(bare / "labels")
    run("occupancy", store, tmp_path / "with")
    run("occupancy", bare, tmp_path / "without")
    a, b = state_of(tmp_path / "with"), state_of(tmp_path / "without")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(CvlctlError, match="given"):
        run("cvl", bare, tmp_path / "cvl")


def test_bad_data_are_named_before_training(store: Path, tmp_path: Path) -> None:
    import shutil

    import zarr

    bad = tmp_path / "bad.zarr"
    shutil.copytree(store, bad)
    zarr.open_array(bad / "data/observation", mode="r+")[7] = np.nan
    for name in ("occupancy", "bc"):
        with pytest.raises(CvlctlError, match=f"{bad}: data/observation: NaN or infinity"):
            run(name, bad, tmp_path / name)


def test_a_named_label_must_exist_even_if_it_is_not_read(store: Path, tmp_path: Path) -> None:
    text = "steps: 1, algorithm: {name: bc, hidden: [32]}"
    with pytest.raises(CvlctlError, match=f"{store}: no label 'fo' .*\n.*given/reward"):
        finetune(load("finetune", store, tmp_path / "run", text, f"stores=[{{path: '{store}', rewards: fo}}]"))
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- what it starts from


def test_seed_k_starts_from_seed_k(store: Path, tmp_path: Path) -> None:
    run("occupancy", store, tmp_path / "pre", "seeds=[0,1,2]")
    text = f"steps: 5, init_from: '{tmp_path / 'pre'}', algorithm: {{name: cvl, hidden: [32], mode: frozen}}"
    finetune(load("finetune", store, tmp_path / "fine", text, "seeds=[2,0]"))
    pre, fine = state_of(tmp_path / "pre"), state_of(tmp_path / "fine")
    assert torch.equal(fine["psi.1.weight"], pre["psi.1.weight"][[2, 0]])
    assert read_run(tmp_path / "fine")["recipe"]["mode"] == "frozen"
    with pytest.raises(CvlctlError, match=r"seeds \[0, 1, 2\], not \[7\]"):
        finetune(load("finetune", store, tmp_path / "other", text, "seeds=[7]"))
    finetune(load("finetune", store, tmp_path / "continued", text.replace("frozen", "continue"), "seeds=[2,0]"))
    assert not torch.equal(state_of(tmp_path / "continued")["psi.1.weight"], pre["psi.1.weight"][[2, 0]])


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"garbage" * 100, None])
def test_hostile_checkpoint_is_one_clear_error(content: bytes | None, store: Path, tmp_path: Path) -> None:
    run("occupancy", store, tmp_path / "pre")
    last = tmp_path / "pre" / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100] if content is None else content)
    text = f"steps: 5, init_from: '{tmp_path / 'pre'}', algorithm: {{name: cvl, hidden: [32]}}"
    with pytest.raises(CvlctlError, match=r"last\.safetensors"):
        finetune(load("finetune", store, tmp_path / "fine", text))
    with pytest.raises(CvlctlError, match=r"last\.safetensors"):
        cvlctl.load_critic(tmp_path / "pre")


def test_init_from_must_be_a_run_with_a_critic(store: Path, tmp_path: Path) -> None:
    def start(name: str) -> None:
        text = f"steps: 5, init_from: '{tmp_path / name}', algorithm: {{name: cvl, hidden: [32]}}"
        finetune(load("finetune", store, tmp_path / "fine", text))

    run("bc", store, tmp_path / "bc", "steps=1")
    with pytest.raises(CvlctlError, match=r"init_from: .*/bc \(bc\) has no occupancy critic"):
        start("bc")
    run("occupancy", store, tmp_path / "pretrained", "steps=1")
    with pytest.raises(CvlctlError, match=r"init_from: no run or checkpoint at .*/pretraned\n.*/pretrained\?"):
        start("pretraned")
    with pytest.raises(CvlctlError, match="cvlctl pretrain"):
        start("elsewhere/run")
    last = tmp_path / "pretrained" / "checkpoints" / "last.safetensors"
    sound = last.read_bytes()
    for key in ("seeds", "spec", "critic"):
        without(last, key)
        with pytest.raises(CvlctlError, match=rf"init_from: .*last\.safetensors .*KeyError: '{key}'"):
            start("pretrained")
        last.write_bytes(sound)
    state, metadata = checkpoints.load(last)
    checkpoints.save(last, state, {**metadata, "seeds": [0, 1]})
    with pytest.raises(CvlctlError, match="expected 2 members and width 4"):
        start("pretrained")
    assert not (tmp_path / "fine").exists()


def test_a_critic_loads_from_a_run_a_step_or_a_file(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("occupancy", store, out, "steps=4", "checkpoint_every_steps=2")
    x = np.ones((1, 4), np.float32)
    found = [
        cvlctl.load_critic(*arguments).log_ratio(x, x[:, :2], x).item()
        for arguments in ((out,), (out, 0, 4), (out / "checkpoints/last.safetensors",), (out, 0, 2))
    ]
    assert found[0] == found[1] == found[2] != found[3]
    with pytest.raises(CvlctlError, match=r"no checkpoint 'step-000000007'\n.*last, step-000000002"):
        cvlctl.load_critic(out, checkpoint=7)
    with pytest.raises(CvlctlError, match=r"no run or checkpoint at .*/rum\n.*/run\?"):
        cvlctl.load_critic(tmp_path / "rum")
    with pytest.raises(CvlctlError, match=r"no seed 5\n.*0"):
        cvlctl.load_critic(out, 5)
