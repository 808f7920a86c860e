"""Goal-conditioned policies that see frames, sent to states that are shown as frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_robots
from PIL import Image
from toy_frames import picture, run, write

import cvlctl
from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn import networks
from cvlctl.learn.algorithms import goal_conditioned, occupancy
from cvlctl.learn.export import export
from cvlctl.learn.finetune import finetune
from cvlctl.play import envs
from cvlctl.play.rollout import EVALUATION_SEED
from cvlctl.types import Views

ROBOT = '''
import gymnasium
import numpy as np
from gymnasium.spaces import Box


def picture(x):
    frame = np.zeros((8, 8, 3), np.uint8)
    at = int(round(3 * (x + 1)))
    frame[3:5, at : at + 2] = 255, 200, 0
    return frame


class Slider(gymnasium.Env):
    """Something that slides along a line in [-1, 1]; nothing is rewarded."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.observation_space, self.action_space = Box(-1, 1, (1,)), Box(-1, 1, (1,), np.float32)
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.x = 0, float(self.np_random.uniform(-1, 1))
        return np.float32([self.x]), {}

    def step(self, action):
        self.time, self.x = self.time + 1, float(np.clip(self.x + 0.5 * action[0], -1, 1))
        return np.float32([self.x]), 0.0, False, self.time == 8, {}

    def render(self):
        return picture(self.x)
