"""Policies as files: each answers as `load_policy` does, and says what it is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_runs import run
from toy_stores import moving_point

from cvlctl.cli.app import app
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.export import FORMATS, export
from cvlctl.play.policies import load_policy

BOUNDS = ([-2.0, -0.5], [2.0, 1.5])  # of the moving point's two actions


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds on a store that says its action bounds."""
    folder = tmp_path_factory.mktemp("robot")
    write_store(folder / "a.zarr", moving_point(), task="point", action_bounds=BOUNDS)
    run("bc", folder / "a.zarr", folder / "run", "seeds=[0,3]", "steps=30")
    return folder / "run"


def answers(file: Path, format: str, observations: np.ndarray) -> np.ndarray:
    return FORMATS[format][1](file.read_bytes())(observations)


def installed(format: str) -> str:
    for package in FORMATS[format][2]:
        pytest.importorskip(package)
    return format


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_answers_as_the_policy(format: str, robot: Path, tmp_path: Path) -> None:
    """Of any number of rows, far outside the data too, of either seed; in the robot's units."""
    done = export(robot, tmp_path / "file", installed(format), seed=3)
    assert done["status"] == "exported" and "observations of" in done["checked_on"] and done["step"] == 30
    policy, rng = load_policy(robot, seed=3, units="physical"), np.random.default_rng(1)
    for rows in (1, 2, 7):
        observations = (100 * rng.standard_normal((rows, len(policy.mean)))).astype(np.float32)
        found = answers(tmp_path / "file", format, observations)
        assert found.dtype == np.float32 and np.allclose(found, policy(observations), atol=1e-5), format
    assert (found >= BOUNDS[0]).all() and (found <= BOUNDS[1]).all()
    assert not np.allclose(policy(observations), load_policy(robot, seed=0, units="physical")(observations), atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_says_what_it_is(format: str, robot: Path, tmp_path: Path) -> None:
    export(robot, tmp_path / "file", installed(format))
    data = (tmp_path / "file").read_bytes()
    if format == "npz":
        about = json.loads(str(np.load(io.BytesIO(data), allow_pickle=False)["cvlctl"]))
    elif format == "torch":
        import torch

        extra = {"cvlctl.json": ""}
        torch.export.load(io.BytesIO(data), extra_files=extra)
        about = json.loads(extra["cvlctl.json"])
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        kept = session.get_modelmeta().custom_metadata_map
        about = {name: kept[name] if name in ("task", "units", "algorithm") else json.loads(kept[name])
                 for name in ("task", "units", "algorithm", "action_bounds", "data", "seed")}  # fmt: skip
        assert [(end.name, end.shape) for end in (*session.get_inputs(), *session.get_outputs())] == [
            ("observation", ["N", 4]), ("action", ["N", 2]),
        ]  # fmt: skip
    assert about["task"] == "point" and about["units"] == "physical" and about["algorithm"] == "bc"
    assert about["action_bounds"] == [list(side) for side in BOUNDS] and len(about["data"]) == 1


def test_without_the_data_it_is_checked_on_random_observations(store: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(store, tmp_path / "own.zarr")
    run("bc", tmp_path / "own.zarr", tmp_path / "bc", "steps=5")
    shutil.rmtree(tmp_path / "own.zarr")
    done = export(tmp_path / "bc", tmp_path / "p.npz", "npz", units="normalised")
    assert done["checked_on"] == "1000 random observations"


def test_units_that_nobody_said(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "bc", "steps=5")
    with pytest.raises(CvlctlError, match="do not say what actions of -1 and 1 stand for"):
        export(tmp_path / "bc", tmp_path / "p.npz", "npz")
    assert not (tmp_path / "p.npz").exists()
    done = export(tmp_path / "bc", tmp_path / "p.npz", "npz", action_bounds=(-3, 3))
    found = answers(tmp_path / "p.npz", "npz", np.zeros((1, 4), np.float32))
    assert done["status"] == "exported"
    assert np.allclose(found, 3 * load_policy(tmp_path / "bc")(np.zeros((1, 4))), atol=1e-5)


def test_a_goal_follows_the_observation(store: Path, tmp_path: Path) -> None:
    run("goal_conditioned", store, tmp_path / "goals", "steps=10")
    policy = load_policy(tmp_path / "goals")
    done = export(tmp_path / "goals", tmp_path / "p.npz", "npz", units="normalised")
    observations = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    told = policy.command(observations, np.ones(4))
    assert np.allclose(answers(tmp_path / "p.npz", "npz", told), policy(told), atol=1e-6)
    assert done["observation_size"] == 8 and done["command_columns"] == [4, 5, 6, 7]


def test_what_is_there_stays(robot: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.npz"
    export(robot, file, "npz")
    before = file.read_bytes()
    assert export(robot, file, "npz")["status"] == "finished already"
    with pytest.raises(CvlctlError, match="exists"):
        export(robot, file, "npz", seed=3)
    assert file.read_bytes() == before
    export(robot, file, "npz", seed=3, force=True)
    assert file.read_bytes() != before


def test_a_file_that_answers_otherwise_is_not_written(
    robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, _, packages = FORMATS["npz"]
    for wrong in (lambda x: np.full((len(x), 2), 0.5, np.float32), lambda x: np.full((len(x), 2), np.nan, np.float32),
                  lambda x: np.zeros((2, 2), np.float32)):  # fmt: skip
        monkeypatch.setitem(FORMATS, "npz", (write, lambda data, wrong=wrong: wrong, packages))
        with pytest.raises(CvlctlError, match="answers otherwise than the policy"):
            export(robot, tmp_path / "p.npz", "npz")
    assert not (tmp_path / "p.npz").exists()


def test_a_critic_has_no_policy_to_export(store: Path, tmp_path: Path) -> None:
    run("occupancy", store, tmp_path / "critic", "steps=2")
    with pytest.raises(CvlctlError, match="holds no actor"):
        export(tmp_path / "critic", tmp_path / "p.npz", "npz")


def test_the_command(robot: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-P", "-m", "cvlctl", "export", str(robot), "--format", "npz", "--out"]
    done = subprocess.run([*line, str(tmp_path / "p.npz"), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["largest_difference"] < 1e-5
    done = subprocess.run([*line, str(tmp_path / "p.npz"), "--seed", "7"], capture_output=True, text=True)
    assert done.returncode == 2 and "has no seed 7" in done.stderr and "Traceback" not in done.stderr
    assert any(command.name == "export" for command in app.registered_commands)
