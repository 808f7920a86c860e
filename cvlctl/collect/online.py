"""An online learner's replay buffer as a store: the collector behind `cvlctl build-dataset` with SAC and the like.

Beside the store lies a run directory (data/x.zarr: data/x.policies/): policies along the way, and what a killed
collection resumes from. The rule that keeps the two together: at an episode's end the learner's state is written first,
under the number of episodes that it has seen; then the store is flushed; then the older state goes. At whatever instant
a kill comes, the state that belongs to the episodes in the store is there, and the resumed collection goes on as the
uninterrupted one would have. Ctrl-C is obeyed amid an episode, which may take a minute: what is saved is then the
learner as it was when the episode began.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl import checkpoints, files, interrupts
from cvlctl.collect import replay
from cvlctl.collect.recipe import BuildRecipe, ContrastiveSource, OnlineSource, SacSource, policies_dir
from cvlctl.data.store import Store
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.learn import networks
from cvlctl.learn.algorithms import ONLINE, actors, contrastive_ac
from cvlctl.learn.networks import State
from cvlctl.learn.programs import Program, programs_of
from cvlctl.learn.settings import configure, resolve_settings, saved_settings
from cvlctl.learn.updates import Metrics
from cvlctl.play import envs
from cvlctl.play.policies import NumpyPolicy, policy_part
from cvlctl.play.rollout import Outcome, flags, in_words, outcome
from cvlctl.progress import Progress, say
from cvlctl.runs import Run, read_run
from cvlctl.types import Episode, Spec
from cvlctl.units import KEY, finite, plain


def _run(recipe: BuildRecipe) -> Run:
    return Run(policies_dir(recipe.out), recipe.resolved(), {}, recipe.with_defaults)


def collect(
    recipe: BuildRecipe,
    source: OnlineSource,
    env: envs.Env,
    open_writer: Callable[..., StoreWriter],
    force: bool,
    progress: type[Progress] = Progress,
) -> Store:
    """Collect the store of `recipe`, or resume it."""
    run = _run(recipe)
    _take(run, force)
    try:
        writer = open_writer()
        saved = _saved(run, recipe, source, env, writer.num_episodes) if writer.num_episodes else None
        if writer.num_episodes and saved is None:
            writer.close(discard=True)
            say(f"{writer.partial}: the learner's state for it is lost; starting over")
            writer = open_writer()
        with writer:
            collector = _Collector(recipe, source, env, run, writer, saved)
            collector.collect(progress)
            settings = collector.settings.as_dict()
            about = {source.name: asdict(collector.config), "settings": settings}
            store = writer.finish(collector=about, **recipe.attributes(env))
        _finish(run, recipe, source, settings=settings)
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


def finish_run(recipe: BuildRecipe, source: OnlineSource, store: Store) -> None:
    """The store is finished: mark the run beside it as finished too, where a kill came between the two."""
    run = _run(recipe)
    if (run.out / "run.json").exists() and read_run(run.out)["status"] != "finished":
        run.open()
        _finish(run, recipe, source, settings=store.attributes.get("collector", {}).get("settings"))


def _finish(run: Run, recipe: BuildRecipe, source: OnlineSource, **more: Any) -> None:
    for file in run.checkpoints.glob("episodes-*.safetensors"):
        file.unlink()
    files.sync(run.checkpoints)  # a finished run is not looked at again: nothing must come back where power is lost
    run.finish(algorithm=source.name, task=recipe.task, seeds=[recipe.seed], steps=source.steps, **more)


def _state_file(run: Run, episodes: int) -> Path:
    return run.checkpoints / f"episodes-{episodes:09d}.safetensors"


def _saved(
    run: Run, recipe: BuildRecipe, source: OnlineSource, env: envs.Env, episodes: int
) -> tuple[State, dict[str, Any]] | None:
    """The learner's state after `episodes` episodes, or None where it is lost or damaged."""
    file = _state_file(run, episodes)
    try:
        state, metadata = checkpoints.load(file)
        checkpoints.check_alike(file, state, learner_of(source).init(env.spec, [recipe.seed]))
    except CvlctlError as error:
        say(error.what)
        return None
    return state, metadata


Act = Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # observation (O,), noise (A,) or None: greedy -> (A,)


class Learner(NamedTuple):
    """Where online learners differ, beside their module's `draws` and `step`."""

    module: ModuleType
    config: Any
    init: Callable[[Spec, list[int]], State]
    explore: Callable[[Act, np.ndarray, np.ndarray], np.ndarray]  # how it acts: observation (O,), noise (A,)


