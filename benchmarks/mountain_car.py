"""Contrastive Q against Monte-Carlo returns on MountainCarContinuous (CVL section 6.3, figure 8).

    python benchmarks/mountain_car.py [--out runs/mountain-car] [--set steps=5000 ...] [--json mountain-car.json]

1. Replay: SAC's, by `recipes/build/mountain-car.yaml`, or `--store PATH` of another collector.
2. Critic: `recipes/pretrain/mountain-car.yaml`, without rewards, on 80 % of the episodes.
3. Q: read out from futures of those episodes and their rewards (Eq. 11), at state-action pairs of the other 20 %.
4. Truth: the discounted return that the data really collected from the held-out step on. Only steps are used whose
   episode terminated, or that have K steps left before the time limit with gamma^K < 2 %, the weight of what is
   unseen (K >= 390 at gamma .99).

Printed: Spearman's and Pearson's correlation over the pairs, with 95 % intervals by resampling whole episodes. A single
return is a noisy sample of Q (which stage of the learner acts cannot be seen in the state, and in an episode that fails
it is action costs alone), so no estimator reaches 1. Hence a yardstick that sees the reward of every training step, the
mean return of the nearest training pairs; and Spearman's correlation over cells of position and velocity, of the mean
return and the mean Q of each cell that holds ten pairs. Written: a PNG of both over position and velocity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cvlctl

# isort: split
import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import pearsonr, spearmanr

from cvlctl.collect.build import build
from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn.pretrain import pretrain
from cvlctl.types import Episode

ROOT = Path(__file__).parents[1]
BUILD, PRETRAIN = ROOT / "recipes/build/mountain-car.yaml", ROOT / "recipes/pretrain/mountain-car.yaml"
UNSEEN = 0.02  # weight of what lies beyond a truncation, gamma^K, at most
CELL, CELL_PAIRS = (0.1, 0.01), 10  # position, velocity; pairs that make a cell's mean worth something
KINDS = ("spearman", "pearson", "spearman_of_cells")
SLICE = 500  # pairs read out at a time: bounds memory


class Pairs(NamedTuple):
    """State-action pairs of several episodes."""

    observations: np.ndarray  # (N, O)
    actions: np.ndarray  # (N, A)
    returns: np.ndarray  # (N,): discounted, from the pair's own reward on
    episode: np.ndarray  # (N,) int64: which episode each comes from


def discounted_returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = sum_k gamma^k r_(t+k), (T,) float64."""
    found = np.zeros(len(rewards) + 1)
    for t in reversed(range(len(rewards))):
        found[t] = rewards[t] + gamma * found[t + 1]
    return found[:-1]


def pairs_of(episodes: Sequence[Episode], gamma: float) -> Pairs:
    """Every pair whose return is known up to `UNSEEN` of the weight."""
    parts = []
    for number, episode in enumerate(episodes):
        if episode.rewards is None:
            raise CvlctlError("the replay has no rewards to compare with")
        left = len(episode) - np.arange(len(episode))
        known = np.full(len(episode), True) if episode.terminated else gamma**left < UNSEEN
        returns = discounted_returns(episode.rewards, gamma)
        parts.append(
            (episode.observations[:-1][known], episode.actions[known], returns[known], np.full(known.sum(), number))
        )
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def choose(pairs: Pairs, num: int) -> Pairs:
    """At most `num` of the pairs, by a seeded choice."""
    keep = np.sort(np.random.default_rng(0).permutation(len(pairs.returns))[:num])
    return Pairs(*(column[keep] for column in pairs))


def nearest_returns(train: Pairs, pairs: Pairs, neighbours: int = 32) -> np.ndarray:
    """The yardstick: mean return of the nearest training pairs, in standardised position, velocity and action."""
    both = [np.concatenate([p.observations, p.actions], axis=1) for p in (train, pairs)]
    std = both[0].std(axis=0)
    _, index = cKDTree(both[0] / std).query(both[1] / std, k=min(neighbours, len(both[0])))
    return train.returns[index].reshape(len(both[1]), -1).mean(axis=1)


def correlations(estimate: np.ndarray, pairs: Pairs, resamples: int) -> dict[str, Any]:
    """Spearman, Pearson, and Spearman over cells, with the returns; 95 % intervals over resampled episodes."""

    def all_three(index: np.ndarray) -> tuple[float, float, float]:
        x, y = estimate[index], pairs.returns[index]
        cells = cell_means(pairs.observations[index], np.stack([x, y]))
        return float(spearmanr(x, y).statistic), float(pearsonr(x, y).statistic), float(spearmanr(*cells).statistic)

    numbers = np.unique(pairs.episode)
    rows = {number: np.flatnonzero(pairs.episode == number) for number in numbers}
    rng = np.random.default_rng(0)
    drawn = [
        all_three(np.concatenate([rows[number] for number in rng.choice(numbers, len(numbers))]))
        for _ in range(resamples)
    ]
    found: dict[str, Any] = {}
    values = all_three(np.arange(len(estimate)))
    for name, value, column in zip(KINDS, values, np.array(drawn).T, strict=True):
        found[name] = round(value, 3)
        found[f"{name}_interval"] = [round(float(x), 3) for x in np.nanquantile(column, (0.025, 0.975))]
    return found


