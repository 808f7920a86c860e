"""`beside`: rows of finished evaluations in the tables of another one, without their policies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_evaluate import TASK, played, recipe, save_run  # noqa: F401 (played: a fixture)

from cvlctl.errors import CvlctlError
from cvlctl.experiments.reports.gather import of_folders
from cvlctl.score import report
from cvlctl.score.evaluate import evaluate
from cvlctl.score.rows import read_rows


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of an evaluation's time here, and are another file's subject."""
    monkeypatch.setattr(report, "plot_scores", lambda *args: None)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A finished evaluation of bc, whose runs are gone."""
    save_run(tmp_path / "elsewhere" / "bc", "bc")
    evaluate(recipe(tmp_path, runs=[str(tmp_path / "elsewhere" / "*")], out=tmp_path / "kept"))
    shutil.rmtree(tmp_path / "elsewhere")
    return tmp_path / "kept"


def test_rows_stand_beside_and_nothing_of_them_is_played(
    tmp_path: Path,
    kept: Path,
    played: list[Any],  # noqa: F811
) -> None:
    save_run(tmp_path / "runs" / "cvl", "cvl", noise=1)
    alone = evaluate(recipe(tmp_path, out=tmp_path / "alone"))
    played.clear()
    both = recipe(tmp_path, beside=[str(kept)], baseline="bc")
    result = evaluate(both)
    assert played == [("cvl", 0, 30), ("cvl", 1, 30)]
    assert result["table"] == [*alone["table"], *json.loads((kept / "table.json").read_text())["table"]]
    assert [record["baseline"] for record in result["pairwise"]] == ["bc"]
    assert read_rows(result["rows"]) == [*read_rows(alone["rows"]), *read_rows(kept / "rows.jsonl")]
    assert evaluate(both)["status"] == "finished already"
    assert len(played) == 2
    fewer = evaluate(recipe(tmp_path, beside=[str(kept)], episodes=1, out=tmp_path / "fewer"))
    assert [record["episodes"] for record in fewer["table"]] == [2, 2]


def test_without_runs_of_its_own_it_joins_others_and_can_be_joined_again(tmp_path: Path, kept: Path) -> None:
    save_run(tmp_path / "runs" / "cvl", "cvl", noise=1)
    evaluate(recipe(tmp_path, out=tmp_path / "kept-too"))
    result = evaluate(recipe(tmp_path, runs=[], beside=[str(tmp_path / "kept*")], out=tmp_path / "joined"))
    assert [(record["algorithm"], record["episodes"]) for record in result["table"]] == [("bc", 4), ("cvl", 4)]
    again = evaluate(recipe(tmp_path, beside=[str(tmp_path / "joined"), str(kept)], out=tmp_path / "again"))
    assert sorted(record["algorithm"] for record in again["table"]) == ["bc", "cvl"]  # the same policies once
    found = of_folders([str(tmp_path / "joined")])
    assert [evaluation.tables["table"] for evaluation in found.evaluations] == [result["table"]]


def test_an_evaluation_that_was_changed_since_changes_the_tables(tmp_path: Path, kept: Path) -> None:
    joining = recipe(tmp_path, runs=[], beside=[str(kept)])
    before = evaluate(joining)["table"][0]["return_mean"]
    lines = [json.loads(line) for line in (kept / "rows.jsonl").read_text().splitlines()]
    changed = [json.dumps(line | {"episode_return": line["episode_return"] + 10}) + "\n" for line in lines]
    (kept / "rows.jsonl").write_text("".join(changed))
    assert evaluate(joining)["table"][0]["return_mean"] == pytest.approx(before + 10)


def unfinished(kept: Path) -> None:
    record = json.loads((kept / "evaluation.json").read_text())
    (kept / "evaluation.json").write_text(json.dumps(record | {"status": "started"}))


def of_another_environment(kept: Path) -> None:
    record = json.loads((kept / "evaluation.json").read_text()) | {"references": {TASK: {"min": -1.0, "max": 1.0}}}
    (kept / "evaluation.json").write_text(json.dumps(record))
    shutil.copytree(kept, kept.with_name("kept-2"))
    record["references"][TASK]["max"] = 2.0
    (kept / "evaluation.json").write_text(json.dumps(record))


FAULTS: list[tuple[dict[str, Any], Callable[[Path], None], str]] = [
    ({"seed": 1}, lambda kept: None, "other episodes: its seed was 0, and is 1 here"),
    ({"horizon": 7}, lambda kept: None, "other episodes: its horizon was None, and is 7 here"),
    ({"episodes": 3}, lambda kept: None, "has 2 episodes of bc on gym/Pendulum-v1, seed 0"),
    ({"baseline": "cql"}, lambda kept: None, "no run is called 'cql'"),
    ({}, shutil.rmtree, "no evaluation matches"),
    ({}, unfinished, "holds no finished evaluation"),
    ({}, of_another_environment, "the references of gym/Pendulum-v1 in .* are not those that it has elsewhere"),
]


@pytest.mark.parametrize(("changes", "damage", "said"), FAULTS, ids=[said[:20] for _, _, said in FAULTS])
def test_what_cannot_be_joined_is_said_before_anything_is_written(
    tmp_path: Path, kept: Path, changes: dict[str, Any], damage: Callable[[Path], None], said: str
) -> None:
    damage(kept)
    with pytest.raises(CvlctlError, match=said):
        evaluate(recipe(tmp_path, runs=[], beside=[str(tmp_path / "kept*")], **changes))
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_name_and_seed_are_told_apart_by_whoever_names_them(tmp_path: Path, kept: Path) -> None:
    save_run(tmp_path / "runs" / "bc", "bc", noise=1)
    with pytest.raises(CvlctlError, match=r"has a run called bc on gym/Pendulum-v1, seed 0, which"):
        evaluate(recipe(tmp_path, beside=[str(kept)]))


def test_something_is_evaluated_and_goals_are_not_joined(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="name at least one run directory"):
        recipe(tmp_path, runs=[])
    with pytest.raises(ValidationError, match="leave out goals and backend"):
        recipe(tmp_path, beside=["kept"], goals={"from": "a.zarr"})
