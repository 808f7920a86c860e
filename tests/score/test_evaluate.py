"""`cvlctl evaluate`: which runs, what they are called, what is reused, and what the files hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvlctl import checkpoints, figures
from cvlctl.cli.console import console
from cvlctl.errors import CvlctlError
from cvlctl.play import players
from cvlctl.play.lockstep import run_lockstep
from cvlctl.play.rollout import PolicyJob
from cvlctl.score import evaluate as module
from cvlctl.score.evaluate import evaluate
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.rows import read_rows
from cvlctl.types import EpisodeResult

TASK = "gym/Pendulum-v1"
EPISODES = 2


def save_run(
    run: Path,
    algorithm: str,
    *,
    seeds: tuple[int, ...] = (0, 1),
    steps: tuple[int, ...] = (),
    step: int = 30,
    noise: int = 0,
) -> None:
    """A run with checkpoints of random actors at `steps` and, last, at `step`; "occupancy" is a critic, without one."""
    generator = torch.Generator().manual_seed(noise)
    for at, name in [*((at, f"step-{at:09d}") for at in steps), (step, "last")]:
        sizes, num = (3, 8, 2), len(seeds)
        state = {"observation_mean": torch.zeros(num, 3), "observation_std": torch.ones(num, 3)}
        for i in range(2 if algorithm != "occupancy" else 0):
            state[f"actor.{i}.weight"] = torch.randn(num, sizes[i], sizes[i + 1], generator=generator)
            state[f"actor.{i}.bias"] = torch.zeros(num, 1, sizes[i + 1])
        metadata = {"algorithm": algorithm, "task": TASK, "seeds": list(seeds), "step": at}
        metadata["spec"] = {"observation_shape": [3], "action_dim": 1, "horizon": 200, "pixels": False}
        checkpoints.save(run / "checkpoints" / f"{name}.safetensors", state, metadata)


def recipe(tmp_path: Path, **changes: Any) -> EvaluateRecipe:
    plain = {"runs": [str(tmp_path / "runs" / "*")], "episodes": EPISODES, "workers": 0, "out": tmp_path / "out"}
    return EvaluateRecipe.model_validate({**plain, "confidence": {"resamples": 50}, **changes})


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """(algorithm, seed, step) of every job that really runs."""
    seen: list[tuple[str, int, int]] = []

    def run_episodes(jobs: list[PolicyJob], **options: Any) -> list[EpisodeResult]:
        seen.extend((job.algorithm, job.seed, job.step) for job in jobs)
        return players.run_episodes(jobs, **options)

    monkeypatch.setattr(module, "run_episodes", run_episodes)
    yield seen


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for noise, algorithm in enumerate(["bc", "cvl"]):
        save_run(tmp_path / "runs" / algorithm, algorithm, steps=(10, 20), noise=noise)
    save_run(tmp_path / "runs" / "critic", "occupancy")
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def test_rows_tables_and_pictures(tmp_path: Path, runs: Path) -> None:
    result = evaluate(recipe(tmp_path))
    assert result["status"] == "evaluated"
    assert [(r["algorithm"], r["runs"], r["episodes"], r["step"]) for r in result["table"]] == [
        ("bc", 2, 4, 30),
        ("cvl", 2, 4, 30),
    ]
    jobs = [PolicyJob(name, TASK, seed, 30, runs / name) for name in ("bc", "cvl") for seed in (0, 1)]
    rows = read_rows(result["rows"])
    assert rows == players.run_episodes(jobs, episodes=EPISODES, workers=0)
    mean = np.mean([row.episode_return for row in rows if row.algorithm == "cvl"])
    assert result["table"][1]["return_mean"] == pytest.approx(mean)
    assert [r["algorithm"] for r in result["pairwise"]] == ["cvl"]
    assert len(result["runs"]) == 4
    saved = json.loads((tmp_path / "out" / "table.json").read_text())
    assert saved["table"] == result["table"]
    assert (tmp_path / "out" / "table.csv").read_text().startswith("task,algorithm,")
    assert "| cvl |" in (tmp_path / "out" / "table.md").read_text()
    assert [Path(plot).name for plot in result["plots"]] == ["scores.png"]
    assert Path(result["plots"][0]).read_bytes().startswith(b"\x89PNG")


def test_a_horizon_cuts_episodes_off(tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(recipe(tmp_path, horizon=7))
    whole = evaluate(recipe(tmp_path, out=tmp_path / "whole"))
    short, long = read_rows(result["rows"]), read_rows(whole["rows"])
    assert {row.length for row in short} == {7} and {row.length for row in long} == {200}
    assert all(a.episode_return > b.episode_return for a, b in zip(short, long, strict=True))  # rewards are negative
    jobs = [PolicyJob(name, TASK, seed, 30, runs / name, horizon=7) for name in ("bc", "cvl") for seed in (0, 1)]
    lockstep = run_lockstep(jobs, episodes=EPISODES, device="cpu")
    assert [row.episode_return for row in lockstep] == pytest.approx([row.episode_return for row in short], rel=1e-4)
    module.render(result, console())
    module.render(whole, console())
    assert capsys.readouterr().out.count("episodes cut off at 7 steps") == 1
    with pytest.raises(CvlctlError, match="horizon was None, now 7"):
        evaluate(recipe(tmp_path, out=tmp_path / "whole", horizon=7))
    with pytest.raises(CvlctlError, match="horizon: 201 is longer than the 200 steps"):
        evaluate(recipe(tmp_path, out=tmp_path / "long", horizon=201))


def test_checkpoints_all_gives_learning_curves(tmp_path: Path, runs: Path) -> None:
    result = evaluate(recipe(tmp_path, checkpoints="all"))
    assert {row.step for row in read_rows(result["rows"])} == {10, 20, 30}
    assert [Path(plot).name for plot in result["plots"]] == ["scores.png", "curves.png"]
    assert all(record["step"] == 30 for record in result["table"])


def test_a_tuning_budget_needs_no_new_episodes(tmp_path: Path, runs: Path, played: list[Any]) -> None:
    first = evaluate(recipe(tmp_path))
    assert first["tuning"] == [] and first["profiles"] == [] and first["comparison"] == []  # one task
    played.clear()
    with pytest.raises(CvlctlError, match=r"tuning: 0 of the evaluated runs match 'iql\*'"):
        evaluate(recipe(tmp_path, tuning=["iql*"]))
    again = evaluate(recipe(tmp_path, tuning=["*"]))
    assert played == []
    assert [(r["of"], r["tried"], r["settings"]) for r in again["tuning"]] == [("*", 1, 2), ("*", 2, 2)]
    values = [r["return_runs"] for r in again["table"]]
    assert again["tuning"][0]["return_tuned"] == pytest.approx(np.mean(values))
    assert "| settings | tried |" in (tmp_path / "out" / "table.md").read_text()


def test_asked_again_nothing_runs(tmp_path: Path, runs: Path, played: list[Any]) -> None:
    first = evaluate(recipe(tmp_path))
    played.clear()
    again = evaluate(recipe(tmp_path))
    assert again == {**first, "status": "finished already"}
    other = evaluate(recipe(tmp_path, confidence={"level": 0.5, "resamples": 50}))
    assert other["status"] == "evaluated"
    assert other["table"][0]["level"] == 0.5
    assert played == []


def test_only_what_is_missing_or_new_runs(tmp_path: Path, runs: Path, played: list[Any]) -> None:
    first = read_rows(evaluate(recipe(tmp_path))["rows"])
    played.clear()
    save_run(runs / "laeo", "laeo", seeds=(4,), noise=7)
    save_run(runs / "bc", "bc", noise=8)  # trained again
    second = read_rows(evaluate(recipe(tmp_path))["rows"])
    assert played == [("bc", 0, 30), ("bc", 1, 30), ("laeo", 4, 30)]
    assert [row for row in second if row.algorithm == "cvl"] == [row for row in first if row.algorithm == "cvl"]
    assert [row.episode_return for row in second[:4]] != [row.episode_return for row in first[:4]]


def test_a_label_that_was_given_since_is_what_tables_say(tmp_path: Path, runs: Path, played: list[Any]) -> None:
    first = evaluate(recipe(tmp_path))
    played.clear()
    said = {
        "bc": {"label": "cloned", "algorithm": {"name": "bc"}},
        "cvl": {"label": None, "algorithm": {"name": "cvl"}},
    }
    for name, plain in said.items():
        (runs / name / "run.json").write_text(json.dumps({"status": "finished", "inputs": {}, "recipe": plain}))
    again = evaluate(recipe(tmp_path))
    assert [record["algorithm"] for record in again["table"]] == ["cloned", "cvl"]
    assert again["table"][0]["return_mean"] == first["table"][0]["return_mean"] and played == []


@pytest.mark.parametrize("every", [1e9, 0.0])
def test_an_interrupted_evaluation_goes_on(
    every: float, tmp_path: Path, runs: Path, played: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C loses no episode that was over, and a kill only those since the last save."""
    whole = read_rows(evaluate(recipe(tmp_path, out=tmp_path / "whole"))["rows"])
    play = module.run_episodes
    lines: list[int] = []

    def interrupted(jobs: list[PolicyJob], *, progress: Any, **options: Any) -> list[EpisodeResult]:
        def third(done: int, total: int, row: EpisodeResult) -> None:
            progress(done, total, row)
            lines.append(len(read_rows(tmp_path / "out" / "rows.jsonl")))
            if done == 3:
                raise KeyboardInterrupt

        return play(jobs, progress=third, **options)

    monkeypatch.setattr(module, "run_episodes", interrupted)
    monkeypatch.setattr(module, "SAVE_SECONDS", every)
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe(tmp_path))
    assert lines == ([1, 2, 3] if every == 0.0 else [0, 0, 0])
    assert read_rows(tmp_path / "out" / "rows.jsonl") == whole[:3]
    monkeypatch.setattr(module, "run_episodes", play)
    played.clear()
    assert read_rows(evaluate(recipe(tmp_path))["rows"]) == whole
    assert played == [("bc", 1, 30), ("cvl", 0, 30), ("cvl", 1, 30)]


