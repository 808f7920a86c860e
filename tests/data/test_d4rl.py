"""D4RL: every quirk of its files by hand, its own readers on ours, and its table of datasets."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from toy_files import Arrays, episodes, hdf5, package_functions, read, rows, same

from cvlctl.data import formats
from cvlctl.data.formats import d4rl_infos
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_d4rl_version_2(tmp_path: Path) -> None:
    found = read("d4rl", hdf5(tmp_path / "a.hdf5", rows() | {"infos/qpos": np.zeros((3, 1)), "metadata/seed": 1}))
    same(found, episodes())
    assert [e.collected_at for e in found] == [0, 1, 7, 18, 23]


def test_d4rl_float64_and_columns_of_width_one(tmp_path: Path) -> None:
    arrays = rows(dtype=np.float64)
    for name in ("rewards", "terminals", "timeouts"):
        arrays[name] = arrays[name][:, None].astype(np.float64)
    same(read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes())


def test_d4rl_without_next_observations(tmp_path: Path) -> None:
    """Cut off: the last transition goes. Terminated: it stays, and the last observation stands in for the final one."""
    arrays = rows()
    del arrays["next_observations"]
    found, wanted = read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes()
    assert [(len(e), e.terminated) for e in wanted] == [(1, True), (6, False), (11, False), (5, True), (10, False)]
    assert [(len(e), e.terminated) for e in found] == [(1, True), (5, False), (10, False), (5, True), (9, False)]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.observations[: len(a)], b.observations[: len(a)])
        np.testing.assert_array_equal(a.actions, b.actions[: len(a)])
        final = b.observations[len(b) - 1]
        np.testing.assert_array_equal(a.observations[-1], final)


def test_d4rl_single_row_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    arrays = {"observations": np.eye(3), "actions": np.zeros((3, 1)), "rewards": np.arange(3.0),
              "terminals": np.zeros(3), "timeouts": np.array([1, 0, 1])}  # fmt: skip
    (found,) = read("d4rl", hdf5(tmp_path / "a.hdf5", arrays))
    assert found.rewards is not None
    assert (found.rewards.tolist(), found.collected_at) == ([1.0], 1)


def test_d4rl_terminals_win_over_timeouts_and_the_last_episode_may_be_unfinished(tmp_path: Path) -> None:
    arrays = rows()
    arrays["timeouts"] = arrays["timeouts"] | arrays["terminals"]
    arrays["timeouts"][-1] = False
    same(read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes())


def test_d4rl_version_0_is_cut_at_the_horizon(tmp_path: Path) -> None:
    arrays = {"observations": np.arange(10.0)[:, None], "actions": np.zeros((10, 1)), "rewards": np.zeros(10),
              "terminals": np.arange(10) == 4}  # fmt: skip
    path = hdf5(tmp_path / "a.hdf5", arrays)
    with pytest.raises(CvlctlError, match="timeouts") as caught:
        read("d4rl", path)
    assert "horizon" in caught.value.hint
    found = read("d4rl", path, horizon=3)  # rows 0-2, 3-4 (terminal), 5-7, 8-9
    assert [e.observations[:, 0].tolist() for e in found] == [[0, 1, 2], [3, 4, 4], [5, 6, 7], [8, 9]]
    assert [e.terminated for e in found] == [False, True, False, False]
    store = formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy", horizon=3)
    assert store.spec.horizon == 3


def test_resets_that_nothing_marks_are_found_by_the_next_observations(tmp_path: Path) -> None:
    arrays = rows()
    del arrays["timeouts"]
    same(read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes())


def test_shuffled_rows_are_refused(tmp_path: Path) -> None:
    arrays = rows(20)
    order = np.random.default_rng(1).permutation(len(arrays["actions"]))
    path = hdf5(tmp_path / "a.hdf5", {name: values[order] for name, values in arrays.items()})
    with pytest.raises(CvlctlError, match=r"a\.hdf5.* the next row does not go on"):
        read("d4rl", path)


# ------------------------------------------------------------------------------------------ its own readers on our file


def plain_qlearning(data: Arrays) -> Arrays:
    """What D4RL documents of `qlearning_dataset`: pairs of rows, those of a timeout and the last left out."""
    kept = ~data["timeouts"][:-1].astype(bool)
    found = {name: data[name][:-1][kept] for name in ("observations", "actions", "rewards", "terminals")}
    return found | {"next_observations": data["observations"][1:][kept]}


def datasets(path: Path) -> Arrays:
    found: Arrays = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("own", [False, True], ids=["as documented", "d4rl's own code"])
def test_d4rl_reads_our_file_as_we_meant_it(tmp_path: Path, own: bool) -> None:
    made = episodes(9)
    store = write_store(tmp_path / "a.zarr", made, task="toy")
    data = datasets(formats.export_store("d4rl", store, tmp_path / "a.hdf5"))
    if own:
        functions = package_functions("d4rl", "d4rl/__init__.py", "qlearning_dataset", "sequence_dataset")
        found = functions["qlearning_dataset"](None, dataset=dict(data))
        sequences = list(functions["sequence_dataset"](None, dataset=dict(data)))
        assert [len(s["actions"]) for s in sequences] == [len(e) for e in made]
        for sequence, episode in zip(sequences, made, strict=True):
            np.testing.assert_array_equal(sequence["observations"], episode.observations[:-1])
            np.testing.assert_array_equal(sequence["rewards"], episode.rewards)
            assert bool(sequence["terminals"][-1]) == episode.terminated
    else:
        found = plain_qlearning(data)
    # all transitions but the last one of each episode that was cut off, and the last of all
    kept = [len(e) if e.terminated else len(e) - 1 for e in made]
    kept[-1] = len(made[-1]) - 1
    for name in ("actions", "rewards", "observations"):
        wanted = np.concatenate([getattr(e, name)[:n] for e, n in zip(made, kept, strict=True)])
        np.testing.assert_array_equal(found[name], wanted)
    alive = ~found["terminals"].astype(bool)
    wanted = np.concatenate([e.observations[1 : n + 1] for e, n in zip(made, kept, strict=True)])
    np.testing.assert_array_equal(found["next_observations"][alive], wanted[alive])
    assert found["terminals"].sum() == sum(e.terminated for e in made[:-1])


# ------------------------------------------------------------------------------------------------ its table of datasets


def test_the_table_is_what_the_installed_package_says() -> None:
    infos = d4rl_infos.package()
    if infos is None:
        pytest.skip("d4rl is not installed")
    for name, dataset in d4rl_infos.table().items():
        assert dataset.url == infos["DATASET_URLS"][name]
        assert (dataset.min, dataset.max) == (infos["REF_MIN_SCORE"][name], infos["REF_MAX_SCORE"][name])


def test_references_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d4rl_infos, "package", lambda: None)
    assert d4rl_infos.references("hopper-medium-v2") == (-20.272305, 3234.3)
    assert d4rl_infos.references("hopper-medium-v9") is None
    assert d4rl_infos.urls()["hopper-medium-replay-v2"].endswith("/gym_mujoco_v2/hopper_medium_replay-v2.hdf5")
    assert len(d4rl_infos.table()) == 48 + 12 + 6 + 6 + 3


def test_references_of_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d4rl").mkdir()
    (tmp_path / "d4rl" / "__init__.py").write_text("raise Exception('needs mujoco-py')")
    tables = "DATASET_URLS = {'a-v0': 'http://x/a.hdf5'}\nREF_MIN_SCORE = {'a-v0': 1}\nREF_MAX_SCORE = {'a-v0': 2}\n"
    (tmp_path / "d4rl" / "infos.py").write_text(tables)
    (tmp_path / "d4rl-1.1.dist-info").mkdir()
    (tmp_path / "d4rl-1.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: d4rl\nVersion: 1.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    d4rl_infos.package.cache_clear()
    try:
        assert d4rl_infos.references("a-v0") == (1.0, 2.0)
        assert d4rl_infos.urls()["a-v0"] == "http://x/a.hdf5"
        assert d4rl_infos.references("hopper-medium-v2") == (-20.272305, 3234.3)
    finally:
        d4rl_infos.package.cache_clear()
