"""Which checkpoints an evaluation is of: the runs that its patterns match, and what they are called in the tables."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvlctl.checkpoints import Saved, read
from cvlctl.errors import CvlctlError
from cvlctl.files import read_json
from cvlctl.play import envs
from cvlctl.play.cameras import Camera
from cvlctl.play.eyes import cameras_seen, stand
from cvlctl.play.settings import Settings
from cvlctl.progress import say
from cvlctl.runs import called
from cvlctl.score.places import place_of
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.references import beside


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint file of a run, as it was when it was found."""

    run: Path
    file: Path
    algorithm: str
    task: str  # that it is played in
    seeds: tuple[int, ...]
    step: int
    sha256: str
    held: Saved | None = None  # its content, where the run is in training and about to replace the file
    settings: Settings | None = None  # of the environment that it is played in, where that is one of one's own
    stores: tuple[Path, ...] = ()  # that it was trained on
    cameras: tuple[Camera, ...] = ()  # that its policy sees

    def content(self) -> Saved:
        """What the file held when it was found. CvlctlError where it holds something else by now."""
        return self.held or read(self.file, self.sha256)


def checkpoints(recipe: EvaluateRecipe) -> list[Checkpoint]:
    """The checkpoints with policies of the runs that the recipe names, in the order of its patterns and of names."""
    found: list[Checkpoint] = []
    for pattern in recipe.runs:
        exact, found_there = places(pattern)
        runs = [run for run in found_there if exact or os.path.isdir(run / "checkpoints")]
        of_pattern = [checkpoint for run in runs for checkpoint in _of_run(run, recipe, exact)]
        if not of_pattern:
            hint = "patterns are relative to the current directory, and name run directories, such as runs/finetune/*"
            raise CvlctlError(f"runs: no run with a policy matches {pattern!r}", hint)
        found += of_pattern
    return list({checkpoint.file.resolve(): checkpoint for checkpoint in found}.values())


def places(pattern: str) -> tuple[bool, list[Path]]:
    """Whether a pattern is one path, and what it matches: brackets in names that exist are names."""
    parts = Path(pattern).parts
    known = max((n for n in range(1, len(parts) + 1) if os.path.isdir(Path(*parts[:n]))), default=0)
    if known == len(parts) or not glob.has_magic(pattern):
        return True, [Path(pattern)]
    literal = [glob.escape(part) for part in parts[:known]]
    found = sorted(glob.glob(os.path.join(*literal, *parts[known:]), recursive=True))
    return False, [Path(place) for place in found]


def _of_run(run: Path, recipe: EvaluateRecipe, exact: bool) -> Iterator[Checkpoint]:
    folder = run / "checkpoints"
    if not os.path.isdir(folder) and exact:
        raise CvlctlError(f"no run at {run}", "train it first: cvlctl finetune RECIPE")
    last = folder / "last.safetensors"
    if not last.is_file():
        if exact:
            raise CvlctlError(f"{run} has no checkpoint yet", "wait for its training, or start it again")
        say(f"{run}: no checkpoint yet, left out")
        return
    record = read_json(run / "run.json") or {}
    plain = record.get("recipe")
    name = called(plain) if isinstance(plain, dict) else None  # it may have another label since
    final = _found(recipe, run, last, name, in_training=record.get("status", "finished") != "finished")
    if final is None:
        if exact:
            raise CvlctlError(f"{run} holds no policy", "it is of a pretrained critic: finetune it to get a policy")
        return  # a glob may well meet the pretrained critics
    total = plain.get("steps") if isinstance(plain, dict) else None
    if isinstance(total, int) and final.step < total:
        say(f"{run}: not finished, evaluated at step {final.step} of {total}")
    if recipe.checkpoints == "all":
        numbered = [_found(recipe, run, file, name) for file in sorted(folder.glob("step-*.safetensors"))]
        yield from (checkpoint for checkpoint in numbered if checkpoint and checkpoint.step != final.step)
    yield final


def _found(
    recipe: EvaluateRecipe, run: Path, file: Path, name: str | None, in_training: bool = False
) -> Checkpoint | None:
    """The checkpoint, or None where it holds no actor. `name`: what tables call it; None: as it says itself."""
    saved = read(file)
    if not any(name.startswith("actor.") for name in saved.places):
        return None
    try:
        algorithm, task, seeds, step = (saved.metadata[name] for name in ("algorithm", "task", "seeds", "step"))
        if not (isinstance(algorithm, str) and isinstance(task, str) and isinstance(step, int)) or not seeds:
            raise ValueError("algorithm, task, seeds or step is of the wrong type")
        seeds = tuple(map(int, seeds))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        what = f"{file} cannot be read as a checkpoint: {type(error).__name__}: {error}"
        raise CvlctlError(what, "it is damaged, or not of cvlctl: train it again, or leave its run out") from error
    place = place_of(recipe, run, saved.metadata)
    held = saved if in_training else None
    return Checkpoint(
        run, file, name or algorithm, place.task, seeds, step, saved.sha256, held, place.settings, _stores(saved),
        _cameras(recipe, run, saved),
    )  # fmt: skip


def _cameras(recipe: EvaluateRecipe, run: Path, saved: Saved) -> tuple[Camera, ...]:
    """The cameras that a policy sees, as its data were made; none where it sees a vector."""
    found = cameras_seen(run, saved, stand(saved) | {name: one.model_dump() for name, one in recipe.cameras.items()})
    if found and recipe.backend != "gymnasium":
        raise CvlctlError(
            f"{run}: its policy sees frames, and EnvPool renders nothing", "leave out backend, or its run"
        )
    return found


def _stores(saved: Saved) -> tuple[Path, ...]:
    """The stores that a checkpoint's recipe names."""
    recipe = saved.metadata.get("recipe")
    named = recipe.get("stores") if isinstance(recipe, dict) else None
    paths = [use.get("path") for use in named if isinstance(use, dict)] if isinstance(named, list) else []
    return tuple(Path(path) for path in paths if isinstance(path, str) and "\0" not in path)


def references(recipe: EvaluateRecipe, found: Sequence[Checkpoint]) -> dict[str, dict[str, Any]]:
    """Reference returns by task that lie beside the stores its runs were trained on, where the task has none itself."""
    if recipe.backend != "gymnasium" or recipe.horizon is not None:
        return {}  # they are of gymnasium's whole episodes
    known: dict[str, dict[str, Any]] = {}
    for one in found:
        if one.task in known or (one.settings is None and envs.references(one.task)):
            continue
        if kept := next((kept for store in one.stores if (kept := beside(store, one.task, one.settings))), None):
            known[one.task] = kept
    return known


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
