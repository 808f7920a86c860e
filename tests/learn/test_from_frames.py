"""All methods that learn from vectors learn from frames: alone and in company, cut short, compiled, streamed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import torch
from toy_frames import ALL, OBSERVE, filmed, run, write
from toy_runs import load, state_of
from toy_stores import moving_point

import cvlctl
from cvlctl import checkpoints
from cvlctl.data.load import join
from cvlctl.data.recipe import StoreUse
from cvlctl.data.stream import Stream
from cvlctl.errors import CvlctlError
from cvlctl.experiments import dry_run
from cvlctl.learn import loop
from cvlctl.learn.finetune import finetune
from cvlctl.learn.label import label_store
from cvlctl.learn.pretrain import pretrain
from cvlctl.learn.settings import have_compiler
from cvlctl.runs import read_metrics, remove
from cvlctl.types import Observe


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("frames") / "point.zarr")


@pytest.mark.parametrize("name", ALL)
def test_a_seed_learns_to_see_alike_alone_and_in_company(name: str, frames: Path, tmp_path: Path) -> None:
    run(name, frames, tmp_path / "alone", "seeds=[3]")
    run(name, frames, tmp_path / "together", "seeds=[0,3]")
    alone, together = state_of(tmp_path / "alone"), state_of(tmp_path / "together")
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        if value.dim():
            assert (value[0] - together[key][1]).abs().max() < 1e-5, key
    learned = [key for key in alone if "camera" in key and "/m/" in key and key.endswith("weight")]
    assert any("camera1.small.3" in key for key in learned)
    assert all(alone[key].abs().max() > 0 for key in learned), "an encoder does not learn"


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_ends_with_the_same_bits(name: str, frames: Path, tmp_path: Path, monkeypatch: Any) -> None:
    often = ("steps=6", "checkpoint_seconds=1e-9")
    run(name, frames, tmp_path / "whole", "steps=6")
    save = checkpoints.save

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        save(path, state, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_then_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(name, frames, tmp_path / "cut", *often)
    monkeypatch.setattr(checkpoints, "save", save)
    assert run(name, frames, tmp_path / "cut", *often)["status"] == "trained"
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


@pytest.mark.parametrize("name", ["bc", *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n != "bc")])
def test_a_captured_step_is_the_eager_one(name: str, frames: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run(name, frames, tmp_path / "eager", "steps=5")
    monkeypatch.setattr(loop, "programs_of", graphs.as_on_a_gpu)
    with graphs.emulated():
        run(name, frames, tmp_path / "graph", "steps=5")
    eager, graph = state_of(tmp_path / "eager"), state_of(tmp_path / "graph")
    for key, value in eager.items():
        torch.testing.assert_close(graph[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ALL)
def test_compiled_and_eager_steps_agree(name: str, frames: Path, tmp_path: Path) -> None:
    run(name, frames, tmp_path / "eager")
    run(name, frames, tmp_path / "compiled", "compile=true")
    eager, compiled = state_of(tmp_path / "eager"), state_of(tmp_path / "compiled")
    for key, value in eager.items():
        assert (value - compiled[key]).abs().max() < 2e-3, key


ALONE = "{cameras: [front], features: 6, shift: 0}"


def test_a_store_larger_than_memory_is_streamed(tmp_path: Path, capsys: Any) -> None:
    many = write(tmp_path / "many.zarr", num=30)
    assert run("bc", many, tmp_path / "run", "memory_gb=1.5e-4", observe=ALONE)["status"] == "trained"
    assert "streaming: of 930 rows" in capsys.readouterr().err
    store, observe = cvlctl.open_store(many), Observe(cameras=("left", "front"), stack=2, vector=True)
    use = StoreUse(path=many)
    with closing(Stream([store], [use], None, True, 400, 64 * 8, "cpu", observe)) as stream:
        whole = join([store], [use], None, True, observe)
        for block in (0, 1, 2):
            window = stream.at(block)
            row = window.layout.row
            for where, column in zip(window.observation[row, 0], row.tolist(), strict=True):
                same = int((whole.observation[:, 0] == where).nonzero()[0])
                assert all(torch.equal(a[column], b[same]) for a, b in zip(window.frames, whole.frames, strict=True))


@pytest.mark.parametrize("name", ["cvl", "laeo", "goal_conditioned"])
def test_a_frozen_critic_does_not_see_a_frame_twice(name: str, frames: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """An actor on features that were computed once is the one that is trained on frames, encoded batch by batch."""
    critic = "{hidden: [32, 32], latent_dim: 8, gamma: 0.9, ema_rate: 0.1}"
    observe = "{cameras: [front, left], stack: 2, features: 6, shift: 0, vector: true}"
    run("occupancy", frames, tmp_path / "critic", f"critic={critic}", "seeds=[0,1]", observe=observe)
    more = ("algorithm.mode=frozen", f"init_from={tmp_path / 'critic'}", "seeds=[1,0]")
    found = {}
    for how in ("once", "batches"):
        if how == "batches":
            monkeypatch.setattr("cvlctl.learn.finetune.encoded", lambda reading, *_: reading)
        recipe = recipe_without_critic(name, frames, tmp_path / how, *more, observe=observe)
        found[how] = recipe
    once, batches = (state_of(tmp_path / how) for how in found)
    assert (tmp_path / "once" / "features.npy").is_file()
    for key, value in batches.items():
        torch.testing.assert_close(once[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert remove(tmp_path / "once") == [], "features outlive their run"
    assert once["actor.0.weight"].shape[1] == 13 * (2 if name == "goal_conditioned" else 1)


def recipe_without_critic(name: str, store: Path, out: Path, *overrides: str, observe: str) -> Any:
    examples = f", success_examples: {{from: '{store}'}}" if name == "laeo" else ""
    text = f"steps: 20, observe: {observe}, algorithm: {{name: {name}, hidden: [16]}}{examples}"
    return finetune(load("finetune", store, out, text, "batch_size=8", *overrides))


@pytest.mark.parametrize("of", ["bc", "cvl"])  # which sees by an encoder of its own, and by the critic's
def test_a_policy_that_sees_is_evaluated_from_its_data(of: str, frames: Path, tmp_path: Path) -> None:
    run(of, frames, tmp_path / "policy", "steps=2", "seeds=[0,1]")
    text = f"steps: 10, observe: {OBSERVE}, algorithm: {{name: fqe, hidden: [16]}}, init_from: '{tmp_path / 'policy'}'"
    found = {}
    for name, seeds in (("alone", "seeds=[1]"), ("together", "seeds=[0,1]")):
        result = finetune(load("finetune", frames, tmp_path / name, text, "batch_size=8", seeds))
        found[name] = result["metrics"]["estimate"]
    assert np.isfinite(found["alone"]).all() and found["alone"][0] == pytest.approx(found["together"][1], abs=1e-4)
    before, after = state_of(tmp_path / "policy"), state_of(tmp_path / "together")
    learner = "actor" if of == "bc" else "phi"
    assert torch.equal(after["actor.camera1.small.2.weight"], before[f"{learner}.camera1.small.2.weight"])
    assert after["initial_frames0"].shape == (2, 6, 2, 10, 10, 3)


@pytest.mark.parametrize("rewards", ["oril", "purl"])
def test_rewards_are_learned_from_frames(rewards: str, frames: Path, tmp_path: Path) -> None:
    more = (f"success_examples={{from: '{frames}'}}", "labeller={steps: 150, batch_size: 16, hidden: [16]}", "steps=2")
    run("td3_bc", frames, tmp_path / "run", f"stores=[{{path: '{frames}', rewards: {rewards}}}]", *more)
    reward = checkpoints.load(tmp_path / "run" / "labels.safetensors")[0]["reward"][0]
    store = cvlctl.open_store(frames)
    near = np.exp(-np.square(np.concatenate([e.observations[:, :2] for e in moving_point()])).sum(1))
    assert reward.shape == (store.num_rows,)
    assert np.corrcoef(reward.numpy(), near > 0.5)[0, 1] > 0.3


def test_a_store_without_a_vector_gets_a_label_from_a_run_that_learned_it(tmp_path: Path) -> None:
    """What learns of vectors alone says how; labels that are not learned need none."""
    blind = write(tmp_path / "blind.zarr", num=3, vector=False)
    for more in ({}, {"examples": tmp_path / "good.npy"}):
        with pytest.raises(CvlctlError, match=r"blind.zarr has no vector") as told:
            label_store(blind, "mine", tmp_path / "out.zarr", rewards="oril", **more)
        assert "observe: {cameras: [front, left]}" in str(told.value) and "--rewards RUN" in str(told.value)
    more = (f"stores=[{{path: '{blind}', rewards: oril}}]", f"success_examples={{from: '{blind}'}}", "labeller.steps=2")
    run("td3_bc", blind, tmp_path / "run", *more, "steps=1", observe=ALONE)
    label_store(blind, "mine", tmp_path / "out.zarr", rewards=str(tmp_path / "run"))
    learned = checkpoints.load(tmp_path / "run" / "labels.safetensors")[0]["reward"][0].numpy()
    found = cvlctl.open_store(tmp_path / "out.zarr")
    np.testing.assert_array_equal(found.rewards("mine")[:20], learned[1:21])
    label_store(found.path, "sparse", tmp_path / "again.zarr", rewards="successes")
    assert cvlctl.open_store(tmp_path / "again.zarr").spec.cameras.keys() == {"front", "left"}


# --- what cannot be


def test_a_run_goes_on_with_what_its_critic_saw(frames: Path, tmp_path: Path, capsys: Any) -> None:
    """Said again or not, it is the same run; of a store that does not show it, or said otherwise, there is none."""
    run("occupancy", frames, tmp_path / "critic", "steps=1")
    start = (f"init_from={tmp_path / 'critic'}", "steps=3")
    text = "observe: null, algorithm: {name: cvl, hidden: [16]}"
    plan = dry_run.plan(load("finetune", frames, tmp_path / "plan", text, *start))
    assert "sees cameras front 10x10x3, left 8x9x3" in plan["sees"] and plan["recipe"]["observe"]["stack"] == 2
    finetuned(frames, tmp_path / "again", *start, observe=OBSERVE)
    capsys.readouterr()
    assert finetuned(frames, tmp_path / "taken", *start, observe="null")["status"] == "trained"
    assert "taken sees cameras front 10x10x3, left 8x9x3 (vector: true, stack: 2" in capsys.readouterr().err
    again, taken = state_of(tmp_path / "again"), state_of(tmp_path / "taken")
    assert again.keys() == taken.keys() and all(torch.equal(again[key], taken[key]) for key in again)
    assert finetuned(frames, tmp_path / "taken", *start, observe="null")["status"] == "finished already"
    assert (
        dry_run.plan(load("finetune", frames, tmp_path / "taken", text, "batch_size=8", *start))["state"] == "finished"
    )
    pretrain(load("pretrain", frames, tmp_path / "more", "steps: 1", start[0]))
    assert checkpoints.load(tmp_path / "more" / "checkpoints" / "last.safetensors")[1]["observe"]["stack"] == 2
    with pytest.raises(CvlctlError, match=r"saw .*stack: 2.*and here it is .*stack: 1"):
        finetuned(frames, tmp_path / "single", *start, observe="{cameras: [front, left], features: 6, vector: true}")
    run("occupancy", frames, tmp_path / "flat", "steps=1", observe="null")
    with pytest.raises(CvlctlError, match=r"saw the vector alone, and here it is cameras front 10x10x3"):
        finetuned(frames, tmp_path / "single", f"init_from={tmp_path / 'flat'}", observe=OBSERVE)


def finetuned(store: Path, out: Path, *overrides: str, observe: str) -> Any:
    return recipe_without_critic("cvl", store, out, *overrides, observe=observe)


@pytest.mark.parametrize(
    ("observe", "says"),
    [
        ("{cameras: [side]}", r"observe.cameras: .*point.zarr has no camera 'side'\n.*it has front, left"),
        ("{cameras: []}", r"observe.*cameras must name one or more"),
        ("{cameras: [front, front]}", r"cameras names one of them twice"),
        ("{cameras: [vector]}", r"a camera called vector cannot be told from the vector"),
        ("{cameras: [front], encoder: drq}", r"drq: the frames of camera front, 10x10, are too small"),
        ("{cameras: [front], encoder: resnet}", r"encoder.*'small', 'drq' or 'impala'"),
        ("{cameras: [front], stack: 0}", r"stack and features must be at least 1"),
    ],
)
def test_what_is_wrong_with_observe_is_said(observe: str, says: str, frames: Path, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match=f"(?s){says}"):
        run("bc", frames, tmp_path / "run", observe=observe)
    assert not (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()


def test_stores_must_show_the_same(frames: Path, store: Path, tmp_path: Path) -> None:
    left = [(one, one.images["left"]) for one in filmed(moving_point(2)) if one.images]
    wide = [cvlctl.Episode(e.observations, e.actions, e.rewards, images={"front": x, "left": x}) for e, x in left]
    other = cvlctl.write_store(tmp_path / "wide.zarr", wide, task="point").path
    with pytest.raises(CvlctlError, match=r"wide.zarr: the frames of camera front are 8x9x3, but .*10x10x3"):
        run("bc", frames, tmp_path / "run", f"stores=['{frames}', '{other}']")
    with pytest.raises(CvlctlError, match=r"(?s)point.zarr has no camera 'front'.*no cameras: leave observe out"):
        run("bc", store, tmp_path / "run")
    blind = write(tmp_path / "blind.zarr", vector=False)
    with pytest.raises(CvlctlError, match=r"(?s)blind.zarr has frames alone, and no vector.*cameras: \[front, left\]"):
        run("bc", blind, tmp_path / "run", observe="null")
    with pytest.raises(CvlctlError, match=r"observe.vector: .*blind.zarr has no vector"):
        run("bc", blind, tmp_path / "run")
    assert run("bc", blind, tmp_path / "run", "steps=1", observe=ALONE)["status"] == "trained"
    with pytest.raises(CvlctlError, match="algorithm contrastive_ac learns from vectors alone"):
        run("contrastive_ac", frames, tmp_path / "run")


def test_a_dry_run_says_so_beforehand(frames: Path, tmp_path: Path) -> None:
    text = "steps: 2, algorithm: bc, observe: {cameras: [CAMERA]}"
    sound, wrong = (
        load("finetune", frames, tmp_path / camera, text.replace("CAMERA", camera)) for camera in ("front", "side")
    )
    assert dry_run.plan(sound)["state"] == "to do"
    with pytest.raises(CvlctlError, match=r"observe.cameras: .*point.zarr has no camera 'side'"):
        dry_run.plan(wrong)
