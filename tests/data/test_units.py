"""What stores say of their numbers: bounds, columns, period; taken along, compared, and never mixed without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import cvlctl
from cvlctl.cli.app import app
from cvlctl.data import formats, transform
from cvlctl.data.load import open_stores
from cvlctl.data.recipe import StoreUse
from cvlctl.data.store import Store, open_store
from cvlctl.data.units import bounds_of, units_of
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode
from cvlctl.units import physical

pytestmark = pytest.mark.usefixtures("no_fsync")

COLUMNS = ("x", "speed", "battery")


def episodes(count: int = 2, length: int = 4, seed: int = 0) -> list[Episode]:
    rng = np.random.default_rng(seed)
    return [
        Episode(rng.normal(size=(length + 1, 3)), rng.uniform(-1, 1, (length, 2)), rng.normal(size=length))
        for _ in range(count)
    ]


def written(path: Path, **about: Any) -> Store:
    return cvlctl.write_store(path, episodes(), task="robot", **about)


def rows_file(path: Path, rows: int = 12, **more: Any) -> Path:
    rng = np.random.default_rng(1)
    arrays = {
        "observations": rng.normal(size=(rows, 3)), "actions": rng.uniform(-2, 2, (rows, 2)),
        "timeouts": np.arange(rows) % 4 == 3,
    }  # fmt: skip
    np.savez(path, **arrays | more)
    return path


def test_units_are_attributes_outside_the_digest_and_go_into_derived_stores(tmp_path: Path) -> None:
    bare = written(tmp_path / "bare.zarr")
    told = written(
        tmp_path / "a.zarr", action_bounds=(-2.5, [2.5, 3]), observation_columns=COLUMNS, control_period=0.05
    )
    assert told.digest() == bare.digest()
    said = {
        "action_bounds": [[-2.5, -2.5], [2.5, 3.0]], "observation_columns": list(COLUMNS), "control_period": 0.05,
    }  # fmt: skip
    assert {key: told.attributes[key] for key in said} == said
    transform.subsample(told.path, tmp_path / "b.zarr", episodes=1)
    derived = units_of(open_store(tmp_path / "b.zarr"))
    assert derived.attributes() == said


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"observation_columns": ["x"]}, "1 observation columns are named"),
        ({"action_bounds": ([-1, -1, -2], 1)}, "action_bounds"),
        ({"action_bounds": (2, 1)}, "action_bounds"),
        ({"action_bounds": (-1, float("nan"))}, "no finite"),
        ({"control_period": -1.0}, "control_period is -1.0"),
        ({"control_period": 0}, "control_period is 0"),
        ({"control_period": float("nan")}, "control_period is nan"),
    ],
)
def test_units_that_cannot_be_are_refused(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        written(tmp_path / "a.zarr", **about)
    file = rows_file(tmp_path / "log.npz")
    if "observation_columns" not in about:
        with pytest.raises(CvlctlError, match=message):
            formats.import_store("arrays", file, tmp_path / "a.zarr", task="robot", **about)
    assert list(tmp_path.iterdir()) == [file]


def test_import_takes_bounds_a_dimension_columns_and_a_period_from_the_command_line(tmp_path: Path) -> None:
    file, out = rows_file(tmp_path / "log.npz", torque=np.zeros(12)), tmp_path / "a.zarr"
    words = ["data", "import", "arrays", str(file), "--out", str(out), "--task", "robot"]
    words += ["--action-bounds", "-2,-4", "2,4", "--columns", "x, speed,battery", "--drop-column", "battery"]
    words += ["--control-period", "0.05"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    store = open_store(out)
    said = units_of(store)
    assert said.action_bounds == [[-2.0, -4.0], [2.0, 4.0]] and said.control_period == 0.05
    assert list(said.observation_columns) == ["x", "speed"] and list(said.dropped_columns) == ["battery"]
    assert "were not mapped: torque" in said.remarks[0]
    with np.load(file) as arrays:  # the last row of an episode that was cut off has no next observation
        np.testing.assert_allclose(store.observations()[:4], arrays["observations"][:4, :2].astype(np.float32))
        np.testing.assert_allclose(physical(store.actions()[:3], bounds_of(store)), arrays["actions"][:3], atol=1e-6)
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0 and "finished already" in again.output
    wrong = CliRunner().invoke(app, [*words[:6], *words[6:9], "--action-bounds", "-2,x", "2", "--force"])
    assert wrong.exit_code == 2


@pytest.mark.parametrize(("drop", "message"), [(["speed", "x", "2"], "leaves no column"), (["height"], "no column")])
def test_columns_that_cannot_be_dropped(tmp_path: Path, drop: list[str], message: str) -> None:
    file = rows_file(tmp_path / "log.npz")
    about: dict[str, Any] = {"task": "robot", "action_bounds": (-2, 2), "columns": COLUMNS, "drop_columns": drop}
    with pytest.raises(CvlctlError, match=message):
        formats.import_store("arrays", file, tmp_path / "a.zarr", **about)
    with pytest.raises(CvlctlError, match="2 columns are named"):
        formats.import_store("arrays", file, tmp_path / "a.zarr", **about | {"columns": ["x", "y"]})
    with pytest.raises(CvlctlError, match="column 1 has an empty name"):
        formats.import_store("arrays", file, tmp_path / "a.zarr", **about | {"columns": ["x", "", "y"]})


def test_what_clipping_cut_off_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actions = np.zeros((12, 2))
    actions[:3, 0] = 1.5
    file = rows_file(tmp_path / "log.npz", actions=actions)
    store = formats.import_store("arrays", file, tmp_path / "a.zarr", task="robot", clip_actions=True)
    assert units_of(store).clipped_fraction == pytest.approx(3 / 18)  # a last row an episode is dropped
    assert "--clip-actions: 17 % of the actions' values were cut off" in capsys.readouterr().err


def test_terminals_that_are_the_timeouts_are_told_and_remembered(tmp_path: Path) -> None:
    flags = np.arange(12) % 4 == 3
    file = rows_file(tmp_path / "log.npz", terminals=flags)
    store = formats.import_store("arrays", file, tmp_path / "a.zarr", task="robot", action_bounds=(-2, 2))
    assert "terminals and timeouts are the same" in units_of(store).remarks[0]
    flags[3] = False
    other = rows_file(tmp_path / "other.npz", terminals=flags)
    store = formats.import_store("arrays", other, tmp_path / "b.zarr", task="robot", action_bounds=(-2, 2))
    assert not units_of(store).remarks


@pytest.mark.parametrize(("format", "name"), [("npz", "a.npz"), ("d4rl", "a.hdf5"), ("minari", "a-v0")])
def test_exports_take_units_along(tmp_path: Path, format: str, name: str) -> None:
    store = written(tmp_path / "a.zarr", observation_columns=COLUMNS, control_period=0.05, action_bounds=(-2, 2))
    out = formats.export_store(format, store, tmp_path / name)
    back = formats.import_store(format, out, tmp_path / "b.zarr")
    assert units_of(back) == units_of(store)
    assert formats.exported_already(format, store, out, "given")


def test_stores_of_other_bounds_or_columns_neither_merge_nor_train_together(tmp_path: Path) -> None:
    one = written(tmp_path / "1.zarr", action_bounds=(-2.5, 2.5), observation_columns=COLUMNS)
    other = written(tmp_path / "2.zarr", action_bounds=(-1, 1), observation_columns=COLUMNS)
    turned = written(tmp_path / "3.zarr", action_bounds=(-2.5, 2.5), observation_columns=("speed", "x", "battery"))
    for store, message, way_out in ((other, "action bounds", "--rescale"), (turned, "column 0 is speed", "same")):
        for use in (
            lambda store=store: transform.merge([one.path, store.path], tmp_path / "c.zarr"),
            lambda store=store: open_stores([StoreUse(path=one.path), StoreUse(path=store.path)]),
        ):
            with pytest.raises(CvlctlError, match=message) as caught:
                use()
            assert way_out in caught.value.hint
    assert not (tmp_path / "c.zarr").exists()


def test_rescaling_brings_actions_to_one_scale(tmp_path: Path) -> None:
    one = written(tmp_path / "1.zarr", action_bounds=(-2.5, 2.5))
    other = written(tmp_path / "2.zarr", action_bounds=([-1, -5], [1, 5]))
    transform.merge([one.path, other.path], tmp_path / "c.zarr", rescale=True)
    both = open_store(tmp_path / "c.zarr")
    assert units_of(both).action_bounds == [[-2.5, -5.0], [2.5, 5.0]]
    parents = [physical(episode.actions, bounds_of(store)) for store in (one, other) for episode in store.episodes()]
    merged = [physical(episode.actions, bounds_of(both)) for episode in both.episodes()]
    np.testing.assert_allclose(np.concatenate(merged), np.concatenate(parents), atol=1e-6)


def test_a_store_that_says_nothing_merges_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, silent = written(tmp_path / "1.zarr", action_bounds=(-2.5, 2.5)), written(tmp_path / "2.zarr")
    transform.merge([one.path, silent.path], tmp_path / "c.zarr")
    assert "2.zarr does not say its action bounds" in capsys.readouterr().err
    assert units_of(open_store(tmp_path / "c.zarr")).action_bounds is None
