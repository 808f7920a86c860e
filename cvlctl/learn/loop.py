"""The loop behind `pretrain` and `finetune`: updates as a generator, checkpoints by the clock, exact resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl import checkpoints
from cvlctl.data.concerns import concerns, never_varied
from cvlctl.data.load import Reading, hold_out, opened
from cvlctl.data.samplers import BLOCK, Data, Draws, Indices, at, batches, draw, gather
from cvlctl.data.statistics import observation_range
from cvlctl.data.stream import Stream, window_rows
from cvlctl.data.units import column_names
from cvlctl.errors import CvlctlError
from cvlctl.files import read_json
from cvlctl.interrupts import interruptible
from cvlctl.learn.encoders import seeing
from cvlctl.learn.networks import NEVER_VARIED, State
from cvlctl.learn.pictures import HELD_OUT, plot_metrics
from cvlctl.learn.programs import Program, programs_of
from cvlctl.learn.recipe import HELD_OUT_BATCHES, FinetuneRecipe, PretrainRecipe
from cvlctl.learn.settings import Settings, configure, resolve_settings, saved_settings
from cvlctl.learn.trackers import Tell, check_installed, tracking
from cvlctl.learn.updates import Metrics
from cvlctl.progress import Progress, say
from cvlctl.runs import Run, read_metrics
from cvlctl.types import Spec

Recipe = PretrainRecipe | FinetuneRecipe
HeldOut = Callable[[State], dict[str, list[float]]]  # metrics of each member


class Learner(NamedTuple):
    """What is trained."""

    name: str  # what tables call it
    task: str
    module: ModuleType  # an algorithm's page: draws, init and step
    config: Any
    critic: Any = None  # the occupancy critic's Config, kept in the checkpoints
    initial: State | None = None  # tensors (E, ...) that replace the fresh ones: a pretrained critic, a finished policy
    environment: Any = None  # what the store says of the environment that it came from, kept in the checkpoints
    beside: State | None = None  # tensors (E, ...) that stand in the state as they are: a policy, and what it sees by


class Job(NamedTuple):
    """A run under way: how it computes, where it starts, and its state then."""

    settings: Settings
    start: int
    state: State | None  # None: a fresh one


def train(recipe: Recipe, learner: Learner, reading: Reading, run: Run, *, force: bool = False) -> dict[str, Any]:
    """Train to the end, or from the last checkpoint on. Data are read only if there is work to do."""
    check_installed(recipe.loggers)
    status = run.open(force=force)
    if status == "finished":
        return finished_already(run, recipe.steps, learner.name)
    try:
        spec = seeing(reading.spec, reading.observe)
        job = _resumed(run, recipe) if status == "resume" else _begun(recipe, reading, learner.critic)
        configure(job.settings)
        with opened(reading, job.settings.window_rows, BLOCK * recipe.batch_size, job.settings.device) as source:
            if isinstance(source, Stream):
                rows = sum(store.num_rows for store in reading.stores)
                say(f"{run.out}: streaming: of {rows:,} rows {job.settings.window_rows:,} in memory")
            draws = learner.module.draws(learner.config, spec, recipe.batch_size)
            programs = programs_of(learner.module, learner.config, job.settings)
            held_out: HeldOut | None = None
            if recipe.validation:
                source, held = _apart(source, recipe.validation)
                held_out = _held_out_losses(held, draws, recipe.seeds, programs[0])
            sample = source.sample() if isinstance(source, Stream) else source
            low, high = observation_range(sample.observation)
            if job.state is None:
                _warn(reading, low, high, streamed=isinstance(source, Stream))
            job = job._replace(state=_state(job, recipe, learner, spec, sample, run.last))
            trained = updates(recipe, draws, programs, source, job)
            metadata = {
                "algorithm": learner.name, "task": learner.task, "spec": reading.spec.plain(),
                "seeds": list(recipe.seeds), "recipe": run.recipe,
                "critic": None if learner.critic is None else asdict(learner.critic),
                "settings": job.settings.as_dict(), "units": reading.units.attributes(),
                "observation_range": [low.tolist(), high.tolist()],
                **({} if learner.environment is None else {"environment": learner.environment}),
                **_sight(reading),
            }  # fmt: skip
            with tracking(recipe.loggers, run.out, recipe.seeds, run.recipe, job.start) as tell:
                seconds = _save_along(trained, len(programs), held_out, tell, recipe, run, job, metadata)
        logged = read_metrics(run.out)
        if not logged or logged[-1]["step"] != recipe.steps:
            raise CvlctlError(f"{run.out}/metrics.jsonl: the last line is lost", "--force starts the run over")
        plot_metrics(logged, run.out / "metrics.png")
        about = {"algorithm": learner.name, "task": learner.task, "seeds": list(recipe.seeds), "steps": recipe.steps}
        run.finish(**about, settings=job.settings.as_dict(), metrics=logged[-1])
    finally:
        run.close()
    rate = round((recipe.steps - job.start) / max(seconds, 1e-9), 1)
    return {
        "status": "trained", "out": str(run.out), **about, "seconds": round(seconds, 1), "updates_per_second": rate,
        "settings": job.settings.as_dict(), "metrics": logged[-1],
    }  # fmt: skip


def _sight(reading: Reading) -> dict[str, Any]:
    """What of cameras is seen, and how the stores say that these stand: whoever plays the policy renders the same."""
    if reading.observe is None:
        return {}
    said = [store.attributes.get("cameras") for store in reading.stores]
    known = {name: about for cameras in reversed(said) if isinstance(cameras, dict) for name, about in cameras.items()}
    stand = {name: known[name] for name in reading.observe.cameras if name in known}
    return {"observe": asdict(reading.observe), "cameras": stand}


def finished_already(run: Run, steps: int, name: str) -> dict[str, Any]:
    """What there is to say of a finished run, its last metrics among it."""
    about = {"status": "finished already", "out": str(run.out), "steps": steps, "algorithm": name}
    return {**about, "metrics": (read_json(run.out / "run.json") or {}).get("metrics")}


def _warn(reading: Reading, low: Tensor, high: Tensor, *, streamed: bool) -> None:
    """Say what of the data is going to be believed, and perhaps should not be."""
    names = column_names(reading.units, len(low))
    for line in never_varied(names, low.tolist(), high.tolist()):
        say(line)
    for store in reading.stores:
        for line in concerns(store, duplicates=not streamed):
            say(f"{store.path}: {line}")


def _begun(recipe: Recipe, reading: Reading, critic: Any) -> Job:
    say(f"{recipe.out}: threads: {recipe.about_threads}")
    settings = resolve_settings(
        device=recipe.device, threads=recipe.num_threads, precision=recipe.precision, compile=recipe.compile,
        steps=recipe.steps, update=recipe.update(critic), say=say,
    )  # fmt: skip
    rows = window_rows(
        reading.stores, recipe.memory_gb, settings.device, (reading.encode is None and reading.observe) or None
    )
    return Job(replace(settings, window_rows=rows), 0, None)


def _resumed(run: Run, recipe: Recipe) -> Job:
    state, metadata = checkpoints.load(run.last)
    start, settings = metadata.get("step"), saved_settings(run.last, metadata)
    if type(start) is not int or not 0 <= start <= recipe.steps:
        raise CvlctlError(f"{run.last}: its step is {start}, of {recipe.steps}", "--force starts the run over")
    run.cut_metrics(start, recipe.log_every_steps if start < recipe.steps else 1)
    say(f"{run.out}: resuming at step {start}")
    return Job(settings, start, state)


def _state(job: Job, recipe: Recipe, learner: Learner, spec: Spec, sample: Data, last: Path) -> State:
    """The state that the first update sees, on its device; statistics are those of `sample`."""
    state = learner.module.init(learner.config, spec, list(recipe.seeds), sample) | (learner.beside or {})
    if learner.initial is not None:
        fresh, state = state, take_over(state, learner.initial)
        if not hasattr(learner.module, "STARTS_FROM"):  # which evaluates a policy as it is
            state = awake(state, fresh)
        _check_moments(state, getattr(recipe, "init_from", None))
    if job.state is not None:
        checkpoints.check_alike(last, job.state, state)
        state = job.state
    return {name: value.to(job.settings.device) for name, value in state.items()}


def take_over(state: State, initial: State) -> State:
    """`state` with those of its networks and statistics that `initial` has too: each as a whole, whatever its depth."""

    def network(name: str) -> str:
        return name.split(".")[0]

    replaced = {network(name) for name in initial} & {network(name) for name in state}
    kept = {name: value for name, value in state.items() if network(name) not in replaced}
    return kept | {name: value for name, value in initial.items() if network(name) in replaced}


def awake(state: State, fresh: State) -> State:
    """`state` with the `fresh` statistics of those columns alone that never varied before, and do now."""
    asleep, here = state["observation_std"] == NEVER_VARIED, fresh["observation_std"] != NEVER_VARIED
    names = ("observation_mean", "observation_std")
    return state | {name: torch.where(asleep & here, fresh[name], state[name]) for name in names}


def _check_moments(state: State, origin: Path | None) -> None:
    """Raise a CvlctlError where a parameter and Adam's moments of it, of `origin`, do not belong together."""
    for name in state:
        before, first, parameter = name.partition("/m/")
        if first:
            shapes = [
                x.shape if (x := state.get(n)) is not None else None for n in (parameter, f"{before}/v/{parameter}")
            ]
            if shapes != [state[name].shape] * 2:
                what = f"init_from: {origin}: {parameter} and its moments do not fit together: {name} is alone"
                raise CvlctlError(what, "it is damaged, or a numbered checkpoint of other widths: take the run itself")


