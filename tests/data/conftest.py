"""Stores of toy episodes (`toy_stores.py`), in chunks of 20 rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy_stores import labelled_store, many, moving_point, numbered_store

from cvlctl.data.writer import write_store


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "a.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvlctl.data.writer.CHUNK_ROWS", 20)
        write_store(path, many(12), task="toy")
    return path


@pytest.fixture
def written(tmp_path: Path, template: Path) -> Path:
    """A fresh copy of a store of 12 episodes."""
    shutil.copytree(template, tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


@pytest.fixture
def a(tmp_path: Path, small_chunks: None) -> Path:
    """A store of 12 numbered episodes, and where they are from."""
    return numbered_store(tmp_path / "a.zarr")


@pytest.fixture
def labelled(a: Path, tmp_path: Path) -> Path:
    return labelled_store(a, tmp_path / "labelled.zarr")


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a moving point's 6 episodes of 30 steps."""
    return write_store(tmp_path_factory.mktemp("point") / "point.zarr", moving_point(), task="point").path
