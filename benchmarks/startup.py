"""How long `cvlctl --help` takes: wall seconds of the whole process, once started to warm the disk's cache.

    python benchmarks/startup.py [--runs 10] [--json startup.json]

There is no peer: the comparison is with a limit of half a second.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import finish, machine, parser, versus

LIMIT, AIM = 0.5, 0.3  # seconds
SCRIPT = "from cvlctl.__main__ import main; main()"  # what the script `cvlctl` does
COMMAND = [sys.executable, "-P", "-c", SCRIPT, "--help"]


def benchmark(runs: int) -> dict[str, Any]:
    before = machine()
    seconds = []
    for _ in range(1 + runs):
        begin = time.perf_counter()
        subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    limit = versus(
        "cvlctl --help", f"a limit of {LIMIT} s", seconds[1:], [LIMIT] * runs, unit="seconds", threads=1,
        least=1, aim=round(LIMIT / AIM, 2),
    )  # fmt: skip
    return {"comparisons": [limit], "machine": before, "load_average_after": machine()["load_average"]}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, threads=None)
    options.add_argument("--runs", type=int, default=10)
    args = options.parse_args(arguments)
    finish(benchmark(args.runs), args)


if __name__ == "__main__":
    main()