def _apart(source: Data | Stream, share: float) -> tuple[Data, Data]:
    if isinstance(source, Stream):
        what = (
            "validation: the stores are larger than memory_gb allows, and a share of their episodes is held in memory"
        )
        raise CvlctlError(what, "raise memory_gb, or leave validation out")
    return hold_out(source, share)


def _held_out_losses(held: Data, draws: Draws, seeds: Sequence[int], program: Program) -> HeldOut:
    """What an update on batches of the held-out episodes would report, which is then undone: whatever is trained, its
    losses are said in one place alone, its step. Always the same batches, so that they do not blur the curve."""
    indices, noise = draw(held, draws, seeds, 0, HELD_OUT_BATCHES)

    def losses(state: State) -> dict[str, list[float]]:
        before = {name: value.clone() for name, value in state.items()}
        reports = []
        for i in range(HELD_OUT_BATCHES):
            batch = gather(held, Indices(*(x[i] for x in indices)), draws)
            _, metrics = program(dict(state), batch, {name: value[i] for name, value in noise.items()})
            reports.append({name: value.clone() for name, value in metrics.items()})
            for name, value in before.items():
                state[name].copy_(value)
        return {
            HELD_OUT + name: torch.stack([report[name] for report in reports]).mean(dim=0).tolist()
            for name in reports[0]
        }

    return losses


