"""`cvlctl build-dataset`: episodes of one task in a store, from SAC, random actions, scripted experts or checkpoints.

Beside its store a SAC collection keeps a run directory (data/x.zarr: data/x.policies/): policies along the way, and
what a killed collection resumes from. The rule that keeps the two together: at an episode's end the learner's state is
written first, under the number of episodes that it has seen; then the store is flushed; then the older state goes. At
whatever instant a kill comes, the state that belongs to the episodes in the store is there, and the resumed collection
goes on as the uninterrupted one would have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvlctl import checkpoints, envs, networks, training
from cvlctl.algorithms import sac
from cvlctl.errors import CvlctlError
from cvlctl.networks import State
from cvlctl.policies import NumpyPolicy, RandomPolicy, load_policy
from cvlctl.recipes import BuildRecipe, PolicySource, RandomSource, SacSource, ScriptedSource, resolved
from cvlctl.rollout import collect_episode
from cvlctl.runs import Progress, Run, read_run, say
from cvlctl.store import Store, open_store
from cvlctl.training import Settings
from cvlctl.types import Episode, Spec
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
            _close_run(recipe, plain)
        return _summary(store, "finished already", 0.0)
    env = envs.make(recipe.task, recipe.seed)
    try:
        if isinstance(recipe.source, SacSource):
            store = _collect_sac(recipe, recipe.source, plain, env, force)
        else:
            with _writer(recipe, plain, env, force) as writer:
                _collect(recipe, recipe.source, env, writer)
                store = writer.finish(collector=plain["source"])
    except KeyboardInterrupt:
        say(f"{recipe.out}: stopped; the same command goes on from the last checkpoint")
        raise
    finally:
        env.close()
    return _summary(store, "built", time.monotonic() - begin)


def policies_dir(out: Path) -> Path:
    """Where the policies of a SAC collection into `out` are kept."""
    return out.with_name(out.name.removesuffix(".zarr") + ".policies")


def _summary(store: Store, status: str, seconds: float) -> dict[str, Any]:
    results = [_result(episode) for episode in store.episodes()]
    return {
        "status": status, "path": str(store.path), "episodes": store.num_episodes, "transitions": store.num_transitions,
        "seconds": round(seconds, 1), "return_mean": float(np.mean([total for total, _ in results])),
        "success_rate": None if results[0][1] is None else float(np.mean([success for _, success in results])),
    }  # fmt: skip


def _result(episode: Episode) -> tuple[float, bool | None]:
    assert episode.rewards is not None
    success = None if episode.successes is None else bool(episode.successes.any())
    return float(episode.rewards.sum(dtype=np.float64)), success


def _writer(recipe: BuildRecipe, plain: dict[str, Any], env: envs.Env, force: bool, resume: bool = True) -> StoreWriter:
    provenance = {"recipe": plain, "environment": env.versions(), "seeds": [recipe.seed]}
    return StoreWriter(
        recipe.out, task=recipe.task, horizon=env.spec.horizon, provenance=provenance, force=force or not resume,
        resume=resume,
    )  # fmt: skip


def _text(latest: Iterable[tuple[float, bool | None]]) -> str:
    """The latest episodes in words."""
    returns, successes = zip(*latest, strict=True)
    rate = "" if successes[0] is None else f", success {np.mean(successes):.0%}"
    return f"return {np.mean(returns):.4g}{rate} (last {len(returns)} episodes)"


# --- random actions, experts, checkpoints: whole episodes, each a pure function of (seed, episode)


def _collect(recipe: BuildRecipe, source: Any, env: envs.Env, writer: StoreWriter) -> None:
    act_of, total = _actors(source, env)
    saved_at = time.monotonic()
    latest: list[tuple[float, bool | None]] = []
    with Progress(f"{source.name} on {recipe.task}", total, "episodes", writer.num_episodes) as progress:
        for number in range(writer.num_episodes, total):
            episode = collect_episode(env, act_of(number), number, collected_at=writer.num_transitions)
            writer.append(episode)
            if time.monotonic() - saved_at >= recipe.checkpoint_seconds:
                writer.flush()
                saved_at = time.monotonic()
            latest = [*latest[-9:], _result(episode)]
            progress.update(number + 1, _text(latest))


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
        sees, does = policy.spec.observation_shape, policy.spec.action_dim
        if (sees, does) != (spec.observation_shape, spec.action_dim):
            what = f"{path} sees {sees} and emits {does} actions"
            raise CvlctlError(
                f"{what}; {env.task} has {spec.observation_shape} and {spec.action_dim}", "use a policy of this task"
            )

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


# --- SAC


def _collect_sac(recipe: BuildRecipe, source: SacSource, plain: dict[str, Any], env: envs.Env, force: bool) -> Store:
    run = Run(policies_dir(recipe.out), plain, {})
    _take(run, force)
    try:
        writer = _writer(recipe, plain, env, force)
        saved = _saved(run, writer.num_episodes) if writer.num_episodes else None
        if writer.num_episodes and saved is None:
            writer.close()
            say(f"{writer.partial}: the learner's state for it is lost; starting over")
            writer = _writer(recipe, plain, env, force, resume=False)
        with writer:
            collector = _Collector(recipe, source, plain, env, run, writer, saved)
            collector.collect()
            settings = collector.settings.as_dict()
            store = writer.finish(collector={"sac": asdict(collector.config), "settings": settings})
        run.finish(algorithm="sac", task=recipe.task, seeds=[recipe.seed], steps=source.steps, settings=settings)
        for file in run.checkpoints.glob("episodes-*.safetensors"):
            file.unlink()
    finally:
        run.close()
    return store


def _take(run: Run, force: bool) -> None:
    """Take the run directory; what a killed collection of the same recipe left there stays, also with `force`."""
    try:
        status = run.open()
    except CvlctlError:
        if not force:
            raise
        status = "finished"  # another recipe's
    if status == "finished":  # or of this one, and its store was deleted or is to be replaced
        run.open(force=True)


def _close_run(recipe: BuildRecipe, plain: dict[str, Any]) -> None:
    """The store is done: so is the run beside it, also where a kill came between the two."""
    run = Run(policies_dir(recipe.out), plain, {})
    if (run.out / "run.json").exists() and read_run(run.out)["status"] != "finished":
        run.open()
        run.finish(algorithm="sac", task=recipe.task, seeds=[recipe.seed], steps=plain["source"]["steps"])


def _state_file(run: Run, episodes: int) -> Path:
    return run.checkpoints / f"episodes-{episodes:09d}.safetensors"


def _saved(run: Run, episodes: int) -> tuple[State, dict[str, Any]] | None:
    """The learner's state after `episodes` episodes, or None where it is lost or damaged."""
    try:
        return checkpoints.load(_state_file(run, episodes))
    except CvlctlError as error:
        say(error.what)
        return None


