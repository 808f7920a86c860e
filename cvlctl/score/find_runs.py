"""Which checkpoints an evaluation is of: the runs that its patterns match, and what they are called in the tables."""

from __future__ import annotations

import glob
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cvlctl.errors import CvlctlError
from cvlctl.files import CHECKPOINT_KEY, read_json
from cvlctl.play import envs
from cvlctl.progress import say
from cvlctl.score.recipe import EvaluateRecipe


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint file of a run, and what its header says."""

    run: Path
    file: Path
    algorithm: str
    task: str
    seeds: tuple[int, ...]
    step: int


def checkpoints(recipe: EvaluateRecipe) -> list[Checkpoint]:
    """The checkpoints with policies of the runs that the recipe names, in the order of its patterns and of names."""
    found: list[Checkpoint] = []
    for pattern in recipe.runs:
        exact = not glob.has_magic(pattern)
        places = [pattern] if exact else sorted(glob.glob(pattern, recursive=True))
        runs = [Path(place) for place in places if exact or Path(place, "checkpoints").is_dir()]
        of_pattern = [checkpoint for run in runs for checkpoint in _of_run(run, recipe, exact)]
        if not of_pattern:
            hint = "patterns are relative to the current directory, and name run directories, such as runs/finetune/*"
            raise CvlctlError(f"runs: no run with a policy matches {pattern!r}", hint)
        found += of_pattern
    return list({checkpoint.file.resolve(): checkpoint for checkpoint in found}.values())


def _of_run(run: Path, recipe: EvaluateRecipe, exact: bool) -> Iterator[Checkpoint]:
    folder = run / "checkpoints"
    if not folder.is_dir() and exact:
        raise CvlctlError(f"no run at {run}", "train it first: cvlctl finetune RECIPE")
    last = folder / "last.safetensors"
    if not last.is_file():
        if exact:
            raise CvlctlError(f"{run} has no checkpoint yet", "wait for its training, or start it again")
        say(f"{run}: no checkpoint yet, left out")
        return
    final = _header(run, last)
    if final is None:
        if exact:
            raise CvlctlError(f"{run} holds no policy", "it is of a pretrained critic: finetune it to get a policy")
        return  # a glob may well meet the pretrained critics
    total = (read_json(run / "run.json") or {}).get("recipe", {}).get("steps")
    if isinstance(total, int) and final.step < total:
        say(f"{run}: not finished, evaluated at step {final.step} of {total}")
    if recipe.checkpoints == "all":
        numbered = [_header(run, file) for file in sorted(folder.glob("step-*.safetensors"))]
        yield from (checkpoint for checkpoint in numbered if checkpoint and checkpoint.step != final.step)
    yield final


def _header(run: Path, file: Path) -> Checkpoint | None:
    """The checkpoint, or None where it holds no actor."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            header = json.loads((tensors.metadata() or {})[CHECKPOINT_KEY])
            has_actor = any(name.startswith("actor.") for name in tensors.keys())  # noqa: SIM118 (not a dict)
        algorithm, task, seeds, step = (header[name] for name in ("algorithm", "task", "seeds", "step"))
        if not (isinstance(algorithm, str) and isinstance(task, str) and isinstance(step, int)) or not seeds:
            raise ValueError("algorithm, task, seeds or step is of the wrong type")
        seeds = tuple(map(int, seeds))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{file} cannot be read as a checkpoint: {type(error).__name__}: {error}"
        raise CvlctlError(what, "it is damaged, or not of cvlctl: train it again, or leave its run out") from error
    if has_actor:
        envs.check_task(task)
    return Checkpoint(run, file, algorithm, task, seeds, step) if has_actor else None


def labels(found: Sequence[Checkpoint]) -> dict[Path, str]:
    """What each run is called in the tables: its algorithm; where a task has several runs of one, its directory too."""
    groups: dict[tuple[str, str], dict[Path, None]] = defaultdict(dict)
    for checkpoint in found:
        groups[checkpoint.task, checkpoint.algorithm][checkpoint.run] = None
    names_of: dict[Path, str] = {}
    for (_, algorithm), runs in groups.items():
        if len(runs) == 1:
            names_of |= dict.fromkeys(runs, algorithm)
            continue
        depth, names = 1, [run.name for run in runs]
        while len(set(names)) < len(names):
            depth += 1
            names = ["/".join(run.absolute().parts[-depth:]) for run in runs]
        for run, name in zip(runs, names, strict=True):
            names_of[run] = name if name.startswith(algorithm) else f"{algorithm}/{name}"
    return names_of
