"""`cvlctl references`: what a task's normalised scores refer to, measured and kept beside a store of it.

Normalised score = 100 (return - min) / (max - min). `min` is the mean return of uniformly random actions. `max` is that
of the scripted expert where the task has one, else what the user says, else the mean of the best tenth of the store's
episodes: none of these is told apart by the score, so that its `source` stands beside it.

<store without .zarr>.references.json    {"tasks": {task: {min, max, ..., source, environment}}}
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.files import read_json, write_json
from cvlctl.machine import num_cpus
from cvlctl.play import envs
from cvlctl.play.own import probe
from cvlctl.play.policies import RandomPolicy
from cvlctl.play.recipe import EnvRecipe
from cvlctl.play.rollout import EVALUATION_SEED, collect_episode, outcome
from cvlctl.play.settings import Settings
from cvlctl.play.workers import share_out
from cvlctl.progress import Progress, say
from cvlctl.recipes.yamlfile import Source, override
from cvlctl.score.places import reading_settings

SCRIPTED_EPISODES = 10  # an expert varies less than random actions do


def file_of(store: Path) -> Path:
    """Where the references of a store's tasks are kept."""
    return store.with_name(store.name.removesuffix(".zarr") + ".references.json")


def measure(
    task: str,
    *,
    store: Path | None = None,
    episodes: int = 50,
    horizon: int | None = None,
    high: float | None = None,
    about: Mapping[str, Any] | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Play `episodes` of random actions, and the scripted expert where there is one; keep what it came to.

    Args:
        task: whose code, if it names any, is imported from here on.
        store: of the task: the references are kept beside it. None: they are shown alone.
        horizon: episodes are cut off after so many steps; None: the task's own limit, else the store's.
        high: the return that is 100; None: the scripted expert's, else of the store's best episodes.
        about: what `env` of a recipe says of the environment; None: as the store says, but for kwargs.

    Returns:
        task, file (None without a store), min, max (None where nothing gives one), random_success, scripted_success,
        source, environment.
    """
    opened = None if store is None else open_store(store)
    settings = envs.named(task, about)
    if opened is not None:
        settings = reading_settings(task, settings, opened.attributes.get("environment"), about is not None)
        settings = settings and Settings(**(vars(settings) | {"limit": opened.spec.horizon}))
    with closing(envs.make(task, EVALUATION_SEED, horizon, settings)) as env:
        if env.own:
            probe(env)
    found: dict[str, Any] = {"random_success": None, "scripted_success": None}
    found["min"], found["random_success"] = _mean(task, "random", episodes, horizon, settings, workers)
    source = f"min: {episodes} episodes of random actions"
    if high is None and task.startswith("metaworld/"):
        high, found["scripted_success"] = _mean(task, "scripted", SCRIPTED_EPISODES, horizon, settings, workers)
        source += f"; max: {SCRIPTED_EPISODES} of the scripted expert"
    elif high is not None:
        source += "; max: given"
    elif opened is not None and opened.has_label("given"):
        returns = np.sort([outcome(episode)[0] for episode in opened.episodes()])
        best = max(1, math.ceil(len(returns) / 10))
        high = float(returns[-best:].mean())
        source += f"; max: the best {best} of {len(returns)} episodes of {opened.path.name}"
    if high is not None and not high > found["min"]:
        what = f"{task}: {high:.4g} is to be a score of 100, and random actions return {found['min']:.4g}"
        raise CvlctlError(what, "say another: --max RETURN")
    found |= {"max": high, "source": source, "environment": {} if settings is None else settings.about()}
    file = None
    if store is not None and high is not None:
        file = file_of(store)
        kept = (read_json(file) or {}).get("tasks")
        write_json(file, {"command": shlex.join(["cvlctl", "references", task]), "horizon": horizon,
                          "tasks": {**(kept if isinstance(kept, dict) else {}), task: found}})  # fmt: skip
    elif high is None:
        say(f"{task}: no scripted expert, and no store with rewards: say which return is 100 by --max")
    return {"task": task, "file": file and str(file), **found}


def settings_in(text: str) -> dict[str, Any] | None:
    """What `--env` says, as `env` of a recipe is read; None where it says nothing."""
    if not text:
        return None
    source, data = Source(Path("--env"), {}), dict[str, Any]()
    override(source, data, f"env={text}")
    found: EnvRecipe = EnvRecipe.read(data["env"], source)
    return found.model_dump()


def in_words(result: Mapping[str, Any]) -> str:
    """The result of `measure`, for people."""
    low, high = result["min"], result["max"]
    top = "" if high is None else f", {high:.4g} is 100"
    told = "" if result["random_success"] is None else f" (random actions succeed in {result['random_success']:.0%})"
    kept = f"\nkept: {result['file']}" if result["file"] else ""
    return f"{result['task']}: a return of {low:.4g} is 0{top}{told}\n{result['source']}{kept}"


def beside(store: Path, task: str, settings: Settings | None) -> dict[str, Any] | None:
    """The references of `task` that are kept beside a store; None where there are none, or of another environment."""
    tasks = (read_json(file_of(store)) or {}).get("tasks")
    found = tasks.get(task) if isinstance(tasks, dict) else None
    if not isinstance(found, dict) or found.get("environment") != ({} if settings is None else settings.about()):
        return None
    low, high = found.get("min"), found.get("max")
    sound = all(isinstance(value, float | int) and math.isfinite(value) for value in (low, high))
    return {**found, "min": float(low), "max": float(high)} if sound and low < high else None  # type: ignore[arg-type, operator]


def _mean(
    task: str, policy: str, episodes: int, horizon: int | None, settings: Settings | None, workers: int | None
) -> tuple[float, float | None]:
    """Mean return and success rate of the first episodes that an evaluation meets."""
    said = None if settings is None else settings.as_json()
    requests = [[task, policy, number, horizon, said] for number in range(episodes)]
    played: list[list[Any]] = [[] for _ in requests]
    answers = share_out(f"{__name__}:_work", requests, workers or num_cpus())
    with closing(answers), Progress(f"{policy} on {task}", episodes, "episodes") as progress:
        for done, (index, answer) in enumerate(answers, 1):
            played[index] = answer
            progress.update(done)
    returns, successes = zip(*played, strict=True)
    told = any(success is not None for success in successes)
    return float(np.mean(returns)), float(np.mean([bool(success) for success in successes])) if told else None


@lru_cache(maxsize=1)
def _env(task: str, horizon: int | None, settings: str | None) -> envs.Env:
    return envs.make(task, EVALUATION_SEED, horizon, None if settings is None else Settings.from_json(settings))


def _work(request: list[Any]) -> tuple[float, bool | None]:
    """An episode in a worker: its return and success."""
    task, policy, number, horizon, settings = request
    env = _env(task, horizon, settings)
    act = RandomPolicy(env.spec, EVALUATION_SEED, number) if policy == "random" else envs.scripted_policy(task)
    env.tells = None  # episode by episode
    return outcome(collect_episode(env, act, number))
