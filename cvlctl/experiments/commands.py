"""The table of commands: what each is called with, what it calls, and recipe files read into that.

`load(path, overrides, kind)` reads a recipe. A kind is the command that eats it: build-dataset, pretrain, finetune,
evaluate, run. Relative paths are relative to the current directory. `key.sub=value` overrides win over the file. YAML
is read as version 1.2 reads numbers (`3e-4` is one); a key given twice is an error, and a number that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.recipes import yamlfile
from cvlctl.recipes.values import Strict


class Command(NamedTuple):
    """One command that eats a recipe. Modules are named, not imported: `cvlctl --help` waits for none of them."""

    telling: str  # a recipe with this key is one for it
    model: str  # module:name of what its recipe is checked against
    function: str  # module:name of (recipe, *, force) -> result


COMMANDS = {
    "run": Command("stages", "cvlctl.experiments.recipe:ExperimentRecipe", "cvlctl.experiments.run:run_experiment"),
    "build-dataset": Command(
        "source", "cvlctl.collect.recipe:BuildRecipe", "cvlctl.collect.build_dataset:build_dataset"
    ),
    "finetune": Command("algorithm", "cvlctl.learn.recipe:FinetuneRecipe", "cvlctl.learn.finetune:finetune"),
    "evaluate": Command("runs", "cvlctl.score.recipe:EvaluateRecipe", "cvlctl.score.evaluate:evaluate"),
    "pretrain": Command("stores", "cvlctl.learn.recipe:PretrainRecipe", "cvlctl.learn.pretrain:pretrain"),
}
STEPS = ("build-dataset", "pretrain", "finetune", "evaluate")  # those that a stage of an experiment can be, in order


def function(command: str) -> Callable[..., Any]:
    """What a step's command calls: (recipe, *, force) -> result. Imported now, and not before."""
    return _named(COMMANDS[command].function)


def model(command: str) -> type[Strict]:
    """What a command's recipe is checked against."""
    return _named(COMMANDS[command].model)


def load(path: str | Path, overrides: Sequence[str] = (), kind: str | None = None) -> Any:
    """The recipe in file `path`, with `key.sub=value` overrides.

    Args:
        kind: a name of `COMMANDS`; None: the one that the file's keys tell.

    Returns:
        The model of that kind: frozen, every default filled in.

    Raises:
        CvlctlError: naming file, line and key (or the command line), what was expected, and the nearest legal name.
    """
    source, data = yamlfile.read(Path(path))
    for override in overrides:
        yamlfile.override(source, data, override)
    told = kind_of(data)
    if kind is None and told is None:
        keys = ", ".join(command.telling for command in COMMANDS.values())
        raise CvlctlError(f"{path}: not a recipe of any kind", f"one of these keys tells which: {keys}")
    try:
        return model(kind or str(told)).read(data, source)
    except CvlctlError:
        if told and kind and told != kind:
            what = f"{path} is a recipe for {told}, not for {kind}"
            raise CvlctlError(what, f"run: cvlctl {told} {path}") from None
        raise


def kind_of(data: Any) -> str | None:
    """The kind of recipe that a mapping's keys tell, or None."""
    return next((name for name, c in COMMANDS.items() if isinstance(data, Mapping) and c.telling in data), None)


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
