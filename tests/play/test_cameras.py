"""Frames without a display, and states of simulators: the same bytes for the same state, and no digit changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvlctl.errors import CvlctlError
from cvlctl.play import envs, states
from cvlctl.play.cameras import Camera, Renderer, cameras_of, probe
from cvlctl.play.env import Env
from cvlctl.play.filming import Film, Studio
from cvlctl.play.workers import share_out

pytestmark = pytest.mark.usefixtures("renders")
DOOR, PUSH = "metaworld/door-open-v3", "gym/FetchPush-v4"
MINE = {"lookat": [0.0, 0.6, 0.2], "distance": 1.2, "azimuth": 160, "elevation": -20, "size": [24, 32]}
SETTINGS: dict[str, Any] = {"corner3": {"size": 32}, "mine": MINE, "default": {"size": 16}}


@pytest.fixture(scope="module", params=[DOOR, PUSH, "gym/Hopper-v5"])
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def door() -> Iterator[Env]:
    env = envs.make(DOOR, 0)
    env.reset(0)
    yield env
    env.close()


def settings(task: str) -> dict[str, Any]:
    return SETTINGS if task == DOOR else {name: SETTINGS[name] for name in ("mine", "default")}


def walked(env: Env, episode: int, steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    env.reset(episode)
    for _ in range(steps):
        env.step(rng.uniform(-1, 1, env.spec.action_dim))


def test_a_state_restored_elsewhere_looks_the_same_is_seen_the_same_and_goes_on_the_same(task: str) -> None:
    one, other = envs.make(task, 0), envs.make(task, 7)
    layout = states.layout(one)  # also before anything is played
    walked(one, 3, 12)
    assert states.layout(one) == layout == states.layout(other)
    walked(other, 11, 5, seed=1)
    state = states.state_of(one)
    with Renderer(one, cameras_of(settings(task))) as first:
        frames = first.frames()
    assert np.array_equal(states.restore(other, state), one.seen)
    assert np.array_equal(states.state_of(other), state)
    with Renderer(other, cameras_of(settings(task))) as second:
        for again in (second.frames(), second.frames(state)):
            assert all(np.array_equal(again[name], frame) for name, frame in frames.items())
    for action in np.random.default_rng(2).uniform(-1, 1, (20, one.spec.action_dim)):
        mine, theirs = one.step(action), other.step(action)
        assert np.array_equal(mine[0], theirs[0]) and mine[1:] == theirs[1:]
        if mine[2]:
            break


def test_rendering_changes_no_digit_of_an_episode(task: str) -> None:
    env, ends = envs.make(task, 0), []
    for filmed in (False, True):
        film = Film(env, cameras_of(settings(task))) if filmed else None
        walked(env, 2, 10)
        ends.append(states.state_of(env))
        if film is not None:
            told = env.filmed()
            film.close()
    assert np.array_equal(*ends) and np.array_equal(told["sim_state"][-1], ends[0])
    assert {name: frames.shape for name, frames in told["images"].items()} == {
        name: (11, *shape) for name, shape in film.shapes.items()
    }
    assert env.filmed() == {}


def test_a_frame_depends_on_no_other_camera_and_differs_with_the_state(door: Env) -> None:
    with Renderer(door, cameras_of(SETTINGS)) as together, Renderer(door, cameras_of({"mine": MINE})) as alone:
        frame = together.frames()["mine"]
        assert frame.shape == (24, 32, 3) == alone.shapes["mine"] and frame.std() > 20
        assert np.array_equal(alone.frames()["mine"], frame)
        walked(door, 1, 3)
        assert not np.array_equal(alone.frames()["mine"], frame)


def test_frames_are_upright(door: Env) -> None:
    """The wall and the table's top are brighter than the floor: corner cameras hang upside down."""
    above = np.array([0.0, 0.6, 1.5])
    model = states.simulator(door).model
    with Renderer(door, cameras_of({"corner2": {}})) as renderer:
        (_, view, turned) = renderer._scene._views[0]  # type: ignore[union-attr]
        top = model.cam_mat0[view.fixedcamid].reshape(3, 3)[:, 1] * (-1 if turned else 1)
        assert turned and top @ (above - [0, 0.6, 0]) > 0
        model.site_pos[model.site("goal").id] = [0, 0.6, 0.75]  # a green ball, high above the middle of the table
        frame = renderer.frames()["corner2"].astype(int)
    green = frame[..., 1] - frame[..., [0, 2]].max(axis=-1)
    assert np.unravel_index(green.argmax(), green.shape)[0] < 32 and green.max() > 60


