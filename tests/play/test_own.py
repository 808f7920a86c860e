"""Environments of one's own: what they may be, what is checked, and whose code is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import toy_robots

from cvlctl.collect.recipe import BuildRecipe
from cvlctl.errors import CvlctlError
from cvlctl.play import envs, named_code, own
from cvlctl.play.env import Env
from cvlctl.play.settings import Settings


@pytest.fixture(autouse=True)
def robots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with robots.py, where we stand."""
    monkeypatch.chdir(tmp_path)
    return toy_robots.write(tmp_path)


def made(name: str, horizon: int | None = 10, **about: Any) -> Env:
    task = name if "/" in name else f"py/robots.py:{name}"
    return envs.make(task, 0, horizon, envs.named(task, about))


def played(env: Env, episode: int = 0, steps: int = 5) -> np.ndarray:
    seen = [env.reset(episode)]
    seen += [env.step(np.full(env.spec.action_dim, 0.5))[0] for _ in range(steps)]
    return np.stack(seen)


def test_any_id_of_gymnasium_and_its_built_in_names_as_they_were() -> None:
    env = made("gym/Reacher-v5", None)
    assert (env.spec.observation_shape, env.spec.action_dim, env.spec.horizon) == ((10,), 2, 50)
    with pytest.raises(CvlctlError, match="unknown task 'gym/Reacher'") as caught:
        envs.check_task("gym/Reacher")
    assert "gym/Reacher-v5" in caught.value.hint
    assert envs.named("gym/Hopper-v5") is None and not envs.make("gym/Pendulum-v1", 0).own
    changed = made("gym/Pendulum-v1", None, kwargs={"g": 3.0})
    assert changed.own and changed.raw.inside.unwrapped.g == 3.0
    with pytest.raises(CvlctlError, match="no settings"):
        made("metaworld/reach-v3", None, success="success")


def test_an_id_with_its_module(tmp_path: Path) -> None:
    (tmp_path / "shop_of_robots.py").write_text(
        "from robots_of_shop import Reach\nimport gymnasium\n"
        "gymnasium.register('Shop-v0', Reach, max_episode_steps=9)\n"
    )
    task = "gym/shop_of_robots:Shop-v0"
    with pytest.raises(CvlctlError, match="No module named 'robots_of_shop'") as caught:
        made(task)
    assert "pip install" in caught.value.hint
    (tmp_path / "robots_of_shop.py").write_text(toy_robots.ROBOTS)
    with pytest.raises(CvlctlError) as caught:
        made(task)  # what lies beside is imported as part of a package alone
    assert "from .robots_of_shop import" in caught.value.hint
    (tmp_path / "shop_of_robots.py").write_text(
        f"{toy_robots.ROBOTS}\ngymnasium.register('Shop-v0', Reach, max_episode_steps=9)\n"
    )
    try:
        assert made(task, None).spec.horizon == 9
        assert str(tmp_path) not in sys.path
    finally:
        gymnasium.registry.pop("Shop-v0", None)
        sys.modules.pop("shop_of_robots", None)


def test_a_module_in_a_folder_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, init in (("armlab_a", True), ("armlab_b", False)):
        folder = tmp_path / name
        folder.mkdir()
        toy_robots.write(folder)
        (folder / "envs.py").write_text("from .robots import Reach as Mine\n")
        if init:
            (folder / "__init__.py").write_text("")
        task = f"py/{name}.envs:Mine"
        settings = envs.named(task)
        assert settings is not None and settings.code is not None and Path(settings.code).is_relative_to(folder)
        monkeypatch.chdir("/")  # a worker is handed where it lies, and may stand elsewhere
        assert envs.make(task, 0, 5, Settings.of({"code": settings.code})).spec.observation_shape == (4,)
        monkeypatch.chdir(tmp_path)
        assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ("py/robts.py:Reach", "no file at robts.py"), ("py/no_such_thing.envs:Reach", "no module 'no_such_thing'"),
        ("py/robots.py", "does not name what gives an environment"), ("py/robots.py:", "does not name"),
        ("py/robots.py:__import__('os')", "does not name"), ("py/a b:Reach", "does not name"),
        ("py/robots.py:Rech", "has no 'Rech'"), ("py/robots.py:nothing", "gives a builtins.int, not a gymnasium.Env"),
        ("gym/json:Reach-v0", "gymnasium knows no 'Reach-v0'"),
        ("py/robots.py:Spaceless", "cannot be made: AttributeError: .* no attribute .action_space"),
        ("py/robots.py:Stuck", r"actions have no range \(dimensions 1: low is not below high\)"),
    ],
)  # fmt: skip
def test_what_does_not_give_an_environment(task: str, fault: str) -> None:
    with pytest.raises(CvlctlError, match=fault):
        made(task)


