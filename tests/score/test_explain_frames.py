"""What the Q of a critic that sees frames stands on: exact shares of states, and pictures of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import toy_frames
from test_filmed import RANDOM, recipe_of
from toy_runs import load
from toy_stores import moving_point

import cvlctl
from cvlctl import checkpoints
from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.collect.build import build
from cvlctl.data import shown
from cvlctl.data.samplers import marginal
from cvlctl.errors import CvlctlError
from cvlctl.frames import beside
from cvlctl.learn.finetune import finetune
from cvlctl.play import envs
from cvlctl.play.cameras import cameras_of
from cvlctl.play.eyes import renderer_of
from cvlctl.play.rollout import EVALUATION_SEED
from cvlctl.score import sheet
from cvlctl.score.explain import explain, map_q
from cvlctl.types import Episode

CAMERAS = ("front", "left")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_frames.write(tmp_path_factory.mktemp("frames") / "point.zarr", num=4)


@pytest.fixture(scope="module")
def runs(store: Path) -> Callable[..., Path]:
    """A run of a method on the store, trained once."""

    def of(name: str) -> Path:
        out = store.parent / name
        if not out.exists():
            toy_frames.run(name, store, out, "seeds=[4]", "steps=3")
        return out

    return of


def seen(episode: Episode, t: int) -> dict[str, np.ndarray]:
    """What is seen at a step: stacks of two, the first frame standing before itself."""
    assert episode.images is not None
    frames = {camera: episode.images[camera][[max(t - 1, 0), t]][None] for camera in CAMERAS}
    return {**frames, "vector": episode.observations[t : t + 1]}


def all_seen(episodes: list[Episode]) -> dict[str, np.ndarray]:
    every = [seen(episode, t) for episode in episodes for t in range(len(episode) + 1)]
    return {name: np.concatenate([one[name] for one in every]) for name in every[0]}


def test_shares_are_those_of_the_law_and_of_f(runs, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every state, whatever pieces psi is computed in; stacks made by hand."""
    monkeypatch.setattr(shown, "FRAMES", 17)
    run, opened = runs("cvl"), cvlctl.open_store(store)
    shutil.rmtree(run / "explain", ignore_errors=True)
    answers = explain(run, episode=1, steps=[0, 7, -1], top="all")
    assert [one["action"] for one in answers] == ["policy", "logged", "rejected"] * 3
    critic, episodes = cvlctl.load_critic(run, seed=4), list(opened.episodes())
    arrival, absorbed = marginal(opened.episode_ends(), opened.terminated(), np.ones(4, bool), critic.gamma)
    states, policy = all_seen(episodes), cvlctl.load_policy(run, seed=4)
    for one in answers:
        moment, action = seen(episodes[1], one["step"]), np.array([one["values"]], np.float32)
        ratio = np.exp(critic.log_ratio(moment, action, states)[0].astype(np.float64))
        total = (arrival + absorbed) @ ratio
        found = np.zeros(opened.num_rows)
        begins = np.append(0, opened.episode_ends())
        for state in one["states"]:
            found[begins[state["episode"]] + state["time"]] = state["weight"]
        np.testing.assert_allclose(found, arrival * ratio / total, rtol=1e-4, atol=1e-9)
        paid = sum(state["weight"] * state["reward"] for state in one["states"])
        assert one["q"] == pytest.approx(paid / (1 - critic.gamma))
        if one["action"] == "policy":
            np.testing.assert_allclose(action, policy(moment), atol=1e-6)
        if one["action"] == "logged":
            np.testing.assert_array_equal(action[0], episodes[1].actions[one["step"]])
    assert explain(run, episode=1, steps=[0], store=store, top="all") == answers[:3]


def test_laeo_names_the_success_examples(runs, store: Path) -> None:
    answers = explain(runs("laeo"), steps=[3], top="all")
    critic, episodes = cvlctl.load_critic(runs("laeo"), seed=4), list(cvlctl.open_store(store).episodes())
    for one in answers:
        places = [(state["episode"], state["time"]) for state in one["states"]]
        assert all(episodes[number].successes[time - 1] for number, time in places)
        every = [seen(episodes[number], time) for number, time in places]
        examples = {name: np.concatenate([e[name] for e in every]) for name in every[0]}
        f = critic.log_ratio(seen(episodes[0], 3), np.array([one["values"]], np.float32), examples)[0]
        ratio = np.exp(f.astype(np.float64))
        np.testing.assert_allclose([state["weight"] for state in one["states"]], ratio / ratio.sum(), rtol=1e-5)


def test_examples_of_a_file_are_its_rows_and_may_not_change(runs, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "good.npz"
    cvlctl.data.examples.examples(store, file, num=5)
    toy_frames.run("laeo", store, tmp_path / "run", "steps=1", f"success_examples={{file: '{file}'}}")
    answers = explain(tmp_path / "run", steps=[0], top="all")
    assert sorted(state["time"] for state in answers[0]["states"]) == list(range(5))
    assert (tmp_path / "run" / "explain" / "frames.png").is_file()
    arrays = dict(np.load(file))
    arrays["images/left"] = arrays["images/left"] + 1
    np.savez(file, **arrays)
    with pytest.raises(CvlctlError, match=r"good.npz is not what .* was trained on"):
        explain(tmp_path / "run")


def test_the_picture_shows_the_moment_and_the_states_that_weigh_most(
    runs, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[list[sheet.Cell]]] = []
    cells = sheet.cells
    monkeypatch.setattr(sheet, "cells", lambda *given: [drawn.append(x := cells(*given)), x][1])
    answers = explain(runs("cvl"), episode=2, steps=[5], top=6)
    episodes = list(cvlctl.open_store(store).episodes())
    for one, row in zip(answers, drawn[0], strict=True):
        places = [(2, 5), *((state["episode"], state["time"]) for state in one["states"])]
        for (number, time), (frame, _) in zip(places, row, strict=True):
            images = episodes[number].images
            assert images is not None
            np.testing.assert_array_equal(frame, beside([images[camera][time] for camera in CAMERAS]))
        assert row[0][1].startswith(f"step 5: {one['action']}\nQ ")
        assert f"ep. {places[1][0]}, step {places[1][1]}\nreward " in row[1][1]
    kept_at = runs("cvl") / "explain" / "frames.png"
    assert kept_at.read_bytes()[:4] == b"\x89PNG" and str(kept_at) in answers[0]["notes"][-1]
    target = tmp_path / "mine.png"
    target.write_bytes(b"mine")
    with pytest.raises(CvlctlError, match="exists"):
        explain(runs("cvl"), steps=[0], plot=target)
    explain(runs("cvl"), steps=[0], plot=target, force=True)
    assert target.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sheet, "DOWN", 2)
    assert len(explain(runs("cvl"), steps=[0])) == 3 and len(drawn[-1]) == 2


