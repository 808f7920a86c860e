"""`cvlctl finetune`: a policy from reward labels or success examples, from scratch or on a pretrained critic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvlctl import checkpoints
from cvlctl.data.examples import array_digest, found_examples
from cvlctl.data.load import Reading, open_stores, seen_spec
from cvlctl.data.samplers import Data
from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError
from cvlctl.learn import labellers, methods
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.learn.critics import critics_of
from cvlctl.learn.encoded import encoded
from cvlctl.learn.encoders import seeing
from cvlctl.learn.labellers import LABELLERS
from cvlctl.learn.loop import Learner, train
from cvlctl.learn.networks import State
from cvlctl.learn.recipe import FinetuneRecipe, check_critic
from cvlctl.learn.starting import begin, members, policy, require_scale
from cvlctl.runs import LABELS_FILE, Run
from cvlctl.types import Spec


def finetune(recipe: FinetuneRecipe, *, force: bool = False, unfinished: bool = False) -> dict[str, Any]:
    """Train, resume, or find the run finished. `unfinished`: so may be the run that `init_from` names."""
    name, config = recipe.algorithm.name, recipe.algorithm.config
    given, (recipe, found) = recipe, begin(recipe, unfinished=unfinished)
    if found is None and hasattr(ALGORITHMS[name], "STARTS_FROM"):
        what = f"algorithm {name} evaluates a finished policy, and needs init_from"
        raise CvlctlError(what, "add init_from: the run of a policy, such as runs/finetune/x")
    stores, observe = open_stores(recipe.stores, recipe.observe), recipe.sees
    learns_from, seen = ALGORITHMS[name].LEARNS_FROM, seen_spec(stores[0].spec, observe)
    spec = seeing(seen, observe)
    inputs = {**_inputs(recipe, stores), **methods.digests(name)}
    labeller = next((use.rewards for use in recipe.stores if use.rewards in LABELLERS), None)
    examples = None
    if recipe.success_examples is not None and (learns_from == "examples" or labeller):
        examples = found_examples(recipe.success_examples, seen, stack=observe.stack if observe else 0)
        origin = recipe.success_examples.file or recipe.success_examples.from_
        inputs[f"examples:{origin}"] = array_digest(examples.observations, *examples.images.values())
    config, initial = _begun_from(config, recipe, spec, found)
    if found is not None:
        assert recipe.init_from is not None
        require_scale(recipe.init_from, found, stores)
        inputs[f"init_from:{recipe.init_from}"] = found.sha256
    plain = {**given.resolved(), "mode": getattr(config, "mode", "scratch")}
    run = Run(recipe.out, plain, inputs, given.with_defaults)
    reading = Reading(stores, recipe.stores, examples, learns_from == "rewards", observe=observe)
    still = getattr(config, "mode", "") == "frozen" and labeller is None  # the encoders, and all that is seen by them
    if observe and still and initial and not observe.shift and observe.actor_encoder == "critic":
        reading = reading._replace(encode=lambda r, device: encoded(r, config.critic, initial, run.out, device))
    if labeller is not None and learns_from == "rewards":
        reading = reading._replace(relabel=partial(labels, labeller, recipe, reading, spec, run.out))
    about = next((s for u, s in zip(recipe.stores, stores, strict=True) if u.rewards != "none"), stores[0])
    critic = getattr(config, "critic", None)
    environment = about.attributes.get("environment")
    learner = Learner(recipe.label or name, about.task, ALGORITHMS[name], config, critic, initial, environment)
    with methods.blamed(name):
        return train(recipe, learner, reading, run, force=force)


def _inputs(recipe: FinetuneRecipe, stores: Sequence[Store]) -> dict[str, str]:
    """The digest of every store, and of every label that is read; a label that is named must be there."""
    inputs = {str(use.path): store.digest() for use, store in zip(recipe.stores, stores, strict=True)}
    from_rewards = ALGORITHMS[recipe.algorithm.name].LEARNS_FROM == "rewards"
    for use, store in zip(recipe.stores, stores, strict=True):
        read = use.from_store and (from_rewards or use.top < 1)
        if read or (use.from_store and use.rewards != "given"):
            store.require_label(use.rewards)
        if read:
            inputs[f"{use.path}:{use.rewards}"] = store.label_digest(use.rewards)
    return inputs


def labels(
    name: str, recipe: FinetuneRecipe, reading: Reading, spec: Spec, out: Path, data: Data, device: str
) -> Tensor:
    """Learned rewards (E, rows), kept in the run as LABELS_FILE: learned once, and read again on resume."""
    file, shape = out / LABELS_FILE, (len(recipe.seeds), len(data.observation))
    if file.exists():
        reward = checkpoints.load(file)[0].get("reward")
        if reward is None or tuple(reward.shape) != shape or reward.dtype != torch.float32:
            what = f"{file} holds no rewards of {shape[0]} seeds and {shape[1]} rows"
            raise CvlctlError(what, "delete it, and they are learned again")
        return reward
    reward = labellers.learn(name, recipe.labeller, spec, data, recipe.seeds, device)
    paths, digest = [str(use.path) for use in recipe.stores], " ".join(store.digest() for store in reading.stores)
    metadata = {"labeller": name, "seeds": list(recipe.seeds), "stores": paths, "digest": digest}
    checkpoints.save(file, {"reward": reward}, metadata)
    return reward


def _begun_from(
    config: Any, recipe: FinetuneRecipe, spec: Spec, found: checkpoints.Saved | None
) -> tuple[Any, State | None]:
    """The config with its mode decided, and what `init_from` gives to begin with."""
    name = recipe.algorithm.name
    if recipe.init_from is None or found is None:
        return (replace(config, mode="scratch") if hasattr(config, "mode") else config), None
    try:
        if not hasattr(config, "mode"):
            return config, policy(recipe.init_from, found, recipe.seeds, spec)
        before = critics_of(found, recipe.init_from)
        try:
            check_critic(before.config, name, config)
        except ValueError as error:
            raise CvlctlError(f"{recipe.init_from}: {error}", "name another run, or another algorithm") from error
    except CvlctlError as error:
        raise CvlctlError(f"init_from: {error.what.removeprefix('init_from: ')}", error.hint) from error
    initial = members(recipe.init_from, recipe.seeds, before.state, before.seeds, before.spec, spec)
    mode = "continue" if config.mode == "auto" else config.mode
    return replace(config, mode=mode, critic=before.config), initial