def test_an_environment_that_goes_elsewhere_or_wants_arguments(robots: Path) -> None:
    here = os.getcwd()
    made("Wandering", 5)
    assert os.getcwd() == here  # the paths of recipes are relative to it
    with pytest.raises(CvlctlError, match="unexpected keyword argument 'siez'") as caught:
        made("Reach", kwargs={"siez": 2})
    assert caught.value.hint == 'what it is called with stands in env: {kwargs: {...}}, here {"siez": 2}'


def test_nothing_is_imported_that_nobody_named(tmp_path: Path) -> None:
    (tmp_path / "trap_a1.py").write_text("open('sprung', 'w')\nReach = None\n")
    for task in ("py/trap_a1.py:Reach", "py/trap_a1:Reach", "gym/trap_a1:Reach-v0"):
        envs.check_task(task)  # it looks where the module lies
        assert envs.named(task) is not None
        with pytest.raises(CvlctlError, match="only what a recipe or the command line names is imported"):
            envs.make(task, 0, 5)
        with pytest.raises(CvlctlError, match="only what a recipe"):
            envs.make(task, 0, 5, Settings(success="x"))
    assert not (tmp_path / "sprung").exists()
    assert named_code.origin("gym/Hopper-v5") is None


def test_observations_of_every_kind() -> None:
    env = made("Rich")
    assert env.columns == (
        "flags[0]", "flags[1]", "inner/a[0]", "inner/a[1]", "inner/a[2]", "inner/a[3]", "inner/a[4]",
        "joint_9[0]", "joint_9[1]", "joint_10[0]", "joint_10[1]", "mode[0]", "mode[1]", "mode[2]",
    )  # fmt: skip
    seen = played(env, steps=1)
    assert seen.dtype == np.float32
    assert seen[1].tolist() == [0, 1, 0, 1, 0, 0, 1, 3, 4, 0.5, -0.5, 0, 0, 1]
    chosen = made("Rich", keys=["mode", "joint_9"])
    assert played(chosen, steps=1)[0].tolist() == [0, 0, 1, 3, 4]
    task = "py/robots.py:Rich"
    assert envs.described(chosen, envs.named(task)) == {"task": task, "keys": ["mode", "joint_9"]}
    plain = {"task": task, "source": {"name": "random", "episodes": 1}, "out": "x.zarr"}
    said = BuildRecipe.model_validate(plain).attributes(chosen)
    assert said["observation_columns"] == ["mode[0]", "mode[1]", "mode[2]", "joint_9[0]", "joint_9[1]"]


@pytest.mark.parametrize(
    ("name", "about", "fault"),
    [
        ("Camera", {}, r"observations are images \(8, 8, 3\)"),
        ("Rich", {"keys": ["camera"]}, "camera observations are"),
        ("Rich", {"keys": ["jont_9"]}, "no observation 'jont_9'"), ("Rich", {"keys": ["mode", "mode"]}, "twice"),
        ("Reach", {"keys": ["at"]}, "no observation 'at'"), ("Words", {}, "told is a Text space"),
        ("Open", {}, r"no finite bounds \(dimensions 0, 1\)"),
        ("Open", {"action_bounds": (1, [2, 3, 4])}, "not of 2 action dimensions"),
        ("Open", {"action_bounds": (1, 1)}, "no finite low and high"),
        ("Reach", {"action_bounds": (-3, 1)}, "reach beyond"), ("Reach", {"kwargs": {"sise": 3}}, "sise"),
        *(("counting", {"kwargs": {"kind": kind}}, "discrete actions are not supported")
          for kind in ("discrete", "several", "binary", "int")),
    ],
)  # fmt: skip
def test_spaces_that_are_refused(name: str, about: dict[str, Any], fault: str) -> None:
    with pytest.raises(CvlctlError, match=fault):
        made(name, **about)


def test_actions_are_scaled_to_the_bounds() -> None:
    env = made("Open", action_bounds=(-4, [8, 4]))
    env.reset(0)
    env.step(np.array([1.0, -0.5]))
    assert env.raw.inside.asked.tolist() == [8.0, -2.0] and env.raw.inside.asked.dtype == np.float32
    assert [side.tolist() for side in env.action_bounds] == [[-4, -4], [8, 4]]
    env.step(np.array([2.0, 0.0]))  # cut off at 1
    assert env.raw.inside.asked.tolist() == [8.0, 0.0]


