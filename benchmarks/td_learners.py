"""TD3+BC, IQL and CQL beside d3rlpy's: updates a second, and what both libraries learn from the same store.

TD3+BC also stands beside a plain eager PyTorch loop, as it is written into a single file (CORL's way).

    python benchmarks/td_learners.py [--threads 2] [--json speed.json]     updates/s of all, side by side in one process
    python benchmarks/td_learners.py --learn --seeds 0 1 --json scores.json     train both on real stores, play both

Needs the extra `bench` (d3rlpy). Both sides do the same work: batch 256 drawn from memory, twin critic and actor (and
IQL's value) of 256x256, Adam, float32, one seed; the hyper-parameters are cvlctl's defaults, which are the papers', and
d3rlpy is set to the same (`peer` says how). Speed rounds alternate between the contestants, so that a busy machine
slows all alike; a ratio is the median over rounds.

`--learn`: the same transitions (those that end by time bootstrap, those that terminate do not), the same number of
updates, and the same greedy episodes in the same environment. A run that `--json` already holds is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import AS_SHIPPED, BF16, COMPILED, EAGER, FORM, OUR_SETTING, Contestant
from td_peers import BATCH, default_config, library, peer, peer_buffer, plain, theirs
from torch.utils.flop_counter import FlopCounterMode

from cvlctl.data.samplers import Data
from cvlctl.learn.algorithms import ALGORITHMS, td3_bc
from cvlctl.learn.settings import Settings

METHODS = ("td3_bc", "iql", "cql")
STORES = ("data/methods/gym/Hopper-v5.zarr", "data/methods/metaworld/window-open-v3.zarr")
LIBRARIES = ("cvlctl", "d3rlpy")
UPDATES = {"td3_bc": 200, "iql": 200, "cql": 40}  # a round
TITLES = {"td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL"}
D3RLPY, PLAIN = "d3rlpy", "plain eager PyTorch"
TARGETS = {  # at least, aim
    ("td3_bc", D3RLPY + AS_SHIPPED): (2.8, 4.0),
    ("td3_bc", PLAIN + AS_SHIPPED): (1.8, 2.5),
    ("iql", D3RLPY + AS_SHIPPED): (3.0, 4.0),
    ("cql", D3RLPY + AS_SHIPPED): (2.3, 2.8),
    ("cql", BF16): (None, 6.0),  # beside d3rlpy as shipped
}
BARE, PRODUCT = "bare matrix products", 2 * 7680 * 256 * 256
SHARE_NOTE = (
    "GFLOP, of any method: of the matrix products in one update. Share: the part of the rate of bare matrix products "
    "(7680x256 by 256x256, our matmul setting) at which they are done."
)


def bare_products(settings: Settings) -> Contestant:
    """What an update could not outdo: matrix products of hidden layers and nothing else, PRODUCT floating-point
    operations in each, as wide as those of CQL's sampled actions."""
    x, weight = torch.randn(7680, 256), torch.randn(256, 256)

    def run(updates: int) -> None:
        common.configure(settings)
        for _ in range(updates):
            torch.mm(x, weight)

    return run


def operations(run: Contestant) -> float:
    """Floating-point operations of the matrix products in one update, forward and backward, counted over two."""
    with FlopCounterMode(display=False) as counter:
        run(2)
    return counter.get_total_flops() / 2


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Updates/s of every form of every method beside the peers', and the operations in an update and the share of the
    rate of bare matrix products at which they are done."""
    data, mine = common.synthetic(args.rows), common.our_settings(args.threads, args.eager_only)
    made: dict[str, list[dict[str, Any]]] = {"comparisons": [], "curves": []}
    for method in args.methods:
        rows, curve = compare(method, args, data, mine)
        made["comparisons"] += rows
        made["curves"].append(curve)
    made["curves"][-1]["note"] = SHARE_NOTE
    return made | {
        "settings": mine[common.best(mine)].as_dict(),
        "sizes": {"hidden": list(td3_bc.Config().hidden), "batch_size": BATCH, "rows": len(data.observation),
                  "cql_num_actions": args.num_actions},
        "rounds": args.rounds, "updates_a_round": args.updates or UPDATES,
        "d3rlpy": library().__version__,
    }  # fmt: skip


def compare(
    method: str, args: argparse.Namespace, data: Data, mine: dict[str, Settings]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The comparisons of one method, and the table of all its forms; `mine`: what ours computes with, by form."""
    config, buffer = default_config(method, args.num_actions), peer_buffer(data)
    contestants = {}
    for suffix, settings in ((AS_SHIPPED, common.shipped(args.threads)), (OUR_SETTING, mine[EAGER])):
        contestants[D3RLPY + suffix] = theirs(peer(method, config, data), buffer, settings)
        if method == "td3_bc":
            contestants[PLAIN + suffix] = plain(config, data, settings)
    module = ALGORITHMS[method]
    contestants |= {form: common.learner(module, config, [0], data, BATCH, settings) for form, settings in mine.items()}
    work = {name: operations(run) for name, run in contestants.items() if name not in (COMPILED, BF16)}
    work |= dict.fromkeys(mine, work[EAGER])  # the counter cannot see into compiled programs
    rates = common.measure(
        {**contestants, BARE: bare_products(mine[EAGER])}, args.rounds, args.updates or UPDATES[method]
    )
    products = np.array(rates.pop(BARE)) * PRODUCT
    title = f"{TITLES[method]}'s update, batch {BATCH}, {'x'.join(map(str, config.hidden))}"
    pairs = [(common.best(mine), name) for name in contestants if name not in mine]
    pairs += [(BF16, D3RLPY + AS_SHIPPED)] * (BF16 in mine)
    comparisons = []
    for form, name in pairs:
        least, aim = TARGETS.get((method, BF16 if form == BF16 else name), (None, None))
        row = common.versus(
            f"{title}, {FORM[form]}", name, rates[form], rates[name], threads=args.threads, least=least, aim=aim
        )
        comparisons.append(row)
    curve = common.forms(f"{title}, {args.threads} threads", rates, D3RLPY + AS_SHIPPED)
    curve["columns"] += ["GFLOP", "share"]
    for row in curve["rows"]:
        share = np.median(np.array(rates[row[0]]) * work[row[0]] / products)
        row += [round(work[row[0]] / 1e9, 3), round(float(share), 3)]
    return comparisons, curve


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, rounds=7, rows=100_000, forms=True)
    options.add_argument("--updates", type=int, help=f"a round; if not given {UPDATES}")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options.add_argument("--num-actions", type=int, default=10, help="that CQL draws of each kind")
    options.add_argument("--learn", action="store_true", help="train and play instead of measuring speed")
    options.add_argument("--stores", nargs="+", type=Path, default=STORES)
    options.add_argument("--steps", type=int, default=10_000)
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--episodes", type=int, default=20)
    options.add_argument("--only", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    args = options.parse_args(arguments)
    if args.learn:
        import td_learning

        td_learning.compare(args)
    else:
        common.main(options, speed, arguments)


if __name__ == "__main__":
    main()
