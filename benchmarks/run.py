"""Run all benchmarks, keep their numbers in benchmarks/results.json, and write docs/performance.md from them.

    python benchmarks/run.py                      all: `make bench`
    python benchmarks/run.py --only critic sac    these again; the others' numbers stay as they are
    python benchmarks/run.py --write              measure nothing: merge what is in build/bench, write the page
    python benchmarks/run.py --small --out DIR    tiny sizes, to see that all of it runs: numbers worth nothing, in DIR

Each script is a process of its own, one after the other, since two at once would slow each other; its numbers go to
build/bench/NAME.json, what it prints to NAME.log. Where one fails the others still run, the page says so, and the exit
code is 1. Scripts whose extra is not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import machine, reached
from gpu_page import aims, table

HERE = Path(__file__).parent
# the arguments that make each small
SCRIPTS: dict[str, list[str]] = {
    "startup": ["--runs", "2"],
    "critic": ["--threads", "1", "--rounds", "1", "--updates", "1", "--rows", "2000", "--eager-only"],
    "sac": [
        "--threads", "1", "--rounds", "1", "--updates", "2", "--frame-rounds", "1", "--frames", "1000",
        "--learning-starts", "100", "--hidden", "16", "--eager-only",
    ],
    "td_learners": ["--threads", "1", "--rounds", "1", "--updates", "1", "--rows", "2000", "--eager-only"],
    "evaluation": ["--threads", "1", "--rounds", "1", "--episodes", "3", "--tasks", "gym/Pendulum-v1"],
    "importing": ["--transitions", "3000", "--frames", "1000", "--rounds", "1"],
    "streaming": ["--rows", "100000", "--share", "0.3", "--updates", "20", "--rounds", "1"],
    "building": ["--tasks", "gym/Pendulum-v1", "gym/MountainCarContinuous-v0", "--frames", "600", "--hidden", "16",
                 "--rounds", "1"],
    "seeds": ["--threads", "1", "--together", "2", "--seeds", "1", "2", "--rounds", "1", "--seconds", "0.2",
              "--updates", "1", "--rows", "2000", "--eager-only"],
    "together": ["--threads", "1", "--seeds", "2", "--methods", "TD3+BC", "--rounds", "1", "--updates", "1", "--rows",
                 "2000", "--eager-only"],
    "scaling": ["--threads", "1", "--transitions", "1000", "2000", "--rounds", "1", "--updates", "1",
                "--memory-updates", "2", "--eager-only"],
    "engines": ["--cells", "2", "--steps", "1", "--rounds", "1", "--hidden", "16", "--more", "1", "--rows", "1000",
                "--many", "20"],
    "reporting": ["--tasks", "2", "--lines", "3", "--rounds", "1"],
    "intervals": ["--runs", "3", "--tasks", "2", "--resamples", "5", "--rounds", "1"],
    "explaining": ["--rows", "2000", "--hidden", "16", "--rounds", "1"],
    "frames": ["--threads", "1", "--rounds", "1", "--updates", "1", "--rows", "1100", "--size", "16", "--eager-only",
               "--batch-size", "8"],
    "rendering": ["--tasks", "gym/FetchPush-v4", "--frames", "2", "--size", "16", "--rounds", "1"],
    "seeing": ["--tasks", "gym/FetchReach-v4", "--episodes", "2", "--horizon", "3", "--size", "24", "--rounds", "1"],
    "backends": ["--tasks", "metaworld/drawer-close-v3", "--episodes", "2", "--rounds", "1"],
}  # fmt: skip
# scripts without their peer
NEEDS = {"sac": "stable_baselines3", "td_learners": "d3rlpy", "intervals": "rliable", "backends": "envpool"}


def measure(name: str, out: Path, small: bool) -> bool:
    """Run one script; whether it came to its end. Its numbers, or that it failed, go to `out`/NAME.json."""
    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)
    begin, before = time.monotonic(), machine()
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(file), *(SCRIPTS[name] if small else [])]
    with log.open("w") as into:
        code = subprocess.run(command, stdout=into, stderr=subprocess.STDOUT).returncode
    seconds = round(time.monotonic() - begin, 1)
    if code == 0 and file.exists():
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"seconds": seconds}, indent=1) + "\n")
        print(f"done in {seconds:.0f} s", flush=True)
        return True
    last = (log.read_text().strip().splitlines() or ["it printed nothing"])[-1]
    failed = {"failed": f"exit code {code}: {last}", "seconds": seconds, "machine": before}
    file.write_text(json.dumps(failed, indent=1) + "\n")
    print(f"FAILED after {seconds:.0f} s, {failed['failed']} (all of it: {log})", flush=True)
    return False


def measure_all(names: Sequence[str], out: Path, small: bool) -> bool:
    """Run the scripts in turn, with a line for each; whether all came to their end."""
    out.mkdir(parents=True, exist_ok=True)
    begin, good = time.monotonic(), []
    for i, name in enumerate(names):
        minutes = (time.monotonic() - begin) / 60
        print(f"[{i + 1}/{len(names)}, {minutes:.1f} min] {name}: ", end="", flush=True)
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            print(f"left out, {NEEDS[name]} is not installed", flush=True)
        else:
            good.append(measure(name, out, small))
    return all(good)


def kind_of(state: dict[str, Any]) -> str:
    """Of which processor a script's numbers are: names alone may be as vague as "AMD EPYC"."""
    return f"{state['cpu']}, {state['instructions']}"


