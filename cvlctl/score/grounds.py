"""What a run's Q stands on, found again: critic, policy, the stores that it was trained on, and which states count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl import checkpoints
from cvlctl.data.examples import array_digest, found_examples
from cvlctl.data.load import best_numbers, held_out, open_stores
from cvlctl.data.recipe import StoreUse, SuccessExamples
from cvlctl.data.samplers import marginal, marginal_of_next
from cvlctl.data.shown import pieces, state_of
from cvlctl.data.store import Store, json_digest
from cvlctl.data.stream import arrival_reward
from cvlctl.errors import CvlctlError
from cvlctl.learn.algorithms import ALGORITHMS, occupancy
from cvlctl.learn.attribution import Readout, States, by_group, kept_psi, psi_of
from cvlctl.learn.critics import Critic, critic_of, critics_of
from cvlctl.play.policies import Policy, policy_of
from cvlctl.play.sights import VECTOR, Seen, part, seen_by
from cvlctl.runs import EXPLAINED, LABELS_FILE, read_run
from cvlctl.types import Observe, Spec


class Episodes(NamedTuple):
    """The episodes that the states belong to, in the order of the states."""

    begins: np.ndarray  # (n + 1,) first state of each, and the number of states
    store: list[str]  # where each lies
    number: list[int | None]  # its number there; None: states of a file
    task: list[str]
    collected_at: np.ndarray  # (n,) environment step of the collector
    mass: np.ndarray  # (n,) its share of the data: of the marginal, or of the success examples


class Grounds(NamedTuple):
    """A run's Q, and what it stands on."""

    readout: Readout
    rewards: bool  # whether there are any to weigh: without, there are weights and no Q
    time: np.ndarray  # (M,) step of its episode at which each state stands; row, of states of a file
    episodes: Episodes
    notes: list[str]  # what is shown, and what is not
    run: Path
    stores: list[Path]  # that it was trained on
    saved: checkpoints.Saved  # its checkpoint
    spec: Spec  # what is seen of the stores
    observe: Observe | None  # of their cameras; None: the vector alone
    policy: Policy | None
    state: Callable[[int], Seen]  # what is seen at one of the states (1, ...), by its number

    @property
    def task(self) -> str:
        """What it was trained on, by name."""
        return str(self.saved.metadata["task"])


Found = tuple[Readout, bool, np.ndarray, Episodes, list[str], Callable[[int], Seen]]  # fields of Grounds


class _Subject(NamedTuple):
    """A run as it was read."""

    run: Path
    record: dict[str, Any]
    found: checkpoints.Saved
    critic: Critic
    spec: Spec
    observe: Observe | None
    seed: int
    uses: list[StoreUse]  # what it was trained on

    @property
    def algorithm(self) -> dict[str, Any]:
        """The method as the recipe has it; of a pretrained critic nothing but a name."""
        given = self.record["recipe"].get("algorithm", {"name": "occupancy"})
        return given if isinstance(given, dict) else {"name": given}

    @property
    def by_rewards(self) -> bool:
        """Whether it learned from rewards."""
        name = self.algorithm.get("name")
        return name in ALGORITHMS and ALGORITHMS[name].LEARNS_FROM == "rewards"


def grounds(
    run: Path,
    seed: int | None = None,
    checkpoint: str | int = "last",
    label: str | None = None,
    *,
    frames: bool = True,
) -> Grounds:
    """The Q of one seed of a run, with psi of all states: computed once, and kept in the run.

    Args:
        seed: None: the first. label: whose rewards are weighed; None: those that the run learned from.
        frames: whether it may be of a run that sees frames.

    Raises:
        CvlctlError: no such run, checkpoint, seed or label; it has no occupancy critic; its stores are gone, or others
            than it was trained on.
    """
    subject = _subject(run, seed, checkpoint)
    if subject.observe is not None and not frames:
        what = f"{run} sees frames of {', '.join(subject.observe.cameras)}: a map is of columns of a vector"
        raise CvlctlError(what, "leave --map out: moments are explained, and drawn")
    laeo = subject.algorithm.get("name") == "laeo"
    read = _of_examples if laeo else _of_stores
    readout, rewards, time, episodes, notes, state = read(subject, label)
    policy, gap = _policy(subject)
    columns = subject.critic.config.future_columns
    if columns is not None:
        notes.append(f"psi sees columns {', '.join(map(str, columns))} of a state: states alike in these weigh alike")
    stores = [use.path for use in subject.uses]
    return Grounds(
        readout, rewards, time, episodes, [*_progress(subject), *notes, *gap], run, stores,
        subject.found, subject.spec, subject.observe, policy, state,
    )  # fmt: skip


