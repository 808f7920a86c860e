"""`cvlctl doctor`: what it tells, and that its parity check sees both likeness and difference."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cvlctl.cli import doctor
from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.play import envpool, envs, parity
from cvlctl.version import __version__

PENDULUM = "gym/Pendulum-v1"


def test_doctor_tells_people_and_programs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert execute(app, ["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cvlctl"] == __version__ and found["python"].startswith("3.")
    assert found["devices"][0] == "cpu" and found["cpus"] >= 1 and found["disk_gb"] > 0
    assert found["settings"]["device"] in ("cpu", "cuda") and found["settings"]["threads"] >= 1
    packages = {row["name"]: row for row in found["packages"]}
    assert packages["mujoco"]["wanted"] == "==3.3.0" and packages["torch"]["version"]
    assert "pytest" not in packages and "pytest" not in found["extras"]["dev"]  # this is pytest
    assert isinstance(found["rendering"]["works"], bool) and found["rendering"]["by"]
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    assert execute(app, ["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "none: mujoco cannot be imported with MUJOCO_GL=nonsense" in " ".join(shown.split())
    assert __version__ in shown and "extra dev" in shown
    assert [line for line in shown.splitlines() if line.split()[:2] == ["mujoco", packages["mujoco"]["version"]]]


def test_doctor_points_at_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    installed = {"numpy": "3.1", "zarr": "3.1.6"}

    def version(name: str) -> str:
        if name not in installed:
            raise doctor.metadata.PackageNotFoundError(name)
        return installed[name]

    wanted = ["numpy>=1.26,<3", "zarr>=3.1", "torch>=2", 'd3rlpy; extra == "bench"', 'zarr; extra == "more"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor.metadata, "version", version)
    assert {row["name"]: (row["version"], row["ok"]) for row in doctor._packages(None)} == {
        "numpy": ("3.1", False),
        "zarr": ("3.1.6", True),
        "torch": (None, False),
    }
    assert [row["ok"] for row in doctor._packages("bench")] == [False]
    assert [row["name"] for row in doctor._packages("more")] == ["zarr"]
    assert execute(app, ["doctor"]) == 0
    assert capsys.readouterr().out.count("WRONG") == 2


@pytest.mark.parametrize(
    "task", [PENDULUM, "gym/MountainCarContinuous-v0", "gym/Hopper-v5", "gym/FetchPush-v4", "metaworld/door-open-v3"]
)
def test_gymnasium_is_brought_to_another_start(task: str) -> None:
    env, other = envs.make(task, 0), envs.make(task, 1)
    like = parity.like(env)
    for number in (0, 3):
        wanted = other.reset(number)
        assert np.abs(env.reset(number) - wanted).max() > 1e-3
        np.testing.assert_allclose(like(wanted.astype(float)), wanted, atol=2e-5)
    assert np.array_equal(env.reset(5), envs.make(task, 0).reset(5))  # and is itself again


def test_parity_agrees_where_the_simulators_do(capsys: Any) -> None:
    pytest.importorskip("envpool")
    assert execute(app, ["doctor", "--parity", PENDULUM, "--episodes", "3", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in rows} == {PENDULUM} and all(row["agrees"] for row in rows)
    assert [row["compared"].split(",")[0] for row in rows] == [
        "columns", "50 starts and 48", "observation", "reward", "return", "length",
    ]  # fmt: skip
    assert rows[0]["gymnasium"] == rows[0]["envpool"] == "(3, 1, 200)"
    parity.render(rows, Console())
    assert "no difference" in capsys.readouterr().out
    parity.render([*rows, rows[0] | {"task": "gym/Hopper-v5", "agrees": False}], Console())
    assert "differs: gym/Hopper-v5\n" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["reward", "observation", "start", "width"])
def test_parity_sees_a_difference(fault: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("envpool")
    step, reset = envpool.Pool.step, envpool.Pool.reset

    def other_step(self: Any, slots: np.ndarray, actions: np.ndarray) -> Any:
        observations, rewards, terminated, successes = step(self, slots, actions)
        observations = observations + 0.05 * (fault == "observation")
        seen = observations[:, :2] if fault == "width" else observations
        return seen, rewards + 0.05 * (fault == "reward"), terminated, successes

    def other_reset(self: Any, slots: np.ndarray) -> Any:
        observations = reset(self, slots)
        if fault == "start":  # only the right half of where the pendulum may be
            observations[:, 0] = np.abs(observations[:, 0])
        return observations[:, :2] if fault == "width" else observations

    monkeypatch.setattr(envpool.Pool, "step", other_step)
    monkeypatch.setattr(envpool.Pool, "reset", other_reset)
    assert execute(app, ["doctor", "--parity", PENDULUM, "--episodes", "2", "--quiet", "--json"]) == 1
    first = next(row for row in json.loads(capsys.readouterr().out) if not row["agrees"])
    assert {"reward": "reward", "observation": "observation", "start": "starts", "width": "columns"}[fault] in (
        first["compared"]
    )


def test_intervals_are_of_pairs_and_never_empty_for_successes() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(100, 50, size=(20, 1))
    close = parity._paired("return", np.hstack([base, base + rng.normal(0, 0.1, (20, 1))]), 1.0, "{:.4g}")
    apart = parity._paired("return", np.hstack([base, base + 3 + rng.normal(0, 0.1, (20, 1))]), 1.0, "{:.4g}")
    assert close["agrees"] and not apart["agrees"]
    alike = parity._paired("success", np.ones((10, 2)))
    assert alike["agrees"] and alike["difference"] == "0% ± 38%"
    assert not parity._paired("success", np.array([[1.0, 0.0]] * 10))["agrees"]


def test_parity_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert execute(app, ["doctor", PENDULUM]) == 2
    assert "--parity" in capsys.readouterr().err
    assert execute(app, ["doctor", "--parity", "--episodes", "1"]) == 2
    assert "--episodes 1" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "envpool", None)
        for tasks in ([], [PENDULUM]):
            assert execute(app, ["doctor", "--parity", *tasks]) == 2
            assert "pip install 'cvlctl[envpool]'" in capsys.readouterr().err
    pytest.importorskip("envpool")
    assert execute(app, ["doctor", "--parity", "gym/Pendulum-v2"]) == 2
    assert "gym/Pendulum-v1" in capsys.readouterr().err
