"""Ctrl-C and SIGTERM lose nothing of a build: what was over is saved at once, and what is said of it is true."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_build_many import CAR, HELD, HOPPER, PENDULUM, many, worker

from cvlctl import checkpoints, interrupts
from cvlctl.collect import build_many
from cvlctl.collect.build import build
from cvlctl.collect.build_many import build_many as build_all
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.store import open_store
from cvlctl.data.writer import StoreWriter
from cvlctl.play.envs import Env

pytestmark = pytest.mark.usefixtures("no_fsync")
RANDOM = {"name": "random", "episodes": 6}
SAC = {"name": "sac", "steps": 240, "learning_starts": 120, "hidden": [8], "batch_size": 8}
CONTRASTIVE = SAC | {"name": "contrastive_ac"}


def recipe_of(out: Path, source: dict[str, Any], **more: Any) -> BuildRecipe:
    plain = {"task": PENDULUM, "source": source, "out": out, "horizon": 60, "compile": "false"}
    return BuildRecipe.model_validate(plain | {"precision": "float32", "checkpoint_seconds": 1e9} | more)


@pytest.fixture(autouse=True)
def _hangups_are_heard() -> Iterator[None]:
    """Also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, number: int = signal.SIGINT) -> None:
    """Send a signal amid the `count`-th call of a function."""
    function, calls = getattr(owner, name), 0

    def sending(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, sending)


def saved(recipe: BuildRecipe) -> int:
    """How many episodes the partial store holds."""
    with StoreWriter(
        recipe.out, task=recipe.task, horizon=recipe.horizon, provenance={"recipe": recipe.resolved()}
    ) as writer:
        return writer.num_episodes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], tuple[str, str]]:
    """The digests of the store that a source gives where nothing comes in between."""
    folder, found = tmp_path_factory.mktemp("whole"), dict[str, tuple[str, str]]()

    def of(source: dict[str, Any]) -> tuple[str, str]:
        name = source["name"]
        if name not in found:
            found[name] = digests(Path(build(recipe_of(folder / f"{name}.zarr", source))["path"]))
        return found[name]

    return of


def digests(path: Path) -> tuple[str, str]:
    store = open_store(path)
    return store.digest(), store.label_digest()


@pytest.mark.parametrize(
    ("number", "source", "owner", "name", "count", "episodes"),
    [
        (signal.SIGINT, RANDOM, StoreWriter, "append", 1, 1),
        (signal.SIGINT, RANDOM, StoreWriter, "append", 4, 4),
        (signal.SIGTERM, RANDOM, Env, "step", 200, 3),
        (signal.SIGHUP, SAC, StoreWriter, "append", 2, 2),
        (signal.SIGTERM, SAC, Env, "step", 200, 3),
        (signal.SIGINT, CONTRASTIVE, Env, "step", 200, 3),
    ],
)
def test_every_episode_that_was_over_is_saved(
    number: int, source: dict[str, Any], owner: Any, name: str, count: int, episodes: int, tmp_path: Path,
    undisturbed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, recipe = undisturbed(source), recipe_of(tmp_path / "x.zarr", source)
    with monkeypatch.context() as patched:
        send_at(patched, owner, name, count, number)
        with pytest.raises(KeyboardInterrupt):
            build(recipe)
    done = f"{episodes} of 6 episodes" if source is RANDOM else f"{60 * episodes} of {source['steps']} frames"
    assert f"{recipe.out}: stopped after {done}; the same command goes on from there" in capsys.readouterr().err
    assert saved(recipe) == episodes
    build(recipe)
    assert ("resuming at frame" in capsys.readouterr().err) == (source is not RANDOM)
    assert digests(recipe.out) == whole


@pytest.mark.parametrize("source", [RANDOM, SAC])
def test_where_nothing_was_over_nothing_is_said_of_it(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path / "x.zarr", source)
    send_at(monkeypatch, Env, "step", 30)
    with pytest.raises(KeyboardInterrupt):
        build(recipe)
    assert "stopped" not in capsys.readouterr().err
    assert not recipe.out.exists() and not recipe.out.with_name("x.zarr.partial").exists()


@pytest.mark.parametrize(("source", "owner", "name"), [(RANDOM, StoreWriter, "flush"), (SAC, checkpoints, "save")])
def test_a_second_one_stops_the_saving_at_once_and_nothing_is_claimed(
    source: dict[str, Any], owner: Any, name: str, tmp_path: Path, undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, recipe = undisturbed(source), recipe_of(tmp_path / "x.zarr", source)
    with monkeypatch.context() as patched:
        patched.setattr(interrupts, "AGAIN_SECONDS", 0.0)
        send_at(patched, Env, "step", 150)
        saves = {"n": 0}
        original = getattr(owner, name)

        def twice(*args: Any, **kwargs: Any) -> Any:
            saves["n"] += 1
            if interrupts._came:
                os.kill(os.getpid(), signal.SIGINT)
            return original(*args, **kwargs)

        patched.setattr(owner, name, twice)
        with pytest.raises(KeyboardInterrupt):
            build(recipe)
    assert saves["n"] > 0 and "goes on from there" not in capsys.readouterr().err
    build(recipe)
    assert digests(recipe.out) == whole


# --- several tasks


def test_workers_save_what_they_have_and_end(
    tmp_path: Path, hostile: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = many(tmp_path, [PENDULUM, CAR, HOPPER], processes=2, checkpoint_seconds=1e9, source=SAC)
    amid, pids, handle = set[str](), set[int](), build_many._handle
    with monkeypatch.context() as patched:

        def handled(job: Any, kind: str, content: Any, screen: Any) -> None:
            handle(job, kind, content, screen)
            pids.add(job.process.pid)
            if job.progress.get("done", 0) >= 200 and job.task not in amid:
                amid.add(job.task)
                if len(amid) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(build_many, "_handle", handled)
        patched.setattr(build_many, "_COMMAND", HELD)
        with pytest.raises(KeyboardInterrupt):
            build_all(recipe)
    said = capsys.readouterr().err
    for task, one in zip((PENDULUM, CAR), recipe.recipes, strict=False):
        assert f"{task}: {one.out}: stopped after 180 of 240 frames; the same command goes on from there" in said
        assert saved(one) == 3
    assert "died" not in said and len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (hostile / "sprung").exists()
    build(recipe.recipes[0])
    assert digests(recipe.recipes[0].out) == undisturbed(SAC)


def test_a_worker_that_does_not_end_is_killed_by_a_second_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker(monkeypatch, "import signal\nsignal.signal(15, signal.SIG_IGN)\ntell(done=1, text='')\ntime.sleep(600)\n")
    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", 0.0)
    began, handle, say = [], build_many._handle, build_many._Screen.say

    def handled(job: Any, kind: str, content: Any, screen: Any) -> None:
        began.append(job)
        os.kill(os.getpid(), signal.SIGINT)

    def said(self: Any, line: str) -> None:
        say(self, line)
        if line.startswith("stopping"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(build_many, "_handle", handled)
    monkeypatch.setattr(build_many._Screen, "say", said)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_all(many(tmp_path, [PENDULUM, CAR], processes=1))
    assert time.monotonic() - begin < build_many._STOP_SECONDS / 2
    assert began[0].process.returncode == -signal.SIGKILL
    assert handle is not build_many._handle and "stopping: 1 tasks" in capsys.readouterr().err
