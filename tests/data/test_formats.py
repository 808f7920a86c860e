"""Formats: every one's round trip, import and export as such, actions and memory."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from toy_files import WRITTEN, changed, episodes, hdf5, read, rows, same_store

from cvlctl import files
from cvlctl.data import formats
from cvlctl.data.formats import cutting, sources
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")


# ----------------------------------------------------------------------------------------------------------- round trip


@st.composite
def episode_lists(draw: st.DrawFn) -> list[Episode]:
    pixels, rewards, successes = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    shape, actions = draw(st.sampled_from([(1,), (4,), (2, 3)])), draw(st.integers(1, 3))
    values, result = st.floats(-1e6, 1e6, width=32), []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 6))
        kind = {"dtype": np.uint8} if pixels else {"dtype": np.float32, "elements": values}
        result.append(
            Episode(
                draw(hnp.arrays(shape=(length + 1, *shape), **kind)),
                draw(hnp.arrays(np.float32, (length, actions), elements=st.floats(-1, 1, width=32))),
                draw(hnp.arrays(np.float32, length, elements=values)) if rewards else None,
                draw(hnp.arrays(bool, length)) if successes else None,
                draw(st.booleans()),
                draw(st.sampled_from(["", "a", "b/c", "../../ö 机器人"])),
                draw(st.integers(0, 2**40)),
                draw(st.integers(0, 2**31)),
            )
        )
    return result


@pytest.mark.parametrize("format", WRITTEN)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=episode_lists(), horizon=st.sampled_from([None, 50]))
def test_what_is_exported_and_imported_is_the_same_store(
    tmp_path: Path, format: str, made: list[Episode], horizon: int | None
) -> None:
    store = write_store(tmp_path / "a.zarr", made, task="../toy ö", horizon=horizon, force=True)
    out = formats.export_store(format, store, tmp_path / WRITTEN[format], force=True)
    back = formats.import_store(format, out, tmp_path / "b.zarr", force=True)
    same_store(back, store)


def test_a_label_of_another_name_is_exported_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy", label="mine")
    for format, name in WRITTEN.items():
        out = formats.export_store(format, store, tmp_path / format / name, label="mine")
        same_store(formats.import_store(format, out, tmp_path / f"{format}.zarr", label="mine"), store)
        bare = formats.export_store(format, store, tmp_path / f"bare-{format}" / name)  # has no label "given"
        assert formats.import_store(format, bare, tmp_path / f"bare-{format}.zarr").labels == []
        with pytest.raises(CvlctlError, match="no label 'x'"):
            formats.export_store(format, store, tmp_path / "x" / name, label="x")


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(9), task="toy")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 50)
    monkeypatch.setattr(cutting, "BATCH_ROWS", 4)
    for format, name in WRITTEN.items():
        out = formats.export_store(format, store, tmp_path / format / name)
        same_store(formats.import_store(format, out, tmp_path / f"{format}.zarr"), store)


@pytest.mark.parametrize("format", ["d4rl", "ogbench", "npz"])
def test_reading_takes_memory_for_a_block_not_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    made = [Episode(np.zeros((501, 40)) + i, np.zeros((500, 4)), np.zeros(500)) for i in range(60)]
    out = formats.export_store(format, write_store(tmp_path / "a.zarr", made, task="toy"), tmp_path / WRITTEN[format])
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(cutting, "BATCH_ROWS", 1000)
    tracemalloc.start()
    steps = sum(len(episode) for episode in formats.FORMATS[format].read(out))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert steps == 30_000
    assert peak < 2.5e6  # observations alone are 4.8 MB


# -------------------------------------------------------------------------------------------------------------- actions


def test_actions_are_scaled_clipped_or_refused(tmp_path: Path) -> None:
    arrays = rows()
    arrays["actions"] = arrays["actions"] * np.float32([2, 10])
    path = hdf5(tmp_path / "a.hdf5", arrays)
    with pytest.raises(CvlctlError, match=r"a\.hdf5: episode 0 \(rows 0-0\): actions lie in .* outside") as caught:
        read("d4rl", path)
    assert "--action-bounds" in caught.value.hint
    scaled = read("d4rl", path, action_bounds=([-2, -10], [2, 10]))
    for a, b in zip(scaled, episodes(), strict=True):
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-6)
    assert max(np.abs(e.actions).max() for e in read("d4rl", path, clip_actions=True)) == 1.0
    for wrong in ((1, 0), (0, np.nan), (0, [1, 2, 3]), (1,), "ab"):
        with pytest.raises(CvlctlError, match="action_bounds"):
            read("d4rl", path, action_bounds=wrong)


def test_actions_beyond_by_rounding_are_cut_off(tmp_path: Path) -> None:
    arrays = rows()
    arrays["actions"][0] = 1.000001
    assert read("d4rl", hdf5(tmp_path / "a.hdf5", arrays))[0].actions.max() == 1.0


# ------------------------------------------------------------------------------------------- import_store, export_store


def test_provenance_and_the_progress_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(formats.Progress, "update", lambda self, done, text="": seen.append((done, self.total)))
    path = hdf5(tmp_path / "a.hdf5", rows())
    store = formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy", command="cvlctl data import ...")
    assert seen == [(1, 33), (7, 33), (18, 33), (23, 33), (33, 33)]
    assert store.provenance["command"] == "cvlctl data import ..."
    assert store.provenance["source"] == {
        "format": "d4rl", "file": str(path), "bytes": path.stat().st_size, "sha256": files.sha256(path), "options": {}
    }  # fmt: skip


def test_a_file_that_changes_while_it_is_imported_is_not_filed_under_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest was taken first, of other bytes."""
    path, other = hdf5(tmp_path / "a.hdf5", rows()), hdf5(tmp_path / "b.hdf5", rows(7))
    entry = formats.FORMATS["d4rl"]

    @functools.wraps(entry.read)
    def read(*args: Any, **options: Any) -> Iterator[Episode]:
        other.replace(path)
        yield from entry.read(*args, **options)

    monkeypatch.setitem(formats.FORMATS, "d4rl", entry._replace(read=read))
    with pytest.raises(CvlctlError, match=r"a\.hdf5 was changed while it was read"):
        formats.import_store("d4rl", path, tmp_path / "out.zarr", task="toy")
    assert not (tmp_path / "out.zarr").exists() and not (tmp_path / "out.zarr.partial").exists()