def _subject(run: Path, seed: int | None, checkpoint: str | int) -> _Subject:
    file = checkpoints.checkpoint_file(run, checkpoint)
    if run.is_file():
        raise CvlctlError(f"{run} is a file", "name its run's directory, which says what it was trained on")
    record, found = read_run(run), checkpoints.read(file)
    trained = critics_of(found, run)
    seed = trained.seeds[0] if seed is None else seed
    if occupancy.linear(trained.config):
        what = (
            f"{run} has a critic of loss: {trained.config.loss}, whose Q has no shares of states: they may be below 0"
        )
        raise CvlctlError(what, "explain a run of info_nce, binary_nce or td_info_nce")
    critic = critic_of(trained, seed, run)
    try:
        uses = [StoreUse.model_validate(use) for use in record["recipe"]["stores"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"{run / 'run.json'}: its recipe says of no stores what was trained on ({type(error).__name__}: {error})"
        raise CvlctlError(what, "it is damaged, or not of cvlctl: train again") from error
    return _Subject(run, record, found, critic, *seen_by(found.metadata), seed, uses)


def _progress(subject: _Subject) -> list[str]:
    if subject.record["status"] == "finished":
        return []
    step, total = subject.found.metadata.get("step"), subject.record["recipe"].get("steps")
    return [f"{subject.run} is not finished: shown is its critic at step {step} of {total}"]


def _policy(subject: _Subject) -> tuple[Policy | None, list[str]]:
    """The run's policy, or why its action is not shown."""
    if not any(name.startswith("actor.") for name in subject.found.places):
        return None, [f"{subject.run} has a critic and no policy: the policy's action is not shown"]
    policy = policy_of(subject.found, subject.seed)
    if policy.needs_goal:
        return None, ["its policy is told a goal beside the observation: the policy's action is not shown"]
    return policy, []


# --- rewards at all states of the stores


def _of_stores(subject: _Subject, label: str | None) -> Found:
    config, uses, own = subject.algorithm, subject.uses, subject.by_rewards
    observe, stores = subject.observe, _opened(subject, uses)
    if label is not None or not own:
        uses = [use.model_copy(update={"rewards": label or "given", "fraction": 1.0}) for use in uses]
    reward, notes = _rewards(subject, stores, uses, asked=label is not None or own)
    if reward is None:
        notes.append("the stores hold no rewards: there are shares of states and no Q, hence no rejected action")
    elif not own:
        notes.append(f"trained without rewards: Q is of label {uses[0].rewards!r} (--label)")
    counts, held = _counting(subject, stores, uses)
    if held:
        notes.append(f"validation: the {held} episodes that were held out of training are left out here too")
    parts = [_law(store, which, subject.critic) for store, which in zip(stores, counts, strict=True)]
    total = sum(count for _, _, count in parts)
    arrival, absorbed = (np.concatenate([part[i] * (part[2] / total) for part in parts]) for i in (0, 1))
    episodes = _episodes(stores, arrival + absorbed)
    digest = json_digest([subject.critic.digest(), *(store.digest() for store in stores)])
    file = subject.run / EXPLAINED / f"psi-{subject.seed}.npy"
    psi = kept_psi(subject.critic, len(arrival), lambda: pieces(stores, observe), file, digest)
    states = States(psi, arrival, absorbed, np.zeros(len(arrival)) if reward is None else reward)
    normaliser = config.get("normaliser", "self")
    notes += _about_readout(config)
    time = np.arange(len(arrival)) - np.repeat(episodes.begins[:-1], np.diff(episodes.begins))
    readout = Readout(subject.critic, states, normaliser)
    return readout, reward is not None, time, episodes, notes, state_of(stores, observe)


def _about_readout(config: dict[str, Any]) -> list[str]:
    notes = []
    if config.get("readout", "exact") != "exact":
        notes.append(
            f"readout: {config['readout']}: shown is the exact Q, which the one that the actor saw approximates"
        )
    if config.get("normaliser", "self") == "none":
        notes.append(
            "normaliser: none: weights are shares of mean e^f; Q is the weighted mean of rewards times mean e^f"
        )
    if config.get("name") == "goal_conditioned":
        notes.append("its actor maximises f of a goal, and not the Q shown here")
    return notes


def _opened(subject: _Subject, uses: Sequence[StoreUse]) -> list[Store]:
    try:
        stores = open_stores(uses, subject.observe)
    except CvlctlError as error:
        hint = "it was trained on that: put it back, or run from the folder in which it was trained"
        raise CvlctlError(f"{subject.run}: stores: {error.what}", hint) from error
    for use, store in zip(uses, stores, strict=True):
        _check_digest(subject, str(use.path), store.digest())
    return stores


def _check_digest(subject: _Subject, key: str, digest: str) -> None:
    before = subject.record["inputs"].get(key)
    if before != digest:
        what = (
            f"{key} is not what {subject.run} was trained on: its digest is {digest[:12]}, and was {str(before)[:12]}"
        )
        raise CvlctlError(what, "put that back, or train again")


def _rewards(
    subject: _Subject, stores: Sequence[Store], uses: Sequence[StoreUse], asked: bool
) -> tuple[np.ndarray | None, list[str]]:
    """Rewards (M,) float64 on arriving at each row of the stores; None where there are none and nobody `asked`."""
    if any(use.learned for use in uses):
        kept = checkpoints.read(subject.run / LABELS_FILE).array("reward")
        seeds = subject.found.metadata["seeds"]
        return kept[seeds.index(subject.seed)].astype(np.float64), [f"rewards: {uses[0].rewards}, learned by the run"]
    found = []
    for store, use in zip(stores, uses, strict=True):
        reward = np.zeros(store.num_rows)
        if use.from_store:
            if not asked and not store.has_label(use.rewards):
                return None, []
            key = f"{use.path}:{use.rewards}"
            if key in subject.record["inputs"]:
                _check_digest(subject, key, store.label_digest(use.rewards))
            kept = use.kept(store.num_episodes)
            reward = arrival_reward(store.rewards(use.rewards), store.episode_ends(), kept).astype(np.float64)
        found.append(reward)
    return np.concatenate(found), []


def _counting(subject: _Subject, stores: Sequence[Store], uses: Sequence[StoreUse]) -> tuple[list[np.ndarray], int]:
    """(n,) bool of each store, the episodes whose futures Q is read out of; and how many were held out of training.

    Args:
        uses: what is weighed, maybe of another label than that of the run.
    """
    lengths = [store.num_episodes for store in stores]
    labelled = [use.labelled(count) & subject.by_rewards for use, count in zip(subject.uses, lengths, strict=True)]
    there = np.concatenate([_read(store, use) for store, use in zip(stores, subject.uses, strict=True)])
    held, share = np.zeros(len(there), dtype=bool), subject.record["recipe"].get("validation", 0)
    if share:
        held[there] = held_out(np.concatenate(labelled)[there], share)
    counts = np.concatenate([use.labelled(count) for use, count in zip(uses, lengths, strict=True)])
    return np.split(counts & there & ~held, np.cumsum(lengths)[:-1]), int(held.sum())


def _read(store: Store, use: StoreUse) -> np.ndarray:
    """(n,) bool: the episodes that training reads at all."""
    if use.top == 1:
        return np.ones(store.num_episodes, dtype=bool)
    best = best_numbers(store.episode_ends(), store.rewards(use.rewards), use.top)
    return np.isin(np.arange(store.num_episodes), best)


def _law(store: Store, counts: np.ndarray, critic: Critic) -> tuple[np.ndarray, np.ndarray, int]:
    """The critic's law of states in the episodes that count, and how many transitions these have."""
    law = marginal_of_next if critic.by_next else marginal
    found = law(store.episode_ends(), store.terminated(), counts, critic.gamma)
    return *found, int(store.lengths()[counts].sum())


def _episodes(stores: Sequence[Store], mass: np.ndarray) -> Episodes:
    sizes = np.concatenate([store.lengths() + 1 for store in stores])
    begins = np.concatenate([[0], np.cumsum(sizes)])
    return Episodes(
        begins,
        [str(store.path) for store in stores for _ in range(store.num_episodes)],
        [number for store in stores for number in range(store.num_episodes)],
        [task or store.task for store in stores for task in store.episode_tasks()],
        np.concatenate([store.collected_at() for store in stores]),
        by_group(mass, begins),
    )


# --- success examples


def _of_examples(subject: _Subject, label: str | None) -> Found:
    config, critic, observe = subject.algorithm, subject.critic, subject.observe
    if label is not None:
        raise CvlctlError(f"--label {label}: {subject.run} learned from success examples, and weighs no rewards")
    source = SuccessExamples.model_validate(subject.record["recipe"]["success_examples"])
    origin = source.file or source.from_
    try:
        found = found_examples(source, subject.spec, stack=observe.stack if observe else 0)
    except CvlctlError as error:
        raise CvlctlError(f"{subject.run}: {error.what}", "it was trained on these examples: put them back") from error
    _check_digest(subject, f"examples:{origin}", array_digest(found.observations, *found.images.values()))
    seen: Seen = {VECTOR: found.observations, **found.images} if observe else found.observations
    count = len(found.rows)
    law = np.full(count, 1 / count)
    states = States(psi_of(critic, seen), law, np.zeros(count), np.ones(count))
    readout = Readout(critic, states, "examples")
    notes = [f"Q is the mean of e^f over {count} success examples: how much likelier these are than by chance"]
    if config.get("readout", "posterior") == "posterior":
        notes.append("weights are shares of that mean, not of the posterior Q / (1 + Q) that its actor maximised")

    def state(j: int) -> Seen:
        return part(seen, slice(j, j + 1))

    if found.store is None:
        begins = np.array([0, count])
        episodes = Episodes(begins, [str(origin)], [None], [""], np.zeros(1, dtype=np.int64), np.ones(1))
        return readout, True, found.rows, episodes, notes, state
    ends = found.store.episode_ends()
    numbers, begins = np.unique(np.searchsorted(ends, found.rows, side="right"), return_index=True)
    begins = np.append(begins, count)
    tasks, starts = found.store.episode_tasks(), ends - found.store.lengths() - 1
    episodes = Episodes(
        begins, [str(origin)] * len(numbers), numbers.tolist(), [tasks[n] or found.store.task for n in numbers],
        found.store.collected_at()[numbers], np.diff(begins) / count,
    )  # fmt: skip
    time = found.rows - np.repeat(starts[numbers], np.diff(begins))
    return readout, True, time, episodes, notes, state
