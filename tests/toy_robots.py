"""Environments of one's own, as a file in a folder: `write(folder)` makes robots.py, whose classes the tests name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cvlctl.experiments.commands import load
from cvlctl.score.evaluate import evaluate

ROBOTS = '''
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple


class Reach(gymnasium.Env):
    """A point that is pushed towards a goal."""

    def __init__(self, size=2.0, says="is_success", breaks=None):
        self.observation_space = Box(-np.inf, np.inf, (2, 2))
        self.action_space = Box(-2.0, 2.0, (2,), np.float32)
        self.size, self.says, self.breaks = size, says, breaks

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.at, self.goal = 0, np.zeros(2), self.np_random.uniform(-1, 1, 2) * self.size
        return self.seen(), {}

    def seen(self):
        return np.stack([self.at, self.goal])

    def step(self, action):
        self.time += 1
        self.at = self.at + 0.1 * action + self.np_random.normal(size=2) * 0.01
        distance = np.linalg.norm(self.at - self.goal)
        seen, reward = self.seen(), -distance
        if self.breaks and self.time == 3:
            if self.breaks == "raise":
                seen[7] = 0  # the fault
            elif self.breaks == "nan":
                seen[1, 0] = np.nan
            elif self.breaks == "shape":
                seen = seen[0]
            elif self.breaks == "reward":
                reward = np.nan
            elif self.breaks == "old":
                return seen, reward, False, {}
            elif self.breaks == "text":
                reward = "five"
            elif self.breaks == "success":
                return seen, reward, False, False, {"success": "yes"}
            elif self.breaks == "exit":
                raise SystemExit(3)
        return seen, reward, False, self.time == 30, {self.says: distance < 1.0} if self.says else {}


class Lamp(gymnasium.Env):
    """A lamp that is left or right of a picture; the reward is how near the action is to its side, and it wanders."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.observation_space, self.action_space = Box(-1, 1, (2,)), Box(-1, 1, (1,), np.float32)
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.side = 0, int(self.np_random.integers(2))
        return np.zeros(2, np.float32), {}

    def step(self, action):
        reward = 1 - abs(float(action[0]) - (2 * self.side - 1))
        self.time, self.side = self.time + 1, int(self.np_random.integers(2))
        return np.zeros(2, np.float32), reward, False, self.time == 6, {}

    def render(self):
        frame = np.zeros((8, 8, 3), np.uint8)
        frame[2:6, 4 * self.side : 4 * self.side + 4] = 255, 200, 0
        return frame


class Drawn(Reach):
    """Draws itself: as bright as it is far."""

    def __init__(self, render_mode=None, size=2.0):
        super().__init__(size)
        self.render_mode = render_mode

    def render(self):
        if self.render_mode == "rgb_array":
            frame = np.zeros((20, 40, 3), np.uint8)
            frame[:, :20] = int(np.clip(100 * np.linalg.norm(self.at - self.goal), 0, 255))
            return frame


class Wandering(Reach):
    """Goes elsewhere as it is made."""

    def __init__(self):
        super().__init__()
        import os

        os.chdir("/")


class Spaceless(gymnasium.Env):
    """Says nothing of what it sees and does."""


class Unseeded(Reach):
    def reset(self, *, seed=None, options=None):
        super().reset()
        return self.seen(), {}


class Rich(Reach):
    """Observations of every kind."""

    def __init__(self):
        super().__init__()
        self.observation_space = Dict(
            joint_10=Box(-1.0, 1.0, (2,), np.float64), joint_9=Box(0, 9, (1, 2), np.int64), mode=Discrete(3, start=-1),
            flags=MultiBinary(2), inner=Dict(a=MultiDiscrete([2, 3])), camera=Box(0, 255, (4, 4, 3), np.uint8),
        )
        self.action_space = Box(-1.0, 1.0, (2, 1), np.float32)

    def seen(self):
        return {
            "joint_10": np.array([0.5, -0.5]), "joint_9": np.array([[3, 4]]), "mode": 1,
            "flags": np.array([0, 1], np.int8), "inner": {"a": np.array([1, 2])},
            "camera": np.zeros((4, 4, 3), np.uint8),
        }

    def step(self, action):
        assert action.shape == (2, 1) and action.dtype == np.float32
        return super().step(action[:, 0])


class Wide(Rich):
    def __init__(self):
        super().__init__()
        self.action_space = Box(-4.0, 4.0, (2, 1), np.float32)


class Open(Reach):
    """No bounds to its actions."""

    def __init__(self):
        super().__init__()
        self.action_space = Box(-np.inf, np.inf, (2,), np.float32)

    def step(self, action):
        self.asked = action
        return super().step(action)


class Counting(Reach):
    def __init__(self, actions=None):
        super().__init__()
        self.action_space = actions or Discrete(4)


def counting(kind):
    spaces = {"discrete": Discrete(4), "several": MultiDiscrete([2, 2]), "binary": MultiBinary(2)}
    return Counting(spaces.get(kind) or Box(0, 3, (2,), np.int64))


class Stuck(Reach):
    def __init__(self):
        super().__init__()
        self.action_space = Box(np.array([-1.0, 3.0]), np.array([1.0, 3.0]), dtype=np.float32)


class Camera(Reach):
    def __init__(self):
        super().__init__()
        self.observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Words(Reach):
    def __init__(self):
        super().__init__()
        self.observation_space = Dict(a=Box(0, 1, (1,)), told=Text(5))


def limited():
    return gymnasium.wrappers.TimeLimit(Reach(), 12)


def nothing():
    return 7
'''


def write(folder: Path) -> Path:
    """The file, in `folder`."""
    file = folder / "robots.py"
    file.write_text(ROBOTS)
    return file


def scores(run: Path, task: str, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of an evaluation of a run that sees 8x8 frames of its environment's own `render()`."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(
        f"{{runs: ['{run}'], task: '{task}', env: {{kwargs: {{render_mode: rgb_array}}}}, "
        f"cameras: {{default: {{size: 8}}}}, out: '{out}'}}"
    )
    evaluate(load(recipe, list(overrides), "evaluate"))
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