def learner_of(source: OnlineSource) -> Learner:
    """The learner that a recipe asks for."""
    module, config = ONLINE[source.name], source.config
    if isinstance(source, ContrastiveSource):
        scale = source.exploration_noise
        return Learner(
            module, config,
            init=lambda spec, seeds: contrastive_ac.init_online(config, spec, seeds, scale),
            explore=lambda act, observation, noise: disturbed(act(observation, None), scale, noise),
        )  # fmt: skip
    return Learner(
        module, config,
        init=partial(module.init, config),
        explore=lambda act, observation, noise: act(observation, noise),
    )  # fmt: skip


def disturbed(action: np.ndarray, scale: float, noise: np.ndarray) -> np.ndarray:
    """The action (A,) with Gaussian noise of standard deviation `scale` on it, inside [-1, 1]."""
    return np.clip(action + np.float32(scale) * noise, -1.0, 1.0)


class _Collector:
    """One collection: environment, learner, replay and store, from the first frame or a resumed one to the last."""

    def __init__(
        self,
        recipe: BuildRecipe,
        source: OnlineSource,
        env: envs.Env,
        run: Run,
        writer: StoreWriter,
        saved: tuple[State, dict[str, Any]] | None,
    ) -> None:
        self.recipe, self.source, self.env, self.run, self.writer = recipe, source, env, run, writer
        self.learner = learner_of(source)
        self.config = self.learner.config
        self.wanted = self.learner.module.draws(self.config, env.spec, source.batch_size)
        self.frame, self.block = writer.num_transitions, -1
        self.latest: list[Outcome] = []
        self.hindsight = source.hindsight if isinstance(source, SacSource) else 0.0
        self.replay = replay.Replay(source.steps, env.spec, envs.goals(recipe.task))
        if saved is not None:
            state, metadata = saved
            self.settings = saved_settings(_state_file(run, writer.num_episodes), metadata)
            for number, episode in enumerate(writer.episodes(frames=False)):
                self._remember(episode, number)
            run.cut_metrics(self.frame)
            say(f"{recipe.out}: resuming at frame {self.frame}, episode {writer.num_episodes}")
        else:
            run.cut_metrics(0)  # of a killed collection whose episodes are gone
            state = self.learner.init(env.spec, [recipe.seed])
            # a step this small gains a third from a second thread where the machine is idle, and loses a factor of five
            # to any neighbour where it is not: auto is one
            say(f"{recipe.out}: threads: {recipe.about_threads}")
            # a GPU would be waited for at every frame, and single updates are mostly its launches: only where asked for
            device = "cpu" if recipe.device == "auto" else recipe.device
            self.settings = resolve_settings(
                device=device, threads=recipe.num_threads, precision=recipe.precision, compile=recipe.compile,
                steps=source.updates, update=source.update, say=say,
            )  # fmt: skip
        configure(self.settings)
        self.state = {name: value.to(self.settings.device) for name, value in state.items()}
        self._remember_state()
        bounds = finite(*env.action_bounds)[0] or (-1.0, 1.0)
        self.metadata = {
            "algorithm": source.name, "task": recipe.task, "spec": env.spec.plain(), "seeds": [recipe.seed],
            "recipe": run.recipe, "settings": self.settings.as_dict(), "units": {KEY: plain(bounds)},
            **({"environment": envs.described(env, recipe.settings)} if env.own else {}),
        }  # fmt: skip

    def collect(self, report: type[Progress]) -> None:
        source, what = self.source, f"{self.source.name} on {self.recipe.task}"
        every = source.policy_every_steps or max(1, source.steps // 10)
        programs = programs_of(self.learner.module, self.config, self.settings)
        act, saved_at = acting(self.state, self.env.spec), time.monotonic()
        if self.settings.compile:
            say(f"{what}: compiling the training step (10-40 s, once)")
        with report(what, source.steps, "frames", self.frame) as progress:
            try:
                while self.frame < source.steps:
                    episode, metrics = self._episode(act, programs, every, progress)
                    with interrupts.held():
                        self._keep(episode, metrics)
                        due = time.monotonic() - saved_at >= self.recipe.checkpoint_seconds
                        if due or self.frame == source.steps:
                            self._checkpoint()
                            saved_at = time.monotonic()
            except KeyboardInterrupt:
                self.frame, self.state = self.safe  # the episode under way begins anew, and goes as it would have
                if self.writer.num_episodes:
                    self._checkpoint()
                    done = f"{self.frame} of {source.steps} frames"
                    say(f"{self.recipe.out}: stopped after {done}; the same command goes on from there")
                raise

    def _episode(
        self, act: Act, programs: list[Program], every: int, progress: Progress
    ) -> tuple[Episode, dict[str, float]]:
        """Collect one episode and learn from it; returns the metrics of its last updates too."""
        source, env, number = self.source, self.env, self.writer.num_episodes
        begin, terminated, over = self.frame, False, False
        metrics: Metrics = {}
        observations, actions, rewards, successes = [env.reset(number)], [], [], []
        while not over:
            draws, i = self._draws()
            observation, learning = observations[-1], self.frame - source.learning_starts + 1
            held = i - i % source.random_repeat
            action = (
                self.learner.explore(act, observation, draws.exploration[i])
                if learning > 0 and draws.choice[held] >= source.random_share
                else draws.uniform_action[held]
            )
            after, reward, terminated, truncated, success = env.step(action)
            self.replay.add(observation, action, reward, terminated, after, number)
            observations.append(after)
            actions.append(action)
            rewards.append(reward)
            successes.append(success)
            update, rest = divmod(learning, source.update_every)
            if update > 0 and rest == 0:
                batch, noise = draws.batch(i, self.replay, self.config.gamma, self.settings.device)
                self.state, found = programs[update % len(programs)](self.state, batch, noise)
                metrics |= found  # a delayed actor's are those of its own last update
            self.frame += 1
            over = terminated or truncated or self.frame == source.steps
            if self.frame % every == 0:
                self._keep_policy(f"step-{self.frame:09d}")
            if self.frame % 50 == 0:
                progress.update(self.frame, in_words(self.latest) if self.latest else "")
        known = flags(successes)
        env.told(number, known is not None)
        episode = Episode(
            np.stack(observations), np.stack(actions), np.array(rewards, dtype=np.float32), known, terminated,
            task=self.recipe.task, collected_at=begin, seed=self.recipe.seed, **env.filmed(),
        )  # fmt: skip
        return episode, {name: float(value) for name, value in metrics.items()}

    def _keep(self, episode: Episode, metrics: dict[str, float]) -> None:
        """Take an episode that is over, and remember the learner as it is now: where a stop goes back to."""
        number = self.writer.num_episodes
        self.writer.append(episode)
        total, succeeded = outcome(episode)
        self.latest = [*self.latest[-9:], (total, succeeded)]
        if not np.isfinite(list(metrics.values())).all():
            raise CvlctlError(f"{self.source.title} diverged at frame {self.frame}: {metrics}", "lower learning_rate")
        row = {"episode": number, "episode_return": total, "length": len(episode), "success": succeeded}
        self.run.log(self.frame, row | metrics)
        self._remember_state()

    def _remember_state(self) -> None:
        self.safe = self.frame, {name: value.clone() for name, value in self.state.items()}

    def _draws(self) -> tuple[replay.Draws, int]:
        """The draws of this frame's block, and its place there."""
        block, i = divmod(self.frame, replay.BLOCK)
        if block != self.block:
            seeds = [self.recipe.seed]
            self.block = block
            self.draws = replay.draw(self.source.name, self.wanted, self.env.spec, seeds, block, self.hindsight)
        return self.draws, i

    def _remember(self, episode: Episode, number: int) -> None:
        assert episode.rewards is not None
        for t in range(len(episode)):
            ends = episode.terminated and t == len(episode) - 1
            now, after = episode.observations[t : t + 2]
            self.replay.add(now, episode.actions[t], float(episode.rewards[t]), ends, after, number)
        self.latest = [*self.latest[-9:], outcome(episode)]

    def _checkpoint(self) -> None:
        """Learner first, store second: see the top of this file."""
        file = _state_file(self.run, self.writer.num_episodes)
        self.run.sync_metrics()
        checkpoints.save(file, self.state, {**self.metadata, "step": self.frame})
        self._keep_policy("last")
        self.writer.flush()
        for other in file.parent.glob("episodes-*.safetensors"):
            if other != file:
                other.unlink()

    def _keep_policy(self, name: str) -> None:
        file = self.run.checkpoints / f"{name}.safetensors"
        checkpoints.save(file, policy_part(self.state), {**self.metadata, "step": self.frame})


def acting(state: State, spec: Spec) -> Act:
    """The policy of member 0. It follows the weights as they change."""
    depth = len(actors.names(state)) // 2
    names = [(f"actor.{i}.weight", f"actor.{i}.bias") for i in range(depth)]
    if state["actor.0.weight"].device.type == "cpu":  # numpy on the same memory: no copy
        layers = [(state[w][0].numpy(), state[b][0, 0].numpy()) for w, b in names]
        return NumpyPolicy(layers, state["observation_mean"][0].numpy(), state["observation_std"][0].numpy(), spec)

    @torch.inference_mode()
    def act(observation: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        given = _on(state, observation)
        mean, log_std = networks.actor(state, networks.normalise(state, given))
        if noise is not None:
            mean = mean + log_std.exp() * _on(state, noise)
        return torch.tanh(mean)[0, 0].cpu().numpy()

    return act


def _on(state: State, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(state["actor.0.weight"].device)[None, None]
