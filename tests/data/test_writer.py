"""Writing stores: round trip, all or nothing, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from toy_stores import assert_same, episode, many

from cvlctl.data import writer as writer_module
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")


# ----------------------------------------------------------------------------------------------------------- round trip


@st.composite
def episode_lists(draw: st.DrawFn) -> list[Episode]:
    pixels, rewards, successes = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    shape, actions = draw(st.sampled_from([(1,), (4,), (2, 3)])), draw(st.integers(1, 3))
    cameras = draw(st.dictionaries(st.sampled_from(["a", "b-1", "c.2"]), st.sampled_from([(1, 2, 3), (3, 1, 1)])))
    cameras, states = ({} if pixels else cameras), draw(st.booleans())
    result = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 9))
        values = st.floats(-1e6, 1e6, width=32)
        observations = (
            hnp.arrays(np.uint8, (length + 1, *shape))
            if pixels
            else hnp.arrays(np.float32, (length + 1, *shape), elements=values)
        )
        result.append(
            Episode(
                draw(observations),
                draw(hnp.arrays(np.float32, (length, actions), elements=st.floats(-1, 1, width=32))),
                draw(hnp.arrays(np.float32, length, elements=values)) if rewards else None,
                draw(hnp.arrays(bool, length)) if successes else None,
                draw(st.booleans()),
                draw(st.sampled_from(["", "a", "b/c"])),
                draw(st.integers(0, 2**40)),
                draw(st.integers(0, 2**31)),
                {name: draw(hnp.arrays(np.uint8, (length + 1, *size))) for name, size in cameras.items()},
                draw(hnp.arrays(np.float64, (length + 1, 2), elements=st.floats(-1e9, 1e9))) if states else None,
            )
        )
    return result


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episodes=episode_lists(), chunk=st.integers(4, 30), frames=st.integers(1, 9), flush_every=st.integers(1, 3))
def test_round_trip_and_digest_do_not_depend_on_how_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, episodes: list[Episode], chunk: int, frames: int, flush_every: int
) -> None:
    for name in ("one.zarr", "many.zarr"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(writer_module, "FRAME_BYTES", 6 * frames)
    whole = write_store(tmp_path / "one.zarr", iter(episodes), task="toy")
    assert_same(whole.episodes(), episodes)
    assert verify_store(whole.path) == []

    for i, item in enumerate(episodes):  # a new process's worth of writer for every episode
        with StoreWriter(tmp_path / "many.zarr", task="toy") as writer:
            assert writer.num_episodes == i
            writer.append(item)
            if i % flush_every == 0:  # then abandoned with something appended after the flush, and tried again
                writer.flush()
                writer.append(item)
                continue
            writer.flush()
    with StoreWriter(tmp_path / "many.zarr", task="toy") as writer:
        assert_same(writer.episodes(), episodes)
        pieces = writer.finish()
    assert_same(pieces.episodes(), episodes)
    assert pieces.digest() == whole.digest()
    assert pieces.labels == whole.labels
    for label in whole.labels:
        assert pieces.label_digest(label) == whole.label_digest(label)


def test_pixels_get_smaller_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FRAME_BYTES", 64 * 10)
    pixels = np.arange(41 * 64, dtype=np.uint8).reshape(41, 8, 8, 1)
    store = write_store(tmp_path / "a.zarr", [Episode(pixels, np.zeros((40, 1)))], task="toy")
    assert store.spec.cameras == {"pixels": (8, 8, 1)} and store.images("pixels").dtype == np.uint8
    assert zarr.open_array(store.path / "data/images/pixels", mode="r").chunks == (10, 8, 8, 1)
    assert zarr.open_array(store.path / "data/action", mode="r").chunks == (41, 1)
    np.testing.assert_array_equal(store.images("pixels"), pixels)


def test_provenance_and_attributes(tmp_path: Path) -> None:
    recipe = {"task": "toy", "steps": 3}
    with StoreWriter(tmp_path / "a.zarr", task="toy", provenance={"recipe": recipe, "simulator": "mujoco"}) as writer:
        writer.append(episode(0))
        store = writer.finish(reference_scores={"random": 1.5})
    assert store.provenance["recipe"] == recipe and store.provenance["simulator"] == "mujoco"
    assert store.provenance["versions"]["zarr"] == zarr.__version__
    assert {"python", "numpy", "torch"} <= set(store.provenance["versions"])
    assert open_store(store.path).attributes["reference_scores"] == {"random": 1.5}
    assert not list(tmp_path.glob("*.partial")) and sorted(p.name for p in store.path.iterdir()) == [
        "data",
        "labels",
        "meta",
        "zarr.json",
    ]


def test_the_callers_arrays_may_change_after_append(tmp_path: Path) -> None:
    buffer = np.zeros((4, 3), np.float32)
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(Episode(buffer, np.zeros((3, 1))))
        buffer += 1.0
        store = writer.finish()
    assert not store.observations().any()


def test_a_refused_episode_leaves_the_writer_as_it_was(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0))
        with pytest.raises(CvlctlError, match="episode 1: collected_at or seed is no 64-bit integer"):
            writer.append(dataclasses.replace(episode(1), seed=2**70, task="another"))
        writer.append(episode(1))
        store = writer.finish()
    assert_same(store.episodes(), [episode(0), episode(1)])
    assert store.task_names == ["toy"]


# ------------------------------------------------------------------------------------------------------- all or nothing


def test_existing_store_needs_force_and_stays_until_the_new_one_is_complete(written: Path) -> None:
    before = open_store(written).digest()
    with pytest.raises(CvlctlError, match="exists") as caught:
        write_store(written, many(3), task="toy")
    assert "--force" in caught.value.hint and "force=True" in caught.value.hint

    def watched() -> Iterator[Episode]:
        for item in many(3):
            assert open_store(written).digest() == before
            yield item
        raise RuntimeError("collector fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_store(written, watched(), task="toy", force=True)
    assert open_store(written).digest() == before and [p.name for p in written.parent.iterdir()] == ["a.zarr"]
    assert_same(write_store(written, many(3), task="toy", force=True).episodes(), many(3))
    assert [p.name for p in written.parent.iterdir()] == ["a.zarr"]


def test_force_never_removes_what_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        write_store(tmp_path / "thesis", many(1), task="toy", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"


def test_a_generator_that_raises_leaves_no_trace(tmp_path: Path) -> None:
    def broken() -> Iterator[Episode]:
        yield from many(3)
        raise ValueError("bad file")

    with pytest.raises(ValueError, match="bad file"):
        write_store(tmp_path / "a.zarr", broken(), task="toy")
    assert list(tmp_path.iterdir()) == []


def test_no_episodes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="no episodes"):
        write_store(tmp_path / "a.zarr", [], task="toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            Episode(np.zeros((3, 4)), np.zeros((2, 2)), np.zeros(2), np.zeros(2)),
            r"episode 1 has observations of shape \(4,\)",
        ),
        (
            Episode(np.zeros((3, 3)), np.zeros((2, 1)), np.zeros(2), np.zeros(2)),
            r"episode 1 has actions of shape \(1,\)",
        ),
        (
            Episode(np.zeros((3, 1, 3), np.uint8), np.zeros((2, 2)), np.zeros(2), np.zeros(2)),
            r"episode 1 has frames of camera .*; those before it have no camera",
        ),
        (episode(1, rewards=False), "episode 1 has no rewards; those before it have"),
        (episode(1, successes=False), "episode 1 has no successes"),
        (episode(1, length=30), "episode 1 has 30 steps; the horizon is 20"),
        ("not an episode", "episode 1 is a str"),
    ],
)
def test_episodes_must_agree(tmp_path: Path, second: Episode, message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        write_store(tmp_path / "a.zarr", [episode(0), second], task="toy", horizon=20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error")
def test_what_users_hand_over_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match=r"episodes is of type Episode, not a list.*\n.*\[episode\]"):
        write_store(tmp_path / "a.zarr", episode(0), task="toy")  # type: ignore[arg-type]
    for task in ("", "  ", None):
        with pytest.raises(CvlctlError, match="is not the name of a task"):
            write_store(tmp_path / "a.zarr", many(1), task=task)  # type: ignore[arg-type]
    with pytest.raises(CvlctlError, match="rewards hold NaN or infinity"):
        Episode(np.zeros((2, 3)), np.zeros((1, 2)), np.array([1e300]))
    for kind in (
        np.int64,
        np.uint8,
        bool,
    ):  # as every reader of files has it: no number between two of them means anything
        discrete = (Episode(np.zeros((3, 2)), np.zeros((2, 1), kind)) for _ in range(1))
        with pytest.raises(CvlctlError, match="discrete actions are not supported"):
            write_store(tmp_path / "a.zarr", discrete, task="toy")
    assert list(tmp_path.iterdir()) == []


def test_an_episode_with_labels_after_one_without(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0, rewards=False, successes=False))
        with pytest.raises(CvlctlError, match="episode 1 has rewards; those before it have no rewards"):
            writer.append(episode(1, successes=False))
        writer.append(episode(1, rewards=False, successes=False))  # the refused one left nothing behind
        store = writer.finish()
    assert_same(store.episodes(), [episode(i, rewards=False, successes=False) for i in (0, 1)])
    assert store.labels == []


def test_a_store_that_appears_meanwhile_is_not_replaced(tmp_path: Path, template: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0))
        shutil.copytree(template, tmp_path / "a.zarr")
        with pytest.raises(CvlctlError, match="exists"):
            writer.finish()
    assert open_store(tmp_path / "a.zarr").num_episodes == 12


def test_unwritable_places_and_values(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CvlctlError, match="cannot write"):
        write_store(tmp_path / "file" / "a.zarr", many(1), task="toy")
    with pytest.raises(CvlctlError, match="JSON"):
        write_store(tmp_path / "a.zarr", many(1), task="toy", provenance={"recipe": {"x": np.zeros(2)}})
    with pytest.raises(CvlctlError, match="plain name"):
        write_store(tmp_path / "a.zarr", many(1), task="toy", label="../up")
    with (
        StoreWriter(tmp_path / "a.zarr", task="toy") as writer,
        pytest.raises(CvlctlError, match="own attribute 'task'"),
    ):
        writer.append(episode(0))
        writer.finish(task="mine")
