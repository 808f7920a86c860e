"""The store: what is read of it, opening, the reward-free guarantee, and futures by the sampler's law."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from toy_stores import assert_same, edit_root, episode, many

from cvlctl.data.store import Store, open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_layout_of_rows(tmp_path: Path) -> None:
    episodes = [episode(0, 3, terminated=True), episode(1, 5)]
    store = write_store(tmp_path / "a.zarr", episodes, task="toy", horizon=9)
    assert (len(store), store.num_transitions, store.num_episodes) == (8, 8, 2)
    assert (store.task, store.spec.observation_shape, store.spec.action_dim, store.spec.horizon) == ("toy", (3,), 2, 9)
    assert store.episode_ends().tolist() == [4, 10]
    assert store.lengths().tolist() == [3, 5]
    assert store.terminated().tolist() == [True, False]
    assert store.collected_at().tolist() == [0, 100]
    assert store.seeds().tolist() == [0, 1]
    assert store.episode_tasks() == ["toy", "toy"]
    np.testing.assert_array_equal(store.observations()[3], episodes[0].observations[3])  # the final observation
    assert (
        not store.actions()[[3, 9]].any() and not store.rewards()[[3, 9]].any() and not store.successes()[[3, 9]].any()
    )
    np.testing.assert_array_equal(store.rewards()[4:9], episodes[1].rewards)
    dtypes = (store.observations().dtype, store.actions().dtype, store.rewards().dtype, store.successes().dtype)
    assert dtypes == (np.float32, np.float32, np.float32, np.bool_)


def test_horizon_is_the_longest_episode_unless_given(written: Path) -> None:
    assert open_store(written).spec.horizon == max(len(e) for e in many(12))


def test_digest_tells_content_apart(tmp_path: Path) -> None:
    base = write_store(tmp_path / "a.zarr", many(3), task="toy")
    again = write_store(tmp_path / "b.zarr", many(3), task="toy", provenance={"note": "other words"})
    other = write_store(tmp_path / "c.zarr", [*many(2), episode(9)], task="toy")
    relabelled = [dataclasses.replace(e, rewards=2 * np.asarray(e.rewards)) for e in many(3)]
    labels = write_store(tmp_path / "d.zarr", relabelled, task="toy")
    assert base.digest() == again.digest() == labels.digest() != other.digest()
    assert base.label_digest() == again.label_digest() != labels.label_digest()


def test_a_large_store_loads_fast(tmp_path: Path) -> None:
    """In CPU seconds, with some ten times of room: it catches a reader that goes by small pieces."""
    rows = np.zeros((100_001, 39), np.float32)
    store = write_store(tmp_path / "a.zarr", [Episode(rows, np.zeros((100_000, 4)))], task="toy")
    store = open_store(store.path)
    start = time.process_time()
    assert store.observations().shape == rows.shape
    assert time.process_time() - start < 0.5
    assert os.path.getsize(store.path / "data/observation/c/0/0") < 100_000


# -------------------------------------------------------------------------------------------------------------- opening


def test_open_errors(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="no store at") as caught:
        open_store(tmp_path / "aa.zar")
    assert "a.zarr?" in caught.value.hint
    with pytest.raises(CvlctlError, match="no store at"):
        open_store(tmp_path / "nowhere" / "deep.zarr")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        open_store(tmp_path)
    (tmp_path / "x.zarr").write_text("a file")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        open_store(tmp_path / "x.zarr")
    with StoreWriter(tmp_path / "b.zarr", task="toy") as writer:
        writer.append(episode(0))
        writer.flush()
    with pytest.raises(CvlctlError, match="not finished") as caught:
        open_store(tmp_path / "b.zarr")
    assert "b.zarr.partial" in caught.value.hint


def test_open_refuses_newer_versions_garbled_attributes_and_missing_arrays(written: Path) -> None:
    keep = (written / "zarr.json").read_text()
    edit_root(written, version=3)
    with pytest.raises(CvlctlError, match="version 3"):
        open_store(written)
    for key in ("spec", "counts", "checksums", "task", "provenance", "tasks"):
        (written / "zarr.json").write_text(keep)
        edit_root(written, **{key: None})
        with pytest.raises(CvlctlError, match=f"lack or garble '{key}'"):
            open_store(written)
    (written / "zarr.json").write_text(keep[:-40])
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        open_store(written)
    (written / "zarr.json").write_text(keep)
    shutil.rmtree(written / "data/action")
    with pytest.raises(CvlctlError, match="data/action: the array is missing"):
        open_store(written)
    assert verify_store(written) == ["data/action: the array is missing"]


def test_missing_labels_say_which_exist(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", [episode(0, successes=False)], task="toy", label="human")
    assert store.labels == ["human"] and store.has_label("human") and not store.has_label("human", "success")
    for call in (store.rewards, store.successes, store.label_digest, lambda: store.futures(3, 0.9, 0)):
        with pytest.raises(CvlctlError, match="no label 'given'") as caught:
            call()
        assert "human/reward" in caught.value.hint
    with pytest.raises(CvlctlError, match="no label 'humam'"):
        next(store.episodes("humam"))
    assert next(store.episodes()).rewards is None
    assert_same(store.episodes("human"), [episode(0, successes=False)])


# -------------------------------------------------------------------------------------------- the reward-free guarantee


def read_everything_but_labels(store: Store) -> list[bytes]:
    arrays = (
        store.observations(),
        store.actions(),
        store.episode_ends(),
        store.terminated(),
        store.collected_at(),
        store.seeds(),
    )
    return [a.tobytes() for a in arrays] + [
        repr(store.episode_tasks()).encode(),
        store.digest().encode(),
        bytes(len(store)),
    ]


def test_a_store_without_its_labels_is_still_whole(written: Path) -> None:
    before = read_everything_but_labels(open_store(written))
    shutil.rmtree(written / "labels")
    store = open_store(written)
    assert read_everything_but_labels(store) == before
    assert store.labels == [] and not store.has_label("given") and next(store.episodes()).rewards is None
    assert verify_store(written) == []
    with pytest.raises(CvlctlError, match="no label"):
        store.rewards()


def test_reading_data_touches_no_file_under_labels(written: Path) -> None:
    """The interpreter's own audit of file opens, listings and more, in a fresh process: `labels` is in none of them."""
    code = textwrap.dedent(f"""
        import sys
        seen = []
        sys.addaudithook(lambda event, args: seen.append((event, str(args))) if "a.zarr" in str(args) else None)
        from cvlctl.data.store import open_store
        store = open_store({str(written)!r})
        store.observations(), store.actions(), store.episode_ends(), store.terminated(), store.lengths()
        store.collected_at(), store.seeds(), store.episode_tasks(), store.digest(), store.spec, len(store), repr(store)
        quiet = list(seen)
        store.rewards()
        print(len(quiet), sum("labels" in args for _, args in quiet), sum("labels" in args for _, args in seen))
    """)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    opened, forbidden, with_rewards = map(int, done.stdout.split())
    assert opened > 10 and forbidden == 0 and with_rewards > 0  # last: the hook does see labels


