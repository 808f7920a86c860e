"""How long a large experiment takes on machines that are not here: a simulation of its schedule, from its own plan.

    python benchmarks/schedule.py recipes/papers/cvl-figure-2.yaml size=full [--page docs/scaling.md]

Cells take what `cvlctl run --dry-run` estimates of them, by this machine's measured rates (`cvlctl/rates.py`) or a
usual core's; on a GPU what benchmarks/gpu_model.py says of one: 2 us a kernel and 67 TFLOP/s, which no GPU has
confirmed yet. Each cell takes longer by a draw (log-normal, `--spread`: stragglers), and by its engine's and Python's
start. A cell begins as soon as those that it needs have ended and there is room, the longest way to the end first.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.experiments.commands import load
from cvlctl.experiments.graph import Cell, cells_of, in_order, needed_by
from cvlctl.rates import Rate

GPU = Rate(67e12, 0.8e-6)  # an update is 0.4 kernels an operation once compiled, and 2 us a kernel
START_SECONDS = 8.0  # Python, torch and the data, before a cell's first update


class Place(NamedTuple):
    """Where cells run."""

    name: str
    cpus: int
    gpus: int = 0
    cells_per_gpu: int = 4  # a small network's kernels leave most of a GPU idle
    overhead: float = 0.5  # seconds a cell, of the engine
    submitted: float = 1e9  # cells a second that its scheduler takes
    threads: int = 1  # of a cell that trains


PLACES = (
    Place("one machine of 8 cores", 8),
    Place("SLURM, 20 nodes of 32 cores", 640, overhead=10.0, submitted=3.0),
    Place("the same, `threads: 8`", 640, overhead=10.0, submitted=3.0, threads=8),
    Place("the same, `threads: 16`", 640, overhead=10.0, submitted=3.0, threads=16),
    Place("Ray, 8 GPUs and 128 cores", 128, gpus=8, overhead=1.5),
)


class Load(NamedTuple):
    """What a cell asks of a place, and for how long."""

    name: str
    needs: tuple[str, ...]
    cpus: int
    gpu: bool
    seconds: float


class Outcome(NamedTuple):
    """What came of a schedule."""

    hours: float
    longest: float  # hours of the longest way through the plan, were there room for everything
    busy: float  # share of the scarcer of GPUs and CPUs
    core_hours: float
    starts_a_minute: float  # at the most: each opens a store and makes a run's folder
    last_alone: float  # hours at the end in which less than a tenth of the place works: stragglers


def loads(cells: Sequence[Cell], place: Place, spread: float, seed: int = 0) -> list[Load]:
    """What each cell asks of a place."""
    chance, needed = random.Random(seed), needed_by(cells)
    found = []
    for cell in in_order(cells):
        recipe = cell.job.recipe
        learning = recipe.learning(needed[cell.name])
        trains = cell.job.command in ("pretrain", "finetune")
        gpu = bool(place.gpus and trains)
        cpus = place.threads if trains else 1
        if trains:
            recipe = recipe.model_copy(update={"threads": cpus})
        seconds = learning[0] * learning[1].seconds(GPU) if gpu and learning else recipe.work(needed[cell.name]).seconds
        if cell.job.command == "evaluate":  # its episodes are shared out among one node's workers; estimated for two
            cpus = min(32, place.cpus)
            seconds *= 2 / cpus
        late = math.exp(chance.gauss(0.0, spread))
        found.append(Load(cell.name, cell.needs, cpus, gpu, seconds * late + START_SECONDS + place.overhead))
    return found


def simulate(cells: Sequence[Load], place: Place) -> Outcome:
    """Run the cells, in order, where there is room: the one with the longest way to the end first."""
    way = _ways(cells)
    waiting = {cell.name: {need for need in cell.needs if need in way} for cell in cells}
    below: dict[str, list[Load]] = {cell.name: [] for cell in cells}
    for cell in cells:
        for need in waiting[cell.name]:
            below[need].append(cell)
    ready = [(-way[cell.name], number, cell) for number, cell in enumerate(cells) if not waiting[cell.name]]
    heapq.heapify(ready)
    running: list[tuple[float, int, Load]] = []
    free = [place.cpus, place.gpus * place.cells_per_gpu]
    now, gate, starts, events = 0.0, -1 / place.submitted, list[float](), list[tuple[float, float]]()
    number = len(cells)
    while ready or running:
        put_off = []
        while ready:
            item = heapq.heappop(ready)
            cell = item[2]
            if free[0] < cell.cpus or (cell.gpu and free[1] < 1):
                put_off.append(item)
                if len(put_off) > 50:
                    break
                continue
            free[0] -= cell.cpus
            free[1] -= cell.gpu
            gate = max(now, gate + 1 / place.submitted)
            starts.append(gate)
            number += 1
            heapq.heappush(running, (gate + cell.seconds, number, cell))
            events += [(gate, _share(cell, place)), (gate + cell.seconds, -_share(cell, place))]
        for item in put_off:
            heapq.heappush(ready, item)
        now, _, done = heapq.heappop(running)
        free[0] += done.cpus
        free[1] += done.gpu
        for cell in below[done.name]:
            waiting[cell.name].discard(done.name)
            if not waiting[cell.name]:
                number += 1
                heapq.heappush(ready, (-way[cell.name], number, cell))
    work = sum(_share(cell, place) * cell.seconds for cell in cells)
    return Outcome(
        now / 3600, max(way.values()) / 3600, work / now, sum(cell.cpus * cell.seconds for cell in cells) / 3600,
        max(sum(start <= other < start + 60 for other in starts) for start in starts), _idle_end(events, now) / 3600,
    )  # fmt: skip


def _share(cell: Load, place: Place) -> float:
    """Of the place that a cell takes: of its GPUs, where it has some."""
    return cell.gpu / (place.gpus * place.cells_per_gpu) if place.gpus else cell.cpus / place.cpus


def _ways(cells: Sequence[Load]) -> dict[str, float]:
    """Seconds from each cell's beginning to the end of the longest chain that waits for it."""
    way = {cell.name: cell.seconds for cell in cells}
    for cell in reversed(cells):
        for need in cell.needs:
            if need in way:
                seconds = next(other.seconds for other in cells if other.name == need)
                way[need] = max(way[need], seconds + way[cell.name])
    return way


