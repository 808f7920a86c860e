"""Several tasks at once: each as it would be alone, kills and failures between them or not."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cvlctl import files
from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.collect import build_many
from cvlctl.collect.build import build
from cvlctl.collect.build_many import build_many as build_all
from cvlctl.collect.recipe import BuildManyRecipe
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load

PENDULUM, CAR, HOPPER = "gym/Pendulum-v1", "gym/MountainCarContinuous-v0", "gym/Hopper-v5"
SUMMARY = {"status": "built", "path": "x", "episodes": 2, "transitions": 9, "seconds": 1.0, "return_mean": -3.0}
SUMMARY |= {"success_rate": 0.5}


def write(folder: Path, tasks: list[str] | str, **more: Any) -> Path:
    source = {"name": "sac", "steps": 420, "learning_starts": 40, "hidden": [8], "batch_size": 8}
    plain = {"task": tasks, "source": source, "out": f"{folder}/${{task}}.zarr", "horizon": 60, "compile": False}
    path = folder / "many.yaml"
    path.write_text(json.dumps(plain | {"precision": "float32", "checkpoint_seconds": 1e-6} | more))
    return path


def many(folder: Path, tasks: list[str] | str, **more: Any) -> BuildManyRecipe:
    recipe = load(write(folder, tasks, **more))
    assert isinstance(recipe, BuildManyRecipe)
    return recipe


# --- the recipe


def test_a_list_and_a_family(tmp_path: Path) -> None:
    policy = {"name": "policy", "checkpoints": ["runs/${task}"], "episodes": 1}
    recipe = many(tmp_path, [PENDULUM, "metaworld/all"], source=policy, processes=3, seed=4)
    assert recipe.processes == 3 and len(recipe.recipes) == 51
    first, last = recipe.recipes[0], recipe.recipes[-1]
    assert (first.task, first.out) == (PENDULUM, tmp_path / "gym" / "Pendulum-v1.zarr")
    assert last.task == "metaworld/window-open-v3" and last.seed == 4
    assert getattr(last.source, "checkpoints", None) == (Path("runs/metaworld/window-open-v3"),)
    assert recipe.command == "build-dataset"


@pytest.mark.parametrize(
    ("tasks", "more", "words"),
    [
        ([PENDULUM, CAR], {"out": "x.zarr"}, "mention ${task}"),
        ([PENDULUM, PENDULUM], {}, "names gym/Pendulum-v1 twice"),
        ([], {}, "empty list"),
        ([PENDULUM, "gym/Hoper-v5"], {}, "gym/Hopper-v5"),
        ("nonsense/all", {}, "unknown task"),
        ([PENDULUM], {"processes": 0}, "processes"),
        ([PENDULUM], {"process": 2}, "unknown key process"),
        ([PENDULUM], {"out": "${tsk}/${task}"}, "names no matrix key"),
    ],
)
def test_what_is_wrong_with_it(tasks: Any, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError) as caught:
        many(tmp_path, tasks, **more)
    assert words in caught.value.what + caught.value.hint


# --- with real workers

# tells of every frame, and stops amid its work, however fast the machine
HELD = """
import time
from cvlctl.collect import build_many
build_many._REPORT_SECONDS = 0
update = build_many._Reported.update
def held(self, done, text=""):
    update(self, done, text)
    if done >= 200:
        time.sleep(600)
build_many._Reported.update = held
build_many.serve()
"""


def test_killed_resumed_and_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = many(tmp_path, [PENDULUM, CAR], processes=2)
    pids = []
    with monkeypatch.context() as patched:
        before = build_many._handle

        def handle(job: Any, kind: str, content: Any, screen: Any) -> None:
            before(job, kind, content, screen)
            pids.append(job.process.pid)
            if job.progress.get("done", 0) >= 200:
                raise KeyboardInterrupt  # and the workers are killed wherever they are

        patched.setattr(build_many, "_handle", handle)
        patched.setattr(build_many, "_COMMAND", HELD)
        with pytest.raises(KeyboardInterrupt):
            build_all(recipe)
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)
    left = [one.out.with_name(one.out.name + ".partial") for one in recipe.recipes]
    assert any((partial / "tail.npz").exists() for partial in left)
    write(tmp_path, [PENDULUM, HOPPER, CAR], processes=2)
    partial = tmp_path / "gym" / "Hopper-v5.zarr.partial"
    partial.mkdir(parents=True, exist_ok=True)
    capsys.readouterr()
    with files.lock(partial / "lock"):
        assert execute(app.app, ["build-dataset", str(tmp_path / "many.yaml"), "--json"]) == 2
    said = capsys.readouterr()
    pendulum, hopper, car = json.loads(said.out)
    assert (hopper["task"], hopper["status"]) == (HOPPER, "failed") and "another process" in hopper["error"]
    assert "resuming at frame" in said.err and f"{HOPPER}: failed" in said.err
    for result, one in zip((pendulum, car), recipe.recipes, strict=True):
        assert (result["task"], result["status"], result["transitions"]) == (one.task, "built", 420)
        alone = build(one.model_copy(update={"out": tmp_path / "alone" / one.out.name}))
        store, lone = open_store(one.out), open_store(Path(alone["path"]))
        assert verify_store(one.out) == []
        assert store.digest() == lone.digest() and store.label_digest() == lone.label_digest()


# --- with workers of our own making


def worker(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Workers that read their request as `task`, and then do `body`."""
    begin = "import json, os, sys, time\ntask = json.loads(sys.stdin.readline())['recipe']['task']\n"
    tell = "def tell(**message): print(json.dumps(message), flush=True)\n"
    monkeypatch.setattr(build_many, "_COMMAND", begin + tell + body)


