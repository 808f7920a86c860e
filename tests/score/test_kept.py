"""What evaluations keep: one process at a time, of the checkpoint that was played, whatever lies there already."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import TASK, recipe, save_run

from cvlctl.cli.console import console
from cvlctl.errors import CvlctlError
from cvlctl.files import lock, sha256
from cvlctl.play import envpool, lockstep, players
from cvlctl.play.rollout import PolicyJob
from cvlctl.score import evaluate as module
from cvlctl.score import find_runs, kept, report
from cvlctl.score.evaluate import evaluate
from cvlctl.score.rows import read_rows
from cvlctl.types import EpisodeResult


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    save_run(tmp_path / "runs" / "bc", "bc")
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of an evaluation's time here, and are another file's subject."""
    monkeypatch.setattr(report, "plot_scores", lambda *args: None)


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_before_the_first_record_leaves_nothing_to_trip_over(tmp_path: Path, runs: Path, force: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").touch()
    (out / ".evaluation.json.4711.tmp").write_text("{")
    assert evaluate(recipe(tmp_path), force=force)["status"] == "evaluated"
    assert not list(out.glob(".*.tmp"))


def test_an_evaluation_that_was_refused_before_it_played_stands_in_no_way(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise CvlctlError("no goal is given")

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_episodes", refused)
        with pytest.raises(CvlctlError, match="no goal is given"):
            evaluate(recipe(tmp_path))
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert evaluate(recipe(tmp_path, seed=3))["status"] == "evaluated"
    with pytest.raises(CvlctlError, match="holds another evaluation: seed was 3, now 4"):
        evaluate(recipe(tmp_path, seed=4))


def test_what_dead_processes_left_goes_and_what_is_of_others_stays(tmp_path: Path, runs: Path) -> None:
    evaluate(recipe(tmp_path, episodes=1))
    out = tmp_path / "out"
    (out / "playing").mkdir()
    left = [out / ".rows.jsonl.4711.tmp", out / ".scores.png.1.tmp", out / "playing" / f"{'0' * 64}.safetensors"]
    mine = [out / ".thesis.tex.4711.tmp", out / "mine.txt", out / "playing" / "mine.txt"]
    for file in [*left, *mine]:
        file.write_text("half")
    evaluate(recipe(tmp_path, episodes=2))
    assert not any(file.exists() for file in left) and all(file.exists() for file in mine)
    mine.pop().unlink()
    evaluate(recipe(tmp_path, episodes=1), force=True)
    assert not (out / "playing").exists() and all(file.exists() for file in mine)


def test_of_two_at_once_the_second_is_refused_and_plays_nothing(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lock(tmp_path / "out" / ".lock")
    monkeypatch.setattr(module, "run_episodes", lambda *args, **options: pytest.fail("the other one plays them"))
    for force in (False, True):
        with pytest.raises(CvlctlError, match=r"another process is writing .*out"):
            evaluate(recipe(tmp_path), force=force)
    assert os.listdir(tmp_path / "out") == [".lock"]
    held.close()


def test_what_another_evaluation_did_before_we_got_the_lock_counts(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kept.lock

    def late(file: Path) -> Any:
        monkeypatch.setattr(kept, "lock", real)
        evaluate(recipe(tmp_path))
        monkeypatch.setattr(module, "run_episodes", lambda *args, **options: pytest.fail("they are there"))
        return real(file)

    monkeypatch.setattr(kept, "lock", late)
    assert evaluate(recipe(tmp_path))["status"] == "finished already"


def swapping(monkeypatch: pytest.MonkeyPatch, swap: Callable[[], None]) -> None:
    """Evaluate with a run that writes another checkpoint as soon as the first episode is over."""
    play = players.run_episodes

    def run_episodes(jobs: list[PolicyJob], *, progress: Any, **options: Any) -> list[EpisodeResult]:
        def after_one(done: int, total: int, row: EpisodeResult) -> None:
            if done == 1:
                swap()
            progress(done, total, row)

        swap()  # and one between the digest and the first player's opening the file
        return play(jobs, progress=after_one, **options)

    monkeypatch.setattr(module, "run_episodes", run_episodes)


@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_run_in_training_what_is_recorded_is_played(
    workers: int, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that trains on replaces its last checkpoint all the time: every episode is of the one recorded."""
    whole = read_rows(evaluate(recipe(tmp_path, out=tmp_path / "whole", episodes=3))["rows"])
    (runs / "bc" / "run.json").write_text(json.dumps({"status": "started", "recipe": {"steps": 90}}))
    last = runs / "bc" / "checkpoints" / "last.safetensors"
    steps = iter(range(31, 90))
    digest = sha256(last)
    swapping(monkeypatch, lambda: save_run(runs / "bc", "bc", step=(at := next(steps)), noise=at))
    result = evaluate(recipe(tmp_path, workers=workers, episodes=3))
    assert read_rows(result["rows"]) == whole
    assert result["table"][0]["step"] == 30
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {job["sha256"] for job in record["jobs"]} == {digest} != {sha256(last)}
    assert {job["checkpoint"] for job in record["jobs"]} == {str(last)}
    assert not (tmp_path / "out" / "playing").exists()
    assert "not finished, evaluated at step 30 of 90" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_finished_run_that_is_trained_again_meanwhile_is_told(
    workers: int, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapping(monkeypatch, lambda: save_run(runs / "bc", "bc", noise=9))
    with pytest.raises(CvlctlError, match=r"last\.safetensors is another file by now"):
        evaluate(recipe(tmp_path, workers=workers))
    assert read_rows(tmp_path / "out" / "rows.jsonl") == []
    monkeypatch.setattr(module, "run_episodes", players.run_episodes)
    assert evaluate(recipe(tmp_path))["status"] == "evaluated"


@pytest.mark.parametrize(
    "play", [players.run_episodes, lambda *jobs, **more: lockstep.run_lockstep(*jobs, device="cpu", **more)]
)
def test_no_player_plays_another_file_than_the_job_is_of(play: Callable[..., Any], tmp_path: Path, runs: Path) -> None:
    file = runs / "bc" / "checkpoints" / "last.safetensors"
    job = PolicyJob("bc", TASK, 0, 30, file, sha256=sha256(file))
    rows = play([job], episodes=1)
    save_run(runs / "bc", "bc", noise=9)
    with pytest.raises(CvlctlError, match="is another file by now"):
        play([job], episodes=1)
    save_run(runs / "copy", "bc")
    assert play([replace(job, copy=runs / "copy")], episodes=1) == rows


def test_envpool_asks_for_the_very_file_too(tmp_path: Path, runs: Path) -> None:
    file = runs / "bc" / "checkpoints" / "last.safetensors"
    with pytest.raises(CvlctlError, match="is another file by now"):
        envpool.run_episodes([PolicyJob("bc", TASK, 0, 30, file, sha256="0" * 64)], episodes=1)


def test_a_damaged_checkpoint_is_not_played_by_workers_either(tmp_path: Path, runs: Path) -> None:
    file = runs / "bc" / "checkpoints" / "last.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1  # of a bias: a number like any other
    file.write_bytes(damaged)
    for workers in (0, 2):
        with pytest.raises(CvlctlError, match="damaged: its content is not what was written"):
            players.run_episodes(
                [PolicyJob("bc", TASK, seed, 30, file) for seed in (0, 1)], episodes=1, workers=workers
            )
        with pytest.raises(CvlctlError, match="damaged: its content is not what was written"):
            evaluate(recipe(tmp_path, workers=workers))
    assert not (tmp_path / "out").exists()


def test_a_run_in_a_folder_with_brackets_is_evaluated_by_that_very_path(tmp_path: Path) -> None:
    for name in ("bc[1]", "bc1", "*", "laeo?"):
        save_run(tmp_path / "runs" / name, "bc", seeds=(0,))
    for name in ("bc[1]", "*", "laeo?"):
        path = str(tmp_path / "runs" / name)
        evaluate(recipe(tmp_path, runs=[path], episodes=1, out=tmp_path / f"out-{name}"))
        (job,) = json.loads((tmp_path / f"out-{name}" / "evaluation.json").read_text())["jobs"]
        assert job["checkpoint"] == f"{path}/checkpoints/last.safetensors"
    result = evaluate(recipe(tmp_path, runs=[str(tmp_path / "runs" / "bc*")], episodes=1))
    assert result["table"][0]["runs"] == 1 and len(result["table"]) == 2


def test_patterns_look_into_a_folder_with_brackets_too(tmp_path: Path) -> None:
    for name in ("e[1]/bc", "e[1]/deep/bc", "e1/bc"):
        save_run(tmp_path / name, "bc", seeds=(0,))

    def found(pattern: str) -> list[str]:
        checkpoints = find_runs.checkpoints(recipe(tmp_path, runs=[f"{tmp_path}/{pattern}"]))
        return [str(checkpoint.run.relative_to(tmp_path)) for checkpoint in checkpoints]

    assert found("e[1]/b*") == found("e[1]/[ab]c") == found("e[1]/bc") == ["e[1]/bc"]
    assert found("e[1]/**/bc") == ["e[1]/bc", "e[1]/deep/bc"]
    assert found("e[!2]/bc") == found("?1/bc") == ["e1/bc"]
    assert found("e*/bc") == ["e1/bc", "e[1]/bc"]
    (tmp_path / "e[1]" / "b").symlink_to(tmp_path / "e[1]" / "b")
    assert found("e[1]/b*") == ["e[1]/bc"]


def job(**changes: Any) -> dict[str, Any]:
    return {"algorithm": "bc", "task": TASK, "seed": 0, "step": 30, "checkpoint": "x", "sha256": "0"} | changes


RECORDS: dict[str, Any] = {
    "empty": b"",
    "not UTF-8": b'{"format": "\xff"}',
    "deep": b'{"a":' * 100_000,
    "a list": [],
    "nothing": {},
    "another format": {"format": 2},
    "jobs of nothing": {"jobs": [{}]},
    "jobs that are no list": {"jobs": {}},
    "jobs that are numbers": {"jobs": [1]},
    "a job's seed as text": {"jobs": [job(seed="0")]},
    "a job's digest as a list": {"jobs": [job(sha256=["0"])]},
    "no recipe": {"recipe": None},
    "a recipe that is a list": {"recipe": []},
    "a status that is a list": {"status": []},
    "simulators that are a list": {"simulators": []},
    "a simulator that is text": {"simulators": {TASK: "mujoco"}},
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_damaged_record_is_one_error_and_force_replaces_it(what: str, tmp_path: Path, runs: Path) -> None:
    file, damage = tmp_path / "out" / "evaluation.json", RECORDS[what]
    sound = {"format": 1, "status": "finished", "recipe": recipe(tmp_path).resolved(), "jobs": [job()], "versions": {}}
    written = damage if isinstance(damage, bytes) else json.dumps(sound | damage if damage else damage).encode()
    file.parent.mkdir()
    file.write_text(json.dumps(sound))
    assert kept.read_evaluation(recipe(tmp_path)) == sound
    file.write_bytes(written)
    with pytest.raises(CvlctlError, match=r"evaluation\.json is damaged") as caught:
        evaluate(recipe(tmp_path))
    assert "--force" in caught.value.hint
    assert file.read_bytes() == written
    if what == "jobs of nothing":
        assert evaluate(recipe(tmp_path, episodes=1), force=True)["status"] == "evaluated"


TABLES: dict[str, Any] = {
    "gone": None,
    "nothing": b"{}",
    "deep": b'{"a":' * 100_000,
    "a number changed": "return_mean",
}


@pytest.mark.parametrize("what", TABLES)
def test_damaged_tables_are_computed_again_from_the_rows(
    what: str, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(recipe(tmp_path))
    file = tmp_path / "out" / "table.json"
    sound, damage = file.read_bytes(), TABLES[what]
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(sound.replace(b'"return_mean": -', b'"return_mean": 1') if damage == "return_mean" else damage)
    monkeypatch.setattr(module, "run_episodes", lambda *args, **options: pytest.fail("rows are there"))
    again = evaluate(recipe(tmp_path))
    assert again == {**first, "status": "finished already"}
    assert file.read_bytes() == sound
    module.render(again, console())


def test_an_evaluation_of_an_earlier_version_is_left_as_it_is(tmp_path: Path, runs: Path) -> None:
    """Its record names no digest of the tables, its `out` has no lock: what is there counts, if it can be shown."""
    first = evaluate(recipe(tmp_path))
    out = tmp_path / "out"
    record = json.loads((out / "evaluation.json").read_text())
    assert {"format", "recipe", "jobs", "status", "versions"} <= record.keys()  # what earlier versions look for
    del record["tables"]
    (out / "evaluation.json").write_text(json.dumps(record))
    (out / ".lock").unlink()
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert evaluate(recipe(tmp_path)) == {**first, "status": "finished already"}
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    for damage in ("{}", '{"table": [{}], "plots": 5}', '{"table": [{"task": 5}], "plots": [], "episodes": 1}'):
        (out / "table.json").write_text(damage)
        (out / "evaluation.json").write_text(json.dumps(record))
        assert evaluate(recipe(tmp_path)) == {**first, "status": "finished already"}


def test_a_kill_amid_force_leaves_an_evaluation(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(recipe(tmp_path))
    (tmp_path / "out" / "mine.txt").write_text("kept")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kept, "write_record", killed)
        evaluate(recipe(tmp_path, episodes=1), force=True)
    assert evaluate(recipe(tmp_path))["status"] == "evaluated"
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


BAD_HEADERS = {
    "no object": [],
    "seeds that are no list": {"seeds": 5},
    "seeds that are infinite": {"seeds": [float("inf")]},
    "no task": {"task": None},
    "a step as text": {"step": "30"},
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_header_that_is_wrong_is_one_error(what: str, tmp_path: Path, runs: Path) -> None:
    from cvlctl import checkpoints

    file, changes = runs / "bc" / "checkpoints" / "last.safetensors", BAD_HEADERS[what]
    state, metadata = checkpoints.load(file)
    checkpoints.save(file, state, metadata | changes if isinstance(changes, dict) else {})
    with pytest.raises(CvlctlError, match=r"last\.safetensors"):
        evaluate(recipe(tmp_path))


def test_a_run_whose_record_is_garbled_is_evaluated_all_the_same(tmp_path: Path, runs: Path) -> None:
    for text in ('{"recipe": []}', '{"recipe": {"steps": "x"}, "status": []}', '{"a":' * 100_000, "\udcff"):
        (runs / "bc" / "run.json").write_bytes(text.encode(errors="surrogateescape"))
        (found,) = find_runs.checkpoints(recipe(tmp_path))
        assert (found.step, found.seeds) == (30, (0, 1))
        assert report.estimates_of([found], {found.run: "bc"}) == {}