def test_a_damaged_line_is_one_episode_to_run_again(
    tmp_path: Path, runs: Path, played: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(evaluate(recipe(tmp_path))["rows"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    (tmp_path / "out" / "table.json").unlink()
    played.clear()
    evaluate(recipe(tmp_path))
    assert path.read_bytes() == whole
    assert played == [("cvl", 1, 30)]
    assert "rows.jsonl: 1 damaged line dropped" in capsys.readouterr().err


def test_more_episodes_run_only_those_that_are_missing(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(recipe(tmp_path))
    play = module.run_episodes
    seen: list[Any] = []

    def run_episodes(jobs: list[PolicyJob], *, episodes: Any, **options: Any) -> list[EpisodeResult]:
        seen.append(episodes)
        return play(jobs, episodes=episodes, **options)

    monkeypatch.setattr(module, "run_episodes", run_episodes)
    result = evaluate(recipe(tmp_path, episodes=3))
    assert seen == [[[2]] * 4]
    assert result["status"] == "evaluated"
    fresh = evaluate(recipe(tmp_path, episodes=3, out=tmp_path / "fresh"))
    assert read_rows(result["rows"]) == read_rows(fresh["rows"])


def test_another_recipe_for_the_same_out_needs_force(tmp_path: Path, runs: Path) -> None:
    evaluate(recipe(tmp_path))
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(CvlctlError, match="episodes was 2, now 1") as caught:
        evaluate(recipe(tmp_path, episodes=1))
    assert "--force" in caught.value.hint
    result = evaluate(recipe(tmp_path, episodes=1), force=True)
    assert result["episodes"] == 4
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    for force in (False, True):
        with pytest.raises(CvlctlError, match="is not empty, and no evaluation") as caught:
            evaluate(recipe(tmp_path, out=tmp_path / "other"), force=force)
        assert "--force" not in caught.value.hint
        with pytest.raises(CvlctlError, match=r"mine\.txt is not a directory"):
            evaluate(recipe(tmp_path, out=tmp_path / "other" / "mine.txt"), force=force)


def test_two_runs_of_one_algorithm_are_told_apart(tmp_path: Path) -> None:
    for name in ("cvl-low", "cvl-high", "third"):
        save_run(tmp_path / "runs" / name, "cvl", seeds=(0,))
    save_run(tmp_path / "runs" / "cloned", "bc", seeds=(0,))
    for part in ("a", "b"):
        save_run(tmp_path / "runs2" / part / "run", "laeo", seeds=(0,))
    names = [str(tmp_path / "runs" / "*"), str(tmp_path / "runs2" / "*" / "run"), str(tmp_path / "runs" / "third")]
    result = evaluate(recipe(tmp_path, runs=names, episodes=1))
    found = [record["algorithm"] for record in result["table"]]
    assert sorted(found) == ["bc", "cvl-high", "cvl-low", "cvl/third", "laeo/a/run", "laeo/b/run"]
    assert {record["baseline"] for record in result["pairwise"]} == {"bc"}


def test_what_is_wrong_with_runs_is_said(tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(**changes: Any) -> str:
        with pytest.raises(CvlctlError) as caught:
            evaluate(recipe(tmp_path, **changes))
        return str(caught.value)

    assert "no run with a policy matches" in error(runs=[str(tmp_path / "nothing" / "*")])
    assert "no run with a policy matches" in error(runs=[str(runs / "crit*")])
    assert "no run at" in error(runs=[str(tmp_path / "nothing")])
    assert "holds no policy" in error(runs=[str(runs / "critic")])
    assert "did you mean cvl?" in error(baseline="clv")
    (runs / "a-begun" / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in error(runs=[str(runs / "a-begun")])
    last = runs / "bc" / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:50])
    assert "cannot be read as a checkpoint" in error()
    assert "a-begun: no checkpoint yet, left out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_evaluated_and_said_to_be(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "cvl" / "run.json").write_text(json.dumps({"recipe": {"steps": 90}}))
    evaluate(recipe(tmp_path, episodes=1))
    assert "cvl: not finished, evaluated at step 30 of 90" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(CvlctlError, match="PyTorch sees no GPU"):
        evaluate(recipe(tmp_path, device="cuda"))


def test_a_gpu_answers_for_large_policies(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    lockstep = run_lockstep

    def play(jobs: Any, device: str, **more: Any) -> Any:
        asked.append(device)
        return lockstep(jobs, device="cpu", **more)

    monkeypatch.setattr(module, "run_lockstep", play)
    small = read_rows(evaluate(recipe(tmp_path, device="auto", out=tmp_path / "small"))["rows"])
    assert not asked
    monkeypatch.setattr(module, "GPU_PAYS_AFTER", 1)
    fast = read_rows(evaluate(recipe(tmp_path, device="auto"))["rows"])
    assert asked == ["cuda"]
    slow = read_rows(evaluate(recipe(tmp_path, out=tmp_path / "slow"))["rows"])
    assert [row.episode_return for row in fast] == pytest.approx([row.episode_return for row in slow], rel=1e-3)
    assert small == slow
    said = capsys.readouterr().err
    assert "device: cpu (auto: policies of up to 2,000,000 weights" in said
    assert "device: cuda (auto: policies of above 1 weights" in said
    with pytest.raises(CvlctlError, match="device: cuda:9, but PyTorch sees 2 GPUs"):
        evaluate(recipe(tmp_path, device="cuda:9", out=tmp_path / "ninth"))


def test_without_matplotlib_there_are_scores_and_no_pictures(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    figures.can_draw.cache_clear()
    result = evaluate(recipe(tmp_path))
    figures.can_draw.cache_clear()
    assert result["plots"] == [] and len(result["table"]) == 2
    assert capsys.readouterr().err.count("matplotlib is not installed: no pictures") == 1


def test_texts(tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(recipe(tmp_path))
    assert module.as_text(result, "csv").count("\n") == 3
    markdown = module.as_text(result, "markdown")
    assert [title in markdown for title in ("### scores", "### against the baseline", "### single runs")] == [True] * 3
    module.render(result, console())
    out = capsys.readouterr().out
    assert "cvl" in out
    assert f"rows:   {result['rows']}" in out
    assert f"plots:  {result['plots'][0]}" in out
