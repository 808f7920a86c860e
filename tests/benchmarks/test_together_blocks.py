"""Batches are drawn a block of updates at a time: rounds that are part of a block would leave that out of a median."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def test_rounds_are_whole_blocks(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    together, asked = script("together"), []

    def measure(runs: dict[str, Any], rounds: int, updates: int, warm_up: int = 4) -> dict[str, list[float]]:
        asked.append((updates, warm_up))
        return {name: [1.0] for name in runs}

    monkeypatch.setattr(together.common, "measure", measure)
    small = ["--threads", "1", "--seeds", "1", "--rows", "2000", "--eager-only", "--methods", "TD3+BC"]
    for updates in ([], ["--updates", "1"], ["--updates", "64"], ["--updates", "65"]):
        together.main([*small, *updates])
    assert asked == [(64, 64), (64, 64), (64, 64), (128, 64)]