def test_what_import_and_export_refuse(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "hopper.hdf5", rows())
    store = formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy")
    digest = store.digest()
    with pytest.raises(CvlctlError, match="no format 'd4lr'") as caught:
        formats.import_store("d4lr", path, tmp_path / "b.zarr", task="toy")
    assert caught.value.hint == "did you mean d4rl?"
    with pytest.raises(CvlctlError, match="no option 'clip'"):
        formats.import_store("d4rl", path, tmp_path / "b.zarr", task="toy", clip=True)
    with pytest.raises(CvlctlError, match=r"nothing at .*hoper\.hdf5") as caught:
        formats.import_store("d4rl", tmp_path / "hoper.hdf5", tmp_path / "b.zarr", task="toy")
    assert "hopper.hdf5" in caught.value.hint
    with pytest.raises(CvlctlError, match="does not say which task"):
        formats.import_store("d4rl", path, tmp_path / "b.zarr")
    with pytest.raises(CvlctlError, match="exists"):
        formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy")
    bad = hdf5(tmp_path / "bad.hdf5", changed(rows(), rewards=np.full(33, np.nan)))
    with pytest.raises(CvlctlError, match="NaN"):
        formats.import_store("d4rl", bad, tmp_path / "a.zarr", task="toy", force=True)
    assert formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy", force=True).digest() == digest
    with pytest.raises(CvlctlError, match="not written as robomimic"):
        formats.export_store("robomimic", store, tmp_path / "x.hdf5")
    with pytest.raises(CvlctlError, match="exists"):
        formats.export_store("d4rl", store, path)
    (tmp_path / "folder-v0").mkdir()
    (tmp_path / "folder-v0" / "precious").write_text("x")
    for format in WRITTEN:
        with pytest.raises(CvlctlError, match="is a directory"):
            formats.export_store(format, store, tmp_path / "folder-v0", force=True)
    assert (tmp_path / "folder-v0" / "precious").exists()


@pytest.mark.parametrize("format", WRITTEN)
def test_an_export_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy")
    out = formats.export_store(format, store, tmp_path / "out" / WRITTEN[format])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cvlctl.files.sync", full)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(CvlctlError, match="No space left"):
        formats.export_store(format, store, out, force=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_options_of_every_format_are_named() -> None:
    assert formats.options_of("d4rl") == ["horizon", "action_bounds", "clip_actions"]
    assert formats.options_of("arrays") == ["keys", "horizon", "action_bounds", "clip_actions", "image_size"]
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for name, entry in formats.FORMATS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert line.rstrip("| ").endswith(("yes", ")")) == (entry.write is not None) or line.count("yes") == 1
        assert (line.count("yes") == 2) == (entry.write is not None)
