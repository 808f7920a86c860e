"""`cvlctl explain`: the states of the data that a run's Q stands on, exactly (the weights: `learn/attribution.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cvlctl.data.load import open_stores, seen_spec
from cvlctl.data.recipe import StoreUse
from cvlctl.data.shown import Sight
from cvlctl.data.store import Column, Store, open_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.attribution import Shares, by_group
from cvlctl.play import envs
from cvlctl.play.eyes import SeeingAct, cameras_seen, renderer_of, stand
from cvlctl.play.policies import NumpyPolicy
from cvlctl.play.rollout import EVALUATION_SEED, check_fit, collect_episode, outcome
from cvlctl.play.sights import VECTOR, Seen, part
from cvlctl.runs import EXPLAINED
from cvlctl.score.explained import plot_map, plot_moments
from cvlctl.score.grounds import Grounds, grounds
from cvlctl.score.places import place_of
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.sheet import draw_sheet
from cvlctl.types import Episode, Spec

CANDIDATES = 64  # seeded actions, the worst of which is the rejected one
STRETCHES = 5  # of the collection
FRAMES = "frames.png"  # in the run, where no other place is named
READ = 2e9  # pairs times states of a map: a minute or so
Top = int | Literal["all"]


class Moment(NamedTuple):
    """A step of an episode, with the actions that are explained there."""

    step: int
    seen: Seen  # (1, O), or by camera (1, S, H, W, C)
    actions: dict[str, np.ndarray]  # (A,) by name: policy, logged


def explain(
    run: str | Path,
    *,
    episode: int = 0,
    steps: Sequence[int] | None = None,
    store: str | Path | None = None,
    play: bool = False,
    seed: int | None = None,
    checkpoint: str | int = "last",
    label: str | None = None,
    top: Top = 3,
    plot: str | Path | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """What Q stands on, at moments of an episode, for the policy's action, the logged one, and a rejected one.

    Args:
        run: the directory of a run with an occupancy critic (pretrain, cvl, laeo, goal_conditioned).
        episode: its number in the store; with `play`, the number that `cvlctl evaluate` knows it by.
        steps: of the episode; below 0 from its end; None: the first, the middle and the last one.
        store: where the episode lies; None: in the first of the run's stores.
        play: play it now, by the run's policy, on the run's task.
        seed: of training; None: the run's first.
        checkpoint: "last", or a step such as 5000.
        label: whose rewards count; None: those that the run learned from.
        top: how many states and episodes of each answer, those with the largest weights; "all": every one.
        plot: a PNG of the answer; None: of a run that sees frames RUN/explain/frames.png, which is replaced. force:
            replace it where it is there.

    Returns:
        One dict an action: step, action ("policy", "logged", or "rejected": that with the lowest Q of 64 seeded ones),
        values (its vector), q (None without rewards), effective_states, absorbed (the share beyond terminal states),
        states (store, episode, time, weight, reward), episodes (store, episode, weight, of_data, q_without: with the
        critic held fixed), tasks and collected (weight, of_data), and notes: what is shown, and what is not.

    Raises:
        CvlctlError: no such run, seed, checkpoint, label, store, episode or step; a run without an occupancy critic;
            stores that are not those it was trained on; or a picture that is there already.
    """
    if isinstance(top, int) and top < 1:
        raise CvlctlError(f"top is {top}", "give a number above 0, or all")
    found = grounds(Path(run), seed, checkpoint, label)
    moments, notes = _moments(found, episode, steps, None if store is None else Path(store), play)
    notes = [*found.notes, *notes]
    answers = [(moment, name, shares) for moment in moments for name, shares in _shares(found, moment).items()]
    target = None if plot is None else Path(plot)
    if found.observe is not None:
        notes.append(_picture(target, found, [(m, name, shares) for m, name, (_, shares) in answers], force))
    elif target is not None:
        plot_moments(target, found, [(m.step, name, shares) for m, name, (_, shares) in answers], force=force)
    return [_answer(found, m.step, name, values, shares, top, notes) for m, name, (values, shares) in answers]


def _picture(path: Path | None, found: Grounds, answers: Sequence[tuple[Moment, str, Shares]], force: bool) -> str:
    """Draw what a run that sees frames stands on, in the run if no other place is named; what is to be said of it."""
    target = found.run / EXPLAINED / FRAMES if path is None else path
    try:
        draw_sheet(
            target, found, [(m.step, m.seen, name, shares) for m, name, shares in answers], force=force or not path
        )
    except CvlctlError as error:
        if path is not None:
            raise
        return f"frames are not drawn: {error.what}"  # a run of somebody else's: the answer does not depend on it
    return f"frames of these moments, and of the states that weigh most: {target}"


def map_q(
    run: str | Path,
    columns: tuple[int, int],
    *,
    seed: int | None = None,
    checkpoint: str | int = "last",
    label: str | None = None,
    points: int = 10_000,
    plot: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Draw Q of the run's logged pairs over two columns of the observation (CVL Figure 8 is a case of it).

    Args:
        points: transitions of the stores, at most, by a seeded choice; fewer where the stores are large.
        plot: the PNG; None: RUN/explain/map-X-Y.png, which is replaced. Others as in `explain`.

    Returns:
        status, path, columns, points, q (least, median and largest), notes.
    """
    found = grounds(Path(run), seed, checkpoint, label, frames=False)
    (width,) = found.spec.observation_shape
    if not all(0 <= column < width for column in columns):
        raise CvlctlError(f"--map {columns[0]},{columns[1]}: observations have columns 0 to {width - 1}")
    if not found.rewards:
        raise CvlctlError(f"{run}: its stores hold no rewards, and without there is no Q to draw")
    observations, actions = _pairs(found.stores, min(points, max(100, int(READ / len(found.time)))))
    q = found.readout.q(observations, actions)
    path = Path(run) / EXPLAINED / f"map-{columns[0]}-{columns[1]}.png" if plot is None else Path(plot)
    status = plot_map(path, observations[:, list(columns)], q, columns, force=force or plot is None)
    quantiles = dict(zip(("least", "median", "largest"), np.quantile(q, (0, 0.5, 1)).tolist(), strict=True))
    about = {"columns": list(columns), "points": len(q), "q": quantiles, "notes": found.notes}
    return {"status": status, "path": str(path), **about}


