"""States that show success: by rule, by frame, from a file; and files that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy_stores import names, numbered_episodes

import cvlctl
from cvlctl.data.examples import examples, success_examples
from cvlctl.data.recipe import SuccessExamples
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError

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
