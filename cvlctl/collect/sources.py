"""Where episodes come from, but for online learners: random actions, experts, policies, mixtures, other stores."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cvlctl.checkpoints import checkpoint_file, read
from cvlctl.collect import measured
from cvlctl.collect.learners import disturbed
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.collect.source_recipes import (
    MixSource,
    OnlineSource,
    PolicySource,
    RandomSource,
    Reaching,
    ScriptedSource,
    StoresSource,
)
from cvlctl.data.store import Store, open_store
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.interrupts import held
from cvlctl.play import envpool, envs
from cvlctl.play.eyes import cameras_seen, playing, stand
from cvlctl.play.policies import RandomPolicy, policy_of
from cvlctl.play.rollout import Outcome, check_fit, collect_episode, in_words, outcome
from cvlctl.progress import Progress, say
from cvlctl.types import Episode


class Plan(NamedTuple):
    """What a source is going to collect."""

    episodes: Iterator[Episode]  # from the first that the writer lacks on
    total: int
    unit: str  # of total: "episodes" or "transitions"
    facts: dict[str, Any]  # what it found out, complete when the episodes end: into the store's attribute `collector`


def roll_out(recipe: BuildRecipe, env: envs.Env, writer: StoreWriter, progress: type[Progress]) -> dict[str, Any]:
    """Whole episodes, each a function of (seed, episode) and, in a mix, of earlier outcomes. Returns the facts."""
    source = recipe.source
    if isinstance(source, StoresSource):
        plan = _copied(source, recipe, env, writer)
    elif isinstance(source, MixSource):
        plan = _mixed(source, recipe, env, writer)
    else:
        assert not isinstance(source, OnlineSource)
        plan = _rolled_out(source, recipe, env, writer)
    saved_at = time.monotonic()
    latest: list[Outcome] = []
    count = "num_" + plan.unit
    with progress(f"{source.name} on {recipe.task}", plan.total, plan.unit, getattr(writer, count)) as bar:
        try:
            for episode in plan.episodes:
                with held():
                    writer.append(episode)
                    if time.monotonic() - saved_at >= recipe.checkpoint_seconds:
                        writer.flush()
                        saved_at = time.monotonic()
                latest = [*latest[-9:], outcome(episode)]
                bar.update(min(getattr(writer, count), plan.total), in_words(latest))
        except KeyboardInterrupt:
            if writer.num_episodes:
                writer.flush()
                done = f"{getattr(writer, count)} of {plan.total} {plan.unit}"
                say(f"{recipe.out}: stopped after {done}; the same command goes on from there")
            raise
    return plan.facts


# --- random actions, experts, checkpoints


def _rolled_out(
    source: RandomSource | ScriptedSource | PolicySource, recipe: BuildRecipe, env: envs.Env, writer: StoreWriter
) -> Plan:
    act_of, turns, facts = _actors(source, recipe, env)
    episodes = (source.episodes or 0) * turns

    def in_turn() -> Iterator[Episode]:
        for number in itertools.count(writer.num_episodes):
            yield collect_episode(env, act_of(number), number, collected_at=writer.num_transitions)

    def at_once() -> Iterator[Episode]:
        return envpool.collect(
            env.task, env.spec, env.seed, act_of, first=writer.num_episodes, total=episodes or None,
            collected_at=writer.num_transitions, threads=None if recipe.threads == "auto" else recipe.threads,
        )  # fmt: skip

    def roll() -> Iterator[Episode]:
        found = at_once() if source.backend == "envpool" else in_turn()
        while writer.num_transitions < (source.transitions or 0) or writer.num_episodes < episodes:
            yield next(found)

    if source.transitions is not None:
        return Plan(roll(), source.transitions, "transitions", facts)
    return Plan(roll(), episodes, "episodes", facts)


def _actors(
    source: RandomSource | ScriptedSource | PolicySource, recipe: BuildRecipe, env: envs.Env
) -> tuple[Callable[[int], envs.Act], int, dict[str, Any]]:
    """A function from the episode's number to what acts in it, how many take turns, and what is known of them."""
    spec, seed = env.spec, env.seed
    if isinstance(source, RandomSource):
        return lambda number: RandomPolicy(spec, seed, number), 1, {}
    if isinstance(source, ScriptedSource):
        expert = envs.scripted_policy(env.task)
        return lambda number: _noisy(expert, source.noise, measured.normal(spec, seed, number, 0)), 1, {}
    facts: dict[str, Any] = {}
    if isinstance(source.checkpoints, Reaching):
        chosen, facts["chosen"] = measured.first_reaching(source.checkpoints, recipe)
        contents = [chosen.content]
    else:
        contents = [read(checkpoint_file(path)) for path in source.checkpoints]
    policies = [policy_of(content, source.seed) for content in contents]
    given = {name: camera.model_dump() for name, camera in recipe.cameras.items()}
    cameras = [cameras_seen(content.path, content, given | stand(content)) for content in contents]
    for content, policy, seen in zip(contents, policies, cameras, strict=True):
        check_fit(content.path, policy, env)
        if seen and source.backend == "envpool":
            what = f"{content.path}: its policy sees frames, and EnvPool renders nothing"
            raise CvlctlError(what, "leave source.backend out")
    facts["sha256"] = [content.sha256 for content in contents]

    def act_of(number: int) -> envs.Act:
        place = number % len(policies) if source.episodes is None else number // source.episodes
        sampling = None if source.greedy else measured.normal(spec, seed, number, 1)
        noise = np.float32(source.noise) * measured.normal(spec, seed, number, 0)
        return playing(policies[place], env, cameras[place], sampling, noise)

    return act_of, len(policies), facts


