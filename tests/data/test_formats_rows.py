"""Rows cut into episodes: flags, resets that nothing marks, blocks that do not show, and the memory that it takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cvlctl.data import formats
from cvlctl.data.formats import cutting, sources
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

Arrays = dict[str, np.ndarray]


def log(episodes: int = 4, length: int = 100, off: int = 0, terminal: bool = False) -> Arrays:
    """Flagged rows of as many episodes; of `off` rows in each, the next observation is not the one that follows."""
    count, rng = episodes * length, np.random.default_rng(0)
    last = np.arange(count) % length == length - 1
    states = rng.normal(size=(count, 3))
    after = np.concatenate([states[1:], states[:1]])
    after[last] = rng.normal(size=(episodes, 3))
    for episode in range(episodes):
        after[episode * length + 1 + rng.permutation(length - 2)[:off]] += 1.0
    flags = {"terminals": last & terminal, "timeouts": last & (not terminal)}
    return flags | {"observations": states, "next_observations": after, "actions": rng.uniform(-1, 1, (count, 2)),
                    "rewards": rng.normal(size=count)}  # fmt: skip


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: values for name, values in arrays.items() if name not in names}


def read(path: Path, arrays: Arrays, format: str = "d4rl", **options: Any) -> list[Episode]:
    if format == "sb3":
        np.savez(path, **arrays)
        return list(formats.FORMATS[format].read(path.with_suffix(".npz"), **options))
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return list(formats.FORMATS[format].read(path, **options))


def lengths(found: list[Episode]) -> list[int]:
    return [len(episode) for episode in found]


# ------------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize("format", ["d4rl", "arrays"])
def test_next_observations_that_contradict_the_flags_are_refused(tmp_path: Path, format: str) -> None:
    """They would make 164 episodes of 1 to 4 steps out of four of 100."""
    for terminal in (True, False):
        with pytest.raises(
            CvlctlError, match=r"a\.h5: no flag marks 160 ends .* beside [34] that are .* after row \d"
        ) as e:
            read(tmp_path / "a.h5", log(off=40, terminal=terminal), format)
        assert "timeouts" in e.value.hint and "next_observations" in e.value.hint
    with pytest.raises(CvlctlError, match="no flag marks 160 ends") as caught:
        read(tmp_path / "a.h5", without(log(off=40, terminal=True), "timeouts"), format)
    assert "horizon" in caught.value.hint
    no_flags = log(off=1) | {"timeouts": np.zeros(400)}
    with pytest.raises(CvlctlError, match=r"no flag marks 7 ends .* beside 0"):
        read(tmp_path / "a.h5", no_flags, format)


def test_cuts_that_no_flag_marks_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lengths(read(tmp_path / "a.h5", log())) == [100] * 4
    assert capsys.readouterr().err == ""
    arrays = log()
    arrays["next_observations"][[150, 260]] += 1.0
    assert lengths(read(tmp_path / "a.h5", arrays)) == [100, 51, 49, 61, 39, 100]
    assert "a.h5: 2 of its episodes end where no flag marks it: the first after row 150" in capsys.readouterr().err


def test_resets_of_a_file_without_timeouts_are_no_contradiction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never_ends = without(log(), "timeouts")
    assert lengths(read(tmp_path / "a.h5", never_ends)) == [100] * 4
    assert "3 of its episodes end where no flag marks it" in capsys.readouterr().err
    rarely = never_ends | {"terminals": np.arange(400) == 99}
    with pytest.raises(CvlctlError, match=r"no flag marks 2 ends .* beside 1"):
        read(tmp_path / "a.h5", rarely)
    capsys.readouterr()
    assert lengths(read(tmp_path / "a.h5", rarely, horizon=100)) == [100] * 4  # which explains them
    assert capsys.readouterr().err == ""


def test_the_seams_of_a_replay_buffer_are_no_contradiction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = log(episodes=1, length=40)
    rows["next_observations"][25] += 1.0  # where the ring came round
    arrays = {name: np.stack([values] * 3, axis=1) for name, values in rows.items()}
    arrays["timeouts"] = arrays["dones"] = np.zeros((40, 3))
    found = read(tmp_path / "a.npz", without(arrays, "terminals"), "sb3")
    assert lengths(found) == [26, 14] * 3
    assert "3 of its episodes end where no flag marks it: the first after row 25" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- blocks


def by_hand(arrays: Arrays, horizon: int | None) -> list[tuple[int, int]]:
    """First row and length of every episode, row by row."""
    found, start, count = [], 0, len(arrays["actions"])
    flags = arrays["terminals"] | arrays.get("timeouts", np.zeros(count, bool))
    for row in range(count):
        gap = row + 1 < count and np.any(arrays["next_observations"][row] != arrays["observations"][row + 1])
        full = horizon is not None and "timeouts" not in arrays and row + 1 - start == horizon
        if flags[row] or gap or full or row + 1 == count:
            found.append((start, row + 1 - start))
            start = row + 1
    return found


@pytest.mark.parametrize("horizon", [None, 1, 7])
@pytest.mark.parametrize("timeouts", [True, False])
def test_where_blocks_begin_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeouts: bool, horizon: int | None
) -> None:
    rng, count = np.random.default_rng(5), 90
    arrays = log(episodes=1, length=count)
    arrays["terminals"], arrays["timeouts"] = rng.random((2, count)) < 0.1
    gaps = np.flatnonzero(rng.random(count) < 0.08)
    arrays["next_observations"][gaps] += 1.0
    arrays = arrays if timeouts else without(arrays, "timeouts")
    monkeypatch.setattr("cvlctl.data.formats.d4rl.judge", lambda *_, **__: None)
    wanted = by_hand(arrays, horizon)
    assert len(wanted) > 10
    for rows, block in ((1, 8), (2, 10**6), (3, 100), (7, 10**6), (1000, 10**6)):
        monkeypatch.setattr(cutting, "BATCH_ROWS", rows)
        monkeypatch.setattr(sources, "BLOCK_BYTES", block)
        found = read(tmp_path / "a.h5", arrays, horizon=horizon)
        assert [(episode.collected_at, len(episode)) for episode in found] == wanted
        for episode, (start, length) in zip(found, wanted, strict=True):
            stop = start + length
            rewards, actions = (arrays[name][start:stop].astype(np.float32) for name in ("rewards", "actions"))
            assert episode.rewards is not None
            np.testing.assert_array_equal(episode.rewards, rewards)
            np.testing.assert_array_equal(episode.actions, actions)
            states = [*arrays["observations"][start:stop], arrays["next_observations"][stop - 1]]
            np.testing.assert_array_equal(episode.observations, np.float32(states))
            assert episode.terminated == arrays["terminals"][stop - 1]


def test_a_long_episode_is_held_about_twice_and_what_followed_each_row_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 100_000
    states = np.zeros((count, 20), np.float32) + np.arange(count, dtype=np.float32)[:, None]
    arrays = {"observations": states, "next_observations": states + 1, "actions": np.zeros((count, 2), np.float32),
              "rewards": np.zeros(count, np.float32), "terminals": np.arange(count) == count - 1}  # fmt: skip
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2**18)
    monkeypatch.setattr(cutting, "BATCH_ROWS", 2000)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in arrays.items():
            file[name] = values
    tracemalloc.start()
    (episode,) = formats.FORMATS["d4rl"].read(tmp_path / "a.h5")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert episode.rewards is not None
    size = episode.observations.nbytes + episode.actions.nbytes + episode.rewards.nbytes
    assert peak < 2.5 * size  # 3.9 when blocks were joined to what came before, one after the other
