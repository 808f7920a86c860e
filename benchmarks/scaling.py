"""What more data cost: speed and memory, from 100 thousand to 5 million transitions (39 observations, 4 actions).

    python benchmarks/scaling.py [--threads 2] [--transitions 100000 1000000 5000000] [--json scaling.json]

* Speed: updates/s of CVL, defaults, batch 256, one seed, compiled, with all data in memory; of all learners its update
  reads the most rows: a batch, its futures, and a bank of 1024 rewarded futures, all drawn and gathered within what is
  timed. One program and one set of networks serve all sizes, and the smaller data are the first episodes of the
  largest, so that nothing but the amount of data differs. Sizes take turns; a ratio to the smallest is the median over
  rounds.
* Memory: the peak of `cvlctl pretrain`, from Python, with a store of each size: a process of its own, a few updates,
  eager, one thread, all rows in memory. Linux alone, by VmHWM: the peak that getrusage tells of a process may be that
  of the one that started it. Data are what `memory_gb` counts: rows and their index.

The claims: an update takes as long with any amount of data, and memory is the data and a constant.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aging
import common
import numpy as np
from common import SPEC, Contestant
from streaming import episodes, train

import cvlctl
from cvlctl.data.samplers import Data, Layout
from cvlctl.data.stream import row_bytes
from cvlctl.learn.algorithms import cvl
from cvlctl.learn.programs import programs_of
from cvlctl.learn.settings import Settings, configure

SIZES = [100_000, 500_000, 1_000_000, 2_000_000, 5_000_000]  # transitions: whole episodes of 500
CVL = cvl.Config()
BATCH = 256


def beginning(data: Data, transitions: int) -> Data:
    """The first transitions of `data`, whole episodes: views of it, no copies."""
    row, last, terminated, first = data.layout
    num_episodes = transitions // SPEC.horizon
    num, rows = num_episodes * SPEC.horizon, num_episodes * (SPEC.horizon + 1)
    where = Layout(row[:num], last[:num], terminated[:num], first[:num_episodes])
    return Data(
        data.observation[:rows], data.action[:rows], data.arrival_reward[:, :rows], where, data.labelled[:num],
        data.examples,
    )  # fmt: skip


def contestants(data: Data, sizes: Sequence[int], settings: Settings) -> dict[str, Contestant]:
    """Functions that make n updates from so much of the data, all of the same networks."""
    draws = cvl.draws(CVL, SPEC, BATCH)
    state = aging.aged(cvl.init(CVL, SPEC, [0], beginning(data, min(sizes))))
    programs = programs_of(cvl, CVL, settings)
    return {str(n): common.updates_from(beginning(data, n), draws, [0], state, programs, settings) for n in sizes}


def speed(sizes: Sequence[int], settings: Settings, rounds: int, updates: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The curve of updates/s, and the comparison of its ends."""
    data = common.synthetic(max(sizes) // SPEC.horizon * (SPEC.horizon + 1))
    configure(settings)
    rates = common.measure(contestants(data, sizes, settings), rounds, updates)
    base = np.array(rates[str(sizes[0])])
    rows = []
    for size in sizes:
        found = np.array(rates[str(size)])
        rows.append([size, round(float(np.median(found)), 1), *common.spread(found / base)])
    how = f"{settings.threads} threads, {'compiled' if settings.compile else 'eager'}, batch {BATCH}, in memory"
    curve = {
        "title": "CVL's updates with more data", "columns": ["transitions", "updates/s", "ratio", "least", "most"],
        "rows": rows, "note": f"{how}; ratio to the fewest: 1 is flat",
    }  # fmt: skip
    ends = common.versus(
        f"CVL update, {sizes[-1]:,} transitions in memory", f"the same with {sizes[0]:,}", rates[str(sizes[-1])],
        rates[str(sizes[0])], threads=settings.threads,
    )  # fmt: skip
    return curve, ends


def memory(sizes: Sequence[int], updates: int) -> dict[str, Any]:
    """The curve of peak memory: each size in a process of its own, its store gone afterwards."""
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            num_rows = size // SPEC.horizon * (SPEC.horizon + 1)
            store = cvlctl.write_store(folder / "data.zarr", episodes(num_rows), task="synthetic")
            mb = store.num_rows * row_bytes(store) / 1e6
            found.append((mb, train(folder, store.path, "run", 2 * mb / 1e3, updates)["megabytes"]))
    rows = [[size, round(mb), round(top), round(top - mb)] for size, (mb, top) in zip(sizes, found, strict=True)]
    note = "pretrain, eager, one thread"
    if len(found) > 1:
        (least, bottom), (most, top) = found[0], found[-1]
        note += f"; from the first row to the last, each MB of data takes {(top - bottom) / (most - least):.2f} MB"
    columns = ["transitions", "data, MB", "peak, MB", "difference"]
    return {"title": "Peak memory with more data", "columns": columns, "rows": rows, "note": note}


def main(arguments: Sequence[str] | None = None) -> None:
    made = common.parser(__doc__, rounds=7, updates=64, forms=True)
    made.add_argument("--transitions", type=int, nargs="+", default=SIZES, help="multiples of 500, ascending")
    made.add_argument("--memory-updates", type=int, default=20, help="updates of the runs whose memory is measured")

    def measured(args: argparse.Namespace) -> dict[str, Any]:
        sizes = sorted(set(args.transitions))
        if any(size < 1 or size % SPEC.horizon for size in sizes):
            made.error(f"--transitions: whole episodes, multiples of {SPEC.horizon}")
        mine = common.our_settings(args.threads, args.eager_only)
        settings = mine[common.best(mine)]
        updates_curve, ends = speed(sizes, settings, args.rounds, args.updates)
        return {
            "comparisons": [ends], "curves": [updates_curve, memory(sizes, args.memory_updates)],
            "settings": settings.as_dict(), "rounds": args.rounds, "updates_a_round": args.updates,
        }  # fmt: skip

    common.main(made, measured, arguments)


if __name__ == "__main__":
    main()
