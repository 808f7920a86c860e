"""Signals: at once, or at the end of what is held; the second at once; swallowed by none; nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cvlctl import interrupts
from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.errors import CvlctlError
from cvlctl.experiments import commands
from cvlctl.interrupts import check, held, interruptible, watched

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any second signal come long enough after the first."""
    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it: nohup
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert interrupts._held == 0
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_obeyed_at_once_and_forgotten_with_the_watch(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), watched():
        send(number)
    with watched():
        check()


def test_what_is_held_comes_to_its_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), watched():
        with held():
            with held():
                send()
                done.append("inner")
            check()  # still held by the outer one
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]


def test_a_second_signal_stops_what_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch)
    done = []
    with pytest.raises(KeyboardInterrupt), watched(), held():
        send()
        done.append(1)
        send(signal.SIGTERM)
        done.append(2)
    assert done == [1]


def test_one_that_comes_twice_is_one() -> None:
    """A terminal sends to the whole group, and a launcher (uv, make, timeout) passes its own on at the same moment."""
    done = []
    with pytest.raises(KeyboardInterrupt), watched():
        try:
            send()
        finally:
            send(signal.SIGTERM)  # a clean-up goes on
            done.append("cleaned up")
    assert done == ["cleaned up"]


def test_a_loop_looks_and_nothing_is_swallowed_on_its_last_turn() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:
        for step in range(3):
            if step == 2:
                send()
            seen.append(interrupted())
    assert seen == [False, False, True]


def test_an_error_inside_is_told_rather_than_the_signal() -> None:
    with pytest.raises(CvlctlError), interruptible():
        send()
        raise CvlctlError("the disk is full")


def test_what_something_swallowed_is_raised_again() -> None:
    with watched():
        with contextlib.suppress(BaseException):  # as libraries have it, by a bare except
            send()
        with watched(), pytest.raises(KeyboardInterrupt):  # an inner watch is the same one
            check()


def test_under_nohup_a_lost_terminal_is_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watched():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_are_left_to_whoever_runs_us() -> None:
    seen: list[Any] = []

    def work() -> None:
        with watched(), held(), interruptible() as interrupted:
            seen.append((interrupted(), interrupts._held))
            check()

    with watched():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [(False, 0)]


def test_released_signals_end_the_process_as_it_is() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with watched():
            interrupts.release()
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_command_that_swallowed_it_ends_with_130_and_without_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    def work(recipe: Any, force: bool) -> dict[str, Any]:
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            return {"status": "trained", "out": "x"}
        raise AssertionError

    monkeypatch.setattr(commands, "function", lambda command: work)
    (tmp_path / "r.yaml").write_text("task: gym/Pendulum-v1\nsource: {name: random, episodes: 1}\nout: OUT\n")
    with watched():
        assert execute(app.app, ["build-dataset", str(tmp_path / "r.yaml"), "--json"]) == 130
    assert capsys.readouterr().out.count("interrupted") == 1
