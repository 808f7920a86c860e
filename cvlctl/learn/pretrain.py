"""`cvlctl pretrain`: a reward-free occupancy critic on one or several stores."""

from __future__ import annotations

from typing import Any

from cvlctl.data.load import Reading, open_stores
from cvlctl.learn.algorithms import occupancy
from cvlctl.learn.loop import Learner, train
from cvlctl.learn.recipe import PretrainRecipe
from cvlctl.runs import Run


def pretrain(recipe: PretrainRecipe, *, force: bool = False) -> dict[str, Any]:
    """Train, resume, or find the run finished. Opens nothing but the reward-free part of the stores."""
    stores = open_stores(recipe.stores)
    inputs = {str(use.path): store.digest() for use, store in zip(recipe.stores, stores, strict=True)}
    run = Run(recipe.out, recipe.resolved(), inputs, recipe.with_defaults)
    learner = Learner("occupancy", stores[0].task, occupancy, recipe.critic, recipe.critic)
    return train(recipe, learner, Reading(stores, recipe.stores), run, force=force)
