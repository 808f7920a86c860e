"""Rows of CSV and parquet files, and where the episodes of rows lie: by hand, in whichever way files say it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_datasets import write_parquet
from toy_files import hdf5, npz

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data.formats import tables
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

Arrays = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_fsync")
LENGTHS = (3, 1, 4)
FIRST = np.array([1, 0, 0, 1, 1, 0, 0, 0])


def log(**more: Any) -> Arrays:
    """Eight rows of three episodes; the state of row i is (i, 10 i)."""
    rows = np.arange(8.0)
    return {"x": rows, "y": 10 * rows, "u": rows / 8, "episode": np.repeat([4, 9, 2], LENGTHS), "r": -rows} | more


def write_csv(path: Path, arrays: Arrays, delimiter: str = ",") -> Path:
    rows = zip(*arrays.values(), strict=True)
    path.write_text("\n".join([delimiter.join(arrays), *(delimiter.join(map(str, row)) for row in rows)]) + "\n")
    return path


def parquet_file(path: Path, arrays: Arrays) -> Path:
    pytest.importorskip("pyarrow", reason="pip install 'cvlctl[lerobot]'")
    return write_parquet(path, arrays, groups=3)


WRITERS = {"csv": write_csv, "tsv": lambda path, arrays: write_csv(path, arrays, "\t"), "parquet": parquet_file}
KEYS = {"observations": "x,y", "actions": "u", "rewards": "r"}


def states(found: list[Episode]) -> list[list[float]]:
    return [episode.observations[:, 0].tolist() for episode in found]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_with_an_index_of_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"a.{kind}", log())
    for batch in (2**13, 1, 3):
        monkeypatch.setattr(tables, "BATCH", batch)
        found = list(formats.FORMATS["table"].read(path, keys=KEYS | {"episode_index": "episode"}))
        assert states(found) == [[0, 1, 2], [4, 5, 6, 7]]  # of the single row that was cut off nothing is left
        assert found[0].observations.tolist() == [[0, 0], [1, 10], [2, 20]]
        assert found[1].actions.tolist() == [[4 / 8], [5 / 8], [6 / 8]]
        assert found[1].rewards is not None and found[1].rewards.tolist() == [-4, -5, -6]
        assert [(e.terminated, e.collected_at) for e in found] == [(False, 0), (False, 4)]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_an_episode(tmp_path: Path, kind: str) -> None:
    whole = log(fell=np.array([0, 0, 1, 1, 0, 0, 0, 0]))
    stops = np.cumsum(LENGTHS)
    (tmp_path / "runs").mkdir()
    for i, (start, stop) in enumerate(zip(stops - LENGTHS, stops, strict=True)):
        WRITERS[kind](tmp_path / "runs" / f"run_{8 + i}.{kind}", {k: v[start:stop] for k, v in whole.items()})
    command = ["data", "import", "table", str(tmp_path / "runs"), "--task", "arm", "--out", str(tmp_path / "a.zarr")]
    keys = [f"{ours}={theirs}" for ours, theirs in (KEYS | {"terminals": "fell"}).items()]
    assert execute(app.app, [*command, *(word for key in keys for word in ("--key", key))]) == 0
    store = open_store(tmp_path / "a.zarr")
    found = list(store.episodes())
    assert states(found) == [[0, 1, 2, 2], [3, 3], [4, 5, 6, 7]]  # run_10 after run_9
    assert [e.terminated for e in found] == [True, True, False]
    assert store.collected_at().tolist() == [0, 3, 4]
    assert store.attributes["observation_columns"] == ["x", "y"]
    assert store.provenance["source"]["files"] == 3


def test_columns_by_pattern_and_lists(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", {"q_10": [1, 2], "q_2": [3, 4], "a0": [0, 0], "ok": ["True", "false"]})
    keys = {"observations": "q_*", "actions": "a0", "successes": "ok"}
    (found,) = formats.FORMATS["table"].read(path, keys=keys, horizon=2)
    assert found.observations.tolist() == [[3, 1], [4, 2]]
    assert found.successes is not None and found.successes.tolist() == [True]
    lists = {"observations": np.arange(8.0).reshape(4, 2), "actions": np.zeros((4, 1)), "timeouts": [0, 0, 0, 1]}
    (found,) = formats.FORMATS["table"].read(parquet_file(tmp_path / "b.parquet", lists))
    assert found.observations.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def text(lines: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.csv").write_text(lines)
        return folder / "a.csv"

    return write


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "ragged": (text("x,y,u,r\n1,2,0,0\n1,2,0\n"), r"a\.csv, line 3: has 3 values for 4 columns"),
    "a string": (text("x,y,u,r\n1,2,0,0\n1,2,up,0\n"), r"a\.csv, line 3: u is 'up', no number"),
    "no names": (text("1,2,0,0\n1,2,0,0\n"), r"a\.csv: its first line is no names"),
    "names twice": (text("x,x,u,r\n1,2,0,0\n"), r"a\.csv: its first line is no names"),
    "empty": (text(""), r"a\.csv has no line of names"),
    "a gap": (text("x,y,u,r\n1,2,0,0\n,2,0,0\n1,2,0,0\n"), r"a\.csv: episode 0 .*NaN"),
    "no such column": (text("x,z,u,r\n1,2,0,0\n"), r"a\.csv: no column 'y'"),
    "bytes": (lambda p: p / "a.csv" if (p / "a.csv").write_bytes(b"x,y\xff,u\n") else p, r"a\.csv: cannot be read"),
    "a line without end": (text("x,y,u,r\n" + "1" * 2**22), r"a\.csv: lines of more than"),
    "nothing that ends": (lambda p: write_csv(p / "a.csv", log(episode=[0] * 8)), r"a\.csv: neither timeouts nor"),
    "an empty folder": (lambda p: p, r"expected files of CSV or of parquet in it: there are none"),
    "parquet cut short": (lambda p: cut_short(parquet_file(p / "a.parquet", log())), r"a\.parquet: cannot be read"),
    "parquet of text": (lambda p: parquet_file(p / "a.parquet", log(u=["a"] * 8)), r"a\.parquet: u: holds text"),
}


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9])
    return path


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_one_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    write, message = BAD[case]
    (tmp_path / "in").mkdir()
    horizon = None if case == "nothing that ends" else 3
    with pytest.raises(CvlctlError, match=message):
        formats.import_store(
            "table", write(tmp_path / "in"), tmp_path / "a.zarr", task="toy", keys=KEYS, horizon=horizon
        )
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# ------------------------------------------------------------------------------------------- where episodes of rows lie

WAYS: dict[str, tuple[str, Any]] = {
    "numbers of first rows": ("episode_starts", [0, 3, 4]),
    "flags of first rows": ("episode_starts", FIRST.astype(bool)),
    "flags of first rows as floats": ("episode_starts", FIRST.astype(float)),
    "first": ("is_first", FIRST),
    "ends": ("episode_ends", [3, 4, 8]),
    "ends as floats": ("episode_ends", [3.0, 4.0, 8.0]),
    "lengths": ("episode_lengths", LENGTHS),
    "an index": ("episode_index", [7, 7, 7, -1, 3, 3, 3, 3]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("write", [npz, hdf5])
def test_the_ways_to_say_where_episodes_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Arrays], Path], way: str
) -> None:
    ours, values = WAYS[way]
    arrays = {"observations": np.arange(16.0).reshape(8, 2), "actions": np.zeros((8, 1)), "where": np.asarray(values)}
    path = write(tmp_path / ("a.npz" if write is npz else "a.h5"), arrays)
    for rows in (2**16, 1, 3):
        monkeypatch.setattr("cvlctl.data.formats.cutting.BATCH_ROWS", rows)
        monkeypatch.setattr("cvlctl.data.formats.segments.BATCH_ROWS", rows)
        found = list(formats.FORMATS["arrays"].read(path, keys={ours: "where"}))
        assert states(found) == [[0, 2, 4], [8, 10, 12, 14]]
    ended = write(path, arrays | {"terminals": np.array([0, 0, 0, 1, 0, 0, 0, 1])})
    found = list(formats.FORMATS["arrays"].read(ended, keys={ours: "where"}))
    assert [(len(e), e.terminated) for e in found] == [(2, False), (1, True), (4, True)]


@pytest.mark.parametrize("way", WAYS)
def test_plain_npz_of_other_names(tmp_path: Path, way: str) -> None:
    ours, values = WAYS[way]
    arrays = {"obs": np.arange(11.0)[:, None], "acts": np.zeros((8, 1)), "rews": np.arange(8.0), "where": values}
    keys = {"observations": "obs", "actions": "acts", "rewards": "rews", ours: "where"}
    store = formats.import_store("npz", npz(tmp_path / "a.npz", arrays), tmp_path / "a.zarr", task="toy", keys=keys)
    found = list(store.episodes())
    assert states(found) == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    assert [e.rewards.tolist() for e in found if e.rewards is not None] == [[0, 1, 2], [3], [4, 5, 6, 7]]


NO_WAY: dict[str, tuple[dict[str, Any], str]] = {
    "starts of flags that begin late": ({"episode_starts": np.roll(FIRST, 1)}, "first episode begins at row 1, not 0"),
    "starts that fall": ({"episode_starts": [0, 4, 3]}, "episode_starts: as episode_starts it says"),
    "starts beyond": ({"episode_starts": [0, 4, 9]}, "episode_starts: as episode_starts it says"),
    "ends short": (
        {"episode_ends": [3, 4, 7]},
        "as episode_ends it says 3 episodes that end after 7 rows; there are 8",
    ),
    "lengths of nothing": ({"episode_lengths": [3, 0, 5]}, "episode_lengths: as episode_lengths it says"),
    "lengths that overflow": ({"episode_lengths": [2**62, 2**62, 2**63 - 1]}, "as episode_lengths it says"),
    "no whole numbers": ({"episode_ends": [3, 4.5, 8]}, "episode_ends: holds float64, not whole numbers"),
    "NaN": ({"episode_ends": [3, np.nan, 8]}, "episode_ends: holds float64, not whole numbers"),
    "an index that returns": ({"episode_index": [0, 0, 1, 1, 0, 0, 2, 2]}, "an episode goes on after another began"),
    "an index of another length": ({"episode_index": [0, 0, 1]}, "has 3 values for 8 rows"),
    "none": ({"episode_ends": np.zeros(0, int)}, "0 episodes that end after 0 rows"),
    "two that differ": ({"episode_lengths": LENGTHS, "is_first": [1, 0, 0, 0, 1, 0, 0, 0]}, "say different episodes"),
    "marks of first rows as timeouts": ({"timeouts": FIRST}, "timeouts: as timeouts it marks the first row, and not"),
}


@pytest.mark.parametrize("case", NO_WAY)
def test_what_does_not_say_where_episodes_lie(tmp_path: Path, case: str) -> None:
    more, message = NO_WAY[case]
    arrays = {"observations": np.arange(16.0).reshape(8, 2), "actions": np.zeros((8, 1))}
    path = npz(tmp_path / "a.npz", arrays | {name: np.asarray(values) for name, values in more.items()})
    with pytest.raises(CvlctlError, match=rf"a\.npz.*{message}") as caught:
        formats.import_store("arrays", path, tmp_path / "a.zarr", task="toy")
    assert caught.value.hint
    assert not (tmp_path / "a.zarr").exists()


# ----------------------------------------------------------------------------------------------------- NaN and infinity


def test_episodes_with_nan_are_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = log()
    arrays["x"][1], arrays["r"][6] = np.nan, 1e300
    path = write_csv(tmp_path / "a.csv", {name: np.append(values, values) for name, values in arrays.items()} | {
        "episode": np.repeat(np.arange(6), LENGTHS * 2)})  # fmt: skip
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:9], *(line.replace("nan", "1").replace("1e+300", "0") for line in lines[9:])]))
    keys = [f"{ours}={theirs}" for ours, theirs in (KEYS | {"episode_index": "episode"}).items()]
    command = ["data", "import", "table", str(path), "--task", "arm", "--out", str(tmp_path / "a.zarr"),
               *(word for key in keys for word in ("--key", key))]  # fmt: skip
    assert execute(app.app, command) == 2
    told = capsys.readouterr().err
    assert "NaN or infinity" in told and "--drop-episodes-with nan" in told
    assert execute(app.app, [*command, "--drop-episodes-with", "nan"]) == 0
    remark = "2 of 4 episodes were dropped for NaN or infinity: episode 0 (rows 0-2) (observations), "
    assert remark + "episode 2 (rows 4-7) (rewards)" in " ".join(capsys.readouterr().err.split())
    store = open_store(tmp_path / "a.zarr")
    assert store.lengths().tolist() == [2, 3]
    assert any("2 of 4 episodes were dropped" in remark for remark in store.attributes["remarks"])
    all_bad = write_csv(tmp_path / "b.csv", log(x=[np.nan] * 8))
    with pytest.raises(CvlctlError, match=r"b\.csv: all 2 episodes hold NaN or infinity"):
        formats.import_store(
            "table", all_bad, tmp_path / "b.zarr", task="a", drop_nan=True, keys=KEYS | {"episode_index": "episode"}
        )
    assert not (tmp_path / "b.zarr").exists()
