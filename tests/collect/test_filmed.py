"""Stores with frames: recorded while they are collected, and rendered afterwards, to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_robots
from toy_builds import Killed, die_in_step, recipe_for, replayed
from typer.testing import CliRunner

from cvlctl.cli.app import app
from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.collect.render_store import render
from cvlctl.data.store import Store, open_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load

pytestmark = pytest.mark.usefixtures("no_fsync", "renders")
HOPPER = "gym/Hopper-v5"
FREE: dict[str, Any] = {"lookat": (0.0, 0.0, 1.0), "distance": 3.0, "azimuth": 90.0, "elevation": -10.0}
CAMERAS = {"track": {"size": 16}, "mine": {**FREE, "size": [16, 24]}}
RANDOM = {"name": "random", "episodes": 3}
SAC = {"name": "sac", "steps": 70, "learning_starts": 30, "hidden": [8], "batch_size": 8, "policy_every_steps": 50}


def recipe_of(out: Path, source: dict[str, Any], cameras: dict[str, Any] = CAMERAS, **more: Any) -> BuildRecipe:
    return recipe_for(out, source, **({"task": HOPPER, "cameras": cameras} | more))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("filmed") / "hopper.zarr"
    build(recipe_of(out, RANDOM), workers=1)
    return out


def frames_of(store: Store) -> dict[str, bytes]:
    return {name: store.images(name).tobytes() for name in store.spec.cameras}


def test_frames_and_states_lie_beside_the_same_episodes(filmed: Path, tmp_path: Path) -> None:
    store = open_store(filmed)
    assert store.spec.cameras == {"mine": (16, 24, 3), "track": (16, 16, 3)}
    assert store.attributes["cameras"]["mine"] == {**FREE, "lookat": [0.0, 0.0, 1.0], "size": [16, 24]}
    assert store.sim_state().shape == (store.num_rows, sum(store.attributes["sim_state"].values()))
    assert all(store.images(name).std() > 10 for name in store.spec.cameras)
    replayed(store, HOPPER, 0)
    plain = tmp_path / "plain.zarr"
    build(recipe_of(plain, RANDOM, {}))
    assert "cameras" not in open_store(plain).attributes and not open_store(plain).spec.cameras
    assert np.array_equal(open_store(plain).observations(), store.observations())


@pytest.mark.parametrize(("source", "number"), [(RANDOM, 40), (SAC, 60)])
def test_killed_and_resumed_equals_uninterrupted(
    source: dict[str, Any], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    build(recipe_of(whole, source), workers=1)
    with monkeypatch.context() as patched:
        die_in_step(patched, number)
        with pytest.raises(Killed):
            build(recipe_of(cut, source), workers=1)
    assert cut.with_name("cut.zarr.partial").exists()
    build(recipe_of(cut, source), workers=1)
    assert open_store(whole).digest() == open_store(cut).digest()
    assert np.array_equal(open_store(whole).sim_state(), open_store(cut).sim_state())
    with pytest.raises(CvlctlError, match="another recipe"):
        build(recipe_of(cut, source, {"track": {"size": 32}}), workers=1)


def test_a_learner_learns_the_same_with_cameras(tmp_path: Path) -> None:
    for name, cameras in (("seen", CAMERAS), ("plain", {})):
        build(recipe_of(tmp_path / f"{name}.zarr", SAC, cameras), workers=1)
    seen, plain = (open_store(tmp_path / f"{name}.zarr") for name in ("seen", "plain"))
    assert np.array_equal(seen.actions(), plain.actions()) and np.array_equal(seen.rewards(), plain.rewards())


def test_rendered_afterwards_gives_the_same_bytes(filmed: Path, tmp_path: Path) -> None:
    store, again = open_store(filmed), tmp_path / "again.zarr"
    render(filmed, again, ["track"], size="16", only=True, workers=2)
    render(again, tmp_path / "both.zarr", ["mine"], size="16x24", **FREE, workers=0)
    both = open_store(tmp_path / "both.zarr")
    assert frames_of(both) == frames_of(store) and both.digest() == store.digest()
    assert both.attributes["cameras"] == store.attributes["cameras"]
    assert both.provenance["parents"][0]["digest"] == open_store(again).digest()
    assert np.array_equal(both.rewards(), store.rewards())
    assert render(again, tmp_path / "both.zarr", ["mine"], size="16x24", **FREE)["status"] == "finished already"
    with pytest.raises(CvlctlError, match="exists"):
        render(filmed, again, ["track"], size="24", workers=0)
    render(filmed, again, ["track"], size="24", workers=0, force=True)
    larger = open_store(again)
    assert larger.spec.cameras == {"mine": (16, 24, 3), "track": (24, 24, 3)}
    assert larger.attributes["cameras"]["track"] == {"size": 24}
    assert frames_of(larger)["mine"] == frames_of(store)["mine"]


def test_what_cannot_be_rendered_is_said_and_leaves_nothing(filmed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    build(recipe_of(tmp_path / "plain.zarr", RANDOM, {}))
    for path, names, options, wrong in (
        (tmp_path / "plain.zarr", ["track"], {}, "no states of a simulator"),
        (filmed, ["corner"], {}, "has no camera 'corner'"),
        (filmed, ["track"], {"size": "4"}, "8 to 1024"),
        (filmed, ["track"], {"size": "large"}, "--size large is no size"),
        (filmed, ["a", "b"], FREE, "several are named"),
        (filmed, ["a"], {"distance": 1.0}, "no lookat, azimuth, elevation"),
    ):
        with pytest.raises(CvlctlError, match=wrong):
            render(path, out, names, **options, workers=0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plain.zarr"]


def test_the_command_renders(filmed: Path, tmp_path: Path) -> None:
    words = ["data", "render", str(filmed), "--camera", "mine", "--size", "16x24", "--only", "--workers", "0"]
    words += ["--lookat", "0", "0", "1", "--distance", "3", "--azimuth", "90", "--elevation", "-10"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "mine.zarr"), "--json"])
    assert done.exit_code == 0, done.output
    assert frames_of(open_store(tmp_path / "mine.zarr"))["mine"] == frames_of(open_store(filmed))["mine"]


def test_plans_count_frames(tmp_path: Path) -> None:
    plain, seen = (recipe_of(tmp_path / "x.zarr", RANDOM, cameras).work() for cameras in ({}, CAMERAS))
    assert plain.size == seen.size and seen.seconds == pytest.approx(21 * plain.seconds)  # two at 400, steps at 4,000


@pytest.mark.parametrize(
    ("about", "wrong"),
    [
        ({"source": RANDOM | {"backend": "envpool"}}, "EnvPool renders nothing"),
        ({"source": {"name": "stores", "stores": ["a.zarr"]}}, "cvlctl data render"),
        ({"cameras": {"track": {"size": 5000}}}, "1024"),
        ({"cameras": {"mine": {"lookat": [0, 0, 0]}}}, "no distance, azimuth, elevation"),
        ({"cameras": {"../x": {}}}, "not a plain name"),
    ],
)
def test_recipes_that_cannot_be_are_refused(about: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    plain = {"task": HOPPER, "source": RANDOM, "cameras": CAMERAS, "out": tmp_path / "x.zarr"} | about
    with pytest.raises(ValueError, match=wrong):
        BuildRecipe.model_validate(plain)


@pytest.mark.parametrize(
    ("cameras", "what", "hint"),
    [
        ("{corner3: {siez: 64}}", "unknown key cameras.corner3.siez", "did you mean size? "),
        ("{corner3: {size: [1, 2, 3]}}", "cameras.corner3.size: expected a whole number or a list of at most 2", ""),
        ("{m: {lookat: [1, 2]}}", "cameras.m.lookat: expected a list of 3, given the list [1, 2]", ""),
        ("{m: {lookat: []}}", "cameras.m.lookat: expected a list of 3, given the list []", ""),
        ("{m: 64}", "cameras.m: expected a mapping", ""),
    ],
)
def test_what_is_wrong_in_a_mapping_of_names_is_named(cameras: str, what: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"task: {HOPPER}\nsource: {{name: random, episodes: 1}}\nout: x.zarr\n")
    with pytest.raises(CvlctlError) as caught:
        load(tmp_path / "x.yaml", [f"cameras={cameras}"], "build-dataset")
    assert what in caught.value.what and caught.value.hint.startswith(hint)


def test_states_may_be_kept_without_frames(filmed: Path, tmp_path: Path) -> None:
    build(recipe_of(tmp_path / "states.zarr", RANDOM, {}, sim_state=True), workers=1)
    states, store = open_store(tmp_path / "states.zarr"), open_store(filmed)
    assert not states.spec.cameras and "cameras" not in states.attributes
    assert np.array_equal(states.sim_state(), store.sim_state())
    render(tmp_path / "states.zarr", tmp_path / "track.zarr", ["track"], size="16", workers=0)
    assert frames_of(open_store(tmp_path / "track.zarr"))["track"] == frames_of(store)["track"]
    with pytest.raises(CvlctlError, match="no state of its simulator"):
        build(recipe_of(tmp_path / "x.zarr", RANDOM, {}, sim_state=True, task="gym/Pendulum-v1"))


def test_what_an_environment_lacks_is_said_before_anything_is_collected(tmp_path: Path) -> None:
    out = tmp_path / "x.zarr"
    with pytest.raises(CvlctlError, match="has no camera 'corner2'"):
        build(recipe_of(out, RANDOM, {"corner2": {}}))
    with pytest.raises(CvlctlError, match="no MuJoCo simulates it"):
        build(recipe_of(out, RANDOM, task="gym/Pendulum-v1"))
    assert not list(tmp_path.iterdir())


def test_an_environment_of_ones_own_draws_itself(tmp_path: Path) -> None:
    task = f"py/{toy_robots.write(tmp_path)}:Drawn"
    about: dict[str, Any] = {"task": task, "horizon": 5, "env": {"kwargs": {"render_mode": "rgb_array"}}}
    build(recipe_of(tmp_path / "own.zarr", RANDOM, {"default": {"size": [10, 20]}}, **about))
    store = open_store(tmp_path / "own.zarr")
    frames, seen = store.images("default"), store.observations().reshape(-1, 2, 2)
    assert frames.shape == (store.num_rows, 10, 20, 3) and not store.has_sim_state
    far = np.clip(100 * np.linalg.norm(seen[:, 0] - seen[:, 1], axis=1), 0, 255)
    assert np.abs(frames[:, 0, 0, 0] - far).max() < 1.01 and not frames[:, :, 10:].any()
    with pytest.raises(CvlctlError, match="render_mode is None"):
        build(recipe_of(tmp_path / "y.zarr", RANDOM, {"default": {}}, task=task, horizon=5))
    with pytest.raises(CvlctlError, match="draws itself, from one place"):
        build(recipe_of(tmp_path / "y.zarr", RANDOM, {"corner": {}}, **about))