def _pairs(paths: Sequence[Path], num: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `num` logged pairs of stores: observations (N, O), actions (N, A)."""
    stores = [open_store(path) for path in paths]
    rows = [np.delete(np.arange(store.num_rows), store.episode_ends() - 1) for store in stores]
    store = np.repeat(np.arange(len(stores)), [len(one) for one in rows])
    chosen = np.sort(np.random.default_rng(0).permutation(len(store))[:num])
    found = []
    for i, one in enumerate(stores):
        mine = np.concatenate(rows)[chosen[store[chosen] == i]]
        if len(mine):
            found.append([Column(one, f"data/{name}").take(mine) for name in ("observation", "action")])
    observations, actions = zip(*found, strict=True)
    return np.concatenate(observations), np.concatenate(actions)


def _moments(
    found: Grounds, number: int, steps: Sequence[int] | None, path: Path | None, play: bool
) -> tuple[list[Moment], list[str]]:
    """The moments that are asked for, and what is to be said of the episode."""
    notes: list[str] = []
    if play:
        (episode, seen_at), where = _played(found, number, path), f"episode {number} of {found.task}, played now"
        value, success = outcome(episode)
        told = "" if success is None else f", {'a success' if success else 'no success'}"
        notes.append(f"{where}: {len(episode)} steps, return {value:.4g}{told}; its actions are the policy's")
        logged = _Logged(seen_at, episode.actions)
    else:
        opened = open_store(path or found.stores[0])
        logged, where = _logged(found, opened, number), f"{opened.path}: episode {number}"
        if (task := opened.episode_tasks()[number] or opened.task) not in ("", found.task):
            notes.append(f"{where} is of {task}, the run of {found.task}")
    count = len(logged.actions)
    chosen = sorted({0, count // 2, count - 1}) if steps is None else list(steps)
    for step in chosen:
        if not -count <= step < count:
            raise CvlctlError(f"step {step}: {where} has steps 0 to {count - 1}", "-1 is the last of them")
    policy: Any = found.policy
    moments = []
    for step in (step % count for step in chosen):
        seen = logged.seen(step)
        actions = {} if policy is None else {"policy": policy(seen)[0]}
        if not play:
            actions["logged"] = logged.actions[step]
        moments.append(Moment(step, seen, actions))
    return moments, notes


class _Logged(NamedTuple):
    """An episode, without its labels."""

    seen: Callable[[int], Seen]  # at a step
    actions: np.ndarray  # (T, A)


def _logged(found: Grounds, store: Store, number: int) -> _Logged:
    """An episode of a store, what is seen of it read as it is asked for."""
    if not 0 <= number < store.num_episodes:
        raise CvlctlError(f"episode {number}: {store.path} has episodes 0 to {store.num_episodes - 1}")
    open_stores([StoreUse(path=store.path)], found.observe)  # it tells of cameras that are not there
    has, knows = (_words(spec) for spec in (seen_spec(store.spec, found.observe), found.spec))
    if has != knows:
        what = f"{store.path} has observations {has}; {found.run} knows {knows}"
        raise CvlctlError(what, "take an episode of the robot that the run was trained on")
    count = int(store.lengths()[number])
    begin, sight = int(store.episode_ends()[number]) - count - 1, Sight(store, found.observe)
    actions = Column(store, "data/action").rows(begin, begin + count)
    return _Logged(lambda step: sight.at(np.array([begin + step])), actions)


def _words(spec: Spec) -> str:
    sizes = "".join(f", {camera} {'x'.join(map(str, size))}" for camera, size in spec.cameras.items())
    return f"{spec.observation_shape} and {spec.action_dim} action dimensions{sizes}"


def _played(found: Grounds, number: int, path: Path | None) -> tuple[Episode, Callable[[int], Seen]]:
    """An episode of the run's policy: the one that an evaluation with seed 0 knows by this number; and what it saw."""
    policy = found.policy
    if path is not None:
        raise CvlctlError("--play and --store both say which episode is meant", "leave one of them out")
    if policy is None:
        raise CvlctlError(f"{found.run} has no policy that could be played", "name an episode of a store: --episode N")
    if number < 0:
        raise CvlctlError(f"episode {number}: they are numbered from 0 on")
    try:
        place = place_of(
            EvaluateRecipe(runs=(str(found.run),), out=found.run / EXPLAINED), found.run, found.saved.metadata
        )
        cameras = cameras_seen(found.run, found.saved, stand(found.saved))
    except CvlctlError as error:
        hint = "build a store in it (cvlctl build-dataset), and explain an episode of that: --store STORE"
        raise CvlctlError(error.what, hint) from error
    env = envs.make(place.task, EVALUATION_SEED, settings=place.settings)
    check_fit(found.run, policy, env)
    if isinstance(policy, NumpyPolicy):
        episode = collect_episode(env, lambda observation, _: policy(observation), number)
        return episode, lambda step: episode.observations[step : step + 1]
    shown: list[dict[str, np.ndarray]] = []
    act = SeeingAct(policy, renderer_of(env, cameras), None, np.zeros((env.spec.horizon, env.spec.action_dim)))

    def watched(observation: np.ndarray, step: int) -> np.ndarray:
        action = act(observation, step)
        vector = {VECTOR: observation[None]} if policy.observe.vector else {}
        shown.append({**act.stacks, **vector})
        return action

    with closing(env):
        return collect_episode(env, watched, number), lambda step: shown[step]


def _shares(found: Grounds, moment: Moment) -> dict[str, tuple[np.ndarray, Shares]]:
    """What each action's Q stands on, by its name; the rejected one beside those that were given."""
    actions = dict(moment.actions)
    if found.rewards:
        rng = np.random.default_rng([moment.step])
        candidates = rng.uniform(-1, 1, (CANDIDATES, found.spec.action_dim)).astype(np.float32)
        q = found.readout.q(part(moment.seen, np.zeros(CANDIDATES, int)), candidates)
        actions["rejected"] = candidates[q.argmin()]
    return {name: (action, found.readout.shares(moment.seen, action)) for name, action in actions.items()}


def _answer(
    found: Grounds, step: int, name: str, values: np.ndarray, shares: Shares, top: Top, notes: list[str]
) -> dict[str, Any]:
    weight = shares.arrival
    return {
        "step": step,
        "action": name,
        "values": [float(value) for value in values],
        "q": shares.q if found.rewards else None,
        "effective_states": shares.effective(),
        "absorbed": float(shares.absorbed.sum()),
        "states": [_state(found, j, float(weight[j])) for j in largest(weight, top)],
        "episodes": _by_episode(found, shares, top),
        "tasks": _by_task(found, shares),
        "collected": _by_collection(found, shares),
        "notes": notes,
    }


def largest(weight: np.ndarray, top: Top) -> list[int]:
    """The places of the `top` largest weights above 0, in descending order."""
    count = len(weight) if top == "all" else min(top, len(weight))
    places = np.argpartition(-weight, count - 1)[:count]
    places = places[np.argsort(-weight[places], kind="stable")]
    return [int(j) for j in places if weight[j] > 0]


def _state(found: Grounds, j: int, weight: float) -> dict[str, Any]:
    episodes = found.episodes
    of = int(np.searchsorted(episodes.begins, j, side="right")) - 1
    pays = found.rewards and found.readout.normaliser != "examples"
    reward = float(found.readout.states.reward[j]) if pays else None
    place = {"store": episodes.store[of], "episode": episodes.number[of], "time": int(found.time[j])}
    return {**place, "weight": weight, "reward": reward}


def _by_episode(found: Grounds, shares: Shares, top: Top) -> list[dict[str, Any]]:
    episodes = found.episodes
    weight = by_group(shares.arrival + shares.absorbed, episodes.begins)
    without = found.readout.without(shares, episodes.begins, episodes.mass)
    return [
        {"store": episodes.store[i], "episode": episodes.number[i], "weight": float(weight[i]),
         "of_data": float(episodes.mass[i]),
         "q_without": float(without[i]) if found.rewards and np.isfinite(without[i]) else None}
        for i in largest(weight, top)
    ]  # fmt: skip


def _by_task(found: Grounds, shares: Shares) -> list[dict[str, Any]]:
    names, number = np.unique(np.array(found.episodes.task), return_inverse=True)
    return [{"task": str(name), **one} for name, one in zip(names, _sums(found, shares, number), strict=True)]


def _by_collection(found: Grounds, shares: Shares) -> list[dict[str, Any]]:
    """By equal stretches of the collection, in the collector's environment steps; none where it took none."""
    at = found.episodes.collected_at
    edges = np.linspace(at.min(), at.max(), STRETCHES + 1)
    if edges[0] == edges[-1]:
        return []
    number = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, STRETCHES - 1)
    sums = _sums(found, shares, number, STRETCHES)
    return [{"from": round(edges[i]), "to": round(edges[i + 1]), **one} for i, one in enumerate(sums)]


def _sums(found: Grounds, shares: Shares, number: np.ndarray, count: int = 0) -> list[dict[str, float]]:
    """Weight, and share of the data, of groups of episodes; `number` (n,) says in which each is."""
    weight = by_group(shares.arrival + shares.absorbed, found.episodes.begins)
    both = (np.bincount(number, weights=x, minlength=count) for x in (weight, found.episodes.mass))
    return [{"weight": float(w), "of_data": float(m)} for w, m in zip(*both, strict=True)]
