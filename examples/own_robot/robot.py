"""A robot of one's own: a puck on a table, pushed by two motors, and the logs that lie about of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

COLUMNS = "x,y,vx,vy,goal_x,goal_y,battery"  # metres, metres a second, volts
PERIOD, FORCE, NEAR = 0.05, 2.5, 0.05  # seconds a step; newtons of a motor at most; metres from the goal that count


class Table(gymnasium.Env):
    """Push the puck to the goal: forces in newtons, success within five centimetres."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (7,), np.float32)
    action_space = gymnasium.spaces.Box(-FORCE, FORCE, (2,), np.float32)

    def __init__(self, battery: float = 24.0) -> None:
        self.battery = battery

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.uniform(-0.5, 0.5, (2, 2))
        self.speed = np.zeros(2)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        force = np.clip(action, -FORCE, FORCE)
        self.speed = 0.8 * self.speed + PERIOD * force
        self.place = self.place + PERIOD * self.speed
        distance = float(np.linalg.norm(self.place - self.goal))
        return self._observation(), -distance, False, False, {"is_success": distance < NEAR}

    def _observation(self) -> np.ndarray:
        return np.array([*self.place, *self.speed, *self.goal, self.battery], np.float32)


def logs(folder: Path, episodes: int = 200, length: int = 60) -> None:
    """What an operator of no great skill has left: log.npz, rows of state, force and a flag at each stop; and
    success.npy, ten states in which the puck lay at its goal."""
    rng, table = np.random.default_rng(0), Table()
    states, forces, stops, there = [], [], [], []
    for episode in range(episodes):
        state, _ = table.reset(seed=episode)
        lean, skill = rng.normal(0, 1.0, 2), rng.uniform(0, 12)
        for t in range(length):
            wish = skill * (state[4:6] - state[:2]) - state[2:4] + lean + rng.normal(0, 1.0, 2)
            force = np.clip(wish, -FORCE, FORCE).astype(np.float32)
            states.append(state)
            forces.append(force)
            stops.append(t == length - 1)
            state, _, _, _, info = table.step(force)
            if info["is_success"]:
                there.append(state)
    np.savez(folder / "log.npz", state=np.array(states), force=np.array(forces), stop=np.array(stops))
    np.save(folder / "success.npy", np.array(there)[rng.choice(len(there), 10, replace=False)])


if __name__ == "__main__":
    logs(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
