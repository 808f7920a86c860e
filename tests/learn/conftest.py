"""The data of the tiny runs in `toy_runs.py`, written once; nobody changes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_stores import moving_point

from cvlctl.data.writer import write_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "point.zarr", moving_point(), task="point").path
