"""`cvlctl data merge | split | filter | subsample | drop-rewards | label | examples`: stores made of stores.

Every function returns what it wrote as plain data (`--json` prints it) and refuses to overwrite unless forced.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl import files
from cvlctl.commands.derive import (
    Column,
    Output,
    Part,
    bounds,
    column_rows,
    command_line,
    copied_labels,
    derive,
    label_arrays,
    summary,
)
from cvlctl.errors import CvlctlError
from cvlctl.runs import LABELS_FILE
from cvlctl.store import Store, open_store
from cvlctl.writer import check_label


@dataclass(frozen=True)
class Criteria:
    """Which episodes `filter_episodes` keeps: those that meet every criterion that is given.

    Returns are undiscounted; an episode succeeds where any of its steps does; bounds are inclusive, but for
    `collected_to`, so that [0, n) and [n, m) share no episode. Returns and successes are those of `label`.
    """

    min_return: float | None = None
    max_return: float | None = None
    success: bool | None = None
    min_length: int | None = None
    max_length: int | None = None
    tasks: Sequence[str] = ()
    collected_from: int | None = None
    collected_to: int | None = None
    label: str = "given"


def merge(paths: Sequence[Path], out: Path, *, task: str | None = None, force: bool = False) -> dict[str, Any]:
    """Join stores of one observation and action shape, one after the other; labels that all of them have are kept.

    Args:
        task: the new store's task; default: the parents', joined by " + " where they differ. Episodes keep their own.
    """
    if len(paths) < 2:
        raise CvlctlError("merge needs two stores or more", "cvlctl data merge A B --out C")
    stores = [open_store(path) for path in paths]
    for path, store in zip(paths, stores, strict=True):
        if _shape(store) != _shape(stores[0]):
            what = f"{path} has {_shape(store)}, but {paths[0]} has {_shape(stores[0])}"
            raise CvlctlError(what, "merge stores of one robot and task family")
    parts = [_all(store) for store in stores]
    labels = copied_labels(parts)
    left_out = sorted({name for store in stores for name in label_arrays(store)} - set(labels))
    name = task or " + ".join(dict.fromkeys(store.task for store in stores))
    command = command_line("merge", *paths, out=out, task=task)
    (store,) = derive([Output(Path(out), parts, labels, name)], command, force=force)
    return {**summary(store), "labels_left_out": left_out}


def split(
    path: Path, *, train: float = 0.9, seed: int = 0, out: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Divide a store by episode, by a seeded draw, into `<out>-train.zarr` and `<out>-validation.zarr`: both or none.

    Args:
        train: share of the episodes, in (0, 1); both stores get at least one.
        out: default: the store's own path without its suffix.
    """
    store = open_store(path)
    if not 0.0 < train < 1.0:
        raise CvlctlError(
            f"--train {train:g} is no share of the episodes", "give a number between 0 and 1, such as 0.9"
        )
    if store.num_episodes < 2:
        raise CvlctlError(f"{path} has one episode: it cannot be split", "collect more episodes")
    order = _generator(seed).permutation(store.num_episodes)
    count = min(max(round(train * store.num_episodes), 1), store.num_episodes - 1)
    stem = Path(out) if out is not None else Path(path).with_suffix("")
    outputs = []
    for name, numbers in (("train", order[:count]), ("validation", order[count:])):
        part = Part(store, np.sort(numbers))
        outputs.append(Output(stem.with_name(f"{stem.name}-{name}.zarr"), [part], copied_labels([part]), store.task))
    written = derive(outputs, command_line("split", path, train=train, seed=seed, out=out), force=force)
    return dict(zip(("train", "validation"), map(summary, written), strict=True))


def filter_episodes(path: Path, out: Path, criteria: Criteria, *, force: bool = False) -> dict[str, Any]:
    """Keep the episodes that meet the criteria, in their order.

    Raises:
        CvlctlError: no criterion, a label that the store lacks, an unknown task, or no episode that meets them.
    """
    store = open_store(path)
    numbers = np.flatnonzero(_meets(store, criteria))
    if len(numbers) == 0:
        raise CvlctlError(f"{path}: none of {store.num_episodes} episodes passes", _ranges(store, criteria.label))
    options = {
        "min_return": criteria.min_return, "max_return": criteria.max_return, "success": criteria.success,
        "min_length": criteria.min_length, "max_length": criteria.max_length, "task": criteria.tasks,
        "collected_from": criteria.collected_from, "collected_to": criteria.collected_to,
        "label": criteria.label if criteria.label != "given" else None,
    }  # fmt: skip
    return _some(Part(store, numbers), out, command_line("filter", path, out=out, **options), force)


