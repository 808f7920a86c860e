"""What is made of stores with frames has them still, with states of the simulator, at the memory of a chunk."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_images import SIZES, seen
from toy_stores import assert_holds

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.data import writer as writer_module
from cvlctl.data.store import open_store
from cvlctl.data.writer import write_store
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Episode]:
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 20)
    monkeypatch.setattr(writer_module, "FRAME_BYTES", 72 * 15)
    return [seen(i, 3 + i) for i in range(5)]


@pytest.fixture
def a(tmp_path: Path, made: list[Episode]) -> Path:
    return write_store(tmp_path / "a.zarr", made, task="toy").path


def data(*words: object, code: int = 0) -> None:
    assert execute(app, ["data", *map(str, words)]) == code, words


def test_every_command_keeps_frames_and_states(a: Path, made: list[Episode], tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    data("merge", a, a, "--out", out)
    assert_holds(open_store(out), [*made, *made])
    data("filter", a, "--out", out, "--min-length", 6, "--force")
    assert_holds(open_store(out), made[3:])
    data("drop-rewards", a, "--out", out, "--force")
    assert open_store(out).digest() == open_store(a).digest() and open_store(out).labels == []
    data("label", a, "zero", "--rewards", "zeros", "--out", out, "--force")
    assert open_store(out).labels == ["given", "zero"]
    assert_holds(open_store(out), made)
    data("split", a, "--train", 0.6)
    parts = [open_store(tmp_path / f"a-{name}.zarr") for name in ("train", "validation")]
    assert [part.num_episodes for part in parts] == [3, 2] and all(part.has_sim_state for part in parts)
    assert all(part.spec.cameras == SIZES for part in parts)
    data("split", a, "--train", 0.6)  # finished already


def test_states_of_the_simulator_go_along_where_all_have_them(a: Path, tmp_path: Path) -> None:
    bare = write_store(tmp_path / "b.zarr", [seen(9, states=False)], task="toy").path
    data("merge", a, bare, "--out", tmp_path / "c.zarr")
    assert not open_store(tmp_path / "c.zarr").has_sim_state
    data("drop-rewards", a, "--out", tmp_path / "d.zarr")
    states = [replace(e, sim_state=e.sim_state + 1) for e in (seen(i, 3 + i) for i in range(5))]
    write_store(a, states, task="toy", force=True)  # of the same digest
    data("drop-rewards", a, "--out", tmp_path / "d.zarr", code=2)  # which is not of these states


def test_stores_of_other_cameras_do_not_merge(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sizes in ({"corner": (4, 6, 3)}, SIZES | {"wrist": (3, 4, 1)}, {"corner": (4, 6, 3), "hand": (3, 3, 1)}):
        b = write_store(tmp_path / "b.zarr", [seen(1, sizes=sizes)], task="toy", force=True).path
        data("merge", a, b, "--out", tmp_path / "c.zarr", code=2)
        assert "camera wrist (3, 3, 1)" in capsys.readouterr().err
    assert not (tmp_path / "c.zarr").exists()


def test_looking(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data("info", a)
    shown = capsys.readouterr().out
    assert "camera corner" in shown and "4x6x3" in shown and "3x3x1" in shown
    data("info", a, "--json")
    spec = json.loads(capsys.readouterr().out)["spec"]
    assert spec["cameras"] == {"corner": [4, 6, 3], "wrist": [3, 3, 1]}
    data("verify", a)
    data("ls", tmp_path)
    twice = write_store(tmp_path / "t.zarr", [seen(0, vector=False), seen(0, vector=False)], task="toy").path
    data("info", twice)
    assert "copies of others" in " ".join(capsys.readouterr().out.split())
    data("plot", twice)


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FRAME_BYTES", 2**20)
    sizes, count = {"a": (64, 64, 3), "b": (64, 64, 3)}, 12  # 2.5 MB an episode, 29 in all
    made = (seen(i, 99, False, True, sizes) for i in range(count))
    path = write_store(tmp_path / "a.zarr", made, task="toy").path

    def peak(*words: Any) -> float:
        tracemalloc.start()
        data(*words)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found / 1e6

    assert peak("drop-rewards", path, "--out", tmp_path / "b.zarr") < 20
    assert peak("verify", path) < 12
    assert peak("info", path) < 12