def cell_means(observations: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means (k, cells) of values (k, N) over cells of position and velocity; cells of few pairs are left out."""
    _, cell, count = np.unique(np.floor(observations / CELL), axis=0, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(cell.ravel(), weights=value) for value in values])
    return sums[:, count >= CELL_PAIRS] / count[count >= CELL_PAIRS]


def read_q(run: Path, seed: int, store: Store, pairs: Pairs, bank: int, normaliser: str) -> np.ndarray:
    """Contrastive Q (N,) of the pairs."""
    critic = cvlctl.load_critic(run, seed=seed)
    futures, rewards = store.futures(bank, critic.gamma, seed=0)
    cuts = range(SLICE, len(pairs.returns), SLICE)
    slices = zip(np.split(pairs.observations, cuts), np.split(pairs.actions, cuts), strict=True)
    return np.concatenate([critic.q(o, a, futures, rewards, normaliser) for o, a in slices])


def plot(path: Path, pairs: Pairs, q: np.ndarray, spearman: float) -> None:
    """Contrastive Q and Monte-Carlo return over position and velocity, and one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, values, title in (
        (axes[0], q, "contrastive Q (self-normalised)"),
        (axes[1], pairs.returns, "Monte-Carlo return"),
    ):
        order = np.random.default_rng(0).permutation(len(values))  # or the last episode would hide the others
        low, high = np.quantile(values, (0.01, 0.99))
        position, velocity = pairs.observations[order].T
        points = axis.scatter(position, velocity, c=values[order], s=5, vmin=low, vmax=high, cmap="viridis")
        figure.colorbar(points, ax=axis)
        axis.set(title=title, xlabel="position", ylabel="velocity")
    axes[2].scatter(pairs.returns, q, s=4, alpha=0.3)
    title = f"{len(q)} held-out pairs, Spearman {spearman:.2f}"
    axes[2].set(title=title, xlabel="Monte-Carlo return", ylabel="contrastive Q")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(
    store: Path | None,
    out: Path,
    overrides: Sequence[str],
    num_pairs: int,
    bank: int,
    resamples: int,
    force: bool = False,
) -> dict[str, Any]:
    """Everything, from the replay (`store`, or a new one) to the correlations.

    Args:
        overrides: of the pretrain recipe, `key=value`; num_pairs: held-out pairs, at most; bank: futures read out from;
        resamples: of the episodes; force: train the critic again.
    """
    if store is None:
        store = Path(build(load(BUILD, kind="build-dataset"))["path"])
    replay = cvlctl.open_store(store)
    episodes = list(replay.episodes())
    order = np.random.default_rng(0).permutation(len(episodes))
    cut = round(0.8 * len(episodes))
    train, held_out = ([episodes[i] for i in np.sort(part)] for part in (order[:cut], order[cut:]))
    train_path = out / "train.zarr"
    provenance = {"from": replay.digest(), "rewards_from": replay.label_digest("given"), "share": 0.8}
    training = None
    if train_path.exists():
        training = cvlctl.open_store(train_path)
        if training.provenance != provenance:
            training = None
    if training is None:
        training = cvlctl.write_store(
            train_path, train, task=replay.task, horizon=replay.spec.horizon, provenance=provenance, force=True
        )
    run = out / "critic"
    places = [f"stores=[{json.dumps(str(train_path))}]", f"out={run}"]
    recipe = load(PRETRAIN, [*overrides, *places], "pretrain")
    pretrain(recipe, force=force)

    gamma = recipe.critic.gamma
    pairs, known = choose(pairs_of(held_out, gamma), num_pairs), pairs_of(train, gamma)
    found: dict[str, Any] = {
        "store": str(store), "episodes": len(episodes), "transitions": len(replay),
        "episodes_at_the_goal": sum(e.terminated for e in episodes), "held_out_episodes": len(held_out),
        "pairs": len(pairs.returns), "pairs_in_episodes_at_the_goal":
        int(sum(held_out[number].terminated for number in pairs.episode)), "gamma": gamma, "bank": bank,
        "steps": recipe.steps, "correlation": {},
    }  # fmt: skip
    table = found["correlation"]
    first = None
    for seed in recipe.seeds:
        for normaliser in ("self", "none"):
            q = read_q(run, seed, training, pairs, bank, normaliser)
            table[f"contrastive Q, normaliser {normaliser}, seed {seed}"] = correlations(q, pairs, resamples)
            first = q if first is None else first
    table["yardstick: nearest training returns"] = correlations(nearest_returns(known, pairs), pairs, resamples)
    assert first is not None
    name = f"contrastive Q, normaliser self, seed {recipe.seeds[0]}"
    plot(out / "mountain-car.png", pairs, first, table[name]["spearman"])
    np.savez_compressed(out / "pairs.npz", q=first, **pairs._asdict())
    return found | {"png": str(out / "mountain-car.png")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mountain-car"))
    parser.add_argument("--store", type=Path, help="a replay of MountainCarContinuous, instead of building one")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the pretrain recipe")
    parser.add_argument("--pairs", type=int, default=5_000, help="held-out pairs, at most")
    parser.add_argument("--bank", type=int, default=30_000, help="futures read out from")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--force", action="store_true", help="train the critic again, whatever lies in its place")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args(arguments)
    try:
        found = compare(args.store, args.out, args.set, args.pairs, args.bank, args.resamples, args.force)
    except CvlctlError as error:
        parser.exit(2, f"error: {error.what}\nhint: {error.hint}\n")
    print(f"{found['pairs']} held-out pairs ({found['pairs_in_episodes_at_the_goal']} of episodes that reach the goal) "
          f"from {found['held_out_episodes']} of {found['episodes']} episodes")  # fmt: skip
    heads = "".join(f"{head:>11} [95 %]     " for head in ("Spearman", "Pearson", "cells"))
    print(f"{'correlation with the Monte-Carlo return':42}{heads}")
    for name, row in found["correlation"].items():
        columns = ["{:11.3f} [{:.2f}, {:.2f}]".format(row[kind], *row[f"{kind}_interval"]) for kind in KINDS]
        print(f"{name:42}{''.join(columns)}")
    print(f"picture: {found['png']}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
