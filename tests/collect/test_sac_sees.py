"""SAC that learns from frames while it collects: it learns to see, and is stopped and goes on as from vectors."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_robots
from test_stopping import send_at
from toy_builds import Killed, die_in_step, recipe_for

import cvlctl
from cvlctl import checkpoints
from cvlctl.collect import replay
from cvlctl.collect.build import build
from cvlctl.collect.online import policies_dir
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.play.env import Env
from cvlctl.runs import read_metrics
from cvlctl.score.evaluate import evaluate
from cvlctl.types import Observe, Spec, Views

pytestmark = pytest.mark.usefixtures("no_fsync")
OBSERVE: dict[str, Any] = {"cameras": ["default"], "features": 8, "stack": 2, "shift": 1}
SAC = {"name": "sac", "steps": 42, "learning_starts": 14, "hidden": [8], "batch_size": 8, "observe": OBSERVE}


@pytest.fixture(scope="module")
def lamp(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"py/{toy_robots.write(tmp_path_factory.mktemp('lamp'))}:Lamp"


def recipe_of(out: Path, task: str, source: dict[str, Any] = SAC, **more: Any) -> BuildRecipe:
    env, cameras = {"kwargs": {"render_mode": "rgb_array"}}, {"default": {"size": 8}}
    return recipe_for(out, source, **({"task": task, "env": env, "horizon": 6, "cameras": cameras} | more))


def state_of(out: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(policies_dir(out) / "checkpoints" / "last.safetensors")[0]


def test_it_learns_to_act_on_what_it_sees(lamp: str, tmp_path: Path) -> None:
    more = {"steps": 300, "learning_starts": 60, "learning_rate": 3e-3, "gamma": 0.0, "policy_every_steps": 150}
    out = tmp_path / "lamp.zarr"
    sees = {"batch_size": 32, "observe": OBSERVE | {"shift": 0}}
    build(recipe_of(out, lamp, SAC | more | sees, checkpoint_seconds=1e9))
    assert cvlctl.open_store(out).spec.cameras == {"default": (8, 8, 3)}
    (tmp_path / "scores.yaml").write_text(
        f"{{runs: ['{policies_dir(out)}'], task: '{lamp}', env: {{kwargs: {{render_mode: rgb_array}}}}, episodes: 10, "
        f"workers: 0, out: '{tmp_path / 'scores'}'}}"
    )
    (row,) = evaluate(load(tmp_path / "scores.yaml", [], "evaluate"))["table"]
    assert row["return_mean"] > 3, "who sees nothing gets 0 on average, and nobody more than 6"
    chosen = {"run": policies_dir(out), "reaches": 1.0, "episodes": 2}
    build(recipe_of(tmp_path / "more.zarr", lamp, {"name": "policy", "checkpoints": chosen, "episodes": 3}, cameras={}))
    assert cvlctl.open_store(tmp_path / "more.zarr").rewards().mean() > 0.3


@pytest.fixture(scope="module")
def whole(lamp: str, tmp_path_factory: pytest.TempPathFactory) -> BuildRecipe:
    """A collection that nothing came in between of."""
    recipe = recipe_of(tmp_path_factory.mktemp("whole") / "whole.zarr", lamp)
    build(recipe)
    return recipe


@pytest.mark.parametrize("encoder", ["critic", "own"])
def test_killed_and_resumed_equals_uninterrupted(
    encoder: str, lamp: str, whole: BuildRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = SAC if encoder == "critic" else SAC | {"observe": OBSERVE | {"actor_encoder": "own", "vector": True}}
    cut, alone = recipe_of(tmp_path / "cut.zarr", lamp, source), whole
    if encoder == "own":
        alone = recipe_of(tmp_path / "whole.zarr", lamp, source)
        build(alone)
    with monkeypatch.context() as patched:
        die_in_step(patched, 33)
        with pytest.raises(Killed):
            build(cut)
    build(cut)
    assert "resuming at frame 24, episode 4" in capsys.readouterr().err
    same(alone, cut)
    names = state_of(cut.out)
    assert ("actor.camera0.small.0.weight" in names) and not any(name.startswith("critic.") for name in names)


def test_stopped_by_a_signal_it_goes_on_as_it_would_have(
    lamp: str, whole: BuildRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = recipe_of(tmp_path / "cut.zarr", lamp, checkpoint_seconds=1e9)
    with monkeypatch.context() as patched:
        send_at(patched, Env, "step", 33, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            build(cut)
    assert "stopped after 24 of 42 frames" in capsys.readouterr().err
    build(cut)
    same(whole, cut)


def same(one: BuildRecipe, two: BuildRecipe) -> None:
    ours, theirs = (cvlctl.open_store(recipe.out) for recipe in (one, two))
    assert ours.digest() == theirs.digest() and ours.label_digest() == theirs.label_digest()
    assert read_metrics(policies_dir(one.out)) == read_metrics(policies_dir(two.out))
    first, second = state_of(one.out), state_of(two.out)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("renders")
def test_what_is_learned_from_is_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a simulator whose state is known, too: drawn as it is played, and drawn of its states afterwards."""
    from cvlctl.collect.render_store import render

    seen: list[np.ndarray] = []
    before = replay.Instants.add

    def add(self: replay.Instants, vector: np.ndarray, frames: dict[str, np.ndarray], begins: bool) -> None:
        seen.append(frames["track"])
        before(self, vector, frames, begins)

    monkeypatch.setattr(replay.Instants, "add", add)
    source = SAC | {"steps": 30, "observe": {"cameras": ["track"], "features": 4}}
    build(recipe_for(tmp_path / "x.zarr", source, task="gym/Hopper-v5", cameras={"track": {"size": 16}}))
    store = cvlctl.open_store(tmp_path / "x.zarr")
    assert np.array_equal(store.images("track"), np.stack(seen))
    render(store.path, tmp_path / "again.zarr", ["track"], size="16", only=True, workers=0)
    assert np.array_equal(cvlctl.open_store(tmp_path / "again.zarr").images("track"), store.images("track"))
    policy = cvlctl.load_policy(policies_dir(store.path))
    assert policy({"track": store.images("track")[:2]}).shape == (2, 3)


