"""What was measured of a machine: read again as it is, and nothing that can happen to the cache does any harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cvlctl import rates
from cvlctl.rates import Rate

RATE = Rate(5e10, 1.5e-5)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cvlctl" / "rates.json"


def test_a_rate_is_that_of_a_processor_and_a_torch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates.kept() is None
    rates.keep(RATE)
    for name, other in (("cpu_name", lambda: "another"), ("versions", lambda: {"torch": "another"})):
        with monkeypatch.context() as patch:
            patch.setattr(rates, name, other)
            assert rates.kept() is None
            rates.keep(Rate(1.0, 2.0))
            assert rates.kept() == Rate(1.0, 2.0)
        assert rates.kept() == RATE
    assert [path.name for path in file.parent.iterdir()] == ["rates.json"]


def test_more_threads_are_faster_and_no_call_is_shorter() -> None:
    assert [RATE.by(threads).flops / RATE.flops for threads in (1, 2, 3, 16, 64)] == [1, 1.5, 2, 8.5, 8.5]
    assert RATE.by(8).call == RATE.call


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "", lambda text: text[:-9], lambda text: "[]", lambda text: text.replace("flops", "flop"),
        lambda text: text.replace("50000000000.0", "-1"), lambda text: text.replace("50000000000.0", "Infinity"),
        lambda text: text.replace("50000000000.0", '"fast"'), lambda text: text.replace("50000000000.0", "true"),
        lambda text: "[" * 100_000, lambda text: " " * (rates.MOST + 1),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_none_and_is_replaced(file: Path, change: object) -> None:
    rates.keep(RATE)
    file.write_text(change(file.read_text()))  # type: ignore[operator]
    assert rates.kept() is None
    rates.keep(RATE)
    assert rates.kept() == RATE


@pytest.mark.parametrize("obstacle", ["file", "folder", "pipe", "no home"])
def test_nor_does_one_that_cannot_be_written(obstacle: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle == "file":
        file.parent.parent.write_text("")
    elif obstacle == "folder":
        file.mkdir(parents=True)
    elif obstacle == "pipe":
        file.parent.mkdir(parents=True)
        os.mkfifo(file)
        assert rates.kept() is None  # and nobody waits for a writer
        return
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert rates.kept() is None
    rates.keep(RATE)
    assert rates.kept() is None


def test_without_the_variable_it_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    rates.keep(RATE)
    assert (tmp_path / ".cache" / "cvlctl" / "rates.json").exists() and rates.kept() == RATE
