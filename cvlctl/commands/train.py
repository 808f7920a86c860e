"""The loop behind `pretrain` and `finetune`: data into memory, batches, checkpoints by the clock, exact resume."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from cvlctl import checkpoints, report, samplers, training
from cvlctl.commands.stream import Stream, arrival_reward, window_rows
from cvlctl.errors import CvlctlError
from cvlctl.networks import State
from cvlctl.runs import Progress, Run, read_metrics, say
from cvlctl.samplers import Data, Indices
from cvlctl.schema import FinetuneRecipe, PretrainRecipe, StoreUse, SuccessExamples
from cvlctl.store import Column, Store, open_store
from cvlctl.training import Settings
from cvlctl.types import Spec

BLOCK = 64  # steps whose randomness is drawn together: part of what "the same batches" means, so a constant


def open_stores(uses: Sequence[StoreUse]) -> list[Store]:
    """Open every store and check that they agree in what a policy sees and does."""
    stores = [open_store(use.path) for use in uses]
    for use, store in zip(uses, stores, strict=True):
        first = stores[0].spec
        if (store.spec.observation_shape, store.spec.action_dim) != (first.observation_shape, first.action_dim):
            raise CvlctlError(
                f"{use.path}: observations {store.spec.observation_shape} and {store.spec.action_dim} action "
                f"dimensions, but {uses[0].path} has {first.observation_shape} and {first.action_dim}",
                "train on stores of one robot",
            )
        if store.spec.pixels or len(store.spec.observation_shape) != 1:
            raise CvlctlError(f"{use.path}: observations of shape {store.spec.observation_shape} are not vectors")
    return stores


class Part(NamedTuple):
    """What is used of one store, as arrays."""

    observation: np.ndarray  # (rows, O)
    action: np.ndarray  # (rows, A)
    arrival_reward: np.ndarray  # (rows,): reward received on arriving at the row's observation
    labelled: np.ndarray  # (rows,) bool: its episode's rewards may be learned from
    episode_ends: np.ndarray  # (n,) cumulative row counts
    terminated: np.ndarray  # (n,) bool


def load(
    recipe: PretrainRecipe | FinetuneRecipe,
    stores: Sequence[Store],
    examples: np.ndarray | None,
    rewards: bool,
    settings: Settings,
) -> Data | Stream:
    """The stores in memory, or windows on them where that is too small."""
    if settings.window_rows == 0:
        return join(stores, recipe.stores, examples, rewards)
    draws = BLOCK * recipe.batch_size
    return Stream(stores, recipe.stores, examples, rewards, settings.window_rows, draws, settings.device)


def join(stores: Sequence[Store], uses: Sequence[StoreUse], examples: np.ndarray | None, rewards: bool) -> Data:
    """The stores in memory, row axes joined. Without `rewards` no label is opened, except to find `top`."""
    parts = [read_part(store, use, rewards) for store, use in zip(stores, uses, strict=True)]
    starts = np.cumsum([0] + [len(part.observation) for part in parts])
    ends = np.concatenate([part.episode_ends + start for part, start in zip(parts, starts, strict=False)])
    where = samplers.layout(ends, np.concatenate([part.terminated for part in parts]))
    labelled = torch.from_numpy(np.concatenate([part.labelled for part in parts]))
    observation = _concatenated([part.observation for part in parts])
    empty = np.zeros((0, observation.shape[1]), dtype=np.float32)
    return Data(
        observation=torch.from_numpy(observation),
        action=torch.from_numpy(_concatenated([part.action for part in parts])),
        arrival_reward=torch.from_numpy(_concatenated([part.arrival_reward for part in parts])).unsqueeze(0),
        layout=where,
        labelled=labelled[where.row].nonzero().squeeze(1),
        examples=torch.from_numpy(empty if examples is None else examples),
    )


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)  # a single store is not copied


def read_part(store: Store, use: StoreUse, rewards: bool) -> Part:
    """What `use` says of a store, read into memory."""
    observation, action, ends = store.observations(), store.actions(), store.episode_ends()
    lengths, count = np.diff(ends, prepend=0), len(ends)
    reward, keeps_label = np.zeros(len(observation), dtype=np.float32), np.zeros(count, dtype=bool)
    if rewards and use.rewards != "none":
        keeps_label = use.kept(count)
        if use.from_store:
            reward = arrival_reward(store.rewards(use.rewards), ends, keeps_label)
        keeps_label |= use.rest == "zeros"
    labelled = np.repeat(keeps_label, lengths)
    part = Part(observation, action, reward, labelled, ends, store.terminated())
    return part if use.top == 1 else best_episodes(part, store.rewards(use.rewards), use.top)


def best_episodes(part: Part, rewards: np.ndarray, share: float) -> Part:
    """The `share` of its episodes with the highest return; the earlier one of equals. `rewards` (rows,) as stored."""
    ends = part.episode_ends
    starts = ends - np.diff(ends, prepend=0)
    order = np.argsort(-np.add.reduceat(rewards.astype(np.float64), starts), kind="stable")
    kept = np.sort(order[: max(1, round(share * len(ends)))])
    rows = np.concatenate([np.arange(starts[i], ends[i]) for i in kept])
    new_ends = np.cumsum((ends - starts)[kept])
    return Part(
        part.observation[rows], part.action[rows], part.arrival_reward[rows], part.labelled[rows], new_ends,
        part.terminated[kept],
    )  # fmt: skip


def success_examples(source: SuccessExamples, spec: Spec, key: str = "success_examples") -> np.ndarray:
    """Success examples (X, O), by rule from a store or from a file; a seeded choice of at most `num`."""
    if source.file is not None:
        found, where = _examples_file(source.file, f"{key}.file"), f"{key}.file: {source.file}"
        found = found[_choice(len(found), source.num)]
    else:
        assert source.from_ is not None
        store = open_store(source.from_)
        ends = store.episode_ends()
        if source.rule == "last":
            rows = np.concatenate(
                [
                    np.arange(max(start + 1, end - source.k), end)
                    for start, end in zip([0, *ends[:-1]], ends, strict=True)
                ]
            )
        else:
            # a success at row t is that of arriving at row t + 1
            rows = np.flatnonzero(store.successes(source.label)) + 1
            if len(rows) == 0:
                raise CvlctlError(
                    f"{source.from_}: no step is labelled a success",
                    "take rule: last, or examples from another store or file",
                )
        where = f"{key}.from: {source.from_}"
        found = Column(store, "data/observation").take(rows[_choice(len(rows), source.num)])
    if found.shape[1:] != tuple(spec.observation_shape):
        what = f"{where}: the examples have shape {found.shape}; expected (X, {spec.observation_shape[0]})"
        raise CvlctlError(what, "take examples from the robot and task that the stores are of")
    return np.ascontiguousarray(found, dtype=np.float32)


def _choice(count: int, num: int) -> np.ndarray:
    """At most `num` of `count`, the same for every seed, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:num])


