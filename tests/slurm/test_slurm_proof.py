"""The whole experiment of tests/experiments/test_proof.py by SLURM: a cell killed, all cancelled, the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_experiment import content, kill_one, reference, start, wait_for_one

__all__ = ["reference"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("cluster")]


def test_killed_and_cancelled_it_ends_with_the_same_rows(reference: dict[str, bytes], tmp_path: Path) -> None:
    def call(*options: str) -> int:
        return start(tmp_path, "--engine", "slurm", *options).wait()

    def said() -> str:
        return (tmp_path / "said.txt").read_text()[-3000:]

    assert call() == 0, said()  # submitted
    kill_one(tmp_path)
    assert call("--status", "--follow") == 2, said()  # what waits for the cell is blocked, the others went on
    assert call() == 0, said()
    wait_for_one(tmp_path)
    assert call("--cancel") == 0, said()
    assert call() == 0, said()
    assert call("--status", "--follow") == 0, said()
    assert content(tmp_path) == reference