def updates(
    recipe: Recipe, draws: Draws, programs: list[Program], source: Data | Stream, job: Job
) -> Iterator[tuple[int, State, Metrics]]:
    """(number of updates done, state, metrics) after each; what update i sees does not depend on where it started."""
    state = job.state
    assert state is not None
    for step, (indices, noise) in batches(source, draws, list(recipe.seeds), job.start, recipe.steps):
        done, data = step + 1, at(source, step // BLOCK)
        state, metrics = programs[done % len(programs)](state, gather(data, indices, draws), noise)
        yield done, state, metrics


def _save_along(
    trained: Iterator[tuple[int, State, Metrics]],
    num_programs: int,
    held_out: HeldOut | None,
    tell: Tell,
    recipe: Recipe,
    run: Run,
    job: Job,
    metadata: dict[str, Any],
) -> float:
    """Train to the end, with logs, progress and checkpoints by the clock; returns the seconds it took.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the state is saved.
        CvlctlError: the losses diverged.
    """
    begin = saved_at = time.monotonic()
    what = f"{metadata['algorithm']} ({len(recipe.seeds)} seeds)"
    reported = Progress(what, recipe.steps, "updates", job.start, num_programs)
    with interruptible() as interrupted, reported as progress:
        if job.settings.compile:
            say(f"{what}: compiling the training step (10-40 s, once)")
        text = ""
        for done, state, metrics in trained:
            if done % recipe.log_every_steps == 0 or done == recipe.steps:
                values = {name: value.tolist() for name, value in metrics.items()}
                _check_finite(values, done, run.last)
                logged = values | (held_out(state) if held_out else {})
                run.log(done, logged)
                tell(done, logged)
                text = " ".join(f"{k.split('/')[-1]} {np.mean(v):.3g}" for k, v in list(values.items())[:3])
            progress.update(done, text)
            if recipe.checkpoint_every_steps and done % recipe.checkpoint_every_steps == 0:
                kept = {name: value for name, value in state.items() if not name.startswith("adam/")}
                checkpoints.save(run.checkpoints / f"step-{done:09d}.safetensors", kept, {**metadata, "step": done})
            due = time.monotonic() - saved_at >= recipe.checkpoint_seconds
            if due or interrupted() or done == recipe.steps:
                run.sync_metrics()
                checkpoints.save(run.last, state, {**metadata, "step": done})
                saved_at = time.monotonic()
                if interrupted():
                    say(f"{run.out}: stopped at step {done}; the same command goes on from there")
                    raise KeyboardInterrupt
    return time.monotonic() - begin


def _check_finite(values: dict[str, list[float]], step: int, last: Path) -> None:
    for name, value in values.items():
        if not np.isfinite(value).all():
            what = f"training diverged: {name} is {value} at step {step}"
            raise CvlctlError(what, f"lower learning_rate, use layer_norm or unit features; {_what_is_left(last)}")


def _what_is_left(last: Path) -> str:
    if not last.exists():
        return "no checkpoint was saved before"
    try:
        return f"the last checkpoint, of step {checkpoints.load(last)[1]['step']}, is sound"
    except CvlctlError:  # losses are looked at every log_every_steps: one may be saved in between
        return f"the last checkpoint ({last}) has diverged too"
