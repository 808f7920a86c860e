"""The simulated schedule, on plans whose ends can be told by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[[str], Any]


@pytest.fixture
def schedule(script: Script) -> Any:
    return script("schedule")


def test_ends_that_can_be_told_by_hand(schedule: Any) -> None:
    Place = schedule.Place

    def load(name: str, seconds: float, *needs: str, cpus: int = 1, gpu: bool = False) -> Any:
        return schedule.Load(name, needs, cpus, gpu, seconds)

    def hours(cells: list[Any], place: Any) -> float:
        return float(schedule.simulate(cells, place).hours * 3600)

    chain = [load("a", 10), load("b", 20, "a"), load("c", 5, "b")]
    assert hours(chain, Place("", 8)) == pytest.approx(35)
    six = [load(name, 10) for name in "abcdef"]
    assert hours(six, Place("", 2)) == pytest.approx(30)
    assert hours(six, Place("", 8)) == pytest.approx(10)
    assert hours([load("wide", 10, cpus=2), load("one", 10)], Place("", 2)) == pytest.approx(20)
    on_gpus = [load(name, 10, gpu=True) for name in "abcdef"]
    assert hours(on_gpus, Place("", 8, gpus=1, cells_per_gpu=2)) == pytest.approx(30)
    assert hours(six, Place("", 8, submitted=0.5)) == pytest.approx(2 * 5 + 10)  # the first begins at once


def test_the_longest_way_goes_first(schedule: Any) -> None:
    cells = [schedule.Load(name, needs, 1, False, seconds) for name, needs, seconds in (
        ("x", (), 10), ("y", (), 10), ("a", (), 10), ("b", ("a",), 20))]  # fmt: skip
    found = schedule.simulate(cells, schedule.Place("", 2))
    assert found.hours * 3600 == pytest.approx(30)
    assert found.longest * 3600 == pytest.approx(30)
    assert found.busy == pytest.approx(50 / 60)
    assert found.core_hours * 3600 == pytest.approx(50)


def test_a_plan_of_an_experiment(
    schedule: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    monkeypatch.setattr("sys.argv", ["schedule.py", str(recipe)])
    schedule.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("6 cells")
    assert len(lines) == 4 + len(schedule.PLACES) + 1
