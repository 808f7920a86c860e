"""States that show success: by rule, by frame, from a file; and files that hold none."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_stores import names, numbered_episodes

import cvlctl
from cvlctl.data import examples as examples_module
from cvlctl.data.examples import examples, success_examples
from cvlctl.data.recipe import SuccessExamples
from cvlctl.data.store import open_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode, Spec

pytestmark = pytest.mark.usefixtures("no_fsync", "small_chunks")


def test_examples_by_rule_are_those_of_a_recipe(a: Path, tmp_path: Path) -> None:
    store, out = open_store(a), tmp_path / "x.npy"
    result = examples(a, out)
    rows = np.flatnonzero(store.successes()) + 1
    np.testing.assert_array_equal(np.load(out), store.observations()[rows])
    assert result == {"status": "written", "path": str(out), "examples": 6, "shape": [6, 3]}
    examples(a, out, rule="last", k=2, num=100, force=True)
    assert len(np.load(out)) == sum(min(2, length) for length in store.lengths())
    examples(a, out, rule="last", num=4, force=True)
    assert len(np.load(out)) == 4


def test_examples_by_frame(a: Path, tmp_path: Path) -> None:
    episodes, out = numbered_episodes(12), tmp_path / "x.npz"
    examples(a, out, picks=["3:0", "1:-1", "0:1", "7:2"])
    with np.load(out, allow_pickle=False) as found:
        wanted = [episodes[3].observations[0], episodes[1].observations[-1], episodes[0].observations[1]]
        np.testing.assert_array_equal(found["observations"], [*wanted, episodes[7].observations[2]])
        origin = json.loads(str(found["provenance"]))
    assert origin["parents"] == [{"path": str(a), "digest": open_store(a).digest()}]
    assert "--pick 3:0" in origin["command"]
    for pick in ("12:0", "-1:0", "0:2", "0:-3", "x", "1:2:3", "1"):
        with pytest.raises(CvlctlError, match=f"--pick {pick}"):
            examples(a, tmp_path / "y.npy", picks=[pick])


def test_examples_that_finetune_reads(a: Path, tmp_path: Path) -> None:
    for name in ("x.npy", "x.npz"):
        examples(a, tmp_path / name)
        source = SuccessExamples.model_validate({"file": tmp_path / name})
        assert success_examples(source, open_store(a).spec).shape == (6, 3)


def test_examples_refuse_to_overwrite(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    out.write_text("mine")
    with pytest.raises(CvlctlError, match=r"x\.npy exists"):
        examples(a, out)
    with pytest.raises(CvlctlError, match=r"\.npy or a \.npz"):
        examples(a, tmp_path / "x.txt")
    (tmp_path / "d.npy").mkdir()
    with pytest.raises(CvlctlError, match=r"d\.npy exists"):
        examples(a, tmp_path / "d.npy", force=True)
    assert out.read_text() == "mine" and names(tmp_path) == ["a.zarr", "d.npy", "x.npy"]
    assert examples(a, out, force=True)["examples"] == 6


# ------------------------------------------------------------------------------------------------ as a recipe says them


def test_success_examples_by_rule(point: Path, tmp_path: Path) -> None:
    spec = cvlctl.open_store(point).spec
    found = success_examples(SuccessExamples(**{"from": point, "num": 10}), spec)
    assert found.shape == (10, 4)
    assert (np.exp(-found[:, 2:].sum(1)) > 0.5 - 1e-5).all()
    last = success_examples(SuccessExamples(**{"from": point, "rule": "last", "k": 2}), spec)
    observations = cvlctl.open_store(point).observations()
    assert np.array_equal(last, observations[np.sort(np.concatenate([np.arange(30, 186, 31), np.arange(29, 186, 31)]))])
    np.save(tmp_path / "x.npy", found)
    again = success_examples(SuccessExamples(file=tmp_path / "x.npy"), spec)
    assert np.array_equal(np.sort(again, 0), np.sort(found, 0))


BAD_EXAMPLES = {
    r"has shape \(0, 4\)": np.zeros((0, 4)),
    r"the examples have shape \(3, 5\); expected \(X, 4\)": np.zeros((3, 5)),
    "NaN or infinity in 1 of 3 examples, first in 2": np.diag([1, 1, np.nan, 1])[:3, :],
    "NaN or infinity in 3 of 3": np.full((3, 4), 1e300),
    "holds complex128, not real numbers": np.zeros((3, 4), complex),
    "holds <U1, not real numbers": np.full((3, 4), "1"),
    "cannot be read: .*allow_pickle": np.full((3, 4), None),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("message", BAD_EXAMPLES)
def test_bad_success_examples_are_named(message: str, point: Path, tmp_path: Path) -> None:
    spec, source = cvlctl.open_store(point).spec, SuccessExamples(file=tmp_path / "bad.npy")
    np.save(tmp_path / "bad.npy", BAD_EXAMPLES[message])
    with pytest.raises(CvlctlError, match=rf"success_examples\.file: .*/bad\.npy: {message}"):
        success_examples(source, spec)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"x" * 50, None])
def test_files_that_hold_no_success_examples(content: bytes | None, point: Path, tmp_path: Path) -> None:
    spec, source = cvlctl.open_store(point).spec, SuccessExamples(file=tmp_path / "bad.npz")
    if content is not None:
        (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(CvlctlError, match=r"no file at .*bad\.npz" if content is None else r"bad\.npz: cannot be read"):
        success_examples(source, spec)


# --------------------------------------------------------------------------------------------------------------- frames

SIZES = {"corner": (4, 6, 3), "wrist": (3, 3, 1)}


def seen_store(path: Path, vector: bool = True, sizes: Any = SIZES) -> Path:
    """Frames of 10 times the episode, and one more each step; every second step is a success."""
    episodes = []
    for i in range(3):
        level = np.arange(10 * i, 10 * i + 5, dtype=np.uint8)[:, None, None, None]
        images = {name: np.broadcast_to(level, (5, *size)) for name, size in sizes.items()}
        rows = np.full((5, 2), float(i)) if vector else None
        episodes.append(Episode(rows, np.zeros((4, 1)), None, np.arange(4) % 2 == 1, images=images))
    return write_store(path, episodes, task="toy").path


def test_examples_of_a_store_come_with_their_frames_stacked_or_not(tmp_path: Path) -> None:
    path = seen_store(tmp_path / "a.zarr")
    spec = open_store(path).spec
    source = SuccessExamples.model_validate({"from": path, "rule": "last", "k": 2})
    found = examples_module.found_examples(source, spec)
    assert found.observations[:, 0].tolist() == [0, 0, 1, 1, 2, 2] and list(found.images) == ["corner", "wrist"]
    assert found.images["corner"].shape == (6, 4, 6, 3) and found.images["corner"].dtype == np.uint8
    assert found.images["wrist"][:, 0, 0, 0].tolist() == [3, 4, 13, 14, 23, 24]
    stacked = examples_module.found_examples(source, spec, stack=6).images["wrist"]
    assert stacked.shape == (6, 6, 3, 3, 1) and stacked[2, :, 0, 0, 0].tolist() == [10, 10, 10, 11, 12, 13]
    one = replace(spec, observation_shape=(0,), cameras={"wrist": (3, 3, 1)})
    part = examples_module.found_examples(source, one)
    assert part.observations.shape == (6, 0) and list(part.images) == ["wrist"]
    with pytest.raises(CvlctlError, match=r"camera wrist has frames of \(3, 3, 1\); expected \(9, 9, 1\)"):
        examples_module.found_examples(source, replace(spec, cameras={"wrist": (9, 9, 1)}))


def test_examples_with_frames_as_a_file(tmp_path: Path) -> None:
    path = seen_store(tmp_path / "a.zarr")
    spec = open_store(path).spec
    with pytest.raises(CvlctlError, match=r"which a \.npy has no place for"):
        examples(path, tmp_path / "x.npy")
    made = examples(path, tmp_path / "x.npz", rule="successes")
    assert made["images"] == {"corner": [6, 4, 6, 3], "wrist": [6, 3, 3, 1]}
    file = SuccessExamples(file=tmp_path / "x.npz")
    found = examples_module.found_examples(file, spec)
    assert found.images["wrist"][:, 0, 0, 0].tolist() == [2, 4, 12, 14, 22, 24]
    assert found.observations[:, 1].tolist() == [0, 0, 1, 1, 2, 2]
    assert examples_module.found_examples(file, spec, stack=3).images["corner"].shape == (6, 3, 4, 6, 3)
    blind = replace(spec, cameras={})
    assert examples_module.success_examples(file, blind).shape == (6, 2)
    picked = examples(path, tmp_path / "p.npz", picks=["2:1", "0:-1"])
    assert picked["examples"] == 2
    with np.load(tmp_path / "p.npz") as arrays:
        assert arrays["images/corner"][:, 0, 0, 0].tolist() == [21, 4]
    for sizes, message in (
        ({"corner": (4, 6, 3), "top": (3, 3, 1)}, "images/top"),
        ({"corner": (4, 7, 3)}, r"images/corner is uint8 \(6, 4, 6, 3\); expected uint8 \(X, 4, 7, 3\)"),
    ):
        with pytest.raises(CvlctlError, match=message):
            examples_module.found_examples(file, replace(spec, cameras=sizes))


def test_ten_photographs(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    ramp = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (40, 1, 3))
    for i in range(10):
        picture = Image.fromarray(ramp + 10 * i)
        picture.save(folder / f"{i:02}.{'jpg' if i % 2 else 'PNG'}", quality=95)
    (folder / "notes.txt").write_text("of the kitchen")
    spec = Spec((0,), 1, 9, {"corner": (8, 8, 3)})
    found = examples_module.found_examples(SuccessExamples(file=folder), spec).images["corner"]
    assert found.shape == (10, 8, 8, 3)
    middle = 30 + 5 * np.arange(8) + 2  # of 100 columns the middle 40, 5 a pixel
    for i in range(10):
        assert np.abs(found[i, 4, :, 0].astype(int) - middle - 10 * i).max() <= 3, i
    source = SuccessExamples(file=folder, fit="stretch", num=3)
    squeezed = examples_module.found_examples(source, spec, stack=2).images["corner"]
    assert squeezed.shape == (3, 2, 8, 8, 3) and squeezed[0, 0, 4, 7, 0] > squeezed[0, 0, 4, 0, 0] + 75
    grey = examples_module.found_examples(SuccessExamples(file=folder), replace(spec, cameras={"a": (8, 8, 1)}))
    assert grey.images["a"].shape == (10, 8, 8, 1)


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    folder, spec = tmp_path / "photos", Spec((0,), 1, 9, {"corner": (8, 8, 3)})
    folder.mkdir()
    source = SuccessExamples(file=folder)

    def refused(message: str, spec: Spec = spec) -> None:
        with pytest.raises(CvlctlError, match=message):
            examples_module.found_examples(source, spec)

    refused("no photograph in")
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    refused("have no vector of 2 columns", replace(spec, observation_shape=(2,)))
    refused("is a folder", Spec((2,), 1, 9))
    refused("no folder .*corner", replace(spec, cameras={"corner": (8, 8, 3), "top": (8, 8, 3)}))
    whole = (folder / "a.png").read_bytes()
    (folder / "b.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refused(r"b\.jpg: is no PNG or JPEG")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "b.jpg")
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-900])
    refused(r"b\.jpg: is damaged")
    header = bytearray(whole)
    header[16:24] = (30_000).to_bytes(4, "big") * 2  # a declared size is held against the limit before it is decoded
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (folder / "b.jpg").write_bytes(header)
    refused("cannot be read: Image size|too large to be true")