def test_a_goal_of_fetch_is_shown_where_it_is() -> None:
    env = envs.make(PUSH, 0)
    env.reset(0)
    with Renderer(env, cameras_of({"default": {}})) as renderer:
        before = renderer.frames()["default"]
        env.raw.inside.goal += [0, 0.2, 0.2]
        assert not np.array_equal(renderer.frames()["default"], before)


@pytest.mark.parametrize(
    ("name", "about", "wrong"),
    [
        ("corner9", {}, "has no camera 'corner9'"),
        ("c", {"size": 4}, "8 to 1024 pixels"),
        ("c", {"size": True}, "8 to 1024 pixels"),
        ("c", {"size": [64, 64, 3]}, "8 to 1024 pixels"),
        ("c", {"lookat": [0, 0, 0], "distance": 1}, "no azimuth, elevation"),
        ("c", {**MINE, "lookat": [0, 0]}, "lookat is three numbers"),
        ("c", {**MINE, "distance": -1}, "above 0"),
        ("c", {**MINE, "distance": float("nan")}, "degrees"),
        ("c", {"zoom": 2}, "unknown key zoom"),
        ("../c", {}, "not a plain name"),
    ],
)
def test_what_is_wrong_with_a_camera_is_said(door: Env, name: str, about: dict[str, Any], wrong: str) -> None:
    with pytest.raises(CvlctlError) as caught:
        Renderer(door, cameras_of({name: about}))
    assert wrong in caught.value.what
    if name == "corner9":
        assert caught.value.hint.startswith("it has corner, corner")
    assert Camera.of("mine", MINE).about() == MINE


def test_a_state_of_another_task_is_refused(door: Env) -> None:
    with pytest.raises(CvlctlError, match="a state of metaworld/door-open-v3 has 216 numbers"):
        states.restore(door, np.zeros(3))
    pendulum = envs.make("gym/Pendulum-v1", 0)
    with pytest.raises(CvlctlError, match="no state of its simulator"):
        states.state_of(pendulum)
    with pytest.raises(CvlctlError, match="no MuJoCo simulates it"):
        Renderer(pendulum, cameras_of({"default": {}}))


@pytest.mark.parametrize("gl", ["egl", "nonsense", "disabled"])
def test_a_machine_that_cannot_render_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gl: str) -> None:
    monkeypatch.setenv("MUJOCO_GL", gl)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", str(tmp_path))  # as where no driver is installed
    with pytest.raises(CvlctlError) as caught:
        next(iter(share_out("cvlctl.play.cameras:probe", [None], 1)))
    assert f"MUJOCO_GL={gl}" in caught.value.what and "unset it" in caught.value.hint


def test_the_machine_says_what_it_renders_by() -> None:
    assert probe().startswith(f"{os.environ['MUJOCO_GL']}: ")


def test_workers_draw_the_same_bytes(door: Env) -> None:
    cameras, rows = cameras_of({"corner3": {"size": 16}}), []
    door.reset(4)
    for action in np.random.default_rng(0).uniform(-1, 1, (6, 4)):
        door.step(action)
        rows.append(states.state_of(door))
    with Studio(door, cameras, 0) as one, Studio(door, cameras, 2) as two:
        alone, together = (studio.frames(np.stack(rows))["corner3"] for studio in (one, two))
        assert np.array_equal(alone, together) and alone.shape == (6, 16, 16, 3)
        with pytest.raises(CvlctlError, match="has 216 numbers"):
            two.frames(np.zeros((2, 3)))
        os.kill(two._processes[0].pid, signal.SIGKILL)
        with pytest.raises(CvlctlError, match="worker process died"):
            two.frames(np.stack(rows))