'''

CODE: dict[str, Any] = {}
exec(ROBOT, CODE)


@pytest.fixture(scope="module")
def slider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of random slides, and a policy that is told goals as frames."""
    folder = tmp_path_factory.mktemp("slider")
    (folder / "slider.py").write_text(ROBOT)
    rng, episodes = np.random.default_rng(0), []
    for _ in range(60):
        x, actions = [rng.uniform(-1, 1)], rng.uniform(-1, 1, (8, 1))
        for action in actions[:, 0]:
            x.append(float(np.clip(x[-1] + 0.5 * action, -1, 1)))
        frames = np.stack([CODE["picture"](at) for at in x])
        episodes.append(cvlctl.Episode(np.float32(x)[:, None], actions, images={"default": frames}))
    cvlctl.write_store(folder / "store.zarr", episodes, task=f"py/{folder}/slider.py:Slider")
    (folder / "recipe.yaml").write_text(
        f"{{stores: [{{path: '{folder}/store.zarr', rewards: none}}], out: '{folder}/run', steps: 130, threads: 1, "
        "observe: {cameras: [default], features: 8, shift: 0}, batch_size: 64, compile: false, algorithm: {name: "
        "goal_conditioned, hidden: [32], learning_rate: 4e-3, critic: {gamma: 0.5, hidden: [32], latent_dim: 8, "
        "learning_rate: 4e-3}}}"
    )
    finetune(load(folder / "recipe.yaml", [], "finetune"))
    return folder


def played(slider: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    task = f"py/{slider}/slider.py:Slider"
    return toy_robots.scores(slider / "run", task, out, "episodes=10", "workers=0", *overrides)


def test_policies_arrive_at_what_they_are_shown(slider: Path, tmp_path: Path) -> None:
    """By hand, and so says an evaluation."""
    goals = f"goals={{from: '{slider}/store.zarr', num: 7, columns: [0], within: 0.25}}"
    rows = played(slider, tmp_path / "one", goals)
    with np.load(tmp_path / "one" / "goals.npz") as kept:
        shown, states = kept["default"], np.load(tmp_path / "one" / "goals.npy")[:, 0]
    assert shown.shape == (7, 1, 8, 8, 3)
    task = f"py/{slider}/slider.py:Slider"
    env = envs.make(task, EVALUATION_SEED, 8, envs.named(task))
    x = np.array([env.reset(episode)[0] for episode in range(10)])
    sent = np.arange(10) % 7
    policy, before, nearest = cvlctl.load_policy(slider / "run"), np.abs(x - states[sent]), np.full(10, np.inf)
    for _ in range(8):
        frames = np.stack([CODE["picture"](at) for at in x])
        x = np.clip(x + 0.5 * policy({"default": frames}, goal={"default": shown[sent]})[:, 0], -1, 1)
        nearest = np.minimum(nearest, np.abs(x - states[sent]))
    assert before.mean() > 0.5 and np.abs(x - states[sent]).mean() < 0.3
    assert [row["success"] for row in rows] == (nearest < 0.25).tolist()


@pytest.mark.parametrize("how", ["critic", "own", "averaged"])
def test_what_plays_is_what_was_trained(how: str, tmp_path: Path) -> None:
    store, out = write(tmp_path / "point.zarr"), tmp_path / "run"
    more = ["algorithm.critic.ema_rate=0.5"] if how == "averaged" else []
    run("goal_conditioned-own" if how == "own" else "goal_conditioned", store, out, *more)
    (file,) = (out / "checkpoints").glob("last*")
    state, metadata = checkpoints.load(file)
    policy, rng = cvlctl.load_policy(out), np.random.default_rng(0)
    seen, goal = (picture(rng.normal(size=(8, 2))).reshape(4, 2, 10, 10, 3) for _ in range(2))
    vectors = rng.normal(size=(2, 4, 1)).astype(np.float32)
    shown = [{"front": x, "left": x[:, :, :8, 1:], "vector": v} for x, v in zip((seen, goal), vectors, strict=True)]
    views = [
        networks.normalise(state, Views(*(
            torch.from_numpy(x["vector"])[None], tuple(torch.from_numpy(x[name])[None] for name in ("front", "left"))
        )))
        for x in shown
    ]  # fmt: skip
    critic = occupancy.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in metadata["critic"].items()})
    config = goal_conditioned.Config(critic=critic)
    parts = [
        networks.see(state, "actor", networks.shown(state, view, features))
        for view, features in zip(
            views, (occupancy.seen(state, views[0]), occupancy.goal_seen(critic, state, views[1])), strict=True
        )
    ]
    wanted = torch.tanh(networks.actor(state, goal_conditioned.command(config, *parts))[0])[0].numpy()
    found = policy(shown[0], goal=shown[1])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - policy(shown[0], goal=shown[0])).max() > 1e-3
    one = {name: of[:1] for name, of in shown[1].items()}
    np.testing.assert_allclose(policy(shown[0], goal=one)[0], found[0], atol=1e-6)
    if how != "own":  # which has no other encoder than the actor's
        stem = "ema/psi" if how == "averaged" else "psi"
        lacking = {name: value for name, value in state.items() if name != f"{stem}.camera1.small.1.bias"}
        checkpoints.save(tmp_path / "cut.safetensors", lacking, metadata)
        with pytest.raises(CvlctlError, match=f"{stem}.camera1.small.1.bias has shape none"):
            cvlctl.load_policy(tmp_path / "cut.safetensors")


def test_goals_that_are_missing_or_cannot_be_judged_are_told(slider: Path, tmp_path: Path) -> None:
    store, frames = slider / "store.zarr", cvlctl.open_store(slider / "store.zarr").images("default")
    with pytest.raises(CvlctlError, match=r"told a goal beside what it sees, and none is given\n.*\"default\""):
        cvlctl.load_policy(slider / "run")({"default": frames[:2]})
    with pytest.raises(CvlctlError, match="shown a goal as frames, for which an exported file has no place"):
        export(slider / "run", tmp_path / "policy.pt", format="torch", units="normalised")
    with pytest.raises(CvlctlError, match=r"a goal beside it, and no goal is given\n.*goals: \{from: STORE\}$"):
        played(slider, tmp_path / "none")
    with pytest.raises(CvlctlError, match="is shown its goals, and does not say which columns of a state make one"):
        played(slider, tmp_path / "columns", f"goals={{from: '{store}', within: 0.1}}")
    with pytest.raises(CvlctlError, match=r"goals.columns: \[1\] of states with 1 columns"):
        played(slider, tmp_path / "columns", f"goals={{from: '{store}', columns: [1], within: 0.1}}")
    bare = cvlctl.write_store(tmp_path / "bare.zarr", [cvlctl.Episode(np.zeros((2, 1)), np.zeros((1, 1)))], task="t")
    with pytest.raises(CvlctlError, match=r"goals.from: .*bare.zarr has no camera 'default'.*\nit holds no frames"):
        played(slider, tmp_path / "bare", f"goals={{from: '{bare.path}', columns: [0], within: 0.1}}")
    (tmp_path / "photographs").mkdir()
    for name, frame in zip("ab", frames, strict=False):
        Image.fromarray(frame).save(tmp_path / "photographs" / f"{name}.png")
    photographs = f"file: '{tmp_path / 'photographs'}'"
    with pytest.raises(CvlctlError, match=r"goals.within: .* observations of 1 columns, and the goals have 0"):
        played(slider, tmp_path / "within", f"goals={{{photographs}, within: 0.1}}")
    rows = played(slider, tmp_path / "shown", f"goals={{{photographs}}}")
    assert len(rows) == 10 and {row["success"] for row in rows} == {None}, "the environment knows of no success"
