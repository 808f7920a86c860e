"""A run's directory: what kills leave, who may write, what is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cvlctl.errors import CvlctlError
from cvlctl.runs import LABELS_FILE, Run, read_metrics, read_run

RECIPE = {"steps": 7, "out": "run"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", RECIPE, {"store": "abc"})


def trained(run: Run, *steps: int) -> None:
    """What a run has after a checkpoint."""
    for step in steps:
        run.log(step, {"loss": [1.0]})
    run.checkpoints.mkdir()
    run.last.write_bytes(b"x")


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_before_the_first_record_leaves_nothing_to_trip_over(run: Run, force: bool) -> None:
    run.out.mkdir()
    (run.out / ".lock").touch()
    (run.out / ".run.json.4711.tmp").write_text('{"sta')
    assert run.open(force=force) == "fresh"
    assert sorted(os.listdir(run.out)) == [".lock", "recipe.yaml", "run.json"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_temporaries_of_others_is_not_ours(run: Run, force: bool) -> None:
    run.out.mkdir()
    (run.out / ".thesis.tex.4711.tmp").write_text("chapter one")
    with pytest.raises(CvlctlError, match="is not empty and not a run"):
        run.open(force=force)
    assert os.listdir(run.out) == [".thesis.tex.4711.tmp"]


def test_what_dead_processes_left_goes_with_the_next_command(run: Run) -> None:
    run.open()
    trained(run, 5)
    run.close()
    left = [run.out / ".recipe.yaml.4711.tmp", run.out / f".{LABELS_FILE}.4711.tmp", run.out / ".metrics.png.1.tmp"]
    left += [run.checkpoints / ".last.safetensors.4711.tmp", run.checkpoints / ".step-000000005.safetensors.1.tmp"]
    mine = [run.out / ".notes.4711.tmp", run.out / "notes.tmp"]
    for file in [*left, *mine]:
        file.write_bytes(b"half")
    assert run.open() == "resume"
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in mine)
    run.finish(steps=7)
    left[-1].write_bytes(b"half")
    assert run.open() == "finished"
    assert not left[-1].exists()


def test_of_two_at_once_the_second_is_refused_and_touches_nothing(run: Run) -> None:
    other = Run(run.out, RECIPE, {"store": "abc"})
    assert run.open() == "fresh"
    trained(run, 5)
    for force in (False, True):
        with pytest.raises(CvlctlError, match="another process is writing"):
            other.open(force=force)
    assert run.last.exists() and read_metrics(run.out)
    run.close()
    assert other.open() == "resume"


def test_what_another_process_did_before_we_got_the_lock_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another process finishes just as we look is finished, and not begun anew."""
    from cvlctl import runs

    other, lock = Run(run.out, RECIPE, {"store": "abc"}), runs.lock

    def late(file: Path) -> object:
        monkeypatch.setattr(runs, "lock", lock)
        assert other.open() == "fresh"
        trained(other, 7)
        other.finish(steps=7)
        return lock(file)

    monkeypatch.setattr(runs, "lock", late)
    assert run.open() == "finished"
    assert read_metrics(run.out) == [{"step": 7, "loss": [1.0]}]
    assert Run(run.out, RECIPE, {"store": "abc"}).open(force=True) == "fresh"  # and nobody holds it


def test_a_finished_run_is_found_where_nothing_can_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.open()
    run.finish(steps=7)
    monkeypatch.setattr("cvlctl.runs.lock", lambda file: pytest.fail("nobody needs to lock a finished run"))
    assert run.open() == "finished"


def test_rewards_that_another_recipe_learned_are_not_taken_for_ours(run: Run) -> None:
    run.open()
    (run.out / LABELS_FILE).write_bytes(b"learned")
    run.close()
    assert run.open() == "fresh" and (run.out / LABELS_FILE).exists()  # the same recipe: they are what it would learn
    run.close()
    other = Run(run.out, RECIPE | {"steps": 6}, {"store": "abc"})
    assert other.open() == "fresh" and not (run.out / LABELS_FILE).exists()
    (run.out / LABELS_FILE).write_bytes(b"learned")
    trained(other, 8)
    other.finish()
    assert other.open(force=True) == "fresh" and not (run.out / LABELS_FILE).exists()


def deep(depth: int = 100_000) -> bytes:
    return b'{"a":' * depth