@pytest.mark.parametrize(
    ("says", "success", "known"),
    [
        ("is_success", None, True),
        ("success", None, True),
        ("done", "done", True),
        ("done", None, False),
        (None, "x", True),
    ],
)
def test_success_is_what_info_says(says: str | None, success: str | None, known: bool) -> None:
    env = made("Reach", kwargs={"says": says, "size": 0.1}, success=success)
    env.reset(0)
    flag = env.step(np.zeros(2))[4]
    assert flag is (says == (success or says) if known else None)


def test_episodes_end_where_the_environment_or_the_horizon_says() -> None:
    assert made("limited", None).spec.horizon == 12
    with pytest.raises(CvlctlError, match="no time limit of its own") as caught:
        made("Reach", None)
    assert "horizon: 200" in caught.value.hint
    with pytest.raises(CvlctlError, match="longer than the 12 steps"):
        made("limited", 13)
    env = made("Reach", 100)
    env.reset(0)
    flags = [env.step(np.zeros(2))[3] for _ in range(30)]
    assert flags == [False] * 29 + [True]  # it truncates itself


@pytest.mark.parametrize(
    ("breaks", "fault"),
    [
        ("raise", r"IndexError: index 7 is out of bounds.* \(robots.py, line {line}\)"),
        ("nan", r"observation\[2\] is nan"), ("shape", r"shape \(2,\); its space says \(2, 2\)"),
        ("reward", "the reward is nan"), ("old", "step returned 4 values"),
        ("exit", r"SystemExit: 3 \(robots.py, line"), ("text", "the reward is 'five', not a number"),
        ("success", r"info\['success'\] is 'yes', not a number"),
    ],
)  # fmt: skip
def test_a_fault_names_task_episode_step_and_line(breaks: str, fault: str) -> None:
    env = made("Reach", kwargs={"breaks": breaks})
    (line,) = (n for n, text in enumerate(toy_robots.ROBOTS.split("\n"), 1) if text.endswith("# the fault"))
    fault = fault.replace("{line}", str(line))
    with pytest.raises(CvlctlError, match=rf"^py/robots.py:Reach: episode 4, step 3: .*{fault}"):
        played(env, episode=4)


def test_episodes_are_functions_of_their_number_and_an_ignored_seed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    first, other = made("Reach"), made("Reach")
    played(other, 7)
    assert np.array_equal(played(first, 3), played(other, 3)) and not np.array_equal(played(first, 4), played(first, 3))
    own.probe(first)
    assert capsys.readouterr().err == ""
    own.probe(made("Unseeded"))
    assert "ignores its seed" in capsys.readouterr().err
    own.probe(made("Reach", success="is_succes"))
    assert "info has no 'is_succes' in its first steps (it has is_success)" in capsys.readouterr().err
    own.probe(made("Rich"))
    assert "images are left out of the observations: camera" in capsys.readouterr().err


def test_settings_survive_json_and_strangers_do_not_pass() -> None:
    settings = Settings.of(
        {"kwargs": {"b": [1], "a": None}, "keys": ["x"], "action_bounds": [-1, [2, 3]], "code": "/a.py"}
    )
    assert Settings.from_json(settings.as_json()) == settings
    assert settings.about() == {"kwargs": {"a": None, "b": [1]}, "keys": ["x"], "action_bounds": [-1.0, [2.0, 3.0]]}
    for bad in (
        {"kwargs": 3},
        {"keys": [3]},
        {"action_bounds": [1]},
        {"success": []},
        {"keys": 3},
        {"action_bounds": "ab"},
    ):
        with pytest.raises(CvlctlError, match="no settings of an environment"):
            Settings.of(bad)


def test_the_digest_follows_the_code(robots: Path, tmp_path: Path) -> None:
    before = named_code.digest(str(robots))
    robots.write_text(toy_robots.ROBOTS + "\n")
    assert named_code.digest(str(robots)) != before
    (tmp_path / "__init__.py").write_text("")
    package = named_code.digest(str(tmp_path / "__init__.py"))
    robots.write_text(toy_robots.ROBOTS)
    assert named_code.digest(str(tmp_path / "__init__.py")) != package
    assert os.path.isfile(robots)
