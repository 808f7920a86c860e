"""One page a method. A module exports LEARNS_FROM, Config, draws, init and step; `ALGORITHMS` lists the legal names.

ONLINE lists those that collect a store as they learn, by `draws` and `step` alike.

LEARNS_FROM: "rewards", "examples" (of success) or "actions" alone: what a recipe must bring.
PASSES: batches through networks of the size `hidden` in an update, for estimates of time; where there is none, 1.
PASSES_AN_ACTION: so many more for each of `num_actions`.
CALLS: calls of PyTorch in an update, for the same; tests/learn/test_estimates.py counts them.
"""

from __future__ import annotations

from types import ModuleType

from cvlctl.learn.algorithms import (
    bc,
    contrastive_ac,
    cql,
    cvl,
    cvl_online,
    fqe,
    goal_conditioned,
    iql,
    laeo,
    sac,
    successor_features,
    td3_bc,
)

ALGORITHMS: dict[str, ModuleType] = {
    "cvl": cvl, "laeo": laeo, "bc": bc, "td3_bc": td3_bc, "cql": cql, "iql": iql,
    "goal_conditioned": goal_conditioned,
    "successor_features": successor_features, "fqe": fqe,
    "contrastive_ac": contrastive_ac,
}  # fmt: skip

ONLINE: dict[str, ModuleType] = {  # what collects a store as it learns
    "sac": sac, "contrastive_ac": contrastive_ac, "cvl": cvl_online,
}  # fmt: skip
