"""How long `cvlctl explain` takes on a store of a million states: the first time, and with psi kept beside the run.

    python benchmarks/explaining.py [--rows 1000000] [--hidden 256] [--rounds 3] [--json explaining.json]

Three moments of an episode, three actions each, the command as it is called: a process of its own, imports included.
The limit is ten seconds on two cores. A critic of Metaworld's shape (256x256->64) is "trained" for one update.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import SPEC

from cvlctl.data.writer import write_store
from cvlctl.types import Episode

LIMIT = 10.0  # seconds


def episodes(rows: int) -> Iterator[Episode]:
    """Random walks of 500 steps, with rewards."""
    rng = np.random.default_rng(0)
    for number in range(max(2, rows // (SPEC.horizon + 1))):
        steps = rng.standard_normal((SPEC.horizon + 1, *SPEC.observation_shape), dtype=np.float32)
        action = rng.uniform(-1, 1, (SPEC.horizon, SPEC.action_dim)).astype(np.float32)
        yield Episode(steps.cumsum(axis=0), action, rng.random(SPEC.horizon), collected_at=number)


def command(*words: str) -> None:
    """One of ours, in a process of its own."""
    subprocess.run([sys.executable, "-P", "-m", "cvlctl", *words], check=True, stdout=subprocess.DEVNULL)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """A store, a run, and three moments of it: once as the first time, then as often as there are rounds."""
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store.zarr", episodes(args.rows), task="walk")
        recipe, run = Path(folder) / "recipe.yaml", Path(folder) / "run"
        recipe.write_text(
            f"{{stores: ['{store.path}'], out: '{run}', steps: 1, batch_size: 32, compile: false, algorithm: "
            f"{{name: cvl, critic: {{hidden: [{args.hidden}, {args.hidden}]}}}}}}"
        )
        command("finetune", str(recipe), "-q")
        asked = partial(command, "explain", str(run), "--episode", "1", "--steps", "0,100,400", "--json")
        first = common.seconds(asked)
        kept = common.timed({"kept": asked}, args.rounds)["kept"]
        size = sum(file.stat().st_size for file in (run / "explain").iterdir())
    work = f"cvlctl explain, three moments, {store.num_rows:,} states"
    rows = [
        common.versus(f"{work}, psi kept", "a limit of 10 s", kept, [LIMIT] * len(kept), unit="seconds",
                      threads=os.cpu_count() or 1, least=1),
        common.versus(f"{work}, the first time", "a limit of 10 s, for comparison", [first], [LIMIT], unit="seconds",
                      threads=os.cpu_count() or 1),
    ]  # fmt: skip
    return {"comparisons": rows, "kept_mb": round(size / 1e6)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None, rounds=3, rows=1_000_000)
    options.add_argument("--hidden", type=int, default=256)
    common.main(options, benchmark, arguments)


if __name__ == "__main__":
    main()
