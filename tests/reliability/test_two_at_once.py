"""Two processes with one `out`: one does the work; the other finds it finished, or says that somebody is at it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from reliability.cases import CASES, Case, lay
from reliability.driver import MOMENTS, Runner, count, described, difference

FEW = 1  # moments of a case in the default run
NAMES = list(CASES)
UNLOCKED = ("examples", "plot")  # one file, made in memory and replaced whole: both may write the same one


def some(trace: list[str], few: int | None) -> list[int]:
    """Numbers of changes: a seeded choice, or all of them."""
    every = list(range(1, len(trace) + 1))
    return every if few is None else random.Random(f"{trace[0]} {len(trace)}").sample(every, min(few, len(every)))


def first(trace: list[str], few: int | None) -> list[int]:
    """The changes that make the first places one's own: a lock's folder, and the lock."""
    locks = [at for at, line in enumerate(trace, start=1) if line.endswith("lock")]
    return sorted({number for at in locks[:2] for number in (at - 1, at) if number > 0})


def faults(
    case: Case, runner: Runner, inputs: Path, mirror: str, folder: Path, few: int | None, choose: Any = some
) -> tuple[int, list[str]]:
    """One process is halted before a change, another does the same from beginning to end, and the first goes on."""
    args = [*case.args.replace("MIRROR", mirror).split(), "--json"]
    lay(case, inputs, folder / "alone")
    alone = runner(folder / "alone", *args)
    assert alone["code"] == 0, alone["err"]
    trace, expected = alone["trace"], described(folder / "alone")
    chosen, lines = choose(trace, few), []
    for at in chosen:
        here = folder / "both"
        lay(case, inputs, here)
        first = runner(here, *args, at=at, how="stop")
        second = runner(here, *args)
        first = runner.ask({"pid": first["pid"]}) if "pid" in first else first
        what = [
            f"the {name} ended with {result['code']}: {(result['err'] + result['out']).strip()[-300:]}"
            for name, result in (("first", first), ("second", second))
            if result["code"] not in (0, 2) or (result["code"] == 2 and "another process" not in result["out"])
        ]
        if first["code"] and second["code"]:
            what.append("neither did it")
        found = ("finished already", "there already")
        done = [r for r in (first, second) if not r["code"] and not any(words in r["out"] for words in found)]
        if len(done) > 1 and "--force" not in args and args[1] not in UNLOCKED:
            what.append("both did it")
        if different := difference(expected, described(here)):
            what.append(different)
        if what:
            lines.append("\n".join([f"--- halted before change {at} of {len(trace)}, {trace[at - 1]}:", *what]))
        shutil.rmtree(here)
    return len(chosen), lines


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "run" else n for n in NAMES])
def test_some_moments(name: str, runner: Runner, inputs: Path, mirror: str, tmp_path: Path) -> None:
    tried, lines = faults(CASES[name], runner, inputs, mirror, tmp_path, FEW)
    count("two at once", tried, len(lines))
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", ["build sac", "import npz", "split", "export npz", "fetch"])
def test_a_place_that_another_finishes_before_it_is_ones_own(
    name: str, runner: Runner, inputs: Path, mirror: str, tmp_path: Path
) -> None:
    tried, lines = faults(CASES[name], runner, inputs, mirror, tmp_path, None, first)
    count("two at once", tried, len(lines))
    assert tried > 1
    assert not lines, "\n".join(lines)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_every_moment(name: str, runner: Runner, inputs: Path, mirror: str, tmp_path: Path) -> None:
    tried, lines = faults(CASES[name], runner, inputs, mirror, tmp_path, MOMENTS)
    count("two at once", tried, len(lines))
    assert not lines, f"{len(lines)} of {tried}\n" + "\n".join(lines)
