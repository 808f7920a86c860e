"""`cvlctl pretrain`: a reward-free occupancy critic on one or several stores."""

from __future__ import annotations

from typing import Any

from cvlctl.data.load import Reading, open_stores
from cvlctl.errors import CvlctlError
from cvlctl.learn.algorithms import occupancy
from cvlctl.learn.critics import critics_of
from cvlctl.learn.encoders import seeing
from cvlctl.learn.loop import Learner, train
from cvlctl.learn.recipe import PretrainRecipe
from cvlctl.learn.starting import begin, members, policy, read_start, require_scale
from cvlctl.runs import Run


def pretrain(recipe: PretrainRecipe, *, force: bool = False, unfinished: bool = False) -> dict[str, Any]:
    """Train, resume, or find the run finished. Opens nothing but the reward-free part of the stores.

    `unfinished`: so may be the runs that `init_from` and `policy` name.
    """
    given, (recipe, found) = recipe, begin(recipe, unfinished=unfinished)
    stores = open_stores(recipe.stores, recipe.observe)
    inputs = {str(use.path): store.digest() for use, store in zip(recipe.stores, stores, strict=True)}
    critic, initial, reading = recipe.critic, None, Reading(stores, recipe.stores, observe=recipe.observe)
    spec = seeing(reading.spec, recipe.observe)
    if recipe.init_from is not None and found is not None:
        try:
            before = critics_of(found, recipe.init_from)
        except CvlctlError as error:
            raise CvlctlError(f"init_from: {error.what}", error.hint) from error
        critic = before.config
        initial = members(recipe.init_from, recipe.seeds, before.state, before.seeds, before.spec, spec)
        require_scale(recipe.init_from, found, stores)
        inputs[f"init_from:{recipe.init_from}"] = found.sha256
    beside = None
    if (other := recipe.policy_run) is not None:
        try:
            found = read_start(other, unfinished=unfinished)
            actor = policy(other, found, recipe.seeds, spec)
        except CvlctlError as error:
            raise CvlctlError(f"policy: {error.what.removeprefix('init_from: ')}", error.hint) from error
        require_scale(other, found, stores)
        beside = {name.replace("actor.", f"{occupancy.POLICY}."): value for name, value in actor.items()}
        inputs[f"policy:{other}"] = found.sha256
    run = Run(recipe.out, given.resolved(), inputs, given.with_defaults)
    learner = Learner("occupancy", stores[0].task, occupancy, critic, critic, initial, beside=beside)
    return train(recipe, learner, reading, run, force=force)
