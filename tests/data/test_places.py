"""Where results may go: beside things that have a name, and never into a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy_stores import numbered_store

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError
from cvlctl.runs import Run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return numbered_store(tmp_path / "a.zarr")


def call(*args: str) -> int:
    return execute(app.app, ["data", *args])


INTO = [
    ("plot", "a.zarr", "--out", "a.zarr/zarr.json", "--force"),
    ("examples", "a.zarr", "--rule", "last", "--out", "link/meta/x.npy"),
    ("export", "a.zarr", "npz", "--out", "a.zarr/data/observation/c/0/0", "--force"),
    ("export", "a.zarr", "minari", "--out", "a.zarr/x-v0"),
    ("filter", "a.zarr", "--min-length", "1", "--out", "a.zarr/b.zarr"),
    ("split", "a.zarr", "--out", "a.zarr/b"),
]


@pytest.mark.parametrize("args", INTO, ids=lambda args: args[0])
def test_nothing_is_written_into_a_store(
    store: Path, args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (store.parent / "link").symlink_to(store)
    before = sorted(store.rglob("*"))
    assert call(*args) == 2
    assert "lies inside the store" in capsys.readouterr().err
    assert sorted(store.rglob("*")) == before
    assert verify_store(store) == []


def test_no_run_lies_in_a_store(store: Path) -> None:
    with pytest.raises(CvlctlError, match="lies inside the store"):
        Run(store / "run", {}, {}).open()
    assert not (store / "run").exists()


def test_here_and_above_are_called_by_their_names(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(store, store.with_name("b.zarr"))
    filtered = ("--min-length", "2", "--out")
    monkeypatch.chdir(store)
    assert call("split", ".") == 0
    assert (store.parent / "a-train.zarr").exists()
    for args in (("filter", "../b.zarr", *filtered, "."), ("plot", "../b.zarr", "--out", "..")):
        assert call(*args, "--force") == 2  # the shell would be left in a folder that is gone
    assert "is the current directory, or holds it" in capsys.readouterr().err
    assert verify_store(store) == []
    monkeypatch.chdir(store / "data")
    for args in (("export", "../../b.zarr", "minari", "--out", "."), ("filter", "../../b.zarr", *filtered, "/")):
        assert call(*args, "--force") == 2
    assert call("split", "..", "--out", "../../c") == 0
    monkeypatch.chdir(store.parent)
    for args in (("export", "b.zarr", "minari", "--out", "."), ("filter", "b.zarr", *filtered, ".")):
        assert call(*args, "--force") == 2  # not ours to replace
    assert sorted(path.name for path in store.parent.iterdir()) == [
        "a-train.zarr", "a-validation.zarr", "a.zarr", "b.zarr", "c-train.zarr", "c-validation.zarr",
    ]  # fmt: skip
