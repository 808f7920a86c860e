"""All that is to be known of cvlctl on a GPU, in ten minutes: does it work there, and how fast is it. `make gpu`.

    python benchmarks/gpu.py [--steps NAME ...] [--out build/gpu]     on one modern GPU with 16 cores
    python benchmarks/gpu.py --small --device cpu --out /tmp/small    the same code in tiny sizes: does all of it run?
    python benchmarks/gpu.py --wheels DIR                             what a bare machine lacks: listed and fetched
    python benchmarks/gpu.py --unpacked DIR                           on that machine: with those wheels

Each step is a process of its own with a limit of seconds. What measures runs alone; of what only checks, some steps run
beside each other. A step whose package is missing is skipped and says so; one that fails, or is not done in time, is
recorded with its last lines, and the next begins. All is in OUT/results.json after every step, and as tables in
OUT/results.md; what a step printed is in OUT/NAME.log. The exit code is 1 where a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gpu_wheels

HERE = Path(__file__).parent
ROOT = HERE.parent


class How(NamedTuple):
    """What a step is told."""

    device: str
    small: bool
    folder: Path  # its own, for temporary files


class Step(NamedTuple):
    """A function of a script, its limit in seconds, the packages without which it is skipped, and whether others that
    do not mind may run beside it."""

    place: str  # module.function
    seconds: int
    needs: tuple[str, ...] = ()
    alone: bool = True


STORES = ("pydantic", "zarr", "numcodecs", "google_crc32c")  # what all commands need beside a bare PyTorch
PLAYS = (*STORES, "gymnasium", "mujoco", "metaworld")
STEPS: dict[str, Step] = {
    "machine": Step("gpu_checks.machine", 30),
    "tests": Step("gpu_checks.tests", 150, ("pytest",)),
    "quickstart": Step("gpu_checks.quickstart", 100, PLAYS, alone=False),
    "killed": Step("gpu_checks.killed", 100, (*STORES, "gymnasium"), alone=False),
    "streamed": Step("gpu_checks.streamed", 100, STORES, alone=False),
    "variants": Step("gpu_checks.variants", 100, STORES, alone=False),
    "compile": Step("gpu_rates.compile_all", 75),
    "CVL": Step("gpu_rates.method", 45),
    "LAEO": Step("gpu_rates.method", 45),
    "TD3+BC": Step("gpu_rates.method", 45),
    "IQL": Step("gpu_rates.method", 45),
    "CQL": Step("gpu_rates.method", 60),
    "matmuls": Step("gpu_rates.matmuls", 45),
    "sac": Step("gpu_rates.sac_at_once", 100, PLAYS),
    "evaluation": Step("gpu_rates.evaluation", 75, PLAYS),
}
TOTAL = 590  # seconds: what begins later is left out
LAST = 12  # lines of a step that failed


def groups(names: Sequence[str]) -> list[list[str]]:
    """Steps that run beside each other, in their order."""
    found: list[list[str]] = []
    for name in names:
        if found and not (STEPS[name].alone or STEPS[found[-1][-1]].alone):
            found[-1].append(name)
        else:
            found.append([name])
    return found


def run_beside(
    names: Sequence[str], args: argparse.Namespace, environment: dict[str, str], left: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run steps, each in a process of its own; what became of each, as it ends."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    limits = {name: min(STEPS[name].seconds * args.patience, left) for name in names}
    begin = time.monotonic()
    try:
        for name in names:
            if missing := [package for package in STEPS[name].needs if find_spec(package) is None]:
                yield name, {"state": "skipped", "why": f"no package {', '.join(missing)}", "seconds": 0.0}
            elif left <= 0:
                yield name, {"state": "skipped", "why": f"all the {TOTAL} seconds are over", "seconds": 0.0}
            else:
                running[name] = begun(name, args, environment)
        while running:
            time.sleep(0.05)
            seconds = time.monotonic() - begin
            for name, process in list(running.items()):
                if process.poll() is not None or seconds > limits[name]:
                    code = process.poll()
                    end(running.pop(name))  # with all that it started
                    why = f"not done in {limits[name]:.0f} s" if code is None else f"exit code {code}"
                    yield name, outcome(args.out / name, code, why, round(seconds, 1))
    finally:
        for process in running.values():
            end(process)


def begun(name: str, args: argparse.Namespace, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A step's process."""
    file = args.out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "gpu.py"), "--step", name, "--device", args.device, "--json", str(file)]
    with (args.out / f"{name}.log").open("wb") as into:
        return subprocess.Popen(
            command + ["--small"] * args.small, stdin=subprocess.DEVNULL, stdout=into, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )  # fmt: skip


def outcome(place: Path, code: int | None, why: str, seconds: float) -> dict[str, Any]:
    """What became of a step, by what it left in `place`.json and `place`.log."""
    file = place.with_name(place.name + ".json")
    if code == 0 and file.exists():
        return {"state": "done", "seconds": seconds, **json.loads(file.read_text())}
    last = place.with_name(place.name + ".log").read_text(errors="replace").strip().splitlines()[-LAST:]
    return {"state": "failed", "why": why, "seconds": seconds, "last": last}


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Run the steps in their order, with a line for each; everything is written down after each."""
    from gpu_page import page

    args.out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *([str(args.unpacked)] if args.unpacked else []), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "MPLBACKEND": "agg"}
    found: dict[str, Any] = {"device": args.device, "small": args.small, "steps": {}}
    start = time.monotonic()
    for names in groups(args.steps):
        gone = time.monotonic() - start
        print(f"[{gone / 60:.1f} min] {', '.join(names)}", flush=True)
        for name, result in run_beside(names, args, environment, TOTAL * args.patience - gone):
            found["steps"][name] = result
            why = f", {result['why']}" if "why" in result else ""
            print(f"    {name}: {result['state']} in {result['seconds']:.0f} s{why}", flush=True)
            for line in result.get("last", []):
                print(f"        {line}")
            write(args.out / "results.json", json.dumps(found, indent=1) + "\n")
            write(args.out / "results.md", page(found))
    return found


def write(file: Path, text: str) -> None:
    """Whole or not at all: the machine may be taken away at any moment."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(text)
    beside.replace(file)


def one_step(args: argparse.Namespace) -> int:
    """What a step's own process does."""
    module, function = STEPS[args.step].place.split(".")
    with tempfile.TemporaryDirectory() as folder:
        call = getattr(importlib.import_module(module), function)
        how = How(args.device, args.small, Path(folder))
        found = call(how, args.step) if function == "method" else call(how)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="NAME", help=", ".join(STEPS)
    )
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--small", action="store_true", help="tiny sizes, eager: does all of it run?")
    options.add_argument("--patience", type=float, default=1.0, help="limits of seconds are multiplied by this")
    options.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    options.add_argument("--wheels", type=Path, metavar="DIR", help="list and fetch wheels for a bare machine, no more")
    options.add_argument("--unpacked", type=Path, metavar="DIR", help="use these wheels, or what they were unpacked to")
    options.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.wheels:
        return 1 if gpu_wheels.fill(args.wheels) else 0
    if args.step:
        return one_step(args)
    args.out = args.out.resolve()
    if args.unpacked:
        args.unpacked = gpu_wheels.unpack(args.unpacked.resolve())
        sys.path.append(str(args.unpacked))  # as the steps will, so that what they need is found
    found = run_steps(args)
    print(f"{args.out / 'results.json'} and results.md written")
    return 1 if any(step["state"] == "failed" for step in found["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