def subsample(
    path: Path,
    out: Path,
    *,
    episodes: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Keep a seeded choice of episodes, by number or by fraction, in their order."""
    store = open_store(path)
    if (episodes is None) == (fraction is None):
        raise CvlctlError("subsample needs one of --episodes and --fraction", "such as --fraction 0.1")
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise CvlctlError(f"--fraction {fraction:g} is not in (0, 1]", "such as --fraction 0.1")
    if episodes is not None and not 1 <= episodes <= store.num_episodes:
        raise CvlctlError(f"--episodes {episodes}: {path} has {store.num_episodes} episodes", "choose 1 to that many")
    count = episodes or max(1, round((fraction or 0.0) * store.num_episodes))
    numbers = np.sort(_generator(seed).permutation(store.num_episodes)[:count])
    command = command_line("subsample", path, out=out, episodes=episodes, fraction=fraction, seed=seed)
    return _some(Part(store, numbers), out, command, force)


def drop_rewards(path: Path, out: Path, *, labels: Sequence[str] = (), force: bool = False) -> dict[str, Any]:
    """Leave labels out, rewards and successes both: all of them, or those named. The digest stays the same."""
    store = open_store(path)
    for label in labels:
        if label not in store.labels:
            raise _no_label(store, label)
    part = _all(store)
    names = tuple(f"labels/{label}/" for label in labels or store.labels)
    kept = {name: rows for name, rows in copied_labels([part]).items() if not name.startswith(names)}
    command = command_line("drop-rewards", path, out=out, label=labels)
    (written,) = derive([Output(Path(out), [part], kept, store.task)], command, force=force)
    return summary(written)


def label_store(
    path: Path,
    name: str,
    out: Path,
    *,
    rewards: str,
    label: str = "given",
    examples: Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Add a label `name` to a copy of a store.

    Args:
        rewards: where its rewards come from: another label, "zeros", "successes" (1 on arriving in a state that `label`
            marks as successful, else 0), a .npy of shape (transitions,), or (rows,) as in the store, "oril" or "purl"
            (learned here from `examples`), or a finetuned run that has learned rewards of this store.
        examples: .npy of success examples, for oril and purl.
        seed: of the labeller, here or in the run.

    Raises:
        CvlctlError: the label is there already, its name is not plain, or the rewards are not to be had.
    """
    store = open_store(path)
    if name in store.labels:
        raise CvlctlError(f"{path} has a label {name!r} already", "choose another name, or drop that one first")
    check_label(name)
    part = _all(store)
    file: np.ndarray | None = None  # of rewards, one a transition or one a row
    if rewards == "successes":
        store.require_label(label, "success")
    elif rewards.endswith(".npy"):
        file = _reward_file(Path(rewards), store)
    elif rewards != "zeros":
        from cvlctl.labellers import LABELLERS  # and with it torch, which the others do without

        if rewards in LABELLERS:
            file = _learn(rewards, store, examples, seed)
        elif (Path(rewards) / LABELS_FILE).is_file():
            file = _learned_in(Path(rewards) / LABELS_FILE, store, seed)
        else:
            store.require_label(rewards)

    def rows() -> Iterator[np.ndarray]:
        if file is not None:
            yield from _rows_of_file(file, part)
        elif rewards == "zeros":
            yield from (np.zeros(end - start, np.float32) for start, end in bounds(part))
        elif rewards == "successes":
            yield from (x.astype(np.float32) for x in column_rows([part], f"labels/{label}/success"))
        else:
            yield from column_rows([part], f"labels/{rewards}/reward")

    labels = {**copied_labels([part]), f"labels/{name}/reward": rows}
    options = {"label": label if label != "given" else None, "examples": examples, "seed": seed or None}
    command = command_line("label", path, name, out=out, rewards=rewards, **options)
    (written,) = derive([Output(Path(out), [part], labels, store.task)], command, force=force)
    return summary(written)


def examples(
    path: Path,
    out: Path,
    *,
    rule: str = "successes",
    num: int = 200,
    k: int = 1,
    label: str = "given",
    picks: Sequence[str] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Write success examples (X, O) for `success_examples: {file: ...}`: a .npy, or a .npz that says whence they came.

    Args:
        rule: "successes" or "last" (`k` states an episode), at most `num` of them: what a recipe would take.
        picks: instead of a rule: frames as "episode:step"; step 0 is the first observation, -1 the final one.
    """
    store = open_store(path)
    if Path(out).suffix not in (".npy", ".npz"):
        raise CvlctlError(f"{out}: success examples are kept in a .npy or a .npz", "name the file so")
    if Path(out).exists() and not (force and Path(out).is_file()):
        raise CvlctlError(f"{out} exists", "choose another file" + "; --force replaces it" * Path(out).is_file())
    if picks:
        found = _picked(store, picks)
        command = command_line("examples", path, out=out, pick=picks)
    else:
        from cvlctl.commands.train import success_examples
        from cvlctl.schema import SuccessExamples

        source = {"from": Path(path), "rule": rule, "num": num, "k": k, "label": label}
        found = success_examples(SuccessExamples.model_validate(source), store.spec)
        command = command_line("examples", path, out=out, rule=rule, num=num, k=k, label=label)
    data = io.BytesIO()
    if Path(out).suffix == ".npy":
        np.save(data, found, allow_pickle=False)
    else:
        origin = {"parents": [{"path": str(path), "digest": store.digest()}], "command": command}
        np.savez(data, allow_pickle=False, observations=found, provenance=np.array(json.dumps(origin)))
    files.write_atomically(Path(out), data.getbuffer())
    return {"status": "written", "path": str(out), "examples": len(found), "shape": list(found.shape)}


def in_words(result: dict[str, Any]) -> str:
    """The result of any of these as one line, two for `split`."""
    if "status" not in result:
        return "\n".join(in_words(one) for one in result.values())
    if "examples" in result:
        return f"{result['path']}: {result['examples']:,} success examples"
    of = f" of {result['of_episodes']:,}" if "of_episodes" in result else ""
    line = f"{result['path']}: {result['episodes']:,}{of} episodes, {result['transitions']:,} transitions, "
    line += f"labels: {', '.join(result['labels']) or 'none'}"
    if result.get("labels_left_out"):
        line += f"\nleft out, since not every store has them: {', '.join(result['labels_left_out'])}"
    return line


def _some(part: Part, out: Path, command: str, force: bool) -> dict[str, Any]:
    (store,) = derive([Output(Path(out), [part], copied_labels([part]), part.store.task)], command, force=force)
    return {**summary(store), "of_episodes": part.store.num_episodes}


def _all(store: Store) -> Part:
    return Part(store, np.arange(store.num_episodes))


def _shape(store: Store) -> str:
    kind = "pixels" if store.spec.pixels else "observations"
    return f"{kind} of shape {store.spec.observation_shape} and {store.spec.action_dim} action dimensions"


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise CvlctlError(f"--seed {seed} is negative", "give 0 or more")
    return np.random.default_rng(seed)


def _meets(store: Store, criteria: Criteria) -> np.ndarray:
    """(episodes,) bool."""
    keep = np.ones(store.num_episodes, bool)
    lengths, collected_at = store.lengths(), store.collected_at()
    bounded: list[tuple[np.ndarray, float | None, float | None]] = [
        (lengths, criteria.min_length, criteria.max_length),
        (collected_at, criteria.collected_from, None if criteria.collected_to is None else criteria.collected_to - 1),
    ]
    if criteria.min_return is not None or criteria.max_return is not None:
        bounded.append((_returns(store, criteria.label), criteria.min_return, criteria.max_return))
    elif criteria == Criteria(label=criteria.label):
        raise CvlctlError("filter needs a criterion", "such as --min-return 100; see cvlctl data filter --help")
    for values, low, high in bounded:
        if low is not None:
            keep &= values >= low
        if high is not None:
            keep &= values <= high
    if criteria.success is not None:
        keep &= _solved(store, criteria.label) == criteria.success
    if criteria.tasks:
        for task in criteria.tasks:
            if task not in store.task_names:
                raise CvlctlError(f"{store.path} has no task {task!r}", f"it has {', '.join(store.task_names)}")
        keep &= np.isin(store.episode_tasks(), list(criteria.tasks))
    return keep


def _returns(store: Store, label: str) -> np.ndarray:
    store.require_label(label)
    rows = column_rows([_all(store)], f"labels/{label}/reward")
    return np.array([x.sum(dtype=np.float64) for x in rows])


def _solved(store: Store, label: str) -> np.ndarray:
    store.require_label(label, "success")
    return np.array([x.any() for x in column_rows([_all(store)], f"labels/{label}/success")])


def _ranges(store: Store, label: str) -> str:
    """What filters could ask for, so that the next try hits something."""
    lengths, collected_at = store.lengths(), store.collected_at()
    said = [f"lengths {lengths.min()} to {lengths.max()}", f"collected at {collected_at.min()} to {collected_at.max()}"]
    if store.has_label(label):
        returns = _returns(store, label)
        said.append(f"returns {returns.min():.6g} to {returns.max():.6g}")
    if store.has_label(label, "success"):
        said.append(f"{int(_solved(store, label).sum())} successful")
    return f"the store has {', '.join(said)}"


def _no_label(store: Store, label: str) -> CvlctlError:
    return CvlctlError(f"{store.path}: no label {label!r}", f"the store has {', '.join(store.labels) or 'no labels'}")


def _reward_file(path: Path, store: Store) -> np.ndarray:
    """(transitions,) or (rows,) real numbers, left on the disk."""
    rows = int(store.episode_ends()[-1])
    hint = f"give a .npy of shape ({store.num_transitions},), a reward a transition, or ({rows},), one a row"
    if not path.is_file():
        raise CvlctlError(f"no file at {path}", hint)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises several kinds
        raise CvlctlError(f"{path} cannot be read: {error}", hint) from error
    if found.shape not in ((store.num_transitions,), (rows,)) or found.dtype.kind not in "fiub":
        raise CvlctlError(f"{path} holds {found.dtype} of shape {found.shape}", hint)
    return found


def _learn(labeller: str, store: Store, examples: Path | None, seed: int) -> np.ndarray:
    """(rows,) rewards by a labeller of default settings, in the store's own order."""
    import torch

    from cvlctl import labellers, schema
    from cvlctl.commands import train

    if examples is None:
        raise CvlctlError(f"--rewards {labeller} is learned from success examples", "give --examples FILE.npy")
    shown = train.success_examples(
        schema.SuccessExamples.model_validate({"file": examples, "num": 10**9}), store.spec, "--examples"
    )
    seen, given = torch.from_numpy(store.observations()), torch.from_numpy(shown)
    learned = labellers.learn(labeller, labellers.Config(), seen, given, [seed], "cpu")
    return _as_stored(learned[0].numpy())


def _learned_in(file: Path, store: Store, seed: int) -> np.ndarray:
    """(rows,) rewards that a finetuned run learned of this store, of its seed `seed`."""
    from cvlctl import checkpoints

    state, metadata = checkpoints.load(file)
    reward, seeds = state.get("reward"), metadata.get("seeds", [])
    if seed not in seeds:
        raise CvlctlError(f"{file} has no seed {seed}", f"its seeds: {', '.join(map(str, seeds))}")
    rows = int(store.episode_ends()[-1])
    if reward is None or tuple(reward.shape) != (len(seeds), rows) or metadata.get("digest") != store.digest():
        what = f"{file} holds no rewards of {store.path}"
        raise CvlctlError(what, f"they were learned of {', '.join(metadata.get('stores', []))}, whole and alone")
    return _as_stored(reward[seeds.index(seed)].numpy())


def _as_stored(arrival: np.ndarray) -> np.ndarray:
    """A learned reward belongs to the state arrived at; the store keeps it with the step that arrived there."""
    return np.append(arrival[1:], np.float32(0))


def _rows_of_file(file: np.ndarray, part: Part) -> Iterator[np.ndarray]:
    """(T+1,) float32 rows of every episode, the last one 0."""
    whole = len(file) == int(part.store.episode_ends()[-1])
    for number, (start, end) in enumerate(bounds(part)):
        first = start if whole else start - number  # without final rows, one fewer for every episode before
        rows = np.zeros(end - start, np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
            rows[:-1] = file[first : first + end - start - 1]
        if not np.isfinite(rows).all():
            raise CvlctlError(f"the rewards of episode {number} hold NaN or infinity", "repair the file of rewards")
        yield rows


def _picked(store: Store, picks: Sequence[str]) -> np.ndarray:
    """(X, O) float32: the frames named "episode:step"."""
    column, lengths = Column(store, "data/observation"), store.lengths()
    starts = store.episode_ends() - lengths - 1
    frames = []
    for pick in picks:
        try:
            episode, step = (int(word) for word in pick.split(":"))
        except ValueError:
            raise CvlctlError(f"--pick {pick} is not episode:step", "such as --pick 3:120 or --pick 3:-1") from None
        if not 0 <= episode < store.num_episodes:
            raise CvlctlError(f"--pick {pick}: {store.path} has episodes 0 to {store.num_episodes - 1}")
        length = int(lengths[episode])
        if not -length - 1 <= step <= length:
            raise CvlctlError(f"--pick {pick}: episode {episode} has observations 0 to {length}", "-1 is the final one")
        row = int(starts[episode]) + step % (length + 1)
        frames.append(column.rows(row, row + 1)[0])
    return np.ascontiguousarray(np.stack(frames), dtype=np.float32)
