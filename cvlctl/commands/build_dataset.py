"""`cvlctl build-dataset`: a store of one task's episodes, from SAC, random actions, scripted experts or checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cvlctl import envs
from cvlctl.commands import collect_sac
from cvlctl.errors import CvlctlError
from cvlctl.policies import RandomPolicy, load_policy
from cvlctl.recipes import BuildRecipe, PolicySource, RandomSource, SacSource, ScriptedSource, resolved
from cvlctl.rollout import Outcome, check_fit, collect_episode, in_words, outcome
from cvlctl.runs import Progress, say
from cvlctl.store import Store, open_store
from cvlctl.types import Spec
from cvlctl.writer import StoreWriter


def build(recipe: BuildRecipe, *, force: bool = False) -> dict[str, Any]:
    """Collect the store of `recipe`, resume it, or find it finished.

    Returns:
        status ("built" or "finished already"), path, episodes, transitions, seconds, return_mean, and success_rate: the
        share of episodes with a successful step, None where the task has no notion of it.

    Raises:
        CvlctlError: where another recipe's store lies at `out` (`force` replaces it once the new one is complete), and
            whatever the sources find wrong.
    """
    begin, plain = time.monotonic(), resolved(recipe)
    if recipe.out.exists() and not force:
        store = open_store(recipe.out)
        if store.provenance.get("recipe") != plain:
            what = f"{recipe.out} holds a store of another recipe"
            raise CvlctlError(what, "choose another out, or --force to replace it")
        if isinstance(recipe.source, SacSource):
            collect_sac.finish_run(recipe, recipe.source)
        return _summary(store, "finished already", 0.0)
    env = envs.make(recipe.task, recipe.seed)
    provenance = {"recipe": plain, "environment": env.versions(), "seeds": [recipe.seed]}
    open_writer = partial(
        StoreWriter, recipe.out, task=recipe.task, horizon=env.spec.horizon, provenance=provenance, force=force
    )
    try:
        if isinstance(recipe.source, SacSource):
            store = collect_sac.collect(recipe, recipe.source, env, open_writer, force)
        else:
            with open_writer() as writer:
                _collect(recipe, recipe.source, env, writer)
                store = writer.finish(collector=plain["source"])
    except KeyboardInterrupt:
        say(f"{recipe.out}: stopped; the same command goes on from the last checkpoint")
        raise
    finally:
        env.close()
    return _summary(store, "built", time.monotonic() - begin)


def _summary(store: Store, status: str, seconds: float) -> dict[str, Any]:
    results = [outcome(episode) for episode in store.episodes()]
    return {
        "status": status, "path": str(store.path), "episodes": store.num_episodes, "transitions": store.num_transitions,
        "seconds": round(seconds, 1), "return_mean": float(np.mean([total for total, _ in results])),
        "success_rate": None if results[0][1] is None else float(np.mean([success for _, success in results])),
    }  # fmt: skip


def _collect(recipe: BuildRecipe, source: Any, env: envs.Env, writer: StoreWriter) -> None:
    """Random actions, experts, checkpoints: whole episodes, each a pure function of (seed, episode)."""
    act_of, total = _actors(source, env)
    saved_at = time.monotonic()
    latest: list[Outcome] = []
    with Progress(f"{source.name} on {recipe.task}", total, "episodes", writer.num_episodes) as progress:
        for number in range(writer.num_episodes, total):
            episode = collect_episode(env, act_of(number), number, collected_at=writer.num_transitions)
            writer.append(episode)
            if time.monotonic() - saved_at >= recipe.checkpoint_seconds:
                writer.flush()
                saved_at = time.monotonic()
            latest = [*latest[-9:], outcome(episode)]
            progress.update(number + 1, in_words(latest))


def _actors(
    source: RandomSource | ScriptedSource | PolicySource, env: envs.Env
) -> tuple[Callable[[int], envs.Act], int]:
    """A function from the episode's number to what acts in it, and the number of episodes."""
    spec, seed = env.spec, env.seed
    if isinstance(source, RandomSource):
        return lambda number: RandomPolicy(spec, seed, number), source.episodes
    if isinstance(source, ScriptedSource):
        expert = envs.scripted_policy(env.task)
        return lambda number: _noisy(expert, source.noise, _normal(spec, seed, number, 0)), source.episodes
    policies = [load_policy(path, source.seed) for path in source.checkpoints]
    for path, policy in zip(source.checkpoints, policies, strict=True):
        check_fit(path, policy, env)

    def act_of(number: int) -> envs.Act:
        policy, exploration = policies[number // source.episodes], _normal(spec, seed, number, 1)

        def act(observation: np.ndarray, step: int) -> np.ndarray:
            return policy(observation, None if source.greedy else exploration[step])

        return _noisy(act, source.noise, _normal(spec, seed, number, 0))

    return act_of, source.episodes * len(policies)


def _normal(spec: Spec, seed: int, number: int, stream: int) -> np.ndarray:
    """(horizon, A) standard normal, float32, of one episode."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number, stream, 0xAC7]))
    return rng.standard_normal((spec.horizon, spec.action_dim), dtype=np.float32)


def _noisy(act: envs.Act, scale: float, noise: np.ndarray) -> envs.Act:
    return lambda observation, step: np.clip(act(observation, step) + np.float32(scale) * noise[step], -1.0, 1.0)
