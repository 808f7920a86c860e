"""What the benchmarks share: arguments, rounds in which contestants take turns, medians with their spread, and the
record of all of it, in words and as JSON.

A script says what it measures against what: a function of its arguments that returns `comparisons` (rows of `versus`)
and `curves` (tables) among other numbers. `main` does the rest. `run.py` merges the scripts' files into one page.

Scripts import this before torch and numpy: cvlctl says how OpenMP's threads are to wait.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import cvlctl  # noqa: F401 (before torch: it says how OpenMP's threads are to wait)

# isort: split
import aging
import numpy as np
import torch

from cvlctl.data import samplers
from cvlctl.data.samplers import Data, batches
from cvlctl.learn import settings as computing
from cvlctl.learn.networks import State
from cvlctl.learn.programs import Program, programs_of
from cvlctl.learn.settings import Settings, have_compiler, resolve_settings
from cvlctl.machine import cpu_name, num_cpus
from cvlctl.types import Spec
from cvlctl.version import versions

SPEC = Spec((39,), 4, 500)  # Metaworld's
HIDDEN = ((256, 256), (512, 512))  # of CVL's and LAEO's critics: the quickstart's, and the default
SHIPPED = "highest"  # the precision of a peer as people install it; Settings never say so of ours
AS_SHIPPED, OUR_SETTING = ", as shipped", ", our matmul setting"  # what a peer computes with
EAGER, COMPILED, BF16 = "cvlctl, eager", "cvlctl, whole step compiled", "cvlctl, whole step compiled, bf16"
FORM = {EAGER: "eager", COMPILED: "compiled", BF16: "compiled, bf16"}  # in the name of a comparison's work
PEERS = ("stable-baselines3", "d3rlpy", "minari", "envpool")  # whose versions count, where they are installed

Contestant = Callable[[int], None]  # makes n updates
Found = TypeVar("Found")


def synthetic(rows: int) -> Data:
    """Random episodes of 500 steps, `rows` rows in all, in memory; the first thousand states are success examples."""
    rng = np.random.default_rng(0)
    num_episodes = max(2, rows // (SPEC.horizon + 1))
    ends = np.arange(1, num_episodes + 1) * (SPEC.horizon + 1)
    observation = rng.standard_normal((ends[-1], *SPEC.observation_shape), dtype=np.float32)
    action = rng.uniform(-1, 1, (ends[-1], SPEC.action_dim)).astype(np.float32)
    reward = rng.uniform(0, 10, ends[-1]).astype(np.float32)
    where = samplers.layout(ends, np.zeros(num_episodes, dtype=bool))
    return Data(
        torch.from_numpy(observation), torch.from_numpy(action), torch.from_numpy(reward).unsqueeze(0), where,
        torch.arange(len(where.row)), torch.from_numpy(observation[:1000]),
    )  # fmt: skip


def configure(settings: Settings) -> None:
    """Threads and precision of a contestant whose turn it is. Not what `settings.configure` does besides before a
    compiled run: forget all compiled programs, which would put their compilation into every round."""
    computing.configure(replace(settings, compile=False))
    if settings.precision == SHIPPED:
        torch.set_flush_denormal(False)  # PyTorch's own default, which OpenMP's next threads take over


def shipped(threads: int) -> Settings:
    """What a peer computes with as people install it: PyTorch's own matrix products, and no number flushed to 0."""
    return Settings("cpu", threads, SHIPPED, False)


def warm_up(run: Contestant, updates: int) -> None:
    """First updates, which compile, too; then a peer's state is aged. Ours are aged as they are made."""
    with aging.watched() as optimisers:
        run(updates)
    for optimiser in optimisers:
        aging.age(optimiser)


def our_settings(threads: int, eager_only: bool = False, device: str = "cpu") -> dict[str, Settings]:
    """What cvlctl computes with on this machine, by form: as it chooses by itself, compiled where there is a compiler,
    and compiled with the layers in bfloat16 where the processor multiplies such numbers."""
    choose = partial(resolve_settings, device=device, threads=threads, precision="auto", steps=1, say=print)
    made = {EAGER: choose(compile="false")}
    if (device != "cpu" or have_compiler()) and not eager_only:
        made[COMPILED] = choose(compile="true")
        if torch.cpu._is_avx512_bf16_supported():
            made[BF16] = replace(made[COMPILED], precision="bf16")
    return made


