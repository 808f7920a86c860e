"""A store ten times larger than the memory that data may take: streamed, and in memory.

    python benchmarks/streaming.py [--rows 3000000] [--share 0.1] [--updates 600] [--rounds 3] [--json streaming.json]

The store is synthetic: episodes of 500 steps, 39 observations and 4 actions, chunks as shipped. Each round trains the
occupancy critic (256x256, batch 256, eager, one thread) twice with `cvlctl pretrain`'s own code, each time in a process
of its own: with all rows in memory, and with `memory_gb` a share of what they take. Updates/s are those of the loop,
after loading; memory is the process's peak, less the peak of a process that trains on a single segment's worth of rows.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

import cvlctl
from cvlctl.data.stream import row_bytes

LENGTH = 500
# the peak by VmHWM (Linux alone): what getrusage tells of a process may be the peak of the one that started it
CHILD = """
import json, pathlib, re, sys
from cvlctl.experiments import commands
from cvlctl.learn.pretrain import pretrain
result = pretrain(commands.load(sys.argv[1], [], "pretrain"))
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
print(json.dumps({"updates_per_second": result["updates_per_second"], "megabytes": round(int(peak) * 1024 / 1e6)}))
"""


def episodes(rows: int) -> Iterator[cvlctl.Episode]:
    rng = np.random.default_rng(0)
    for _ in range(max(1, rows // (LENGTH + 1))):
        observation = rng.standard_normal((LENGTH + 1, 39), dtype=np.float32)
        yield cvlctl.Episode(observation, rng.uniform(-1, 1, (LENGTH, 4)).astype(np.float32))


def train(folder: Path, store: Path, name: str, memory_gb: float | str, updates: int) -> dict[str, Any]:
    """Rate of one training in a process of its own, and its peak memory in MB."""
    plain = {
        "stores": [str(store)], "critic": {"hidden": [256, 256]}, "batch_size": 256, "steps": updates, "threads": 1,
        "device": "cpu", "compile": "false", "memory_gb": memory_gb, "out": str(folder / name),
    }  # fmt: skip
    recipe = folder / f"{name}.yaml"
    recipe.write_text(json.dumps(plain))
    child = subprocess.run([sys.executable, "-P", "-c", CHILD, str(recipe)], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(child.stderr)
    return dict(json.loads(child.stdout))


def benchmark(rows: int, share: float, updates: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = cvlctl.write_store(folder / "big.zarr", episodes(rows), task="synthetic")
        small = cvlctl.write_store(folder / "small.zarr", episodes(int(rows * share / 10)), task="synthetic")
        data_mb = store.num_rows * row_bytes(store) / 1e6
        bare = train(folder, small.path, "bare", "auto", 50)["megabytes"]
        numbers = map(str, itertools.count())  # of the runs: each round trains anew
        ways = {
            name: lambda gb=gb: train(folder, store.path, next(numbers), gb, updates)  # type: ignore[misc]
            for name, gb in (("in memory", 2 * data_mb / 1e3), ("streamed", share * data_mb / 1e3))
        }
        found = common.turns(ways, rounds)
    memory_rates, streamed_rates = ([one["updates_per_second"] for one in found[name]] for name in found)
    work = f"critic's training, data streamed, {share:.0%} of it in memory"
    row = common.versus(work, "the same, all in memory", streamed_rates, memory_rates, threads=1, least=0.5)
    return {
        "comparisons": [row],
        "rows": rows, "data_megabytes": round(data_mb), "allowed_megabytes": round(share * data_mb),
        "bare_megabytes": bare, "rounds": found,
    }  # fmt: skip


def told(found: dict[str, Any]) -> dict[str, Any]:
    print(f"{found['data_megabytes']} MB of data, {found['allowed_megabytes']} MB allowed")
    for name, results in found["rounds"].items():
        peaks = ", ".join(f"{one['megabytes'] - found['bare_megabytes']}" for one in results)
        print(f"{name:<10} MB beyond a bare run {peaks}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None, rounds=3, updates=600, rows=3_000_000)
    options.add_argument("--share", type=float, default=0.1, help="of what the rows take: what they may take in memory")
    common.main(options, lambda a: told(benchmark(a.rows, a.share, a.updates, a.rounds)), arguments)


if __name__ == "__main__":
    main()
