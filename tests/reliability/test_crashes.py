"""A command that dies before any change of the file system, or in the middle of a write, is simply given again: it ends
as if nothing had happened, and leaves nothing behind."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from reliability.cases import CASES, Case, lay
from reliability.driver import Runner, count, described, difference
from reliability.runner import CRASHED

from cvlctl.experiments.engines.start import LOG

FEW = 3  # points of a case in the default run
Point = tuple[int, str]  # before which change, and how


def points(trace: list[str]) -> list[Point]:
    """Every point of a case: killed before each change, and in the middle of each write before one; and not at all."""
    ends = [(k, how) for k in range(1, len(trace) + 1) for how in ("kill", "torn")]
    opened = {k for k in range(2, len(trace) + 1) if trace[k - 2].startswith("open")}
    written = {k for k in opened if not trace[k - 2].endswith(LOG)}  # a cell has written since, by changes of its own
    return [point for point in ends if point[1] == "kill" or point[0] in written] + [(0, "kill")]


def some(every: list[Point], trace: list[str], name: str) -> list[Point]:
    """A seeded choice: half of it around changes of whole files and folders, half among those inside of a store."""
    if len(every) <= FEW:
        return every
    chance = random.Random(name)
    outside = [p for p in every if p[0] == 0 or all(part.count("/") < 2 for part in trace[p[0] - 1].split()[1:])]
    first = chance.sample(outside, min(len(outside), FEW // 2))
    return first + chance.sample([p for p in every if p not in first], FEW - len(first))


class Trial:
    """One case, and what becomes of it undisturbed."""

    def __init__(self, case: Case, runner: Runner, inputs: Path, folder: Path, mirror: str) -> None:
        self.case, self.runner, self.inputs, self.folder = case, runner, inputs, folder
        self.args = case.args.replace("MIRROR", mirror).split()
        lay(case, inputs, folder / "whole")
        self.before = described(folder / "whole")
        result = runner(folder / "whole", *self.args)
        assert result["code"] == 0, result["err"]
        self.trace, self.expected = result["trace"], described(folder / "whole")

    def faults(self, point: Point) -> str:
        """What is wrong after a crash at `point` and the same command again; "" if nothing."""
        at, how = point
        here = self.folder / "crashed"
        shutil.rmtree(here, ignore_errors=True)
        lay(self.case, self.inputs, here)
        first = self.runner(here, *self.args, at=at, how=how)
        if first["code"] not in (CRASHED, 0):
            return f"ended with {first['code']}: {first['err']}"
        # which change is the k-th depends on zarr's threads
        what = f"--- {how} before change {at} of {len(self.trace)}, " if first["code"] else "--- after "
        what, lost = f"{what}{first['trace'][-1]}:\n", self.lost(here)
        again = self.runner(here, *self.args)
        if again["code"] != 0:
            return f"{what}{lost}again: exit {again['code']}: {again['err'].strip()[-300:]}"
        lost += difference(self.expected, described(here))
        return lost and what + lost

    def lost(self, here: Path) -> str:
        """What a command that replaces has neither left nor replaced, in words."""
        if self.args[0] not in ("data", "build-dataset"):
            return ""  # of runs and evaluations `--force` says that they are started over
        found = {name: content(value) for name, value in described(here).items()}
        lines = []
        for name, value in self.before.items():
            legal = [content(value), content(self.expected.get(name))]
            replaced = value != self.expected.get(name) and not name.startswith("out.policies")
            first, slash, rest = name.partition("/")  # what is replaced is a file, a store, or a folder of files
            if replaced and not any(found.get(place) in legal for place in (name, f"{first}.old{slash}{rest}")):
                lines.append(f"lost: {name}\n")
        return "".join(lines)

    def run(self, chosen: list[Point]) -> list[str]:
        failed = [fault for point in chosen if (fault := self.faults(point))]
        count("crash points", len(chosen), len(failed))
        return failed


def content(value: Any) -> Any:
    """Of a store what it holds, wherever it lies and whatever lies beside."""
    return value[:3] if isinstance(value, list) else value


@pytest.fixture
def trial(request: pytest.FixtureRequest, runner: Runner, inputs: Path, tmp_path: Path, mirror: str) -> Trial:
    return Trial(CASES[request.param], runner, inputs, tmp_path, mirror)


@pytest.mark.parametrize(("trial", "name"), [(name, name) for name in CASES], indirect=["trial"], ids=list(CASES))
def test_some_crash_points(trial: Trial, name: str) -> None:
    failed = trial.run(some(points(trial.trace), trial.trace, name))
    assert not failed, "\n".join(failed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("trial", CASES, indirect=True)
def test_every_crash_point(trial: Trial) -> None:
    failed = trial.run(points(trial.trace))
    assert not failed, f"{len(failed)} of {len(points(trial.trace))}\n" + "\n".join(failed)