def best(mine: dict[str, Settings]) -> str:
    """The form that cvlctl chooses for a long run, of those in `our_settings`."""
    return COMPILED if COMPILED in mine else EAGER


def with_critic(module: ModuleType, hidden: tuple[int, ...]) -> Any:
    """The Config of CVL or LAEO with a critic of this size."""
    return module.Config(critic=replace(module.Config().critic, hidden=hidden))


def size_of(hidden: Sequence[int]) -> str:
    """As people write it: 256x256."""
    return "x".join(map(str, hidden))


def updates_from(
    data: Data,
    draws: samplers.Draws,
    seeds: Sequence[int],
    state: State,
    programs: Sequence[Program],
    settings: Settings,
) -> Contestant:
    """n updates of all seeds by the training loop's own pieces: draws in blocks, gather, one program for all of them
    (one of several where the actor learns more rarely)."""
    stream = batches(data, draws, seeds, 0, 2**40)

    def run(updates: int) -> None:
        configure(settings)
        for _ in range(updates):
            step, (indices, noise) = next(stream)
            programs[(step + 1) % len(programs)](state, samplers.gather(data, indices, draws), noise)
        if settings.device == "cuda":
            torch.cuda.synchronize()

    return run


def learner(
    module: ModuleType, config: Any, seeds: Sequence[int], data: Data, batch_size: int, settings: Settings
) -> Contestant:
    """The same of a learner, from its first state on, aged."""
    fresh = aging.aged(module.init(config, SPEC, seeds, data))
    state = {name: value.to(settings.device) for name, value in fresh.items()}
    programs = programs_of(module, config, settings)
    return updates_from(data, module.draws(config, SPEC, batch_size), seeds, state, programs, settings)