def _idle_end(events: Sequence[tuple[float, float]], end: float) -> float:
    """Seconds at the end in which less than a tenth of the place works."""
    level, since = 0.0, 0.0
    for at, change in sorted(events):
        before, level = level, level + change
        if before >= 0.1 > level:
            since = at
        if level >= 0.1:
            since = end
    return end - since


def rows(cells: Sequence[Cell], spread: float) -> list[list[Any]]:
    """A line for each place."""
    found = []
    for place in PLACES:
        one = simulate(loads(cells, place, spread), place)
        found.append([
            place.name, f"{one.hours:,.1f}", f"{one.longest:,.1f}", f"{one.busy:.0%}", f"{one.core_hours:,.0f}",
            f"{one.starts_a_minute:.0f}", f"{one.last_alone:,.1f}",
        ])  # fmt: skip
    return found


HEADINGS = ("place", "hours", "longest way", "busy", "core hours", "starts a minute", "hours with a tenth busy")


def table(lines: Sequence[Sequence[Any]]) -> str:
    """Of Markdown."""
    head = f"| {' | '.join(HEADINGS)} |\n|---|{'---:|' * (len(HEADINGS) - 1)}\n"
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--spread", type=float, default=0.2)
    given = parser.parse_args()
    experiment = load(given.recipe, given.overrides, "run")
    cells = cells_of(experiment.out, experiment.jobs)
    print(f"{given.recipe} {' '.join(given.overrides)}: {len(cells)} cells\n")
    print(table(rows(cells, given.spread)))


if __name__ == "__main__":
    main()
