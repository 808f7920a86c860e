"""D4RL's addresses and reference scores: from the installed package if there is one, else from the table below.

Importing d4rl crashes without mujoco-py, so its `infos.py` is found through the package's metadata and executed alone.
The table holds the datasets that papers report, as d4rl 1.1 (Apache 2.0) lists them in d4rl/infos.py; a test compares.
Scores are 100 * (return - min) / (max - min). They are constants of the mujoco-py days: beside today's environments a
convention, to be printed with the environment's version.
"""

from __future__ import annotations

import runpy
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

BASE = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
# task -> (min, max)
GYM = {"hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3), "halfcheetah": (-280.178953, 12135.0),
       "ant": (-325.6, 3879.7)}  # fmt: skip
GYM_KINDS = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
ADROIT = {"pen": (96.262799, 3076.8331017826877), "hammer": (-274.856578, 12794.134825156867),
          "relocate": (-6.425911, 4233.877797728884), "door": (-56.512833, 2880.5693087298737)}  # fmt: skip
ANTMAZE = {"umaze": "u-maze_noisy_multistart_False_multigoal_False",
           "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
           "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
           "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
           "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
           "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True"}  # fmt: skip
MAZE2D = {"umaze": (23.85, 161.86), "medium": (13.13, 277.39), "large": (6.7, 273.99),
          "umaze-dense": (68.537689, 193.66285642381482), "medium-dense": (44.264742, 297.4552547777125),
          "large-dense": (30.569041, 303.4857382709002)}  # fmt: skip
KITCHEN = {"complete": "mini_kitchen_microwave_kettle_light_slider", "partial": "kitchen_microwave_kettle_light_slider",
           "mixed": "kitchen_microwave_kettle_bottomburner_light"}  # fmt: skip


class Dataset(NamedTuple):
    url: str
    min: float
    max: float


def table() -> dict[str, Dataset]:
    """The datasets known without the package, by their D4RL names."""
    found: dict[str, Dataset] = {}
    for version in ("v1", "v2"):
        for task, scores in GYM.items():
            for kind in GYM_KINDS:
                file = f"gym_mujoco_{version}/{task}_{kind.replace('-', '_')}-{version}.hdf5"
                found[f"{task}-{kind}-{version}"] = Dataset(f"{BASE}/{file}", *scores)
    for task, scores in ADROIT.items():
        for kind in ("human", "expert", "cloned"):
            name = f"{task}-{kind}-v1"
            found[name] = Dataset(f"{BASE}/hand_dapg_v1/{name}.hdf5", *scores)
    for name, file in ANTMAZE.items():
        found[f"antmaze-{name}-v2"] = Dataset(f"{BASE}/ant_maze_v2/Ant_maze_{file}_sparse_fixed.hdf5", 0.0, 1.0)
    for name, scores in MAZE2D.items():
        file = name if name.endswith("-dense") else f"{name}-sparse"
        found[f"maze2d-{name}-v1"] = Dataset(f"{BASE}/maze2d/maze2d-{file}-v1.hdf5", *scores)
    for name, file in KITCHEN.items():
        found[f"kitchen-{name}-v0"] = Dataset(f"{BASE}/kitchen/{file}-v0.hdf5", 0.0, 4.0)
    return found


@cache
def package() -> dict[str, Any] | None:
    """The names that d4rl's infos.py defines; None where d4rl is not installed."""
    try:
        file = metadata.distribution("d4rl").locate_file("d4rl/infos.py")
    except metadata.PackageNotFoundError:
        return None
    return runpy.run_path(str(file))


def urls() -> dict[str, str]:
    """Address of every known dataset by its D4RL name: the package's where it is installed, the table's besides."""
    known = {name: dataset.url for name, dataset in table().items()}
    return known | ((package() or {}).get("DATASET_URLS") or {})


def references(name: str) -> tuple[float, float] | None:
    """(min, max) of a dataset's normalised score; None where D4RL has none."""
    infos, ours = package() or {}, table().get(name)
    low, high = (infos.get(key, {}).get(name) for key in ("REF_MIN_SCORE", "REF_MAX_SCORE"))
    if low is not None and high is not None:
        return float(low), float(high)
    return (ours.min, ours.max) if ours else None