def turns(contestants: Mapping[str, Callable[[], Found]], rounds: int) -> dict[str, list[Found]]:
    """What every contestant found in every round, the contestants taking turns: a busy machine slows all alike."""
    found: dict[str, list[Found]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            found[name].append(call())
    return found


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def timed(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round."""
    return turns({name: partial(seconds, call) for name, call in contestants.items()}, rounds)


def measure(contestants: dict[str, Contestant], rounds: int, updates: int, first: int = 4) -> dict[str, list[float]]:
    """Updates a second of every contestant in every round."""
    torch.compiler.reset()  # the programs of earlier contestants: torch keeps eight of a function
    for run in contestants.values():
        warm_up(run, first)
    taken = timed({name: partial(run, updates) for name, run in contestants.items()}, rounds)
    return {name: [updates / one for one in found] for name, found in taken.items()}


def spread(ratio: np.ndarray) -> list[float]:
    """Median, least and most."""
    return [round(float(x), 2) for x in (np.median(ratio), ratio.min(), ratio.max())]


def summary(rates: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median rate, and median over rounds of the ratio to `base`, with its extremes."""
    found = {}
    for name, rate in rates.items():
        ratios = spread(np.array(rate) / np.array(rates[base]))
        row = {"updates_per_second": round(float(np.median(rate)), 2)}
        found[name] = row | dict(zip(("ratio", "ratio_min", "ratio_max"), ratios, strict=True))
    return found


def machine() -> dict[str, Any]:
    """What the absolute numbers depend on."""
    return {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpus": num_cpus(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "states": "aged",  # of update rates: those of earlier results were fresh
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "versions": versions() | {name: version(name) for name in PEERS if find_spec(name.replace("-", "_"))},
    }


def conditions(found: dict[str, Any]) -> str:
    """Under what a benchmark ran, in words: of its `machine` before, and of `load_average_after`."""
    state, after = found["machine"], found["load_average_after"]
    return (
        f"{state['cpu']}, {state['cpus']} CPUs, load {state['load_average'][0]} before and {after[0]} after; "
        f"torch {state['versions']['torch']}"
    )


def comparison(
    work: str,
    peer: str,
    ratio: float,
    *,
    low: float,
    high: float,
    ours: float,
    theirs: float,
    unit: str,
    threads: int,
    least: float | None = None,
    aim: float | None = None,
) -> dict[str, Any]:
    """The record of one comparison, a row of the page.

    Args:
        ratio: how many times faster than the peer, the median over rounds: above 1 cvlctl is ahead, whatever the unit.
        low, high: its extremes over rounds.
        ours, theirs: medians over rounds, in `unit` ("updates/s", "frames/s", "seconds").
        least, aim: the ratios to be reached; None: it is told, and no target is set.
    """
    numbers = {"ratio": ratio, "low": low, "high": high, "ours": ours, "theirs": theirs}
    rounded = {name: float(f"{value:.4g}") for name, value in numbers.items()}
    return {"work": work, "peer": peer, **rounded, "unit": unit, "threads": threads, "least": least, "aim": aim}


def versus(
    work: str,
    peer: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    threads: int,
    unit: str = "updates/s",
    least: float | None = None,
    aim: float | None = None,
) -> dict[str, Any]:
    """The comparison of what both sides did in the same rounds: rates, or with unit "seconds" the time it took."""
    a, b = np.array(ours), np.array(theirs)
    ratio = b / a if unit == "seconds" else a / b
    return comparison(
        work, peer, float(np.median(ratio)), low=float(ratio.min()), high=float(ratio.max()), ours=float(np.median(a)),
        theirs=float(np.median(b)), unit=unit, threads=threads, least=least, aim=aim,
    )  # fmt: skip


def reached(row: dict[str, Any]) -> str:
    """What became of a comparison's targets, in a word or two; nothing where none is set."""
    if row["least"] is None and row["aim"] is None:
        return ""
    if row["least"] is not None and row["ratio"] < row["least"]:
        return "missed"
    if row["aim"] is None:
        return "reached"
    if row["ratio"] >= row["aim"]:
        return "aim reached"
    return "aim missed" if row["least"] is None else "reached, aim missed"


def forms(title: str, rates: dict[str, list[float]], base: str, note: str = "") -> dict[str, Any]:
    """Every contestant's updates/s as a table of the page (one of a script's `curves`)."""
    rows = [[name, *row.values()] for name, row in summary(rates, base).items()]
    return {"title": title, "columns": ["", "updates/s", "ratio", "least", "most"], "rows": rows, "note": note}


def show(curve: dict[str, Any]) -> None:
    """Print such a table."""
    print(f"{curve['title']}\n{''.join(f'{name:>12}' for name in curve['columns'][1:]):>90}")
    for first, *rest in curve["rows"]:
        print(f"{first!s:42}{''.join(f'{value!s:>12}' for value in rest)}")
    if curve["note"]:
        print(curve["note"])


def parser(
    doc: str | None,
    *,
    threads: int | None = 2,
    rounds: int | None = None,
    updates: int | None = None,
    rows: int | None = None,
    forms: bool = False,
    device: bool = False,
) -> argparse.ArgumentParser:
    """Arguments that several scripts have. Numbers are defaults; what is None or False is no argument of this one.

    Args:
        forms: whether cvlctl is measured compiled and eager.
        device: whether it is on a GPU too.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = {"threads": None, "rounds": None, "updates": "a round", "rows": "rows in memory"}
    defaults = {"threads": threads, "rounds": rounds, "updates": updates, "rows": rows}
    for name, text in helps.items():
        if defaults[name] is not None:
            made.add_argument(f"--{name}", type=int, default=defaults[name], help=text)
    if forms:
        made.add_argument("--eager-only", action="store_true", help="compile nothing")
    if device:
        made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--json", type=Path, help="write the numbers there too")
    return made


def main(
    options: argparse.ArgumentParser,
    benchmark: Callable[[argparse.Namespace], dict[str, Any]],
    arguments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure between two looks at the machine, print, and write everything where `--json` says."""
    args = options.parse_args(arguments)
    before = machine()
    found = benchmark(args) | {"machine": before}
    found["load_average_after"] = machine()["load_average"]
    for curve in found.get("curves", []):
        show(curve)
    show_comparisons(found["comparisons"])
    print(conditions(found))
    keep(found, args.json)
    return found


def show_comparisons(rows: list[dict[str, Any]]) -> None:
    """Print comparisons as a table."""
    both = [f"{row['work']} / {row['peer']}" for row in rows]
    width = max(map(len, both), default=0) + 2
    print(f"{'work / peer':{width}}{'ours':>10}{'theirs':>10} {'unit':10}{'ratio':>8}{'range':>18}  target")
    for name, row in zip(both, rows, strict=True):
        extremes = f"[{row['low']:.2f}, {row['high']:.2f}]"
        print(f"{name:{width}}{row['ours']:10.4g}{row['theirs']:10.4g} {row['unit']:10}{row['ratio']:7.2f}x"
              f"{extremes:>18}  {reached(row)}")  # fmt: skip


def keep(found: dict[str, Any], file: Path | None) -> None:
    """Write the numbers as JSON, where a file is named."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