class _Collector:
    """One SAC collection: environment, learner, replay and store, from the first frame or a resumed one to the last."""

    def __init__(
        self,
        recipe: BuildRecipe,
        source: SacSource,
        plain: dict[str, Any],
        env: envs.Env,
        run: Run,
        writer: StoreWriter,
        saved: tuple[State, dict[str, Any]] | None,
    ) -> None:
        self.recipe, self.source, self.env, self.run, self.writer = recipe, source, env, run, writer
        self.config = sac.Config(
            gamma=source.gamma, hidden=source.hidden, learning_rate=source.learning_rate, batch_size=source.batch_size
        )
        self.frame, self.block = writer.num_transitions, -1
        self.latest: list[tuple[float, bool | None]] = []
        self.replay = sac.Replay(source.steps, env.spec)
        if saved is not None:
            state, metadata = saved
            self.settings = Settings(**metadata["settings"])
            for episode in writer.episodes():
                self._remember(episode)
            run.cut_metrics(self.frame)
            say(f"{recipe.out}: resuming at frame {self.frame}, episode {writer.num_episodes}")
        else:
            state = sac.init(self.config, env.spec, [recipe.seed])
            self.settings = training.resolve_settings(
                device=recipe.device, threads=recipe.threads, precision=recipe.precision, compile=recipe.compile,
                steps=source.steps - source.learning_starts, say=say,
            )  # fmt: skip
        training.configure(self.settings)
        self.state = {name: value.to(self.settings.device) for name, value in state.items()}
        self.metadata = {
            "algorithm": "sac", "task": recipe.task, "spec": asdict(env.spec), "seeds": [recipe.seed], "recipe": plain,
            "settings": self.settings.as_dict(),
        }  # fmt: skip

    def collect(self) -> None:
        source, what = self.source, f"sac on {self.recipe.task}"
        every = source.policy_every_steps or max(1, source.steps // 10)
        program = training.whole_step(lambda s, b, n: sac.step(self.config, s, b, n), self.settings)
        act, saved_at = acting(self.state, self.env.spec), time.monotonic()
        if self.settings.compile:
            say(f"{what}: compiling the training step (10-40 s, once)")
        with Progress(what, source.steps, "frames", self.frame) as progress:
            while self.frame < source.steps:
                self._episode(act, program, every, progress)
                done = self.frame == source.steps
                if done or time.monotonic() - saved_at >= self.recipe.checkpoint_seconds:
                    self._checkpoint()
                    saved_at = time.monotonic()

    def _episode(
        self, act: Callable[..., np.ndarray], program: training.Program, every: int, progress: Progress
    ) -> None:
        """Collect one episode and learn from it, one update a frame."""
        source, env, number = self.source, self.env, self.writer.num_episodes
        begin, terminated, over = self.frame, False, False
        metrics: training.Metrics = {}
        observations, actions, rewards, successes = [env.reset(number)], [], [], []
        while not over:
            draws, i = self._draws()
            observation, random = observations[-1], self.frame < source.learning_starts
            action = draws.uniform_action[i] if random else act(observation, draws.exploration[i])
            after, reward, terminated, truncated, success = env.step(action)
            self.replay.add(observation, action, reward, terminated, after)
            observations.append(after)
            actions.append(action)
            rewards.append(reward)
            successes.append(success)
            if not random:
                batch, noise = draws.batch(i, self.replay, self.config.gamma, self.settings.device)
                self.state, metrics = program(self.state, batch, noise)
            self.frame += 1
            over = terminated or truncated or self.frame == source.steps
            if self.frame % every == 0:
                self._keep_policy(f"step-{self.frame:09d}")
            if self.frame % 50 == 0:
                progress.update(self.frame, _text(self.latest) if self.latest else "")
        flags = None if successes[0] is None else np.array(successes, dtype=bool)
        episode = Episode(
            np.stack(observations), np.stack(actions), np.array(rewards, dtype=np.float32), flags, terminated,
            task=self.recipe.task, collected_at=begin, seed=self.recipe.seed,
        )  # fmt: skip
        self.writer.append(episode)
        total, succeeded = _result(episode)
        self.latest = [*self.latest[-9:], (total, succeeded)]
        values = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(list(values.values())).all():
            raise CvlctlError(f"SAC diverged at frame {self.frame}: {values}", "lower learning_rate")
        row = {"episode": number, "episode_return": total, "length": len(episode), "success": succeeded}
        self.run.log(self.frame, row | values)

    def _draws(self) -> tuple[sac.Draws, int]:
        """The draws of this frame's block, and its place there."""
        block, i = divmod(self.frame, sac.BLOCK)
        if block != self.block:
            self.block, self.draws = block, sac.draw(self.config, self.env.spec, [self.recipe.seed], block)
        return self.draws, i

    def _remember(self, episode: Episode) -> None:
        assert episode.rewards is not None
        for t in range(len(episode)):
            ends = episode.terminated and t == len(episode) - 1
            now, after = episode.observations[t : t + 2]
            self.replay.add(now, episode.actions[t], float(episode.rewards[t]), ends, after)
        self.latest = [*self.latest[-9:], _result(episode)]

    def _checkpoint(self) -> None:
        """Learner first, store second: see the top of this file."""
        file = _state_file(self.run, self.writer.num_episodes)
        checkpoints.save(file, self.state, {**self.metadata, "step": self.frame})
        self._keep_policy("last")
        self.writer.flush()
        for other in file.parent.glob("episodes-*.safetensors"):
            if other != file:
                other.unlink()

    def _keep_policy(self, name: str) -> None:
        kept = {k: v for k, v in self.state.items() if k.startswith(("actor.", "observation_"))}
        checkpoints.save(self.run.checkpoints / f"{name}.safetensors", kept, {**self.metadata, "step": self.frame})


def acting(state: State, spec: Spec) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The policy of member 0: (observation (O,), noise (A,)) -> action (A,). It follows the weights as they change."""
    depth = sum(name.startswith("actor.") for name in state) // 2
    names = [(f"actor.{i}.weight", f"actor.{i}.bias") for i in range(depth)]
    if state["actor.0.weight"].device.type == "cpu":  # numpy on the same memory: no copy
        layers = [(state[w][0].numpy(), state[b][0, 0].numpy()) for w, b in names]
        return NumpyPolicy(layers, state["observation_mean"][0].numpy(), state["observation_std"][0].numpy(), spec)

    @torch.inference_mode()
    def act(observation: np.ndarray, noise: np.ndarray) -> np.ndarray:
        given = _on(state, observation)
        mean, log_std = networks.actor(state, networks.normalise(state, given))
        return torch.tanh(mean + log_std.exp() * _on(state, noise))[0, 0].cpu().numpy()

    return act


def _on(state: State, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(state["actor.0.weight"].device)[None, None]
