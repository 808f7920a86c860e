"""`cvlctl compare` and `cvlctl runs`: what differs, what is shared, what there is, and what may be removed."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from toy_results import save_run, save_scores, save_store

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.errors import CvlctlError
from cvlctl.experiments import inventory
from cvlctl.experiments.compare import compare, in_words, render, shared_episodes
from cvlctl.files import lock
from cvlctl.terminal import console
from cvlctl.types import EpisodeResult

TASK = "gym/Pendulum-v1"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(task: str = TASK) -> list[str]:
    """bc, and cvl on another store, whose recipe has a key more."""
    stores = [save_store(Path(f"data/{i}.zarr"), seed=i) for i in (0, 1)]
    runs = [
        save_run(Path("runs/bc"), stores[0]),
        save_run(Path("runs/cvl"), stores[1], "cvl", task, init_from="runs/bc"),
    ]
    save_scores(Path("runs/scores"), runs, (TASK, task), ("bc", "cvl"))
    return list(map(str, runs))


def test_what_differs_and_scores_on_the_same_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    runs = save()
    result = compare(runs)
    differing = {(row["of"], row["key"]): row["values"] for row in result["differences"]}
    assert differing["recipe", "algorithm.name"] == ["bc", "cvl"]
    assert differing["recipe", "init_from"] == [None, "runs/bc"]
    assert differing["data", "data/0.zarr"][1] is None and len(differing["data", "data/1.zarr"][1]) == 64
    assert not [key for _, key in differing if key.startswith("torch") or key == "out"]
    (scored,) = result["scores"]
    saved = json.loads(Path("runs/scores/table.json").read_text())
    assert scored["table"] == saved["table"] and scored["pairwise"] == saved["pairwise"]
    assert {record["episodes"] for record in scored["shared"]} == {4} and not result["gaps"]
    assert execute(app, ["compare", *runs]) == 0
    out = capsys.readouterr().out
    assert "algorithm.name" in out and "of 4 shared episodes" in " ".join(out.split())


def test_in_a_narrow_terminal_no_name_is_broken() -> None:
    out = io.StringIO()
    narrow = console(file=out, force_terminal=True, width=40)
    render(compare(save()), narrow)
    inventory.render_ls(inventory.ls(Path("runs")), narrow)
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()]
    assert "bc bc, cvl cvl" in lines and "bc -, cvl runs/bc" in lines
    assert "command finetune, algorithm bc, task" in lines and lines.count("init_from") == 1
    assert {"scores", "cvl"} <= set(lines)


def test_shared_episodes_by_hand() -> None:
    def row(name: str, seed: int, episode: int, value: float) -> EpisodeResult:
        return EpisodeResult(name, TASK, seed, 9, episode, value, 5, None)

    rows = [row("a", 0, 0, 1.0), row("a", 1, 0, 3.0), row("a", 0, 1, 5.0), row("a", 1, 1, 5.0), row("a", 0, 7, 9.0)]
    rows += [row("b", 0, 0, 2.5), row("b", 0, 1, 4.0), row("b", 0, 2, 99.0)]
    (record,) = shared_episodes(rows, "a")
    assert (record["episodes"], record["above"], record["below"]) == (2, 1, 1)
    assert record["difference"] == pytest.approx(np.mean([2.5 - 2.0, 4.0 - 5.0]))
    assert in_words([record]) == [
        "b is above a on 1 of 2 shared episodes of Pendulum-v1 by return, below on 1; on average -0.25"
    ]


def test_runs_of_other_tasks_and_half_finished_ones_stand_beside_each_other() -> None:
    runs = save("gym/Hopper-v5")
    half = save_run(Path("runs/half"), Path("data/0.zarr"), finished=False)
    result = compare([*runs, str(half)])
    gaps = " | ".join(result["gaps"])
    assert "runs/half: its training is not finished" in gaps and "different tasks" in gaps
    assert "runs/half: no evaluation near it has scored it" in gaps
    assert not result["scores"][0]["shared"] and len(result["scores"][0]["table"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["runs/bc"], "two runs at least"), (["runs/bc", "runs/bc/"], "two runs at least"),
     (["runs/bc", "runs"], "runs below it: runs/bc"), (["runs/bc", "nowhere"], "nowhere is not a run")],
)  # fmt: skip
def test_what_cannot_be_compared(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(Path("runs/bc"), save_store(Path("data/0.zarr")))
    assert execute(app, ["compare", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_ls_and_show_tell_of_all_with_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    save()
    Path("runs/bad").mkdir()
    Path("runs/bad/run.json").write_text("[")
    os.symlink("/usr", "runs/bc/usr")  # nothing behind a link counts
    found = {row["path"]: row for row in inventory.ls(Path("runs"))}
    assert list(found) == ["runs/bad", "runs/bc", "runs/cvl", "runs/scores"]
    assert found["runs/bad"]["problem"] and found["runs/cvl"]["algorithm"] == "cvl"
    assert 0 < found["runs/bc"]["size_mb"] < 0.1
    assert found["runs/scores"]["command"] == "evaluate" and found["runs/scores"]["seeds"] == [0, 1, 2]
    shown = inventory.show(Path("runs/bc"))
    assert (
        shown["needed_by"] == ["runs/cvl"] and shown["evaluations"] == ["runs/scores"] and shown["last"]["step"] == 200
    )
    for arguments in (["ls"], ["ls", "--json"], ["show", "runs/cvl"], ["show", "runs/scores"]):
        assert execute(app, ["runs", *arguments]) == 0
        assert "cvl" in capsys.readouterr().out
    assert execute(app, ["runs", "show", "data"]) == 2
    with open("runs/bc/metrics.jsonl", "a") as log:
        log.write('{"step": 300, "actor/bc": [NaN, Infinity, 1.0]}\n')  # as one that diverged has logged
    assert execute(app, ["runs", "show", "runs/bc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last"] == {"step": 300, "actor/bc": [None, None, 1.0]}


def test_rm_takes_what_cvlctl_wrote_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    save()
    Path("elsewhere").mkdir()
    Path("elsewhere/last.safetensors").write_text("mine")
    os.rename("runs/cvl/checkpoints", "checkpoints")
    os.symlink("../../elsewhere", "runs/cvl/checkpoints")
    Path("runs/bc/thesis.tex").write_text("mine")
    Path("runs/bc/explain").mkdir()
    for name in ("psi-0.npy", "psi-0.json", "map-0-1.png"):  # as `cvlctl explain` keeps them
        Path("runs/bc/explain", name).touch()
    os.symlink("runs/cvl", "link")
    with pytest.raises(CvlctlError, match="is needed by runs/cvl"):
        inventory.remove([Path("runs/bc")])
    with pytest.raises(CvlctlError, match="is a link"):
        inventory.remove([Path("link")])
    with pytest.raises(CvlctlError, match="neither a run nor an evaluation"):
        inventory.remove([Path("runs/bc"), Path("elsewhere")], force=True)
    with lock(Path("runs/bc/.lock")), pytest.raises(CvlctlError, match="another process"):
        inventory.remove([Path("runs/bc")], force=True)
    assert execute(app, ["runs", "rm", "runs/bc", "runs/cvl"]) == 2  # nobody is here to answer
    assert "--yes" in capsys.readouterr().err
    assert len(inventory.ls(Path("runs"))) == 3
    assert execute(app, ["runs", "rm", "runs/bc", "runs/cvl", "runs/scores", "--yes"]) == 0
    assert "left there, since cvlctl did not write it: thesis.tex" in capsys.readouterr().out
    assert sorted(os.listdir("runs")) == ["bc", "cvl"] and os.listdir("runs/bc") == ["thesis.tex"]
    assert os.listdir("runs/cvl") == ["checkpoints"] and Path("elsewhere/last.safetensors").exists()


def test_what_an_unfinished_evaluation_plays_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(Path("runs/bc"), save_store(Path("data/0.zarr")))
    save_scores(Path("runs/scores"), [run], [TASK], ["bc"], skip=1)
    with pytest.raises(CvlctlError, match="is needed by runs/scores"):
        inventory.remove([run])
    inventory.remove([run], force=True)
    assert not run.exists()