def test_where_nothing_can_be_written_the_answer_is_the_same(runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs("cvl"), run, ignore=shutil.ignore_patterns("explain"))
    (run / "explain").touch()
    (one, *_), (wanted, *_) = explain(run, steps=[2]), explain(runs("cvl"), steps=[2])
    assert one["q"] == pytest.approx(wanted["q"], rel=1e-5) and "frames are not drawn: " in one["notes"][-1]


def test_a_critic_without_a_policy_that_can_be_asked(runs, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("occupancy", "goal_conditioned"):
        assert {one["action"] for one in explain(runs(name), steps=[2])} == {"logged", "rejected"}
    assert execute(app.app, ["explain", str(runs("goal_conditioned")), "--steps", "2"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "told a goal" in found and "frames.png" in found.replace(" ", "")


def test_what_cannot_be_shown_is_one_error(runs, tmp_path: Path) -> None:
    run = runs("cvl")
    with pytest.raises(CvlctlError, match="cvl sees frames of front, left: a map is of columns of a vector"):
        map_q(run, (0, 0))
    episodes = [(one, one.images) for one in toy_frames.filmed(moving_point(2)) if one.images]
    others = {
        "blind": ({"front": "front"}, r"blind.zarr has no camera 'left'"),
        "other": ({"front": "left", "left": "left"}, r"front 8x9x3.*knows .*front 10x10x3"),
    }
    for name, (cameras, told) in others.items():
        made = [Episode(e.observations, e.actions, images={a: x[b] for a, b in cameras.items()}) for e, x in episodes]
        path = cvlctl.write_store(tmp_path / f"{name}.zarr", made, task="point").path
        with pytest.raises(CvlctlError, match=told):
            explain(run, store=path)


@pytest.mark.usefixtures("no_fsync", "renders")
def test_an_episode_is_played_by_what_the_policy_sees(tmp_path: Path) -> None:
    """The one that evaluations know by this number; its first moment is what the camera shows there, twice."""
    build(recipe_of(tmp_path / "hopper.zarr", RANDOM, {"track": {"size": 16}}), workers=1)
    text = "steps: 2, observe: {cameras: [track], stack: 2, features: 4, vector: true}, algorithm: {name: cvl, "
    critic = "hidden: [8], bank_size: 8, critic: {hidden: [8], latent_dim: 4}}"
    finetune(load("finetune", tmp_path / "hopper.zarr", tmp_path / "run", text + critic))
    answers = explain(tmp_path / "run", play=True, episode=3, steps=[0, -1])
    assert [one["action"] for one in answers] == ["policy", "rejected"] * 2
    with closing(envs.make("gym/Hopper-v5", EVALUATION_SEED)) as env:
        vector, policy = env.reset(3), cvlctl.load_policy(tmp_path / "run")
        frame = renderer_of(env, cameras_of({"track": {"size": 16}})).frames()["track"]
        wanted = policy({"track": frame[None], "vector": vector[None]})[0]
    np.testing.assert_allclose(answers[0]["values"], wanted, atol=1e-5)
    assert any("episode 3 of gym/Hopper-v5, played now: " in note for note in answers[0]["notes"])
    with pytest.raises(CvlctlError, match="its data do not say where front stands"):
        toy = toy_frames.write(tmp_path / "toy.zarr", num=2)
        toy_frames.run("cvl", toy, tmp_path / "toy", "steps=1")
        told = tmp_path / "toy" / "checkpoints" / "last.safetensors"
        state, metadata = checkpoints.load(told)
        checkpoints.save(told, state, {**metadata, "task": "gym/Hopper-v5"})
        explain(tmp_path / "toy", play=True)


def test_pieces_are_small_and_together_the_whole(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one store after another; a stack at the begin of a piece has what lies before it."""
    monkeypatch.setattr(shown, "FRAMES", 13)
    opened, observe = cvlctl.open_store(store), cvlctl.types.Observe(cameras=CAMERAS, stack=2, vector=True)
    found = list(shown.pieces([opened, opened], observe))
    assert max(len(one["vector"]) for one in found) == 13
    whole = all_seen(list(opened.episodes()))
    for name, wanted in whole.items():
        np.testing.assert_array_equal(np.concatenate([one[name] for one in found]), np.concatenate([wanted, wanted]))
    state = shown.state_of([opened, opened], observe)
    for j in (0, 5, opened.num_rows - 1, opened.num_rows, opened.num_rows + 31):
        for name, wanted in whole.items():
            np.testing.assert_array_equal(state(j)[name][0], wanted[j % opened.num_rows])
