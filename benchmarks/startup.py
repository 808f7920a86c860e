"""How long `cvlctl --help` takes: wall seconds of the whole process, once started to warm the disk's cache.

    python benchmarks/startup.py [--runs 10] [--json startup.json]

There is no peer: the comparison is with a limit of half a second.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import common

LIMIT, AIM = 0.5, 0.3  # seconds
SCRIPT = "from cvlctl.__main__ import main; main()"  # what the script `cvlctl` does
COMMAND = [sys.executable, "-P", "-c", SCRIPT, "--help"]


def benchmark(runs: int) -> dict[str, Any]:
    start = partial(subprocess.run, COMMAND, check=True, stdout=subprocess.DEVNULL)
    seconds = common.timed({"help": start}, 1 + runs)["help"]
    limit = common.versus(
        "cvlctl --help", f"a limit of {LIMIT} s", seconds[1:], [LIMIT] * runs, unit="seconds", threads=1,
        least=1, aim=round(LIMIT / AIM, 2),
    )  # fmt: skip
    return {"comparisons": [limit]}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None)
    options.add_argument("--runs", type=int, default=10)
    common.main(options, lambda a: benchmark(a.runs), arguments)


if __name__ == "__main__":
    main()
