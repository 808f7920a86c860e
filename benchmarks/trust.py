"""How far the Q of occupancy critics can be trusted, and how far their actors move from the data.

    python benchmarks/trust.py RUN [RUN ...] [--json trust.json]

RUN: a run of `pretrain`, or of `finetune` with cvl or laeo; all of one store, the first of their recipes, with rewards.
Printed for each run, the mean over its seeds:

* `returns`: Spearman's correlation of Q with the discounted returns of the data, over pairs whose return is known up to
  2 % of the weight (at least 388 steps are left at gamma .99). The data's own policy, so of one-step critics.
* `action`: how much of Q is the action's. At 300 states, 16 actions that were taken at the nearest states of as many
  episodes: the spread of Q over these, over the spread of Q over everything.
* `episode`: correlation, at each of these states, of Q with the return of the episode that the action is from. A replay
  is of a policy that improves, and an action tells how late in it one is: a critic of whole futures sees that.
* `states`: the effective number of states that Q is read out of, 1 / sum of squared shares, of 20,000 futures.
* `moved`: root mean square of the actor's action less the logged one, in units of the logged ones' spread.
* `gain`: Q of the actor's action less Q of the logged one, in units of the spread over actions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cvlctl

# isort: split
import numpy as np
from mountain_car import pairs_of
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError
from cvlctl.files import read_json
from cvlctl.learn.critics import Critic

STATES, ACTIONS, FUTURES = 300, 16, 20_000
COLUMNS = ("returns", "action", "episode", "states", "moved", "gain")


class Choices(NamedTuple):
    """States, and at each of them actions that were taken nearby, one of an episode."""

    observations: np.ndarray  # (S, O)
    actions: np.ndarray  # (S, K, A), the first of the state itself
    returns: np.ndarray  # (S, K): of the episodes that the actions are from


def choices(store: Store, states: int = STATES, actions: int = ACTIONS) -> Choices:
    """A seeded choice of states of the store, with the nearest other episodes' actions."""
    episodes = list(store.episodes(frames=False))
    if len(episodes) < actions:
        raise CvlctlError(f"{store.path} has {len(episodes)} episodes, and {actions} are compared")
    totals = np.array([np.sum(episode.rewards) for episode in episodes])
    number = np.concatenate([np.full(len(episode), at) for at, episode in enumerate(episodes)])
    observed = np.concatenate([episode.observations[:-1] for episode in episodes])
    taken = np.concatenate([episode.actions for episode in episodes])
    scaled = (observed - observed.mean(axis=0)) / (observed.std(axis=0) + 1e-6)
    trees = [cKDTree(scaled[number == at]) for at in range(len(episodes))]
    starts = np.searchsorted(number, np.arange(len(episodes)))
    chosen = np.random.default_rng(0).choice(len(number), min(states, len(number)), replace=False)
    found = [tree.query(scaled[chosen]) for tree in trees]
    distance, row = (np.stack([one[part] for one in found], axis=1) for part in (0, 1))  # (S, episodes)
    nearest = np.argsort(distance, axis=1)[:, :actions]  # the state's own episode first: at distance 0
    rows = np.take_along_axis(row, nearest, axis=1) + starts[nearest]
    return Choices(observed[chosen], taken[rows], totals[nearest])


def trusted(critic: Critic, store: Store, near: Choices, policy: Any = None) -> dict[str, float]:
    """The numbers of one seed; `policy`: (N, O) -> (N, A), None for none."""
    futures, rewards = store.futures(FUTURES, critic.gamma, seed=0, next_states=critic.by_next)[:2]
    q = lambda observations, actions: critic.q(observations, actions, futures, rewards)  # noqa: E731
    observations, actions, returns = _known_returns(store, critic.gamma)
    found = {"returns": spearmanr(q(observations, actions), returns)[0]}
    shape = near.actions.shape
    repeated = np.repeat(near.observations, shape[1], axis=0)
    values = q(repeated, near.actions.reshape(-1, shape[-1])).reshape(shape[:2])
    preferred, better = (x - x.mean(axis=1, keepdims=True) for x in (values, near.returns))
    found["action"] = preferred.std() / values.std()
    found["episode"] = np.corrcoef(preferred.ravel(), better.ravel())[0, 1]
    found["states"] = _effective(critic, near, futures)
    if policy is not None:
        own = policy(near.observations)
        found["moved"] = np.sqrt(np.square((own - near.actions[:, 0]) / near.actions.std(axis=(0, 1))).mean())
        found["gain"] = (q(near.observations, own) - values[:, 0]).mean() / preferred.std()
    return {name: float(value) for name, value in found.items()}


@cache
def _known_returns(store: Store, gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some two thousand pairs of the data, (N, O) and (N, A), whose returns (N,) are known: once for all seeds."""
    pairs = pairs_of(list(store.episodes(frames=False)), gamma)
    every = slice(None, None, max(1, len(pairs.returns) // 2_000))
    return pairs.observations[every], pairs.actions[every], pairs.returns[every]


def _effective(critic: Critic, near: Choices, futures: np.ndarray) -> float:
    f = critic.log_ratio(near.observations, near.actions[:, 0], futures)
    f = f.min(axis=0) if f.ndim == 3 else f  # of twins the smaller
    shares = np.exp(f - f.max(axis=1, keepdims=True))
    return float(np.mean(shares.sum(axis=1) ** 2 / np.square(shares).sum(axis=1)))


def measure(run: str, known: dict[str, tuple[Store, Choices]]) -> dict[str, Any]:
    """What is printed of a run; `known`: what was read of stores before."""
    recipe = (read_json(Path(run) / "run.json") or {}).get("recipe", {})
    if not recipe.get("stores"):
        raise CvlctlError(f"{run} is no run", "name runs of pretrain, or of finetune with cvl or laeo")
    path = recipe["stores"][0]["path"]
    if path not in known:
        store = cvlctl.open_store(path)
        known[path] = store, choices(store)
    store, near = known[path]
    acts = recipe.get("algorithm") is not None
    rows = [
        trusted(cvlctl.load_critic(run, seed), store, near, cvlctl.load_policy(run, seed) if acts else None)
        for seed in recipe["seeds"]
    ]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {"run": run, "seeds": len(rows), **means}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(arguments)
    known: dict[str, tuple[Store, Choices]] = {}
    found = []
    print(" ".join([f"{'run':32}", *(f"{name:>8}" for name in COLUMNS)]))
    for run in options.runs:
        try:
            found.append(measure(run, known))
        except CvlctlError as error:
            parser.exit(2, f"error: {error.what}\nhint: {error.hint}\n")
        numbers = [f"{found[-1][name]:8.3g}" if name in found[-1] else f"{'-':>8}" for name in COLUMNS]
        print(" ".join([f"{'/'.join(Path(run).parts[-2:]):32}", *numbers]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
