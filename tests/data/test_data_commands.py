"""`cvlctl data`: the numbers in the tables are those of the episodes."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from rich.console import Console

from cvlctl.cli import app, options
from cvlctl.cli.console import execute
from cvlctl.cli.options import FORMATS, stores
from cvlctl.data import exchange, formats, look, plots
from cvlctl.data.store import open_store
from cvlctl.data.transform import subsample
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode


def toy(length: int, reward: float, success: bool | None, terminated: bool = False) -> Episode:
    successes = None if success is None else np.arange(length) == (length - 1 if success else -1)
    return Episode(np.ones((length + 1, 2)), np.zeros((length, 1)), np.full(length, reward), successes, terminated)


# returns 4, 1, 12, 0
EPISODES = [toy(4, 1.0, True, terminated=True), toy(2, 0.5, False), toy(6, 2.0, False), toy(8, 0.0, False)]


def printed(render: Callable[[Any, Console], None], result: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    render(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_store(tmp_path / "deep" / "a.zarr", EPISODES, task="gym/Toy-v0", provenance={"recipe": {"seed": [0]}})
    return tmp_path


def test_info(root: Path) -> None:
    result = look.info(root / "deep" / "a.zarr")
    assert json.loads(json.dumps(result)) == result
    assert (result["task"], result["episodes"], result["transitions"]) == ("gym/Toy-v0", 4, 20)
    assert result["spec"] == {"observation_shape": [2], "action_dim": 1, "horizon": 8, "cameras": {}}
    assert result["lengths"] == {"min": 2, "mean": 5.0, "max": 8}
    returns = result["returns"]["given"]
    assert returns == {"mean": 4.25, "min": 0.0, "q25": 0.75, "median": 2.5, "q75": 6.0, "max": 12.0}
    assert result["success_fraction"] == {"given": 0.25} and result["terminated_fraction"] == 0.25
    histogram = result["histogram"]["given"]
    assert len(histogram["edges"]) == 11 and histogram["counts"] == [2, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert result["provenance"]["recipe"] == {"seed": [0]} and 0 < result["size_mb"] < 1
    text = printed(look.render_info, result)
    for word in ("gym/Toy-v0", "25.0 %", "0 / 0.75 / 2.5 / 6 / 12", "horizon 8", "seed [0]", "█" * look.BAR):
        assert word in text


def test_a_store_with_bad_rewards_is_one_clear_error_and_does_not_hide_the_others(root: Path) -> None:
    bad = root / "deep" / "bad.zarr"
    rewards = write_store(bad, EPISODES, task="gym/Toy-v0").rewards().copy()
    rewards[3] = np.nan
    zarr.open_array(bad / "labels/given/reward", mode="r+")[:] = rewards
    with pytest.raises(CvlctlError, match=f"{bad}: labels/given/reward: NaN or infinity") as caught:
        look.info(bad)
    assert f"cvlctl data verify {bad}" in caught.value.hint
    good, other = look.ls(root)
    assert good["problem"] is None and other["problem"] == "labels/given/reward: NaN or infinity"


def test_info_of_equal_returns_and_of_no_labels(tmp_path: Path) -> None:
    same = [toy(3, 1.0, None), toy(3, 1.0 + 1e-7, None)]
    result = look.info(write_store(tmp_path / "a.zarr", same, task="toy").path)
    assert sum(result["histogram"]["given"]["counts"]) == 2 and result["success_fraction"] == {}
    bare = [Episode(np.ones((3, 2)), np.zeros((2, 1)))]
    result = look.info(write_store(tmp_path / "b.zarr", bare, task="toy").path)
    assert result["returns"] == result["histogram"] == result["success_fraction"] == {}
    assert "returns (" not in printed(look.render_info, result)


def test_ls_lists_sound_broken_and_unfinished_stores(root: Path) -> None:
    broken = write_store(root / "b.zarr", EPISODES, task="toy").path
    (broken / "labels/given/reward/c/0").write_bytes(b"x")
    with StoreWriter(root / "c.zarr", task="toy") as writer:
        writer.append(EPISODES[0])
        writer.flush()
    (root / "notes").mkdir()
    rows = look.ls(root)
    assert json.loads(json.dumps(rows)) == rows
    assert [Path(row["path"]).name for row in rows] == ["b.zarr", "c.zarr.partial", "a.zarr"]
    good = rows[2]
    assert (good["task"], good["episodes"], good["transitions"], good["return_mean"]) == ("gym/Toy-v0", 4, 20, 4.25)
    assert good["success_fraction"] == 0.25 and good["problem"] is None and good["labels"] == ["given"]
    assert "labels/given/reward chunk 0" in rows[0]["problem"] and "not finished" in rows[1]["problem"]
    text = printed(look.render_ls, rows)
    assert "gym/Toy-v0" in text and "not finished" in text and "chunk 0" in text


def test_ls_of_nothing(tmp_path: Path) -> None:
    assert look.ls(tmp_path) == []
    assert "no stores here" in printed(look.render_ls, [])
    with pytest.raises(CvlctlError, match="no directory"):
        look.ls(tmp_path / "nowhere")


def test_verify(root: Path) -> None:
    path = root / "deep" / "a.zarr"
    result = look.verify(path)
    told = ["2 of 2 columns never varied, and are zeroed before a policy sees them: column 0 (1), column 1 (1)"]
    assert result == {"path": str(path), "problems": [], "warnings": told, "ok": True}
    assert "sound" in printed(look.render_verify, result)
    (path / "data/action/c/0/0").unlink()
    result = look.verify(path)
    assert not result["ok"] and len(result["problems"]) == 1
    assert "data/action chunk 0 (rows 0-23)" in printed(look.render_verify, result)
    with pytest.raises(CvlctlError, match="no store at"):
        look.verify(root / "none.zarr")


# ---------------------------------------------------------------------------------------------------------------- plot


def collected(count: int, pixels: bool = False, labelled: bool = True, task: str = "") -> list[Episode]:
    rng = np.random.default_rng(0)
    episodes = []
    for i in range(count):
        length = 3 + i % 5
        images, states = rng.integers(0, 255, (length + 1, 8, 8, 3), np.uint8), rng.normal(size=(length + 1, 4))
        rewards = np.full(length, float(i)) if labelled else None
        successes = rng.random(length) < 0.2 if labelled else None
        actions = np.zeros((length, 2))
        episodes.append(Episode(images if pixels else states, actions, rewards, successes, i % 2 == 0, task, 10 * i))
    return episodes


def drawn_size(file: Path) -> tuple[int, int]:
    """Width and height of what must be a PNG."""
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize(
    ("episodes", "panels"),
    [
        (collected(30), 3),
        ([*collected(6), *collected(6, task="other")], 3),
        (collected(3, pixels=True), 3),
        (collected(4, labelled=False), 2),
        ([Episode(np.ones((2, 1)), np.zeros((1, 1)))], 2),  # one transition, one dimension, nothing that moves
    ],
)
def test_plot(tmp_path: Path, episodes: list[Episode], panels: int) -> None:
    store = write_store(tmp_path / "a.zarr", episodes, task="gym/Toy-v0")
    result = plots.plot(store.path)
    assert json.loads(json.dumps(result)) == result
    assert result["path"] == str(tmp_path / "a.png") and len(result["panels"]) == panels
    width, height = drawn_size(tmp_path / "a.png")
    assert width > 200 * panels and height > 400
    assert all(0.0 <= share <= 1.0 for share in result["explained_variance"])


def test_plot_refuses_to_overwrite_and_unknown_labels(root: Path) -> None:
    store, out = root / "deep" / "a.zarr", root / "x.png"
    out.write_text("mine")
    with pytest.raises(CvlctlError, match=r"x\.png exists"):
        plots.plot(store, out)
    with pytest.raises(CvlctlError, match="no label 'human'"):
        plots.plot(store, root / "y.png", label="human")
    assert out.read_text() == "mine" and not (root / "y.png").exists()
    plots.plot(store, out, force=True)
    assert drawn_size(out)


def test_plane_finds_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(500, 2))
    mixed = np.column_stack([hidden[:, 0] * scale for scale in (1, -3, 100)] + [hidden[:, 1], np.full(500, 7.0)])
    coordinates, shares = plots.plane(mixed)
    assert shares == pytest.approx([0.75, 0.25], abs=0.02) and coordinates.shape == (500, 2)
    assert abs(np.corrcoef(coordinates[:, 0], hidden[:, 0])[0, 1]) > 0.99
    still, nothing = plots.plane(np.ones((5, 3)))
    assert not still.any() and nothing == [0.0, 0.0]


# -------------------------------------------------------------------------------------------------- the command line


def call(*args: object) -> int:
    return execute(app.app, [str(arg) for arg in args])


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_store(tmp_path / "a.zarr", collected(12), task="gym/Toy-v0").path


COMMANDS = [
    ["merge", "A", "A", "--out", "O", "--task", "both"],
    ["split", "A", "--train", "0.5", "--seed", "1", "--out", "O"],
    [
        "filter",
        "A",
        "--out",
        "O",
        "--min-return",
        "5",
        "--max-return",
        "50",
        "--min-length",
        "3",
        "--collected-to",
        "99",
    ],
    ["filter", "A", "--out", "O", "--no-success", "--task", "gym/Toy-v0", "--collected-from", "0", "--max-length", "7"],
    ["subsample", "A", "--out", "O", "--episodes", "4"],
    ["subsample", "A", "--out", "O", "--fraction", "0.5", "--seed", "3"],
    ["drop-rewards", "A", "--out", "O", "--label", "given"],
    ["label", "A", "sparse", "--rewards", "successes", "--out", "O"],
    ["examples", "A", "--out", "O.npy", "--rule", "last", "--k", "2", "--num", "5"],
    ["examples", "A", "--out", "O.npz", "--pick", "0:0", "--pick", "1:-1"],
    ["plot", "A", "--out", "O.png"],
    ["export", "A", "npz", "--out", "O.npz"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_every_command_writes_says_so_as_json_and_overwrites_by_force_alone(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    paths = {"A": str(many), **{f"O{end}": f"{tmp_path}/o{end}" for end in ("", ".npy", ".npz", ".png")}}
    args = ["data", *(paths.get(word, word) for word in words)]
    assert call(*args, "--json") == 0
    out = capsys.readouterr().out
    result = json.loads(out)
    for written in result.values() if words[0] == "split" else [result]:
        assert written["status"] == "written" and Path(written["path"]).exists()
    assert call(*args, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    for found in again.values() if words[0] == "split" else [again]:
        assert found["status"] == "finished already"
    places = [Path(made["path"]) for made in (result.values() if words[0] == "split" else [result])]
    for place in places:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        place.write_text("of another command")
    assert call(*args, "--json") == 2
    assert "exists" in json.loads(capsys.readouterr().out)["error"]
    for place in places:
        place.unlink()
    assert call(*args) == 0 and call(*args, "--force") == 0
    line = capsys.readouterr().out
    assert str(tmp_path / "o") in line and not line.startswith("{")
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.tmp"))


FILES = {"d4rl": "x.hdf5", "ogbench": "x.npz", "npz": "x.npz", "minari": "x-v0"}


@pytest.mark.parametrize(("form", "name"), FILES.items())
def test_export_and_import_give_the_same_store(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, name: str
) -> None:
    assert call("data", "export", many, form, "--out", tmp_path / name, "--json") == 0
    exported = json.loads(capsys.readouterr().out)
    assert (exported["format"], exported["episodes"]) == (form, 12)
    back = tmp_path / "back.zarr"
    assert call("data", "import", form, tmp_path / name, "--task", "gym/Toy-v0", "--out", back, "--json") == 0
    before, after = open_store(many), open_store(back)
    assert json.loads(capsys.readouterr().out)["digest"] == after.digest() == before.digest()
    assert after.label_digest() == before.label_digest()
    assert after.provenance["command"].startswith(f"cvlctl data import {form} ")
    assert call("data", "import", form, tmp_path / name, "--task", "gym/Toy-v0", "--out", back, "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished already"
    assert call("data", "import", form, tmp_path / name, "--task", "gym/Another-v0", "--out", back) == 2
    assert call("data", "export", many, form, "--out", tmp_path / name, "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished already"


def test_import_passes_its_options_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "mine.npz", tmp_path / "a.zarr"
    rng = np.random.default_rng(0)
    np.savez(file, obs=rng.normal(size=(20, 3)), act=rng.uniform(0, 10, (20, 2)), rewards=np.ones(20))
    args = ["data", "import", "arrays", file, "--out", out, "--task", "gym/Toy-v0", "--horizon", "5", "--label", "mine"]
    args += ["--key", "observations=obs", "--key", "actions=act", "--action-bounds", "0", "10"]
    assert call(*args) == 0
    store = open_store(out)
    assert store.labels == ["mine"] and store.spec.horizon == 5 and np.abs(store.actions()).max() > 0.9
    assert shlex.split(store.provenance["command"])[:3] == ["cvlctl", "data", "import"]
    assert call(*shlex.split(store.provenance["command"])[1:], "--force") == 0
    assert open_store(out).digest() == store.digest()
    capsys.readouterr()
    assert call("data", "import", "arrays", file, "--out", tmp_path / "b.zarr", "--key", "observations") == 2
    assert "OURS=THEIRS" in capsys.readouterr().err
    assert call("data", "import", "d4lr", file, "--out", tmp_path / "b.zarr") == 2
    assert "did you mean d4rl?" in capsys.readouterr().err


def test_formats_are_listed_and_completed() -> None:
    assert set(FORMATS) == set(formats.FORMATS)
    rows = exchange.ls()
    assert [row["format"] for row in rows] == list(formats.FORMATS)
    text = printed(exchange.render_ls, rows)
    assert all(name in text for name in formats.FORMATS) and "--action-bounds" in text
    narrow = Console(file=io.StringIO(), width=60)
    exchange.render_ls(rows, narrow)
    told = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert all(flag in told for row in rows for flag in map(formats.FLAGS.get, row["options"]))
    assert options.formats("mi") == ["minari"]


def test_fetch_without_a_network_or_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = "http://127.0.0.1:9"
    assert call("data", "fetch", "d4rl/hopper-medium-v2", "--out", tmp_path, "--mirror", nowhere) == 2
    assert "cannot be fetched" in capsys.readouterr().err
    assert call("data", "fetch", "d4rl/hopper-medum-v2", "--out", tmp_path) == 2
    assert "did you mean d4rl/hopper-medium-v2?" in capsys.readouterr().err


def test_completion_of_stores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(root / "data" / "task" / "b.zarr", EPISODES, task="toy")
    (root / "data" / "task" / "c.zarr.partial").mkdir()
    monkeypatch.chdir(root)
    assert stores("") == ["data/task/b.zarr"]
    assert stores("data/ta") == ["data/task/b.zarr"]
    assert stores("deep/") == ["deep/a.zarr"]
    assert stores(f"{root}/deep/a") == [f"{root}/deep/a.zarr"]
    assert stores("nowhere/x") == stores("x") == []


def test_the_shell_gets_completions_without_anything_heavy(root: Path) -> None:
    write_store(root / "data" / "b.zarr", EPISODES, task="toy")
    code = "from cvlctl.__main__ import main\ntry: main()\nfinally: print([m for m in HEAVY if m in sys.modules])"
    code = "import sys; HEAVY = ('numpy', 'zarr', 'torch'); " + code
    env = {**os.environ, "_CVLCTL_COMPLETE": "complete_bash", "COMP_WORDS": "cvlctl data info da", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert done.stdout.split() == ["data/b.zarr", "[]"], done.stderr


def test_info_names_parents(many: Path, tmp_path: Path) -> None:
    child = subsample(many, tmp_path / "b.zarr", episodes=3)
    text = printed(look.render_info, look.info(tmp_path / "b.zarr"))
    assert f"a.zarr ({open_store(many).digest()[:16]})" in text.replace("\n", "") and child["digest"][:16] in text
    assert "cvlctl data subsample" in text
