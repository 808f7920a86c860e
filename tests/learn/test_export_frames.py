"""Policies that see frames as files: each answers as `load_policy` does, and the robot's loop keeps its stacks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_frames
from test_export import BOUNDS, installed
from toy_stores import moving_point

from cvlctl.data.store import open_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.export import export
from cvlctl.learn.policy_files import FORMATS, arrays_of
from cvlctl.play import convolutions
from cvlctl.play.policies import NumpyPolicy, load_policy
from cvlctl.play.sights import SeeingPolicy
from cvlctl.types import Observe, Spec

DOCS = Path(__file__).parents[2] / "docs" / "deploying.md"


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds that sees stacks of two cameras, and a column of a vector."""
    folder = tmp_path_factory.mktemp("robot")
    episodes = toy_frames.filmed(moving_point(3))
    write_store(folder / "a.zarr", episodes, task="point", action_bounds=BOUNDS)
    toy_frames.run("cvl", folder / "a.zarr", folder / "run", "seeds=[0,3]", "steps=3")
    return folder / "run"


def seeing(kind: str, camera: str = "front") -> SeeingPolicy:
    """A policy of random weights that sees stacks of two grey frames of 20x24."""
    rng, size = np.random.default_rng(0), (20, 24, 1)
    arrays: dict[str, np.ndarray] = {}
    for j, shape in enumerate(convolutions.shapes(kind, size, 2, 6)):
        out, fan_in = (shape[0], np.prod(shape[1:])) if len(shape) == 4 else (shape[1], shape[0])
        arrays[f"actor.camera0.{kind}.{j}.weight"] = rng.normal(0, fan_in**-0.5, shape).astype(np.float32)
        arrays[f"actor.camera0.{kind}.{j}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)
    head = NumpyPolicy([(rng.normal(0, 0.3, (6, 4)), np.zeros(4))], np.zeros(6), np.ones(6), Spec((6,), 2, 9))
    observe = Observe(cameras=(camera,), stack=2, encoder=kind, features=6)  # type: ignore[arg-type]
    return SeeingPolicy(arrays, head, Spec((0,), 2, 9, cameras={camera: size}), observe)


def about(policy: SeeingPolicy) -> dict[str, Any]:
    return {"inputs": policy.inputs, "encoder": policy.observe.encoder, "observation_size": 0, "action_size": 2}


@pytest.mark.parametrize("kind", ["small", "drq", "impala"])
def test_each_encoder_is_the_same_in_onnx(kind: str) -> None:
    write, load, _ = FORMATS[installed("onnx")]
    policy = seeing(kind)
    answer = load(write(arrays_of(policy), about(policy)))
    frames = np.random.default_rng(1).integers(0, 256, (5, 2, 20, 24, 1), np.uint8)
    found = answer({"front": frames})
    np.testing.assert_allclose(found, policy({"front": frames}), atol=1e-5)
    assert np.ptp(found, axis=0).min() > 1e-2, "it sees nothing"


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_each_format_answers_as_the_policy(format: str, robot: Path, tmp_path: Path) -> None:
    """Of any number of rows, of either seed; in the robot's units, with the cameras by their names."""
    done = export(robot, tmp_path / "file", installed(format), seed=3)
    assert done["checked_on"].startswith("93 frames of") and done["encoder"] == "small"
    assert done["inputs"] == {"front": [2, 10, 10, 3], "left": [2, 8, 9, 3], "vector": [1]}
    policy, rng = load_policy(robot, seed=3, units="physical"), np.random.default_rng(1)
    answer = FORMATS[format][1]((tmp_path / "file").read_bytes())
    for rows in (1, 3):
        shown = {
            "vector": rng.standard_normal((rows, 1)).astype(np.float32),  # in whatever order
            "left": rng.integers(0, 256, (rows, 2, 8, 9, 3), np.uint8),
            "front": rng.integers(0, 256, (rows, 2, 10, 10, 3), np.uint8),
        }
        found = answer(shown)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, policy(shown), atol=1e-5)
    assert not np.allclose(found, load_policy(robot, seed=0, units="physical")(shown), atol=1e-4)
    assert not np.allclose(found, answer({**shown, "left": 255 - shown["left"]}), atol=1e-5)


def test_the_loop_of_the_docs_keeps_the_stacks(robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acts on an episode as the policy does that is shown stacks of it; the first frame stands before itself."""
    export(robot, tmp_path / "policy.onnx", installed("onnx"))
    (code,) = re.findall(r"(?:^    .*\n|^\n)*^    .*deque.*\n(?:^    .*\n|^\n)*", DOCS.read_text(), re.M)
    monkeypatch.chdir(tmp_path)
    loop: dict[str, Any] = {}
    exec(re.sub("^    ", "", code, flags=re.M), loop)  # the docs' own
    episode = next(open_store(robot.parent / "a.zarr").episodes())
    assert episode.images is not None
    policy = load_policy(robot, units="physical")
    for _ in range(2):
        for t in (0, 1, 2, 3):
            shown = {name: frames[[max(t - 1, 0), t]][None] for name, frames in episode.images.items()}
            now = {name: frames[t] for name, frames in episode.images.items()}
            found = loop["act"](now, episode.observations[t])
            np.testing.assert_allclose(
                found, policy({**shown, "vector": episode.observations[t : t + 1]})[0], atol=1e-5
            )
        loop["stacks"].clear()


def test_plain_arrays_are_refused(robot: Path, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="sees frames of front, left, and plain arrays do not say how") as told:
        export(robot, tmp_path / "p.npz", "npz")
    assert "--format onnx or torch" in str(told.value) and not (tmp_path / "p.npz").exists()


def test_without_the_data_it_is_checked_on_random_frames(robot: Path, tmp_path: Path) -> None:
    shutil.move(robot.parent / "a.zarr", tmp_path / "gone.zarr")
    try:
        assert export(robot, tmp_path / "p.onnx", installed("onnx"))["checked_on"] == "100 random frames"
    finally:
        shutil.move(tmp_path / "gone.zarr", robot.parent / "a.zarr")


def test_a_camera_may_not_have_the_name_of_something_in_an_onnx_file() -> None:
    policy = seeing("small", "action")
    with pytest.raises(CvlctlError, match="the camera action has the name of something else"):
        FORMATS[installed("onnx")][0](arrays_of(policy), about(policy))


def test_how_far_from_the_data_is_known_of_the_vector(robot: Path) -> None:
    """In the data nothing; beyond them as of a policy that sees the vector alone, whatever the frames show."""
    policy, episode = load_policy(robot, units="physical"), next(open_store(robot.parent / "a.zarr").episodes())
    assert isinstance(policy, SeeingPolicy) and episode.images is not None
    shown = {**episode.images, "vector": episode.observations}
    assert (policy.outside(shown) == 0).all()
    every = open_store(robot.parent / "a.zarr").observations()
    low, high, std = every.min(), every.max(), policy.head.std[0]
    for value, wanted in ((high + 3, 3 / std), (low - 2, 2 / std)):
        far = {name: np.zeros_like(frames) for name, frames in episode.images.items()}
        found = policy.outside({**far, "vector": np.full_like(episode.observations, value)})
        np.testing.assert_allclose(found, np.full(len(episode) + 1, wanted), rtol=1e-4)
    with pytest.raises(CvlctlError, match="observations lack vector"):
        policy.outside(episode.images)
