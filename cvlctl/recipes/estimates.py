"""How much work a recipe is, in words and in seconds: what all steps' estimates are made of.

Rules of thumb for two CPU cores, good to a factor of two or three: a training step costs 6 floating point operations a
weight and example at 200 GFLOP/s, and 0.5 ms besides; simulators make 4,000 steps a second alone and 10,000 with two
workers. Observations are taken to have 40 dimensions and episodes 500 steps.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

FLOPS, UPDATE_SECONDS, SIMULATED, SIMULATED_WITH_WORKERS = 200e9, 0.5e-3, 4_000, 10_000
OBSERVATION_DIM, EPISODE_STEPS = 40, 500


class Work(NamedTuple):
    """How much there is to do."""

    size: str
    seconds: float


def count(num: int, noun: str) -> str:
    """ "1 policy", "2,000 policies"."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{num:,} {noun if num == 1 else plural}"


def weights(*widths: int) -> int:
    """Of a network that sees an observation, with layers of these widths."""
    return sum(a * b for a, b in itertools.pairwise((OBSERVATION_DIM, *widths)))


def update_seconds(work: float) -> float:
    """Of one update of `work` weights times examples."""
    return 6 * work / FLOPS + UPDATE_SECONDS
