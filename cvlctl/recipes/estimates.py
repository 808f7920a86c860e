"""How much work a recipe is, in words and in seconds: what all steps' estimates are made of.

A training step is floating point operations, 6 a weight and example, and calls of PyTorch; what these take was measured
on this machine when a run had to know (`rates`), else it is what they usually take. Rules of thumb beside: simulators
make 4,000 steps a second alone and 10,000 with two workers, which draw 400 frames; observations have 40 dimensions,
episodes 500 steps. All hold within a factor of two on an idle machine.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from cvlctl import rates
from cvlctl.rates import Rate

SIMULATED, SIMULATED_WITH_WORKERS = 4_000, 10_000
RENDERED = 400  # frames a second, of two workers
OBSERVATION_DIM, EPISODE_STEPS = 40, 500
COMPILE_PAYS_AFTER = (
    60.0  # seconds of eager training on a CPU: compiling takes 8 to 40, and saves a quarter of the rest
)
COMPILING, SAVING = 20.0, 1.3
SLOWEST, FASTEST = Rate(2e9, 300e-6), Rate(4e12, 1e-6)  # no machine is: where both agree, none needs to be measured


class Work(NamedTuple):
    """How much there is to do."""

    size: str
    seconds: float


class Update(NamedTuple):
    """What an update of all seeds is."""

    flops: float
    calls: int  # of PyTorch

    def seconds(self, rate: Rate) -> float:
        """Of one, eager."""
        return self.flops / rate.flops + self.calls * rate.call


def count(num: int, noun: str) -> str:
    """ "1 policy", "2,000 policies"."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{num:,} {noun if num == 1 else plural}"


def weights(*widths: int) -> int:
    """Of a network that sees an observation, with layers of these widths."""
    return sum(a * b for a, b in itertools.pairwise((OBSERVATION_DIM, *widths)))


def update_of(work: float, calls: int) -> Update:
    """An update of `work` weights times examples."""
    return Update(6 * work, calls)


def compiling_pays(steps: int, update: Update, rate: Rate) -> bool:
    """Whether so many updates on a CPU take long enough."""
    return steps * update.seconds(rate) >= COMPILE_PAYS_AFTER


def training_seconds(steps: int, update: Update, threads: int, compile: str) -> float:
    """Of so many updates, compiled where that is chosen."""
    rate = (rates.kept() or rates.USUAL).by(threads)
    eager = steps * update.seconds(rate)
    compiled = compile == "true" or (compile == "auto" and compiling_pays(steps, update, rate))
    return COMPILING + eager / SAVING if compiled else eager