# -------------------------------------------------------------------------------------------------------------- futures


def exact_futures(store: Store, gamma: float, renormalise_terminated: bool = False) -> dict[tuple[int, float], float]:
    """Probability of each (row, reward) under a uniform transition and its discounted future, by the definition."""
    law: dict[tuple[int, float], float] = {}
    start = 0
    for end, terminated in zip(store.episode_ends().tolist(), store.terminated().tolist(), strict=True):
        last = end - 1
        for row in range(start, last):
            steps = last - row
            mass = np.array([(1 - gamma) * gamma ** (k - 1) for k in range(1, steps + 1)])
            if not terminated or renormalise_terminated:
                mass = mass / mass.sum()
            outcomes = [((row + k, float(store.rewards()[row + k - 1])), mass[k - 1]) for k in range(1, steps + 1)]
            for key, p in [*outcomes, ((last, 0.0), 1.0 - mass.sum())]:
                law[key] = law.get(key, 0.0) + p / store.num_transitions
        start = end
    return {key: p for key, p in law.items() if p > 1e-12}


def future_p_value(store: Store, law: dict[tuple[int, float], float], gamma: float, num: int = 20_000) -> float:
    observations, rewards = store.futures(num, gamma, seed=3)
    assert observations.shape == (num, 1) and rewards.shape == (num,) and rewards.dtype == np.float32
    keys = sorted(law)
    drawn = [(int(o), float(r)) for o, r in zip(observations[:, 0], rewards, strict=True)]
    assert set(drawn) <= set(keys)
    counts = [drawn.count(key) for key in keys]
    return float(stats.chisquare(counts, [law[key] * num for key in keys]).pvalue)


@pytest.mark.parametrize("terminated", [(False, True), (True, True), (False, False)])
def test_futures_follow_the_samplers_law(tmp_path: Path, terminated: tuple[bool, bool]) -> None:
    episodes, row = [], 0
    for length, flag in zip((4, 3), terminated, strict=True):  # observations are row numbers
        observations = np.arange(row, row + length + 1, dtype=np.float32)[:, None]
        episodes.append(
            Episode(observations, np.zeros((length, 1)), np.arange(row + 1, row + length + 1), terminated=flag)
        )
        row += length + 1
    store = write_store(tmp_path / "a.zarr", episodes, task="toy")
    law = exact_futures(store, 0.8)
    assert sum(law.values()) == pytest.approx(1.0)
    assert future_p_value(store, law, 0.8) > 1e-3
    shifted = {key: law[other] for key, other in zip(law, reversed(law), strict=True)}
    assert future_p_value(store, shifted, 0.8) < 1e-6
    if all(terminated):
        wrong = exact_futures(store, 0.8, renormalise_terminated=True)
        padded = {key: wrong.get(key, 1e-9) for key in law}
        assert future_p_value(store, {key: p / sum(padded.values()) for key, p in padded.items()}, 0.8) < 1e-6


def test_futures_repeat_under_a_seed_and_refuse_nonsense(written: Path) -> None:
    store = open_store(written)
    first, again, other = store.futures(50, 0.9, 1), store.futures(50, 0.9, 1), store.futures(50, 0.9, 2)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert np.array_equal(store.futures(1, 0.0, 0)[0].shape, (1, 3))
    for num, gamma, seed in ((0, 0.9, 0), (5, 1.0, 0), (5, -0.1, 0), (5, float("nan"), 0), (5, 0.9, -1)):
        with pytest.raises(CvlctlError):
            store.futures(num, gamma, seed)
