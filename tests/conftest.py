"""One thread a test process: the machine is shared, and a test must not depend on how many cores it has."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

TRAPS = (
    "json", "importlib", "queue", "typing", "re", "ctypes", "threading", "subprocess", "signal", "numpy", "torch",
    "zarr", "gymnasium", "mujoco", "yaml", "pydantic", "rich", "cvlctl", "sitecustomize", "usercustomize",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of this machine stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_matmul() -> Iterator[None]:
    """Training settings are process-wide; leave none behind for the next test."""
    import sys

    yield
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(False)  # hypothesis minds


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `slow` take minutes and those marked `soak` hours: they run where `-m` asks for them."""
    unwanted = {mark for mark in ("slow", "soak") if mark not in config.option.markexpr}
    left_out = [item for item in items if unwanted & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """No power is lost in this process, and fsync is most of the time. Writers in processes of their own do call it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvlctl.files.sync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def renders() -> None:
    """Frames can be rendered on this machine; else what needs them is skipped."""
    from cvlctl.errors import CvlctlError
    from cvlctl.play.workers import share_out

    try:
        next(iter(share_out("cvlctl.play.cameras:probe", [None], 1)))
    except CvlctlError as error:
        pytest.skip(error.what)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 rows, so that every store has several."""
    monkeypatch.setattr("cvlctl.data.writer.CHUNK_ROWS", 20)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory, as of a download, whose modules none of our processes may import: they write `sprung`."""
    import sys

    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in TRAPS:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'sprung')!r}, 'a').write('{name} ')\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path, "."])  # as in an interactive session
    return folder
