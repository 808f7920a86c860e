"""A Minari dataset: an arm of two joints whose hand goes to a target, or away, by a clumsy controller."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np


def torques(observation: np.ndarray, gain: float, rng: np.random.Generator) -> np.ndarray:
    """Towards the target by the arm's Jacobian, damped, and shaken."""
    cos, sin, speed, away = observation[:2], observation[2:4], observation[6:8], observation[8:10]
    both = np.array([cos[0] * cos[1] - sin[0] * sin[1], sin[0] * cos[1] + cos[0] * sin[1]])  # cos, sin of the sum
    elbow, hand = 0.1 * np.array([-sin[0], cos[0]]), 0.11 * np.array([-both[1], both[0]])
    wish = -gain * np.array([(elbow + hand) @ away, hand @ away]) - 0.02 * speed
    return np.clip(wish + rng.normal(0, 0.2, 2), -1, 1).astype(np.float32)


def record(name: str, episodes: int = 200) -> None:
    """Where MINARI_DATASETS_PATH says."""
    import minari
    from minari.data_collector import EpisodeBuffer

    env, rng, buffers = gymnasium.make("Reacher-v5"), np.random.default_rng(0), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        gain, seen, steps = rng.uniform(-10, 30), [observation], []
        while not (steps and (steps[-1][2] or steps[-1][3])):
            action = torques(observation, gain, rng)
            observation, *result, _ = env.step(action)
            seen.append(observation)
            steps.append((action, *result))
        columns = zip(
            ("actions", "rewards", "terminations", "truncations"), map(list, zip(*steps, strict=True)), strict=True
        )
        buffers.append(EpisodeBuffer(seed=episode, observations=seen, **dict(columns)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody says who wrote it
        minari.create_dataset_from_buffers(name, buffers, env=env)


if __name__ == "__main__":
    os.environ["MINARI_DATASETS_PATH"] = str(Path(sys.argv[1] if len(sys.argv) > 1 else ".").absolute())
    record("arm/clumsy-v0")
