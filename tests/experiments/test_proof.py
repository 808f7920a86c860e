"""A whole experiment, 3 tasks x 6 methods x 3 seeds: by any engine, killed twice, it ends with the same bits.

By SLURM: tests/slurm/test_slurm_proof.py. `-m slow`: two to four minutes an engine on two cores.
"""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from whole_experiment import content, kill_one, reference, start, wait_for_one

__all__ = ["reference"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_killed_twice_it_ends_with_the_same_rows(engine: str, reference: dict[str, bytes], tmp_path: Path) -> None:
    if engine == "ray" and find_spec("ray") is None:
        pytest.skip("ray is not installed")
    first = start(tmp_path, "--engine", engine)
    kill_one(tmp_path)
    first.wait()
    second = start(tmp_path, "--engine", engine)
    wait_for_one(tmp_path)
    os.kill(second.pid, signal.SIGKILL)  # the driver
    second.wait()
    third = start(tmp_path, "--engine", engine)
    assert third.wait() == 0, (tmp_path / "said.txt").read_text()[-3000:]
    assert content(tmp_path) == reference
