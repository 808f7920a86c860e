"""One store of one task: collected, resumed, or found finished."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from cvlctl import units
from cvlctl.collect import online
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.collect.source_recipes import OnlineSource
from cvlctl.collect.sources import roll_out
from cvlctl.data.store import Store, open_store
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.folders import again_where_it_exists, put_right
from cvlctl.interrupts import watched
from cvlctl.machine import num_cpus
from cvlctl.play import envpool, envs
from cvlctl.play.filming import Film
from cvlctl.play.own import probe
from cvlctl.play.rollout import outcome
from cvlctl.progress import Progress


@watched()
@again_where_it_exists
def build(
    recipe: BuildRecipe, *, force: bool = False, progress: type[Progress] = Progress, workers: int | None = None
) -> dict[str, Any]:
    """Collect the store of `recipe`, resume it, or find it finished.

    Args:
        progress: what reports on it: a bar for people, or lines for a process that builds several.
        workers: processes that draw frames, where there are cameras; 0 or 1: none but this; None: one a CPU.

    Returns:
        status ("built" or "finished already"), path, episodes, transitions, seconds, return_mean, normalised (the score
        of return_mean; None where the task has no reference returns), environment (what was simulated by what), and
        success_rate: the share of episodes with a successful step, None where the task has no notion of it.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once all episodes that were over are saved.
        CvlctlError: where another recipe's store lies at `out` (`force` replaces it once the new one is complete), and
            whatever the sources find wrong.
    """
    begin, plain = time.monotonic(), recipe.resolved()
    tidied = put_right(recipe.out)  # by a build that was killed when all was done, perhaps this one
    if recipe.out.exists() and (not force or (tidied and _is_of(recipe, open_store(recipe.out)))):
        return finished(recipe)
    env = envs.make(recipe.task, recipe.seed, recipe.horizon, recipe.settings)
    film: Film | None = None
    try:
        if env.own:
            probe(env)
        if recipe.is_filmed:
            film = Film(env, recipe.filmed_by, num_cpus() if workers is None else workers, live=recipe.sees is not None)
        provenance = {"recipe": plain, "environment": _versions(recipe, env), "seeds": [recipe.seed],
                      units.KEY: units.plain(units.finite(*env.action_bounds)[0] or (-1.0, 1.0))}  # fmt: skip
        open_writer = partial(
            StoreWriter, recipe.out, task=recipe.task, horizon=env.spec.horizon, provenance=provenance, force=force
        )
        if isinstance(recipe.source, OnlineSource):
            store = online.collect(recipe, recipe.source, env, open_writer, force, progress)
        else:
            with open_writer() as writer:
                facts = roll_out(recipe, env, writer, progress)
                store = writer.finish(collector={**plain["source"], **facts}, **recipe.attributes(env))
    finally:
        if film is not None:
            film.close()
        env.close()
    return _summary(store, "built", time.monotonic() - begin)


def finished(recipe: BuildRecipe) -> dict[str, Any]:
    """The summary of the store that is there.

    Raises:
        CvlctlError: it is another recipe's.
    """
    put_right(recipe.out)
    store = open_store(recipe.out)
    recipe.check_built(store.provenance.get("recipe"))
    if isinstance(recipe.source, OnlineSource):
        online.finish_run(recipe, recipe.source, store)
    return _summary(store, "finished already", 0.0)


def _is_of(recipe: BuildRecipe, store: Store) -> bool:
    try:
        recipe.check_built(store.provenance.get("recipe"))
    except CvlctlError:
        return False
    return True


def _summary(store: Store, status: str, seconds: float) -> dict[str, Any]:
    results = [outcome(episode) for episode in store.episodes(frames=False)]
    mean, reference = float(np.mean([total for total, _ in results])), store.attributes.get("reference")
    return {
        "status": status, "path": str(store.path), "episodes": store.num_episodes, "transitions": store.num_transitions,
        "seconds": round(seconds, 1), "return_mean": mean,
        "normalised": reference and 100 * (mean - reference["min"]) / (reference["max"] - reference["min"]),
        "environment": _environment(store),
        "success_rate": None if results[0][1] is None else float(np.mean([success for _, success in results])),
    }  # fmt: skip


def _versions(recipe: BuildRecipe, env: envs.Env) -> dict[str, str]:
    """What simulates the collection."""
    if getattr(recipe.source, "backend", "gymnasium") == "gymnasium":
        return env.versions()
    return envpool.announced_versions(recipe.task, str(recipe.out))


def _environment(store: Store) -> str:
    """The task, which names the environment's version, and what simulated it: a score means nothing without."""
    versions = store.provenance.get("environment") or {}
    named = ("envpool", "mujoco", "gymnasium", "metaworld")
    packages = [f"{name} {versions[name]}" for name in named if name in versions]
    return " ".join([store.task, *([f"({', '.join(packages)})"] if packages else [])])
