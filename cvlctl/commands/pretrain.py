"""`cvlctl pretrain`: a reward-free occupancy critic on one or several stores."""

from __future__ import annotations

from functools import partial
from typing import Any

from cvlctl.algorithms import occupancy
from cvlctl.commands import train
from cvlctl.recipes import resolved, with_defaults
from cvlctl.runs import Run
from cvlctl.schema import PretrainRecipe


def pretrain(recipe: PretrainRecipe, *, force: bool = False) -> dict[str, Any]:
    """Train, resume, or find the run finished. Opens nothing but the reward-free part of the stores."""
    stores = train.open_stores(recipe.stores)
    inputs = {str(use.path): store.digest() for use, store in zip(recipe.stores, stores, strict=True)}
    run = Run(recipe.out, resolved(recipe), inputs, partial(with_defaults, "pretrain"))
    return train.train(
        recipe, occupancy, recipe.critic, stores, lambda settings: train.load(recipe, stores, None, False, settings),
        run, algorithm="occupancy", task=stores[0].task, critic=recipe.critic, force=force,
    )  # fmt: skip
