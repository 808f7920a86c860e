"""Five seeds of each method as one program: CVL, LAEO, TD3+BC, IQL and CQL, with the whole step compiled, and eager.

    python benchmarks/together.py [--device cuda] [--seeds 5] [--threads 2] [--json together.json]

Networks of 256x256, batch 256, sampling from 500k rows in the device's memory included. On a GPU the compiled step is
replayed as a CUDA graph; eager is the same step, launched operation by operation, with the same matmul setting. Rounds
are rounded up to whole blocks of 64 updates, whose batches are drawn at once: each has its share of that. A rate counts
one update of one seed as one. Minutes are those of 500,000 updates of all seeds at that rate. With --device cuda, what
others have published stands beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import common
from common import EAGER

# isort: split
import numpy as np

from cvlctl.data.load import to_device
from cvlctl.data.samplers import BLOCK
from cvlctl.learn.algorithms import cql, cvl, iql, laeo, td3_bc

BATCH, LONG = 256, 500_000
METHODS: dict[str, tuple[ModuleType, Any]] = {
    "CVL": (cvl, common.with_critic(cvl, (256, 256))),
    "LAEO": (laeo, common.with_critic(laeo, (256, 256))),
    "TD3+BC": (td3_bc, td3_bc.Config()),
    "IQL": (iql, iql.Config()),
    "CQL": (cql, cql.Config()),
}
PUBLISHED = [  # updates/s; from the READMEs of LeanRL and of JAX-CORL (times there, divided)
    ["CORL: TD3+BC, IQL, CQL", "GTX 1080 Ti", "112, 68, 24"],
    ["JAX-CORL: TD3+BC, IQL, CQL", "GTX 1080 Ti", "1850, 1850, 298"],
    ["LeanRL: SAC, PyTorch eager", "H100", "127"],
    ["LeanRL: SAC, compiled, CUDA graph", "H100", "725"],
]


def benchmark(args: Any) -> dict[str, Any]:
    """Rates of every method in both forms, in turns."""
    seeds = range(args.seeds)
    mine = common.our_settings(args.threads, args.eager_only, args.device)
    chosen = common.best(mine)
    data = to_device(common.synthetic(args.rows), args.device)
    comparisons, rows = [], []
    updates = -(-args.updates // BLOCK) * BLOCK  # whole blocks: each round draws its share of batches
    for name in args.methods:
        module, config = METHODS[name]
        forms = dict.fromkeys((EAGER, chosen))
        runs = {form: common.learner(module, config, seeds, data, BATCH, mine[form]) for form in forms}
        rates = common.measure(runs, args.rounds, updates, BLOCK)
        eager, fast = (args.seeds * np.array(rates[form]) for form in (EAGER, chosen))
        minutes = LONG * args.seeds / np.median(fast) / 60
        rows.append([name, *(round(float(np.median(x)), 1) for x in (eager, fast)), *common.spread(fast / eager),
                     round(float(minutes), 1)])  # fmt: skip
        work = f"{name}, {args.seeds} seeds together, whole step, {args.device}"
        comparisons.append(common.versus(work, "the same, eager", fast.tolist(), eager.tolist(), threads=args.threads))
    note = f"{args.device}, {args.threads} threads, 256x256, batch {BATCH}; minutes: {LONG:,} updates of all seeds"
    columns = ["method", "eager", "whole step", "ratio", "least", "most", "minutes"]
    title = f"{args.seeds} seeds of each method together, updates/s"
    curves: list[dict[str, Any]] = [{"title": title, "columns": columns, "rows": rows, "note": note}]
    if args.device == "cuda":
        note = "other hardware, one seed each; not measured here"
        columns = ["what", "on", "updates/s"]
        curves.append({"title": "Published by others", "columns": columns, "rows": PUBLISHED, "note": note})
    return {
        "comparisons": comparisons, "curves": curves,
        "settings": mine[chosen].as_dict(), "rounds": args.rounds,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, rounds=5, updates=BLOCK, rows=500_000, forms=True, device=True)
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options.add_argument("--seeds", type=int, default=5)
    common.main(options, benchmark, arguments)


if __name__ == "__main__":
    main()
