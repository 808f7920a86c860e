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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl import checkpoints, files, interrupts
from cvlctl.collect import replay
from cvlctl.collect.learners import Act, acting, learner_of
from cvlctl.collect.recipe import BuildRecipe, policies_dir
from cvlctl.collect.source_recipes import OnlineSource, SacSource
from cvlctl.data.load import seen_spec
from cvlctl.data.store import Store
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.learn import encoders
from cvlctl.learn.encoders import seeing
from cvlctl.learn.networks import State
from cvlctl.learn.programs import Program, programs_of
from cvlctl.learn.settings import configure, lack_of, resolve_settings, saved_settings
from cvlctl.learn.updates import Metrics
from cvlctl.play import envs
from cvlctl.play.policies import policy_part
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
    run, spec = _run(recipe), seeing(_seen(recipe, env), recipe.sees)
    encoders.init("critic", spec, [recipe.seed])  # frames that are too small are told before anything is there
    if lacking := lack_of(recipe.device, recipe.compile == "true"):  # nor where the machine cannot
        raise CvlctlError(*lacking)
    run.check(force=force)
    writer = open_writer()  # first: who has the store may do what it likes with the run beside it
    try:
        _take(run, force)
        saved = _saved(run, recipe, source, env, writer.num_episodes) if writer.num_episodes else None
        if writer.num_episodes and saved is None:
            writer.close(discard=True)
            say(f"{writer.partial}: the learner's state for it is lost; starting over")
            writer = open_writer()
        collector = _Collector(recipe, source, env, run, writer, saved)
        collector.collect(progress)
        settings = collector.settings.as_dict()
        about = {source.name: asdict(collector.config), "settings": settings}
        store = writer.finish(collector=about, **recipe.attributes(env))
        _finish(run, recipe, source, settings=settings)
    finally:
        writer.close()
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


def _seen(recipe: BuildRecipe, env: envs.Env) -> Spec:
    """What the learner sees of the environment."""
    sizes = {camera.name: (camera.height, camera.width, 3) for camera in recipe.filmed_by}
    return seen_spec(replace(env.spec, cameras=sizes), recipe.sees)


def _state_file(run: Run, episodes: int) -> Path:
    return run.checkpoints / f"episodes-{episodes:09d}.safetensors"


def _saved(
    run: Run, recipe: BuildRecipe, source: OnlineSource, env: envs.Env, episodes: int
) -> tuple[State, dict[str, Any]] | None:
    """The learner's state after `episodes` episodes, or None where it is lost or damaged."""
    file = _state_file(run, episodes)
    try:
        state, metadata = checkpoints.load(file)
        spec = seeing(_seen(recipe, env), recipe.sees)
        checkpoints.check_alike(file, state, learner_of(source).init(spec, [recipe.seed]))
    except CvlctlError as error:
        say(error.what)
        return None
    return state, metadata


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
        self.config, self.observe = self.learner.config, recipe.sees
        self.wanted = self.learner.module.draws(self.config, env.spec, source.batch_size)
        self.frame, self.block = writer.num_transitions, -1
        self.latest: list[Outcome] = []
        self.hindsight = source.hindsight if isinstance(source, SacSource) else 0.0
        seen = _seen(recipe, env)
        if saved is not None:
            state, metadata = saved
            self.settings = saved_settings(_state_file(run, writer.num_episodes), metadata)
            run.cut_metrics(self.frame)
            say(f"{recipe.out}: resuming at frame {self.frame}, episode {writer.num_episodes}")
        else:
            run.cut_metrics(0)  # of a killed collection whose episodes are gone
            state = self.learner.init(seeing(seen, self.observe), [recipe.seed])
            # a step this small gains a third from a second thread where the machine is idle, and loses a factor of five
            # to any neighbour where it is not: auto is one
            say(f"{recipe.out}: threads: {recipe.about_threads}")
            # a GPU would be waited for at every frame, and single updates are mostly its launches: only where asked for
            # (or where frames are encoded)
            device = "cpu" if recipe.device == "auto" and self.observe is None else recipe.device
            self.settings = resolve_settings(
                device=device, threads=recipe.num_threads, precision=recipe.precision, compile=recipe.compile,
                steps=source.updates, update=source.update, say=say,
            )  # fmt: skip
        configure(self.settings)
        instants = None
        if self.observe is not None:
            rows = source.steps + source.steps // env.spec.horizon + 1
            instants = replay.Instants(rows, seen, self.observe, self.settings.device)
        self.replay = replay.Replay(source.steps, env.spec, envs.goals(recipe.task), instants)
        for number, episode in enumerate(writer.episodes(frames=instants is not None)):
            self._remember(episode, number)
        self.state = {name: value.to(self.settings.device) for name, value in state.items()}
        self._remember_state()
        bounds = finite(*env.action_bounds)[0] or (-1.0, 1.0)
        self.metadata = {
            "algorithm": source.name, "task": recipe.task, "spec": seen.plain(), "seeds": [recipe.seed],
            "recipe": run.recipe, "settings": self.settings.as_dict(), "units": {KEY: plain(bounds)},
            **({"environment": envs.described(env, recipe.settings)} if env.own else {}),
        }  # fmt: skip
        if self.observe is not None:
            stand = {camera.name: camera.about() for camera in recipe.filmed_by if camera.name in seen.cameras}
            self.metadata |= {"observe": asdict(self.observe), "cameras": stand}

    def collect(self, report: type[Progress]) -> None:
        source, what = self.source, f"{self.source.name} on {self.recipe.task}"
        every = source.policy_every_steps or max(1, source.steps // 10)
        programs = programs_of(self.learner.module, self.config, self.settings)
        act, saved_at = acting(self.state, self.env.spec, self.replay.instants), time.monotonic()
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
        self._look(observations[0], begins=True)
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
            self._look(after)
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

    def _look(self, vector: np.ndarray, begins: bool = False) -> None:
        """Remember what cameras show now, where that is learned from."""
        if self.replay.instants is not None:
            assert self.env.film is not None
            self.replay.instants.add(vector, self.env.film.latest, begins)

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
            self.draws = replay.draw(
                self.source.name, self.wanted, self.env.spec, seeds, block, self.hindsight,
                0 if self.observe is None else self.observe.shift,
            )  # fmt: skip
        return self.draws, i

    def _remember(self, episode: Episode, number: int) -> None:
        assert episode.rewards is not None
        observations, instants = episode.observations, self.replay.instants
        for t in range(len(episode) + 1):
            if instants is not None:
                shown = {camera: frames[t] for camera, frames in (episode.images or {}).items()}
                instants.add(observations[t], shown, begins=t == 0)
            if t > 0:
                ends, before = episode.terminated and t == len(episode), t - 1
                action, reward = episode.actions[before], float(episode.rewards[before])
                self.replay.add(observations[before], action, reward, ends, observations[t], number)
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
