"""What `init_from` names: a run to start from, its file read once, held to what is trained here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from cvlctl import checkpoints
from cvlctl.data.store import Store
from cvlctl.data.units import agreed, require_alike
from cvlctl.errors import CvlctlError
from cvlctl.learn.encoders import seeing
from cvlctl.learn.networks import State
from cvlctl.learn.recipe import FinetuneRecipe, PretrainRecipe
from cvlctl.play.policies import policy_of, policy_part
from cvlctl.play.sights import SeeingPolicy, seen_by
from cvlctl.progress import say
from cvlctl.types import Seeing, Spec
from cvlctl.units import read_units

R = TypeVar("R", FinetuneRecipe, PretrainRecipe)


def read_start(run: Path, *, unfinished: bool = False) -> checkpoints.Saved:
    """The last checkpoint of a run, or a checkpoint file that is named itself.

    Args:
        unfinished: a run that is in training, or was interrupted, will do.

    Raises:
        CvlctlError: there is no such run, it is damaged, or not finished.
    """
    found = checkpoints.read(checkpoints.checkpoint_file(run))
    recipe = found.metadata.get("recipe")
    step, steps = found.metadata.get("step"), recipe.get("steps") if isinstance(recipe, dict) else None
    if run.is_dir() and not unfinished and isinstance(step, int) and isinstance(steps, int) and step < steps:
        hint = (
            f"train it to its end: cvlctl pretrain or finetune {run / 'recipe.yaml'}; or take it as it is: --unfinished"
        )
        raise CvlctlError(f"{run} is not finished: step {step} of {steps}", hint)
    return found


def begin(
    recipe: R, *, unfinished: bool = False, tell: Callable[[str], Any] = say
) -> tuple[R, checkpoints.Saved | None]:
    """A recipe as it begins, and the file that its `init_from` names: a recipe that says nothing of cameras sees what
    that run saw.

    Args:
        tell: is told so.

    Raises:
        CvlctlError: as `read_start` does.
    """
    if recipe.init_from is None:
        return recipe, None
    try:
        found = read_start(recipe.init_from, unfinished=unfinished)
    except CvlctlError as error:
        raise CvlctlError(f"init_from: {error.what}", error.hint) from error
    try:
        spec, observe = seen_by(found.metadata)
    except (KeyError, TypeError, ValueError, AttributeError):  # said where its state is read
        return recipe, found
    if recipe.observe is not None or observe is None:
        return recipe, found
    tell(f"{recipe.out} sees {_words(_sight(seeing(spec, observe)))}, as {recipe.init_from} did")
    return recipe.model_copy(update={"observe": observe}), found


def require_scale(run: Path, found: checkpoints.Saved, stores: Sequence[Store]) -> None:
    """Hold a run and the stores that it goes on with to one scale of actions and the same columns."""
    units = read_units(str(found.path), found.metadata.get("units") or {}, stores[0].spec)
    said = [(run, units), (stores[0].path, agreed(stores))]
    require_alike(said, stores[0].spec.action_dim, "take a run and stores of one scale")


def members(run: Path, wanted: Sequence[int], state: State, seeds: list[int], before: Spec, spec: Spec) -> State:
    """Of a run's state the members that the seeds `wanted` start from: seed k from seed k. It must fit `spec`."""
    missing = [seed for seed in wanted if seed not in seeds]
    if missing:
        raise CvlctlError(
            f"init_from: {run} has seeds {seeds}, not {missing}",
            "seed k starts from seed k: train these seeds there, or take those here",
        )
    saw, sees = _sight(before), _sight(spec)
    if saw != sees:
        hint = "let observe be the same in both, but for shift and actor_encoder"
        what = f"init_from: {run} saw {_words(saw)}"
        raise CvlctlError(f"{what}, and here it is {_words(sees)}", hint)
    if (before.observation_shape, before.action_dim) != (spec.observation_shape, spec.action_dim):
        raise CvlctlError(
            f"init_from: {run} was trained on observations {before.observation_shape} and "
            f"{before.action_dim} action dimensions; the stores here have {spec.observation_shape} and "
            f"{spec.action_dim}",
            "take a run and stores of the same robot",
        )
    chosen = torch.tensor([seeds.index(seed) for seed in wanted])
    return {name: value[chosen] if value.dim() else value for name, value in state.items()}


def policy(run: Path, found: checkpoints.Saved, seeds: Sequence[int], spec: Spec) -> State:
    """The finished policy of a run whose file was read: actor and normaliser, seed k's of seed k.

    Raises:
        CvlctlError: there is none, or it waits for a goal, or sees or does something else than `spec`.
    """
    before, *_ = [policy_of(found, seed) for seed in seeds]  # it says what is amiss in the file
    if before.needs_goal:
        raise CvlctlError(f"{run}: its policy is told a goal, and does nothing without", "name another run")
    saw = seeing(before.spec, before.observe if isinstance(before, SeeingPolicy) else None)
    state = {name: value.to(torch.float32) for name, value in policy_part(checkpoints.unpack(found)).items()}
    return members(run, seeds, state, found.metadata["seeds"], saw, spec)


def _sight(spec: Spec) -> dict[str, Any] | None:
    """What of cameras is seen, as far as weights depend on it."""
    if not isinstance(spec, Seeing):
        return None
    told = {key: value for key, value in asdict(spec.observe).items() if key not in ("shift", "actor_encoder")}
    return {**told, "cameras": {name: spec.cameras[name] for name in spec.observe.cameras}}


def _words(sight: dict[str, Any] | None) -> str:
    if sight is None:
        return "the vector alone"
    sizes = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in sight["cameras"].items())
    rest = ", ".join(f"{key}: {str(value).lower()}" for key, value in sight.items() if key != "cameras")
    return f"cameras {sizes} ({rest})"