def _examples_file(path: Path, key: str) -> np.ndarray:
    where, hint = f"{key}: {path}", "give a .npy of shape (X, O), or a .npz with `observations`"
    if not path.is_file():
        raise CvlctlError(f"{key}: no file at {path}", "check the path")
    try:
        loaded = np.load(path, allow_pickle=False)
        found = np.asarray(loaded if isinstance(loaded, np.ndarray) else loaded["observations"])
    except Exception as error:  # zip, zlib and numpy each have their own
        raise CvlctlError(f"{where}: cannot be read: {error}", hint) from error
    if found.dtype.kind not in "fiub":
        raise CvlctlError(f"{where}: holds {found.dtype}, not real numbers", hint)
    if found.ndim != 2 or len(found) == 0:
        raise CvlctlError(f"{where}: has shape {found.shape}; expected (X, O) with X >= 1", hint)
    with np.errstate(over="ignore"):  # what does not fit is infinite, and said below
        array = found.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise CvlctlError(f"{where}: NaN or infinity in {len(bad)} of {len(array)} examples, first in {bad[0]}")
    return array


def array_digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def train(
    recipe: PretrainRecipe | FinetuneRecipe,
    module: ModuleType,
    config: Any,
    stores: Sequence[Store],
    data: Callable[[Settings], Data | Stream],
    run: Run,
    *,
    algorithm: str,
    task: str,
    critic: Any,
    initial: State | None = None,
    force: bool,
) -> dict[str, Any]:
    """Train to the end, or from the last checkpoint on. `data` is called only if there is work to do.

    Args:
        module: exports draws, init and step.
        stores: what `data` is read from.
        critic: the occupancy critic's Config, or None; kept in the checkpoints.
        initial: tensors (E, ...) that replace the fresh ones (a pretrained critic, a finished policy).
    """
    status = run.open(force=force)
    if status == "finished":
        return {"status": "finished already", "out": str(run.out), "steps": recipe.steps, "algorithm": algorithm}
    seeds, spec = list(recipe.seeds), stores[0].spec
    source: Data | Stream | None = None
    try:
        start, saved = 0, None
        if status == "resume":
            saved, metadata = checkpoints.load(run.last)
            try:
                start, settings = int(metadata["step"]), training.saved_settings(metadata["settings"])
            except (KeyError, TypeError, ValueError) as error:
                what = f"{run.last}: step or settings are missing or garbled: {error}"
                raise CvlctlError(what, "the file is damaged: --force starts the run over") from error
            run.cut_metrics(start)
            say(f"{run.out}: resuming at step {start}")
        else:
            settings = training.resolve_settings(
                device=recipe.device, threads=recipe.threads, precision=recipe.precision, compile=recipe.compile,
                steps=recipe.steps, say=say,
            )  # fmt: skip
            settings = replace(settings, window_rows=window_rows(stores, recipe.memory_gb, settings.device))
        training.configure(settings)
        source = data(settings)
        if isinstance(source, Stream):
            say(f"{run.out}: streaming: of {sum(s.num_rows for s in stores):,} rows {settings.window_rows:,} in memory")
        else:
            source = to_device(source, settings.device)
        state = saved or module.init(config, spec, seeds, source.sample() if isinstance(source, Stream) else source)
        if saved is None and initial is not None:
            state = take_over(state, initial)
        state = {name: value.to(settings.device) for name, value in state.items()}
        metadata = {
            "algorithm": algorithm,
            "task": task,
            "spec": asdict(spec),
            "seeds": seeds,
            "recipe": run.recipe,
            "critic": None if critic is None else asdict(critic),
            "settings": settings.as_dict(),
        }
        seconds = _loop(recipe, module, config, source, spec, run, state, settings, metadata, start)
        logged = read_metrics(run.out)
        report.plot_metrics(logged, run.out / "metrics.png")
        run.finish(
            algorithm=algorithm, task=task, seeds=seeds, steps=recipe.steps, settings=settings.as_dict(),
            metrics=logged[-1],
        )  # fmt: skip
    finally:
        if isinstance(source, Stream):
            source.close()
        run.close()
    rate = (recipe.steps - start) / max(seconds, 1e-9)
    return {
        "status": "trained", "out": str(run.out), "algorithm": algorithm, "task": task, "seeds": seeds,
        "steps": recipe.steps, "seconds": round(seconds, 1), "updates_per_second": round(rate, 1),
        "settings": settings.as_dict(),
    }  # fmt: skip


