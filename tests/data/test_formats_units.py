"""Actions in their environment's units outside, in [-1, 1] inside: every scaling has its inverse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data import formats, transform, units
from cvlctl.data.criteria import Criteria
from cvlctl.data.store import Store, open_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.play import envs
from cvlctl.types import Episode
from cvlctl.units import scaled

WRITTEN = {"d4rl": "out.hdf5", "minari": "out-v0", "ogbench": "out.npz", "npz": "out.npz"}
PENDULUM = "gym/Pendulum-v1"
ODD = [[-0.4, -3.0, 0.1], [0.4, 7.0, 0.7]]  # bounds of three dimensions, no powers of two


pytestmark = pytest.mark.usefixtures("no_fsync")


def some(actions: int, length: int = 40, count: int = 2) -> list[Episode]:
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        values = rng.uniform(-1, 1, (length, actions)) * 10.0 ** rng.integers(-6, 1, (length, 1))
        values[:2] = [[-1.0], [1.0]]
        made.append(Episode(rng.normal(size=(length + 1, 2)), values, rng.normal(size=length)))
    return made


def store_with(path: Path, bounds: Any, actions: int = 3, task: str = "toy") -> Store:
    return write_store(path, some(actions), task=task, provenance={"action_bounds": bounds} if bounds else None)


def actions_in(path: Path) -> np.ndarray:
    """The actions that an exported file holds, those that start a transition."""
    if path.is_dir():
        with h5py.File(path / "data" / "main_data.hdf5") as file:
            return np.concatenate([file[f"episode_{i}/actions"][()] for i in range(len(file))])
    if path.suffix == ".npz":
        with np.load(path) as file:
            actions = file["actions"]
            return actions[file["terminals"] == 0] if "terminals" in file else actions
    with h5py.File(path) as file:
        return file["actions"][()]


@pytest.mark.parametrize("format", WRITTEN)
def test_what_is_exported_is_in_units_and_comes_back(tmp_path: Path, format: str) -> None:
    store = store_with(tmp_path / "a.zarr", ODD)
    inside = np.concatenate([episode.actions for episode in store.episodes()])
    out = formats.export_store(format, store, tmp_path / WRITTEN[format])
    low, high = np.float64(ODD)
    found = actions_in(out)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, low + (inside.astype(float) + 1) / 2 * (high - low), rtol=3e-7, atol=3e-7)
    assert found[0].tolist() == np.float32(low).tolist() and found[1].tolist() == np.float32(high).tolist()
    back = formats.import_store(format, out, tmp_path / "b.zarr")
    assert back.provenance["action_bounds"] == ODD
    centred = [0]  # of a centre that is not 0, float32 keeps what float32 keeps of the centre
    np.testing.assert_array_max_ulp(back.actions()[:, centred], store.actions()[:, centred], 1)
    np.testing.assert_allclose(back.actions(), store.actions(), atol=2e-7)
    again = formats.export_store(format, back, tmp_path / f"again-{WRITTEN[format]}")
    np.testing.assert_array_max_ulp(actions_in(again), found, 1)


@pytest.mark.parametrize("format", WRITTEN)
def test_bounds_that_are_powers_of_two_come_back_bit_for_bit(tmp_path: Path, format: str) -> None:
    store = store_with(tmp_path / "a.zarr", [-2.0, 2.0])
    out = formats.export_store(format, store, tmp_path / WRITTEN[format])
    assert formats.import_store(format, out, tmp_path / "b.zarr").digest() == store.digest()
    np.testing.assert_array_equal(actions_in(out), 2 * np.concatenate([e.actions for e in store.episodes()]))


def test_an_import_with_bounds_is_exported_as_it_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, length = np.random.default_rng(1), 30
    theirs = {"observations": rng.normal(size=(length, 2)), "actions": rng.uniform(-0.7, 0.7, (length, 2)),
              "rewards": np.zeros(length), "terminals": np.arange(length) == length - 1}  # fmt: skip
    theirs["actions"][0] = 0.7
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, values in theirs.items():
            file[name] = values.astype(np.float32)
    store = formats.import_store(
        "d4rl", tmp_path / "a.hdf5", tmp_path / "a.zarr", task=PENDULUM, horizon=99, action_bounds=(-0.7, [0.7, 0.7])
    )
    assert store.provenance["action_bounds"] == [-0.7, 0.7]
    assert store.actions().max() == 1.0
    capsys.readouterr()
    for format, name in WRITTEN.items():
        out = formats.export_store(format, store, tmp_path / "out" / format / name)
        np.testing.assert_array_max_ulp(actions_in(out), theirs["actions"].astype(np.float32), 1)
    assert capsys.readouterr().err.count("written in the units of their environment, [-0.7, 0.7]") == 4
    plain = formats.import_store("d4rl", tmp_path / "a.hdf5", tmp_path / "b.zarr", task=PENDULUM, horizon=99)
    assert "action_bounds" not in plain.provenance  # nothing was scaled, so nothing is scaled back
    out = formats.export_store("minari", plain, tmp_path / "plain-v0")
    np.testing.assert_array_equal(actions_in(out), theirs["actions"].astype(np.float32))


def test_a_collected_store_is_exported_as_the_environment_was_given_it(tmp_path: Path) -> None:
    """Replayed in the environment that the file names, its actions give its observations."""
    recipe = {"task": PENDULUM, "source": {"name": "random", "episodes": 2}, "horizon": 30, "seed": 3}
    build(BuildRecipe.model_validate(recipe | {"out": tmp_path / "a.zarr"}))
    store = open_store(tmp_path / "a.zarr")
    assert store.provenance["action_bounds"] == [-2.0, 2.0]
    out = formats.export_store("minari", store, tmp_path / "a-v0")
    metadata = json.loads((out / "data" / "metadata.json").read_text())
    space = json.loads(metadata["action_space"])
    assert (space["low"], space["high"]) == ([-2.0], [2.0])
    assert json.loads(metadata["env_spec"])["id"] == "Pendulum-v1"
    env = envs.make(PENDULUM, 3)
    with h5py.File(out / "data" / "main_data.hdf5") as file:
        for number in range(2):
            observations, actions = (file[f"episode_{number}/{name}"][()] for name in ("observations", "actions"))
            np.testing.assert_array_equal(env.reset(number), observations[0])
            for action, wanted in zip(actions, observations[1:], strict=True):
                np.testing.assert_array_equal(env.raw.step(action)[0], wanted)
    assert formats.import_store("minari", out, tmp_path / "b.zarr").digest() == store.digest()


def test_derived_stores_keep_their_bounds_where_the_parents_agree(tmp_path: Path) -> None:
    a, b, other = (store_with(tmp_path / f"{i}.zarr", bounds).path for i, bounds in enumerate((ODD, ODD, [-2.0, 2.0])))
    transform.merge([a, b], tmp_path / "ab.zarr")
    transform.filter_episodes(tmp_path / "ab.zarr", tmp_path / "some.zarr", Criteria(min_length=2))
    assert open_store(tmp_path / "some.zarr").provenance["action_bounds"] == ODD
    with pytest.raises(CvlctlError, match=r"2\.zarr has action bounds \[-2.0, 2.0\], .*0\.zarr has") as caught:
        transform.merge([a, other], tmp_path / "mixed.zarr")
    assert "--rescale" in caught.value.hint and not (tmp_path / "mixed.zarr").exists()


def test_of_a_store_that_does_not_say_gymnasium_is_asked_unless_it_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = store_with(tmp_path / "a.zarr", None, actions=1, task=PENDULUM)
    assert units.bounds_of(silent) == ([-2.0], [2.0])
    out = formats.export_store("minari", silent, tmp_path / "a-v0")
    np.testing.assert_array_equal(actions_in(out), 2 * np.concatenate([e.actions for e in silent.episodes()]))
    wide = store_with(tmp_path / "wide.zarr", None, actions=3, task=PENDULUM)  # these are not its actions
    source = {"source": {"format": "d4rl"}}
    came = write_store(tmp_path / "came.zarr", some(1), task=PENDULUM, provenance=source)
    transform.merge([came.path, silent.path], tmp_path / "merged.zarr")
    for store in (wide, came, open_store(tmp_path / "merged.zarr")):
        assert units.bounds_of(store) is None
    (tmp_path / "evil.py").write_text("raise SystemExit('a module was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for task in ("gym/evil:Thing-v0", "evil:Thing-v0", "gym/Nothing-v0", "gym/"):
        silent.task = task
        assert units.bounds_of(silent) is None
    assert "evil" not in sys.modules


def test_dimensions_without_finite_bounds_are_taken_as_they_are_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_formats_hostile import minari_folder

    def folder(name: str, low: str, high: str, actions: np.ndarray) -> Path:
        space = f'{{"type": "Box", "dtype": "float32", "shape": [2], "low": {low}, "high": {high}}}'
        made = minari_folder(tmp_path / name, np.zeros((3, 1)), action_space=space)
        with h5py.File(made / "data" / "main_data.hdf5", "a") as file:
            del file["episode_0/actions"]
            file["episode_0/actions"] = actions
        return made

    values = np.array([[2.0, 0.5], [-1.0, -0.25]])
    path = folder("one", "[-2.0, -Infinity]", "[2.0, Infinity]", values)
    store = formats.import_store("minari", path, tmp_path / "a.zarr")
    assert store.actions()[:2].tolist() == [[1.0, 0.5], [-0.5, -0.25]]
    assert store.provenance["action_bounds"] == [[-2.0, -1.0], [2.0, 1.0]]
    assert "dimensions 1 have no finite bounds, and are taken as they are" in capsys.readouterr().err
    with pytest.raises(CvlctlError, match=r"episode_0: actions lie in .* outside") as caught:
        formats.import_store("minari", folder("two", "[-2, 0]", "[2, Infinity]", 3 * values), tmp_path / "b.zarr")
    assert "--action-bounds" in caught.value.hint
    bare = folder("all", "[-Infinity, -Infinity]", "[Infinity, Infinity]", values / 2)
    assert formats.import_store("minari", bare, tmp_path / "c.zarr").actions()[0].tolist() == [1.0, 0.25]
    assert "actions have no finite bounds" in capsys.readouterr().err
    known = formats.import_store("minari", path, tmp_path / "d.zarr", action_bounds=([-2, -4], [2, 4]))
    assert known.actions()[0].tolist() == [1.0, 0.125] and capsys.readouterr().err == ""


def test_imports_of_earlier_versions_have_their_bounds_elsewhere(tmp_path: Path) -> None:
    store = store_with(tmp_path / "a.zarr", None, actions=1)
    for source in ({"options": {"action_bounds": [-2, 2]}}, {"options": {}, "action_bounds": [[-2.0], 2]}):
        store.provenance = {"source": {"format": "d4rl", **source}}
        assert units.bounds_of(store) == ([-2.0], [2.0])
    for wrong in ([1, 0], "x", 5, [[-1, -1], [1, 1]], {"low": 0}):
        store.provenance = {"action_bounds": wrong}
        with pytest.raises(CvlctlError, match=r"a\.zarr: provenance: action_bounds .* are no"):
            formats.export_store("npz", store, tmp_path / "a.npz")


def test_bounds_of_more_dimensions_than_the_actions_have_are_none() -> None:
    with pytest.raises(CvlctlError, match=r"action_bounds .* are no finite \(low, high\) for actions of shape \(1,\)"):
        scaled(np.zeros((4, 1)), ([-1, -1], [1, 1]), clip=False)


@pytest.mark.parametrize("bounds", ['"x"', "[1, 0]", "[0, NaN]", "[[-1, -1, -1, -2], 1]", "[-1]", "[[[-1]], 1]"])
def test_bounds_in_a_file_that_are_none(tmp_path: Path, bounds: str) -> None:
    store = store_with(tmp_path / "a.zarr", ODD)
    out = formats.export_store("d4rl", store, tmp_path / "a.hdf5")
    with h5py.File(out, "a") as file:
        said = json.loads(file.attrs["cvlctl"].decode())
        file.attrs["cvlctl"] = np.bytes_(json.dumps(said).replace(json.dumps(ODD), bounds))
    with pytest.raises(CvlctlError, match=r"a\.hdf5.*action_bounds .* are no finite \(low, high\)"):
        formats.import_store("d4rl", out, tmp_path / "b.zarr")
    if bounds == '"x"':
        return
    plain = formats.export_store("npz", store, tmp_path / "a.npz")
    with np.load(plain) as file:
        arrays = dict(file)
    values = json.loads(bounds)
    np.savez(plain, **arrays | {"action_bounds": np.array(np.broadcast_arrays(*values) if len(values) > 1 else values)})
    with pytest.raises(CvlctlError, match=r"a\.npz.*action_bounds .* are no finite \(low, high\)"):
        formats.import_store("npz", plain, tmp_path / "b.zarr")
    assert not (tmp_path / "b.zarr").exists()


def test_minari_replays_what_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    store = store_with(tmp_path / "a.zarr", [-2.0, 2.0], actions=1, task=PENDULUM)
    formats.export_store("minari", store, tmp_path / "root" / "pendulum" / "some-v0")
    dataset = package.load_dataset("pendulum/some-v0")
    env = dataset.recover_environment()
    assert dataset.action_space == env.action_space
    for episode in dataset.iterate_episodes():
        assert all(env.action_space.contains(action) for action in episode.actions)
        assert np.abs(episode.actions).max() == 2.0
