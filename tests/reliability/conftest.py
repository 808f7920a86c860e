"""One warm process and one set of inputs for all tests of reliability, and what they tried, in a line at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability import driver
from reliability.cases import make_inputs


@pytest.fixture(scope="session")
def runner() -> Iterator[driver.Runner]:
    made = driver.Runner()
    yield made
    made.close()


@pytest.fixture(scope="session")
def inputs(runner: driver.Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, runner)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, (tried, failed) in driver.COUNTS.items():
        terminalreporter.write_line(f"reliability: {what}: {tried:,} tried, {failed:,} failed")
