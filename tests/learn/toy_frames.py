"""Tiny runs of every method that learns from frames, on pictures of a moving point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from toy_runs import CRITIC, load
from toy_stores import moving_point

from cvlctl.data.writer import write_store
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.learn.finetune import finetune
from cvlctl.learn.pretrain import pretrain
from cvlctl.types import Episode

SIZE = 10
SEES = [name for name, page in ALGORITHMS.items() if hasattr(page, "SEES_BY") and name != "fqe"]
ALL = ["occupancy", "occupancy-td", *SEES, "cvl-own"]
OBSERVE = "{cameras: [front, left], stack: 2, features: 6, shift: 1, vector: true}"


def picture(at: np.ndarray) -> np.ndarray:
    """(n, 10, 10, 3) uint8 of points (n, 2) in about [-3, 3]."""
    frames = np.zeros((len(at), SIZE, SIZE, 3), np.uint8)
    y, x = np.clip(np.round(at.T * 1.2 + 4.5), 0, SIZE - 2).astype(int)
    for down in (0, 1):
        for right in (0, 1):
            frames[np.arange(len(at)), y + down, x + right] = (250, 120, 30)
    return frames


def filmed(episodes: list[Episode], vector: bool = True) -> list[Episode]:
    """The episodes of a point as two cameras see them, the second one smaller; with a column of the vector, or none."""
    found = []
    for one in episodes:
        seen = picture(one.observations[:, :2])
        images = {"front": seen, "left": seen[:, :8, 1:]}
        kept = one.observations[:, :1] if vector else None
        found.append(Episode(kept, one.actions, one.rewards, one.successes, one.terminated, images=images))
    return found


def write(path: Path, num: int = 6, vector: bool = True) -> Path:
    return write_store(path, filmed(moving_point(num), vector), task="point").path


def recipe_of(name: str, store: Path, out: Path, *overrides: str, observe: str = OBSERVE) -> Any:
    text, overrides = f"steps: 10, observe: {observe}", ("batch_size=8", *overrides)
    by_next = f"{CRITIC[:-1]}, loss: td_info_nce}}"
    if name.startswith("occupancy"):
        critic = by_next if name == "occupancy-td" else CRITIC
        return load("pretrain", store, out, f"{text}, critic: {critic}", *overrides)
    plain = name.removesuffix("-own")
    more = ", bank_size: 16" if plain == "cvl" else ""
    critic = f", critic: {CRITIC}" if plain in ("cvl", "laeo", "goal_conditioned") else ""
    if name.endswith("-own"):
        text = text.replace("vector: true", "vector: true, actor_encoder: own")
    examples = f", success_examples: {{from: '{store}'}}" if plain == "laeo" else ""
    algorithm = f"algorithm: {{name: {plain}, hidden: [16]{more}{critic}}}"
    return load("finetune", store, out, f"{text}, {algorithm}{examples}", *overrides)


def run(name: str, store: Path, out: Path, *overrides: str, observe: str = OBSERVE) -> dict[str, Any]:
    recipe = recipe_of(name, store, out, *overrides, observe=observe)
    return (pretrain if name.startswith("occupancy") else finetune)(recipe)