def take_over(state: State, initial: State) -> State:
    """`state` with those of its networks and statistics that `initial` has too: each as a whole, whatever its depth."""

    def network(name: str) -> str:
        return name.split(".")[0]

    replaced = {network(name) for name in initial} & {network(name) for name in state}
    kept = {name: value for name, value in state.items() if network(name) not in replaced}
    return kept | {name: value for name, value in initial.items() if network(name) in replaced}


def to_device(data: Data, device: str) -> Data:
    """The same data on `device`."""
    where = samplers.Layout(*(x.to(device) for x in data.layout))
    return Data(
        data.observation.to(device), data.action.to(device), data.arrival_reward.to(device), where,
        data.labelled.to(device), data.examples.to(device),
    )  # fmt: skip


def _loop(
    recipe: PretrainRecipe | FinetuneRecipe,
    module: ModuleType,
    config: Any,
    source: Data | Stream,
    spec: Spec,
    run: Run,
    state: State,
    settings: Settings,
    metadata: dict[str, Any],
    start: int,
) -> float:
    draws = module.draws(config, spec, recipe.batch_size)
    programs = training.programs(module, config, settings)
    begin = saved_at = time.monotonic()
    what = f"{metadata['algorithm']} ({len(recipe.seeds)} seeds)"
    with interruptible() as interrupted, Progress(what, recipe.steps, "updates", start) as progress:
        if settings.compile:
            say(f"{what}: compiling the training step (10-40 s, once)")
        text = ""
        for step, (indices, noise) in batches(source, draws, list(recipe.seeds), start, recipe.steps):
            done, data = step + 1, at(source, step // BLOCK)
            state, metrics = programs[done % len(programs)](state, samplers.gather(data, indices, draws), noise)
            if done % recipe.log_every_steps == 0 or done == recipe.steps:
                values = {name: value.tolist() for name, value in metrics.items()}
                _check_finite(values, done, run.last)
                run.log(done, values)
                text = " ".join(f"{k.split('/')[-1]} {np.mean(v):.3g}" for k, v in list(values.items())[:3])
            progress.update(done, text)
            if recipe.checkpoint_every_steps and done % recipe.checkpoint_every_steps == 0:
                kept = {name: value for name, value in state.items() if not name.startswith("adam/")}
                checkpoints.save(run.checkpoints / f"step-{done:09d}.safetensors", kept, {**metadata, "step": done})
            due = time.monotonic() - saved_at >= recipe.checkpoint_seconds
            if due or interrupted() or done == recipe.steps:
                checkpoints.save(run.last, state, {**metadata, "step": done})
                saved_at = time.monotonic()
                if interrupted() and done < recipe.steps:
                    say(f"{run.out}: stopped at step {done}; the same command goes on from there")
                    raise KeyboardInterrupt
    return time.monotonic() - begin


def at(source: Data | Stream, block: int) -> Data:
    """What the updates of a block draw from."""
    return source.at(block) if isinstance(source, Stream) else source


def batches(
    source: Data | Stream, draws: samplers.Draws, seeds: list[int], start: int, stop: int
) -> Iterator[tuple[int, tuple[Indices, dict[str, torch.Tensor]]]]:
    """(step, (indices, noise)) for steps start..stop-1: what step i sees does not depend on where the run started."""
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        indices, noise = samplers.draw(at(source, block), draws, seeds, block, BLOCK)
        for step in range(max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)):
            i = step - block * BLOCK
            yield step, (Indices(*(x[i] for x in indices)), {name: value[i] for name, value in noise.items()})


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


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag, so that no update is left half done. A second Ctrl-C stops at once."""
    seen = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, handler) for number in signals]
    except ValueError:  # not the main thread: whoever runs us deals with signals
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        for number, old in zip(signals, before, strict=True):
            signal.signal(number, old)
