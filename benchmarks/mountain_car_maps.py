"""Maps of Q over the states of MountainCarContinuous (CVL Figure 8): contrastive, of TD learning, and returns.

    cvlctl run recipes/papers/cvl-figure-8.yaml
    python benchmarks/mountain_car_maps.py [--critic RUN] [--q RUN] [--store STORE] [--out build/mountain-car-maps.png]

A point for each step of SAC's replay whose discounted return is known (`mountain_car.pairs_of`), coloured on a
logarithmic scale: contrastive Q over all of the replay's states, self-normalised (the default; `cvlctl explain RUN
--map 0,1` draws it alone) and as Eq. 11 is written; Q of SAC's last policy, by fitted Q evaluation (its own critic is
not kept); and the Monte-Carlo return. Printed: the rank correlation of each map with that of the returns, over the
pairs and over cells of position and velocity. The policies differ: contrastive Q and returns are of what SAC did on
average, fitted Q is of what it came to do.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import cvlctl

# isort: split
import matplotlib
import mountain_car
import numpy as np
import torch
from scipy.stats import spearmanr

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.learn import networks
from cvlctl.learn.algorithms import values
from cvlctl.learn.attribution import Readout
from cvlctl.score.explained import draw_map
from cvlctl.score.grounds import grounds

RUNS = Path("runs/papers/cvl-figure-8/small")
STORE = Path("data/papers/mountain-car-30000.zarr")
FLOOR = 1e-3  # of a map's highest values: what is lower, or below 0, has no place on a logarithmic scale


def fitted_q(run: Path, pairs: mountain_car.Pairs) -> np.ndarray:
    """Q (N,) of the first seed of a run of `fqe`, in units of the return."""
    state, metadata = checkpoints.load(run / "checkpoints" / "last.safetensors")
    if metadata.get("algorithm") != "fqe":
        raise CvlctlError(f"{run} is not a run of fqe", "train it: cvlctl run recipes/papers/cvl-figure-8.yaml")
    first = {name: value[:1] for name, value in state.items() if value.ndim}
    observation = networks.normalise(first, torch.from_numpy(pairs.observations)[None])
    action = torch.from_numpy(pairs.actions)[None]
    q = values.q_values(values.target(first), observation, action).mean(dim=1) * first["value_scale"]
    return q[0].numpy()


def plot(path: Path, pairs: mountain_car.Pairs, maps: Mapping[str, np.ndarray]) -> None:
    """A panel for each map, on a logarithmic scale of its own."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(maps), figsize=(4.4 * len(maps), 4.2), layout="constrained")
    for axis, (title, found) in zip(panels, maps.items(), strict=True):
        draw_map(figure, axis, pairs.observations, found, FLOOR)
        axis.set(title=title, xlabel="position", ylabel="velocity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(store: Path, critic: Path, q: Path, out: Path, num_pairs: int) -> dict[str, tuple[float, float]]:
    """Draw the maps; the rank correlation of each with the returns: over pairs, over cells."""
    replay = cvlctl.open_store(store)
    stands_on = grounds(critic).readout
    gamma = stands_on.critic.gamma
    pairs = mountain_car.choose(mountain_car.pairs_of(list(replay.episodes()), gamma), num_pairs)
    as_written = Readout(stands_on.critic, stands_on.states, "none")
    maps = {
        "contrastive Q, self-normalised": stands_on.q(pairs.observations, pairs.actions),
        "contrastive Q, as written (Eq. 11)": as_written.q(pairs.observations, pairs.actions),
        "Q of SAC's last policy, fitted": fitted_q(q, pairs),
        "Monte-Carlo return": pairs.returns,
    }
    plot(out, pairs, maps)
    agreement = {}
    for title, found in list(maps.items())[:-1]:
        cells = mountain_car.cell_means(pairs.observations, np.stack([found, pairs.returns]))
        over_cells = spearmanr(*cells).statistic if cells.shape[1] > 1 else float("nan")
        agreement[title] = (float(spearmanr(found, pairs.returns).statistic), float(over_cells))
    return agreement


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=STORE, help="SAC's replay")
    parser.add_argument("--critic", type=Path, default=RUNS / "critic", help="a critic pretrained on it")
    parser.add_argument("--q", type=Path, default=RUNS / "q", help="a run of fqe on it")
    parser.add_argument("--out", type=Path, default=Path("build/mountain-car-maps.png"))
    parser.add_argument("--pairs", type=int, default=10_000, help="points, at most")
    args = parser.parse_args(arguments)
    try:
        agreement = draw(args.store, args.critic, args.q, args.out, args.pairs)
    except CvlctlError as error:
        parser.exit(2, f"error: {error.what}\nhint: {error.hint}\n")
    print("rank correlation with the Monte-Carlo return: over pairs, over cells")
    for title, (over_pairs, over_cells) in agreement.items():
        print(f"{title:42}{over_pairs:6.2f}{over_cells:6.2f}")
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