DAMAGED = {
    "empty": b"",
    "torn": b'{"status": "start',
    "not UTF-8": b'{"status": "\xff"}',
    "a list": b"[]",
    "text": b'"status"',
    "deep": deep(),
    "a deep recipe": b'{"status": "started", "inputs": {}, "recipe": ' + deep(),
    "no status": b'{"inputs": {}, "recipe": {}}',
    "a status that is a number": b'{"status": 1, "inputs": {}, "recipe": {}}',
    "no inputs": b'{"status": "started", "recipe": {}}',
    "inputs that are a list": b'{"status": "started", "inputs": [], "recipe": {}}',
    "a recipe that is a list": b'{"status": "started", "inputs": {}, "recipe": []}',
    "a recipe that is nothing": b'{"status": "finished", "inputs": {}, "recipe": null}',
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_record_is_one_error_and_force_starts_over(what: str, run: Run) -> None:
    run.open()
    trained(run, 5)
    run.close()
    (run.out / "run.json").write_bytes(DAMAGED[what])
    for read in (run.open, lambda: read_run(run.out)):
        with pytest.raises(CvlctlError, match=r"run\.json: damaged") as caught:
            read()
        assert "--force" in caught.value.hint and len(str(caught.value)) < 1000
    assert run.last.exists()
    assert run.open(force=True) == "fresh"


def test_a_recipe_nearly_too_deep_to_read_is_another_recipe(run: Run) -> None:
    run.open()
    trained(run, 5)
    run.close()
    for depth in (100, 900, 5000):
        recipe = "{" + '"steps": {' * depth + "}" * depth + "}"
        (run.out / "run.json").write_text(f'{{"status": "started", "inputs": {{}}, "recipe": {recipe}}}')
        with pytest.raises(CvlctlError, match=r"holds another run|damaged"):
            run.open()


LINES = {
    "not UTF-8": b'{"step": 1}\n\xff\xfe\n{"step": 3}\n',
    "no object": b'{"step": 1}\n[1, 2]\n{"step": 3}\n',
    "no step": b'{"step": 1}\n{"loss": 2}\n{"step": 3}\n',
    "a step that is text": b'{"step": 1}\n{"step": "2"}\n',
    "zeros": b'{"step": 1}\n\0\0\0\0\0\0\n{"step": 3}\n',
    "deep": b'{"step": 1}\n' + deep() + b"\n",
    "an empty line": b'{"step": 1}\n\n{"step": 3}\n',
}


@pytest.mark.parametrize("what", LINES)
def test_a_damaged_line_of_metrics_is_named(what: str, run: Run) -> None:
    run.open()
    path = run.out / "metrics.jsonl"
    path.write_bytes(LINES[what])
    for read in (lambda: read_metrics(run.out), lambda: run.cut_metrics(3)):
        with pytest.raises(CvlctlError, match=r"metrics\.jsonl, line 2: damaged"):
            read()
    assert path.read_bytes() == LINES[what]
    run.cut_metrics(0)  # starting over needs none of them
    assert path.read_bytes() == b""


@pytest.mark.parametrize("rest", [b"", b'{"st', b"\xff", b"\0\0\0", b'{"loss": 1}', b'{"step": 3, "loss": 2.5}'])
def test_what_a_kill_cut_off_at_the_end_is_dropped(rest: bytes, run: Run) -> None:
    run.open()
    for step in (1, 2):
        run.log(step, {"loss": [0.5]})
    with open(run.out / "metrics.jsonl", "ab") as file:
        file.write(rest)
    steps = [line["step"] for line in read_metrics(run.out)]
    assert steps == ([1, 2, 3] if rest.endswith(b"2.5}") else [1, 2])
    run.cut_metrics(2)
    run.log(3, {"loss": [0.25]})
    assert [line["step"] for line in read_metrics(run.out)] == [1, 2, 3]


def test_metrics_that_are_gone_or_cannot_be_written_are_told(run: Run) -> None:
    run.open()
    run.sync_metrics()
    with pytest.raises(CvlctlError, match=r"cannot read .*metrics\.jsonl: No such file"):
        read_metrics(run.out)
    (run.out / "metrics.jsonl").mkdir()
    with pytest.raises(CvlctlError, match=r"cannot write .*metrics\.jsonl"):
        run.log(1, {})


def test_metrics_are_on_the_disk_before_the_checkpoint_that_goes_on_after_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.open()
    run.log(1, {})
    synced: list[str] = []
    monkeypatch.setattr("cvlctl.runs.sync", lambda path: synced.append(path.name))
    run.sync_metrics()
    assert synced == ["metrics.jsonl", "run"]  # and its name


def test_a_run_of_an_earlier_version_without_a_recipe_in_its_record_is_another_run(run: Run) -> None:
    run.open()
    trained(run, 5)
    run.close()
    (run.out / "run.json").write_text(json.dumps({"status": "started", "inputs": {"store": "abc"}}))
    with pytest.raises(CvlctlError, match="holds another run: steps was null, now 7"):
        run.open()


def test_starting_over_keeps_what_somebody_put_beside_the_checkpoints(run: Run) -> None:
    own = ("last.safetensors", "step-000000002.safetensors", "episodes-000000003.safetensors")
    assert run.open(force=False) == "fresh"
    run.checkpoints.mkdir(exist_ok=True)
    for name in (*own, "keep.safetensors", "step-best.safetensors"):
        (run.checkpoints / name).write_bytes(b"")
    run.close()
    assert Run(run.out, RECIPE, {"store": "other"}).open(force=True) == "fresh"
    assert sorted(file.name for file in run.checkpoints.iterdir()) == ["keep.safetensors", "step-best.safetensors"]