def test_a_batch_by_hand() -> None:
    """Two episodes, of 2 and 1 transitions; each frame says its row."""
    spec = Spec((1,), 1, 5, cameras={"left": (2, 3, 3)})
    observe = Observe(cameras=("left",), vector=True, stack=2)
    instants = replay.Instants(2, spec, observe, "cpu")  # room for two: it grows
    buffer, row = replay.Replay(3, Spec((1,), 1, 5), None, instants), 0
    for episode, length in enumerate((2, 1)):
        for t in range(length + 1):
            instants.add(np.float32([row]), {"left": np.full((2, 3, 3), row, np.uint8)}, t == 0)
            if t > 0:
                buffer.add(np.float32([row - 1]), np.zeros(1), 10.0 * row, episode == 1, np.float32([row]), episode)
            row += 1
    batch = buffer.gather(torch.tensor([[0, 1, 2]]), 0.9, "cpu")
    assert isinstance(batch.observation, Views) and isinstance(batch.next_observation, Views)
    assert batch.observation.vector.flatten().tolist() == [0, 1, 3]
    assert batch.next_observation.vector.flatten().tolist() == [1, 2, 4]
    assert batch.observation.frames[0][0, :, :, 1, 1, 2].tolist() == [[0, 0], [0, 1], [3, 3]]
    assert batch.next_observation.frames[0][0, :, :, 1, 1, 2].tolist() == [[0, 1], [1, 2], [3, 4]]
    assert batch.reward.tolist() == [[10, 20, 40]] and batch.discount.tolist() == [
        [np.float32(0.9), np.float32(0.9), 0]
    ]
    latest = instants.latest()
    assert isinstance(latest, Views) and latest.frames[0][0, 0, :, 0, 0, 0].tolist() == [3, 4]


def test_shifts_are_a_function_of_seed_and_block() -> None:
    spec, wanted = Spec((1,), 1, 5), replay.samplers.Draws(6)
    one, two, plain = (
        replay.draw("sac", wanted, spec, seeds, 3, shift=shift) for seeds, shift in (([7], 2), ([0, 7], 2), ([7], 0))
    )
    assert one.shift is not None and two.shift is not None and plain.shift is None
    assert one.shift.shape == (64, 1, 12, 2) and torch.equal(one.shift[:, 0], two.shift[:, 1])
    assert set(one.shift.flatten().tolist()) == set(range(-2, 3))
    assert torch.equal(one.place, plain.place), "shifts changed what is drawn"


@pytest.mark.parametrize(
    ("about", "wrong"),
    [
        ({"cameras": {}}, "source.observe: default is none of cameras"),
        ({"cameras": {"front": {}}}, "source.observe: default is none of cameras"),
        ({"source": SAC | {"name": "contrastive_ac"}}, "observe"),
        ({"source": SAC | {"hindsight": 0.5}}, "hindsight relabels goals in vectors"),
        ({"source": SAC | {"observe": {"cameras": []}}}, "cameras must name one or more"),
    ],
)
def test_recipes_that_cannot_be_are_refused(about: dict[str, Any], wrong: str, lamp: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=wrong):
        recipe_of(tmp_path / "x.zarr", lamp, **about)


def test_frames_too_small_for_the_encoder_are_told_before_anything_is_collected(lamp: str, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="drq: the frames of camera default, 8x8, are too small"):
        build(recipe_of(tmp_path / "x.zarr", lamp, SAC | {"observe": OBSERVE | {"encoder": "drq"}}))
    assert not list(tmp_path.iterdir())
