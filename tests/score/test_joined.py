"""`beside`: rows of finished evaluations in the tables of another one, without their policies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_evaluate import EPISODES, TASK, played, recipe, save_run  # noqa: F401 (played: a fixture)

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.experiments.graph import cells_of
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


def with_other_references(kept: Path) -> None:
    record = json.loads((kept / "evaluation.json").read_text()) | {"references": {TASK: {"min": -1.0, "max": 1.0}}}
    (kept / "evaluation.json").write_text(json.dumps(record))
    shutil.copytree(kept, kept.with_name("kept-2"))
    record["references"][TASK]["max"] = 2.0
    (kept / "evaluation.json").write_text(json.dumps(record))


def in_another_environment(kept: Path) -> None:
    shutil.copytree(kept, kept.with_name("kept-2"))
    record = json.loads((kept / "evaluation.json").read_text())
    (kept / "evaluation.json").write_text(json.dumps(record | {"environments": {TASK: {"sha256": "1"}}}))


def with_a_row_too_many(kept: Path) -> None:
    text = (kept / "rows.jsonl").read_text()
    (kept / "rows.jsonl").write_text(text.replace('"episode": 0', '"episode": -1'))


def deeply_nested(kept: Path) -> None:
    (kept / "rows.jsonl").write_text("[" * 100_000 + "\n")


def called_nothing(kept: Path) -> None:
    for name in ("evaluation.json", "rows.jsonl"):
        text = (kept / name).read_text()
        (kept / name).write_text(text.replace('"algorithm": "bc"', '"algorithm": "b\\ud800"'))


FAULTS: list[tuple[dict[str, Any], Callable[[Path], None], str]] = [
    ({"seed": 1}, lambda kept: None, "other episodes: its seed was 0, and is 1 here"),
    ({"horizon": 7}, lambda kept: None, "other episodes: its horizon was None, and is 7 here"),
    ({"episodes": 3}, lambda kept: None, "has 2 episodes of bc on gym/Pendulum-v1, seed 0"),
    ({"baseline": "cql"}, lambda kept: None, "no run is called 'cql'"),
    ({}, shutil.rmtree, "no evaluation matches"),
    ({}, unfinished, "holds no finished evaluation"),
    ({}, with_other_references, "the references of gym/Pendulum-v1 in .* differ from those elsewhere"),
    ({}, in_another_environment, "the environments of gym/Pendulum-v1 in .* differ from those elsewhere"),
    ({}, with_a_row_too_many, "has 1 episodes of bc on gym/Pendulum-v1, seed 0"),
    ({}, deeply_nested, "line 1: not an evaluated episode"),
    ({}, called_nothing, "is not text that can be stored|a name"),
]


@pytest.mark.parametrize(("changes", "damage", "said"), FAULTS, ids=[said[:20] for _, _, said in FAULTS])
def test_what_cannot_be_joined_is_said_before_anything_is_written(
    tmp_path: Path, kept: Path, changes: dict[str, Any], damage: Callable[[Path], None], said: str
) -> None:
    damage(kept)
    with pytest.raises(CvlctlError, match=said):
        evaluate(recipe(tmp_path, runs=[], beside=[str(tmp_path / "kept*")], **changes))
    assert not (tmp_path / "out").exists()


def test_what_was_joined_is_not_emptied_by_being_joined_with_nothing(tmp_path: Path, kept: Path) -> None:
    joining = recipe(tmp_path, runs=[], beside=[str(kept)])
    evaluate(joining)
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    with pytest.raises(CvlctlError, match="there is nothing to show"):
        evaluate(recipe(tmp_path, runs=[], beside=[str(tmp_path / "out")]))
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows
    with pytest.raises(CvlctlError, match="no evaluation matches"):
        evaluate(recipe(tmp_path, runs=[], beside=["x" * 300]))


def test_the_curve_of_a_run_whose_end_is_there_already(tmp_path: Path) -> None:
    save_run(tmp_path / "runs" / "bc", "bc", steps=(10, 20))
    evaluate(recipe(tmp_path, out=tmp_path / "a[1]"))
    evaluate(recipe(tmp_path, out=tmp_path / "b", checkpoints="all"))
    for order in (["a[1]", "b"], ["b", "a[1]"], ["[ab]*"]):
        names = [str(tmp_path / name) for name in order]
        result = evaluate(recipe(tmp_path, runs=[], beside=names, out=tmp_path / "-".join(order).replace("*", "")))
        assert result["episodes"] == 3 * 2 * EPISODES and {row["updates"] for row in result["curves"]} == {10, 20, 30}


def test_reports_take_no_run_of_this_place_for_one_that_was_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(Path("runs/bc"), "bc")
    evaluate(recipe(Path(), out="kept"))
    save_run(Path("runs/bc"), "bc", noise=1)  # another one, in the same place
    evaluate(recipe(Path(), runs=[], beside=["kept"], out="joined"))
    assert of_folders(["joined"]).gaps == []
    assert len(of_folders(["kept"]).gaps) == 1


def test_an_experiment_joins_what_its_cells_have_scored(tmp_path: Path) -> None:
    stages: dict[str, Any] = {
        "one": {"command": "evaluate", "runs": ["a"], "out": "${out}/one/scores"},
        "two": {"command": "evaluate", "runs": ["b"], "out": "${out}/two/scores"},
        "all": {"command": "evaluate", "runs": [], "beside": ["${out}/*/scores"], "out": "${out}/all/scores"},
    }
    (tmp_path / "e.yaml").write_text(json.dumps({"out": str(tmp_path / "e"), "stages": stages}))
    experiment = load(tmp_path / "e.yaml", [], "run")
    needs = {cell.name: cell.needs for cell in cells_of(experiment.out, experiment.jobs)}
    assert needs == {"one/scores": (), "two/scores": (), "all/scores": ("one/scores", "two/scores")}


def test_two_runs_of_one_name_and_seed_are_told_apart_by_whoever_names_them(tmp_path: Path, kept: Path) -> None:
    save_run(tmp_path / "runs" / "bc", "bc", noise=1)
    with pytest.raises(CvlctlError, match=r"has a run called bc on gym/Pendulum-v1, seed 0, which"):
        evaluate(recipe(tmp_path, beside=[str(kept)]))


def test_something_is_evaluated_and_goals_are_not_joined(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="name at least one run directory"):
        recipe(tmp_path, runs=[])
    with pytest.raises(ValidationError, match="leave out goals and backend"):
        recipe(tmp_path, beside=["kept"], goals={"from": "a.zarr"})