def test_one_that_dies_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker(
        monkeypatch,
        f"""
if 'Pendulum' in task:
    print('{{"done": 3', end='', flush=True)  # amid a message
    print('out of luck', file=sys.stderr)
    os.kill(os.getpid(), 9)
tell(what='w', total=10, unit='frames', start=0)
tell(done=5, text='')
tell(result={SUMMARY!r})
""",
    )
    died, built = build_all(many(tmp_path, [PENDULUM, CAR], processes=1))
    assert died["status"] == "failed" and "out of luck" in died["error"] and "alone" in died["hint"]
    assert built == {"task": CAR} | SUMMARY
    said = capsys.readouterr().err
    assert f"{PENDULUM}: out of luck" in said and f"{CAR}: built in" in said and "success 50%" in said


def test_no_more_processes_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    worker(
        monkeypatch,
        f"""
with open({str(log)!r}, 'a') as file: print('begin', file=file, flush=True)
time.sleep(0.2)
with open({str(log)!r}, 'a') as file: print('end', file=file, flush=True)
tell(result={SUMMARY!r})
""",
    )
    results = build_all(many(tmp_path, [PENDULUM, CAR, HOPPER, "gym/Ant-v5", "gym/Walker2d-v5"], processes=2))
    assert [one["status"] for one in results] == ["built"] * 5
    lines, together = log.read_text().split(), []
    for place in range(len(lines)):
        together.append(lines[: place + 1].count("begin") - lines[: place + 1].count("end"))
    assert max(together) == 2


def test_a_finished_one_needs_no_worker_and_another_recipes_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = many(tmp_path, [PENDULUM, CAR], source={"name": "random", "episodes": 1})
    for one in recipe.recipes:
        build(one)
    monkeypatch.setattr(build_many, "_start", None)
    assert [one["status"] for one in build_all(recipe)] == ["finished already"] * 2
    other = many(tmp_path, [PENDULUM, CAR], source={"name": "random", "episodes": 2})
    results = build_all(other)
    assert all(one["status"] == "failed" and "--force" in one["hint"] for one in results)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    request = json.dumps({"recipe": {}, "force": False})
    code = "from cvlctl.collect import build_many as b\nb.threading.Thread(target=b._end_with_parent).start()\n"
    script = code + "print('up', flush=True)\nimport time; time.sleep(60)"
    begin = [sys.executable, "-P", "-c", script]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(begin, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        assert process.stdin and process.stdout
        process.stdin.write(request + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "up\n" and process.poll() is None
        process.stdin.close()
        assert process.wait(30) == 1


# --- what people see


def test_the_table_shows_who_runs_and_who_failed(tmp_path: Path) -> None:
    from rich.console import Console

    jobs = [build_many._Job(one) for one in many(tmp_path, [PENDULUM, CAR, HOPPER, "gym/Ant-v5"]).recipes]
    running, failed, done, _ = jobs
    screen = build_many._Screen(jobs)
    for job in (running, failed, done):
        job.process, job.begin = object(), time.monotonic() - 65  # type: ignore[assignment]
    started = {"what": "w", "total": 1000, "unit": "frames", "start": 0}
    build_many._handle(running, "message", json.dumps(started), screen)
    running.progress["since"] -= 10
    build_many._handle(running, "message", json.dumps({"done": 250, "text": "return 7"}), screen)
    build_many._handle(failed, "message", json.dumps({"error": ["no luck", "try again"]}), screen)
    build_many._handle(done, "message", json.dumps({"result": SUMMARY}), screen)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(screen.table())
    text = console.export_text()
    assert "25% of 1000 frames, 25/s, 30s left  return 7" in text
    assert "failed: no luck" in text and "2 of 4 tasks done, 1 failed, 1 waiting" in text
    assert HOPPER not in text  # it is done
    build_many.render([{"task": job.task} | (job.result or {}) for job in (failed, done)], console)
    table = console.export_text()
    assert "try again" in table and "50%" in table and "built" in table