def merged(out: Path, results: Path) -> dict[str, dict[str, Any]]:
    """Of every processor, every script's latest numbers: those in `out`, and others in `results`, where they stay."""
    found = json.loads(results.read_text()) if results.exists() else {}
    for name in SCRIPTS:
        file = out / f"{name}.json"
        if file.exists():
            latest = json.loads(file.read_text())
            found.setdefault(kind_of(latest["machine"]), {})[name] = latest
    return {kind: {name: found[kind][name] for name in SCRIPTS if name in found[kind]} for kind in sorted(found)}


def compared(row: dict[str, Any]) -> list[str]:
    """A comparison as a row of the page; a missed target stands out."""
    result = reached(row)
    targets = ["" if row[name] is None else f"{row[name]:g}x" for name in ("least", "aim")]
    return [
        row["work"], row["peer"], str(row["threads"]), f"{row['ours']:g} {row['unit']}",
        f"{row['theirs']:g} {row['unit']}", f"**{row['ratio']:.2f}x** [{row['low']:.2f}, {row['high']:.2f}]", *targets,
        f"**{result}**" if result == "missed" else result,
    ]  # fmt: skip


def wrapped(prose: str, hang: str = "") -> str:
    """As the other pages' prose; `hang`: what lines but the first begin with."""
    return textwrap.fill(prose, 120, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


def machines(scripts: dict[str, Any]) -> list[str]:
    """A line for each machine and set of versions, with the scripts that ran there."""
    ran: dict[str, list[str]] = {}
    for name, found in scripts.items():
        state = found["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in state["versions"].items())
        ran.setdefault(f"{state['cpu']}, {state['cpus']} CPUs; {versions}", []).append(name)
    return [wrapped(f"* {where} ({', '.join(names)})", "  ") for where, names in ran.items()]


def rows_of(scripts: dict[str, Any]) -> list[dict[str, Any]]:
    """All comparisons of scripts that came to their end."""
    return [row for found in scripts.values() if "failed" not in found for row in found["comparisons"]]


def side_by_side(results: dict[str, dict[str, Any]]) -> list[str]:
    """The ratios of all processors, a column each, and the targets that hold on one and not on another."""
    columns = {
        kind: {(r["work"], r["peer"], r["threads"]): r for r in rows_of(found)} for kind, found in results.items()
    }
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows, apart = [], []
    for key in keys:
        here = {kind: column[key] for kind, column in columns.items() if key in column}
        told = [f"{row['ratio']:.2f}x {reached(row)}".strip() if (row := here.get(kind)) else "" for kind in columns]
        rows.append([key[0], key[1], str(key[2]), *told])
        missed = [kind for kind, row in here.items() if reached(row) == "missed"]
        if missed and len(missed) < len(here):
            held = [kind for kind in here if kind not in missed]
            apart.append(
                wrapped(f"* {key[0]}, beside {key[1]}: missed on {'; '.join(missed)}, not on {'; '.join(held)}", "  ")
            )
    parts = ["## Side by side", table(["work", "peer", "threads", *columns], rows)]
    if apart:
        parts += ["Targets that hold on one processor and not on another:", "\n".join(apart)]
    return parts


def section(kind: str, scripts: dict[str, Any]) -> list[str]:
    """One processor's comparisons, curves and conditions."""
    good, rows = {name: found for name, found in scripts.items() if "failed" not in found}, rows_of(scripts)
    missed = sum(reached(row) == "missed" for row in rows)
    asked = sum(row["least"] is not None for row in rows)
    conditions = [
        [name, f"{found['machine']['load_average'][0]:g}", f"{found['load_average_after'][0]:g}",
         f"{found['seconds']:.0f}"] if name in good else [name, "", "", f"**failed**: {found['failed']}"]
        for name, found in scripts.items()
    ]  # fmt: skip
    parts = [
        f"## {kind}",
        "\n".join(machines(scripts)),
        f"{len(rows)} comparisons; of {asked} with a least ratio {asked - missed} reach it, {missed} miss it.",
        table(["work", "peer", "threads", "ours", "theirs", "ratio [range]", "at least", "aim", "reached?"],
              [compared(row) for row in rows]),
    ]  # fmt: skip
    if fresh := [name for name, found in good.items() if "states" not in found["machine"]]:
        parts.append(wrapped(f"Update rates of fresh states, measured before they were aged: {', '.join(fresh)}."))
    for curve in (curve for found in good.values() for curve in found.get("curves", [])):
        parts += [f"### {curve['title']}", table(curve["columns"], curve["rows"])]
        parts += [wrapped(curve["note"])] if curve.get("note") else []
    parts += ["### Conditions", table(["script", "load before", "after", "seconds"], conditions)]
    if absent := [name for name in SCRIPTS if name not in scripts]:
        parts.append(wrapped(f"Not run: {', '.join(absent)}."))
    return parts


UNTRIED = (
    "It has run on no GPU yet; in tiny sizes on a CPU all but its tests went through with Python 3.12, torch 2.11 and "
    "nothing but that machine's packages and the wheels"
)


def on_a_gpu() -> list[str]:
    """The aims on a GPU and what became of them (what `gpu.py` found there, kept as gpu_results.json), and the model of
    the limits, counted by `gpu_model.py`."""
    file = HERE / "gpu_results.json"
    found = json.loads(file.read_text()) if file.exists() else None
    ran = f"It ran on {found['steps']['machine']['curves'][0]['rows'][0][1]}" if found else UNTRIED
    parts = [
        "## On a GPU",
        wrapped(
            "`make gpu` (`python benchmarks/gpu.py`) asks all of this of a machine with a GPU, in ten minutes. "
            f"{ran}. Aims are for one GPU of the class of an H100."
        ),
        table(*aims(found)),
        wrapped(
            "What can be told without one (`python benchmarks/gpu_model.py --json benchmarks/gpu_model.json`), and by "
            "what an update is bound."
        ),
    ]
    for curve in (curves := json.loads((HERE / "gpu_model.json").read_text())["curves"]):
        parts += [f"### {curve['title']}", table(curve["columns"], curve["rows"]), wrapped(curve["note"])]
    return [*parts, wrapped(of_the_aims({name: times for name, *times in curves[1]["rows"]}))]


def of_the_aims(limits: dict[str, list[float]]) -> str:
    """What the model of the limits says of the aims; `limits`: of each method the columns of its table."""
    launches, moved, products, graph, *_, minutes = limits["CVL"]
    five = graph / (launches + (moved + products) / 5)  # one seed has as many kernels, and a fifth of the work
    rates = ", ".join(f"{name} {5e6 / limits[name][3]:,.0f}" for name in ("TD3+BC", "IQL"))
    gain = min(times[4] / times[3] for times in limits.values())
    return (
        f"So the model has 500,000 CVL updates of five seeds in {minutes} minutes (aim: 3), five seeds at {five:.2f} "
        f"times the time of one (aim: 1.3), {rates} agent-updates/s (aim: 9,250), and graphs at least {gain:.1f} times "
        f"as fast as eager in these {len(limits)} methods (aim: 4). The share of bare products at hidden 1024x1024 is "
        "not modelled."
    )


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/performance.md."""
    parts = [
        "# Performance",
        wrapped("Generated by `make bench` (`python benchmarks/run.py`) from `benchmarks/results.json`; do not edit. "
                "What each script measures, and how: [benchmarks](../benchmarks/README.md). Numbers of each kind of "
                "processor are kept, whichever was measured last."),
        wrapped(
            "A ratio above 1 means that cvlctl is faster: the median over rounds in which the contestants take turns, "
            "in brackets the extremes. Ours and theirs are medians and belong to the machine. \"As shipped\" is a peer "
            "as people install it, \"our matmul setting\" the same peer given the back-end for matrix products that "
            "cvlctl chooses. At least and aim are the targets set beforehand; rows without them are told for "
            "completeness."
        ),
        wrapped(
            "Load, under conditions: processes that ran or waited, on average over the minute before each script and "
            "over its last minute. The script before leaves its own trace in the former."
        ),
    ]  # fmt: skip
    parts += side_by_side(results) if len(results) > 1 else []
    for kind, scripts in results.items():
        parts += section(kind, scripts)
    parts += on_a_gpu()
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="NAME", help="these")
    options.add_argument("--write", action="store_true", help="measure nothing, write results and page anew")
    options.add_argument("--small", action="store_true", help="tiny sizes")
    options.add_argument("--out", type=Path, help="a folder for everything, results and page included")
    args = options.parse_args(arguments)
    if args.small and args.out is None:
        options.error("--small needs --out: its numbers are not to replace real ones")
    out = args.out or HERE.parent / "build" / "bench"
    results = args.out / "results.json" if args.out else HERE / "results.json"
    written = args.out / "performance.md" if args.out else HERE.parent / "docs" / "performance.md"
    good = args.write or measure_all(args.only, out, args.small)
    scripts = merged(out, results)
    if not scripts:
        print(f"no numbers in {out}")
        return 1
    results.write_text(json.dumps(scripts, indent=1) + "\n")
    written.write_text(page(scripts))
    print(f"{results} and {written} written")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
