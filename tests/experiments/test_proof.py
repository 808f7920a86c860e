"""The proof by the engines of one machine: killed twice, the experiment ends with the same bits.

`reference` is one cell after the other, undisturbed. `-m slow`: two to four minutes an engine on two cores. On SLURM:
`tests/slurm`.
"""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from proof import amid, content, kill_one, said, start, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return undisturbed(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_killed_twice_it_ends_with_the_same_rows(engine: str, reference: dict[str, bytes], tmp_path: Path) -> None:
    if engine == "ray" and find_spec("ray") is None:
        pytest.skip("ray is not installed")
    first = start(tmp_path, "--engine", engine)
    kill_one(tmp_path, lambda: first.poll() is None)  # a cell
    first.wait()
    second = start(tmp_path, "--engine", engine)
    amid(tmp_path, lambda: second.poll() is None)
    os.kill(second.pid, signal.SIGKILL)  # the driver
    second.wait()
    third = start(tmp_path, "--engine", engine)
    assert third.wait() == 0, said(tmp_path)
    assert content(tmp_path) == reference
