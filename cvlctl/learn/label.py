"""`cvlctl data label`: a reward label of one's own, from a rule, a file, or learned from success examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.derive import (
    Output,
    Part,
    bounds,
    column_rows,
    command_line,
    copied_labels,
    derive,
    finished_already,
    summary,
    whole,
)
from cvlctl.data.examples import Examples, success_examples
from cvlctl.data.recipe import StoreUse, SuccessExamples
from cvlctl.data.store import Store, open_store
from cvlctl.data.writer import check_label
from cvlctl.errors import CvlctlError, Exists
from cvlctl.folders import again_where_it_exists
from cvlctl.runs import LABELS_FILE


@again_where_it_exists
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
    options = {"label": label if label != "given" else None, "examples": examples, "seed": seed or None}
    command = command_line("label", path, name, out=out, rewards=rewards, **options)
    read: dict[str, np.ndarray] = {}  # what else than the store is read

    def digests() -> dict[str, str]:
        if not read:
            read.update(_inputs(rewards, open_store(path), examples, seed))
        return {what: hashlib.sha256(np.ascontiguousarray(values).data).hexdigest() for what, values in read.items()}

    if done := finished_already(command, [Path(out)], [path], force=force, inputs=digests):
        return summary(done[0], "finished already")
    if Path(out).exists() and not force:  # said before anything is learned
        raise Exists(out)
    store = open_store(path)
    if name in store.labels:
        raise CvlctlError(f"{path} has a label {name!r} already", "choose another name, or drop that one first")
    check_label(name)
    part, inputs = whole(store), digests()
    file = read.get("rewards")  # one a transition or one a row
    if rewards == "successes":
        store.require_label(label, "success")
    elif "examples" in read:
        file = _learn(rewards, store, read["examples"], seed)
    elif file is None and rewards != "zeros":
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
    (written,) = derive([Output(Path(out), [part], labels, store.task)], command, force=force, inputs=inputs)
    return summary(written)


def _inputs(rewards: str, store: Store, examples: Path | None, seed: int) -> dict[str, np.ndarray]:
    """What is read beside the store: "rewards" (transitions,) or (rows,), or "examples" (X, O) to learn them from."""
    if rewards.endswith(".npy"):
        return {"rewards": _reward_file(Path(rewards), store)}
    if rewards in ("successes", "zeros"):
        return {}
    from cvlctl.data.load import seen_spec  # and with it torch, which the others do without
    from cvlctl.learn.labellers import LABELLERS

    if rewards in LABELLERS:
        if store.spec.observation_shape == (0,):
            cameras = ", ".join(store.spec.cameras)
            what = f"{store.path} has no vector, and --rewards {rewards} is learned of vectors here"
            hint = (
                f"finetune with observe: {{cameras: [{cameras}]}}, rewards: {rewards} and success_examples learns it of"
            )
            raise CvlctlError(what, f"{hint} frames; --rewards RUN then makes a label of what that run learned")
        if examples is None:
            raise CvlctlError(f"--rewards {rewards} is learned from success examples", "give --examples FILE.npy")
        source = SuccessExamples.model_validate({"file": examples, "num": 10**9})
        return {"examples": success_examples(source, seen_spec(store.spec, None), "--examples")}
    if (Path(rewards) / LABELS_FILE).is_file():
        return {"rewards": _learned_in(Path(rewards) / LABELS_FILE, store, seed)}
    return {}


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


def _learn(labeller: str, store: Store, examples: np.ndarray, seed: int) -> np.ndarray:
    """(rows,) rewards by a labeller of default settings, in the store's own order; examples (X, O)."""
    from cvlctl.data.load import join, open_stores
    from cvlctl.learn import labellers

    use = StoreUse(path=store.path, rewards="none")
    data = join(open_stores([use]), [use], Examples(examples, np.arange(len(examples)), None), rewards=False)
    learned = labellers.learn(labeller, labellers.Config(), store.spec, data, [seed], "cpu")
    return _as_stored(learned[0].numpy())


def _learned_in(file: Path, store: Store, seed: int) -> np.ndarray:
    """(rows,) rewards that a finetuned run learned of this store, of its seed `seed`."""
    from cvlctl import checkpoints

    state, metadata = checkpoints.load(file)
    reward, seeds, stores = state.get("reward"), metadata.get("seeds"), metadata.get("stores")
    if reward is None or not isinstance(seeds, list) or not isinstance(stores, list):
        raise CvlctlError(f"{file} holds no rewards", "it is damaged, or not of cvlctl: finetune again")
    if seed not in seeds:
        raise CvlctlError(f"{file} has no seed {seed}", f"its seeds: {', '.join(map(str, seeds))}")
    rows = int(store.episode_ends()[-1])
    if tuple(reward.shape) != (len(seeds), rows) or metadata.get("digest") != store.digest():
        what = f"{file} holds no rewards of {store.path}"
        raise CvlctlError(what, f"they were learned of {', '.join(map(str, stores))}, whole and alone")
    return _as_stored(reward[seeds.index(seed)].float().numpy())


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