def _noisy(act: envs.Act, scale: float, noise: np.ndarray) -> envs.Act:
    return lambda observation, step: disturbed(act(observation, step), scale, noise[step])


# --- checkpoints, mixed to a success rate


def _mixed(source: MixSource, recipe: BuildRecipe, env: envs.Env, writer: StoreWriter) -> Plan:
    checkpoints, mixer = measured.measured_mixer(source, recipe)
    rates = mixer.rates.tolist()
    for episode in writer.episodes(frames=False):  # of a killed collection: the choices are made again
        mixer.record(mixer.choose(), bool(outcome(episode)[1]))
    facts: dict[str, Any] = {}

    def roll() -> Iterator[Episode]:
        while writer.num_episodes < source.episodes:
            number, place = writer.num_episodes, mixer.choose()
            act = measured.sampled(checkpoints[place], env, number)
            episode = collect_episode(env, act, number, collected_at=writer.num_transitions)
            mixer.record(place, bool(outcome(episode)[1]))
            yield episode
        used = zip(checkpoints, rates, mixer.episodes.tolist(), mixer.successes.tolist(), strict=True)
        facts["achieved_success_rate"] = mixer.rate
        facts["selection"] = "by checkpoint: every collected episode was kept"
        facts["checkpoints"] = [
            {
                "step": one.step, "file": str(one.file), "sha256": one.content.sha256,
                "measured_success_rate": rate, "episodes": episodes, "successes": successes,
            }
            for one, rate, episodes, successes in used
        ]  # fmt: skip
        asked = f"{source.success_rate:.1%} asked for (tolerance {source.tolerance:.1%})"
        line = f"{recipe.out}: {mixer.rate:.1%} of {source.episodes} episodes succeed, {asked}"
        if abs(mixer.rate - source.success_rate) > source.tolerance:
            raise CvlctlError(line, "collect more episodes, measure more (measured_episodes), or widen the tolerance")
        say(line)

    return Plan(roll(), source.episodes, "episodes", facts)


# --- episodes of other stores


def _copied(source: StoresSource, recipe: BuildRecipe, env: envs.Env, writer: StoreWriter) -> Plan:
    until, facts = source.until, dict[str, Any]()
    if isinstance(until, Reaching):
        chosen, facts["chosen"] = measured.first_reaching(until, recipe)
        until = chosen.step
    parts: list[tuple[Store, np.ndarray]] = []  # and (episodes,) which of its episodes
    for path in source.stores:
        store = open_store(path)
        store.require_label("given")
        if store.task != recipe.task:
            raise CvlctlError(f"{path} is of {store.task}, the recipe of {recipe.task}", "join stores of one task")
        store.check([*store.arrays, *store.label_arrays("given")])
        parts.append((store, store.collected_at() + store.lengths() <= (until or np.inf)))
    total = sum(int(taken.sum()) for _, taken in parts)
    if total == 0:
        raise CvlctlError(f"source.until: no episode was over by frame {until}", "choose a later one")
    facts["frames"] = until
    facts["parents"] = [
        {
            "path": str(store.path),
            "digest": store.digest(),
            "episodes": int(taken.sum()),
            "provenance": store.provenance,
        }
        for store, taken in parts
    ]
    chained = itertools.chain.from_iterable(itertools.compress(store.episodes(), taken) for store, taken in parts)
    return Plan(itertools.islice(chained, writer.num_episodes, None), total, "episodes", facts)
