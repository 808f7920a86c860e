"""Policies in environments of one's own, by the real commands: and what a stranger's run may say of one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import toy_robots

from cvlctl.checkpoints import read, save, unpack
from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.export import export
from cvlctl.learn.finetune import finetune
from cvlctl.learn.recipe import FinetuneRecipe
from cvlctl.play import envs
from cvlctl.play.lockstep import run_lockstep
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import PolicyJob
from cvlctl.score.evaluate import evaluate
from cvlctl.score.recipe import EvaluateRecipe

REACH, REACHER = "py/robots.py:Reach", "gym/Reacher-v5"
ENV = {"kwargs": {"size": 1.5}, "success": "is_success"}


def trained(task: str, **more: Any) -> None:
    """data/x.zarr of random actions, and runs/x of a policy that clones them, in the current directory."""
    source = {"name": "random", "episodes": 4}
    build(BuildRecipe.model_validate({"task": task, "source": source, "out": "data/x.zarr", **more}))
    plain = {"stores": ["data/x.zarr"], "algorithm": {"name": "bc", "hidden": [8]}, "steps": 5, "batch_size": 16}
    finetune(FinetuneRecipe.model_validate({**plain, "seeds": [0, 1], "out": "runs/x", "compile": "false"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where robots.py lies, a store of Reach, and a run on it."""
    folder = tmp_path_factory.mktemp("robots")
    toy_robots.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained(REACH, horizon=20, env=ENV)
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def evaluated(out: Path, **more: Any) -> dict[str, Any]:
    plain = {"runs": ["runs/x"], "episodes": 3, "workers": 0, "out": out}
    return evaluate(EvaluateRecipe.model_validate(plain | more))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_store_and_its_runs_remember_the_environment(folder: Path) -> None:
    store = open_store("data/x.zarr")
    assert store.task == REACH and store.has_label("given", "success")
    assert store.attributes["environment"] == {"task": REACH, **ENV}
    assert store.provenance["environment"]["code"] == "robots.py" and store.provenance["action_bounds"] == [-2.0, 2.0]
    assert read(Path("runs/x/checkpoints/last.safetensors")).metadata["environment"] == {"task": REACH, **ENV}
    assert str(folder) not in json.dumps(store.attributes["environment"])


def test_reacher_from_data_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained(REACHER)
    assert open_store("data/x.zarr").attributes["environment"] == {"task": REACHER}
    assert evaluated(tmp_path / "scores")["episodes"] == 6  # nothing of it is anybody's code: nothing need be named
    assert {row["task"] for row in rows(tmp_path / "scores")} == {REACHER}


def test_the_task_is_to_be_named_again(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="unless you name it too") as caught:
        evaluated(tmp_path / "a")
    assert caught.value.hint.endswith("""task=py/robots.py:Reach 'env.kwargs={"size": 1.5}'""")
    with pytest.raises(CvlctlError, match=r'with \{"size": 1.5\}'):  # what it is handed, too
        evaluated(tmp_path / "a", task=REACH)
    assert not (tmp_path / "a").exists()
    assert evaluated(tmp_path / "a", task=REACH, env=ENV)["episodes"] == 6
    assert {row["length"] for row in rows(tmp_path / "a")} == {20}  # the store's, since the environment has no limit
    assert evaluated(tmp_path / "a", task=REACH, env=ENV)["status"] == "finished already"


def test_the_same_rows_for_any_number_of_workers(tmp_path: Path, folder: Path) -> None:
    asked = {"task": REACH, "env": ENV}
    evaluated(tmp_path / "a", **asked)
    evaluated(tmp_path / "b", **asked | {"workers": 2})
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    settings = envs.named(REACH, ENV)
    jobs = [PolicyJob("bc", REACH, seed, 5, folder / "runs/x", horizon=20, env=settings) for seed in (0, 1)]
    together = run_lockstep(jobs, episodes=3, device="cpu", workers=2)
    returns = [row["episode_return"] for row in rows(tmp_path / "a")]
    assert [row.episode_return for row in together] == pytest.approx(returns, rel=1e-4)


def test_a_changed_environment_is_another_evaluation(tmp_path: Path, folder: Path) -> None:
    evaluated(tmp_path / "a", task=REACH, env=ENV)
    with pytest.raises(CvlctlError, match="its code or its settings, has changed"):
        evaluated(tmp_path / "a", task=REACH, env={"kwargs": {"size": 1.0}})
    try:
        (folder / "robots.py").write_text(toy_robots.ROBOTS + "\n# changed\n")
        with pytest.raises(CvlctlError, match="its code or its settings, has changed"):
            evaluated(tmp_path / "a", task=REACH, env=ENV)
    finally:
        toy_robots.write(folder)


def test_a_policy_acts_in_the_units_and_on_the_columns_of_its_data(tmp_path: Path, monkeypatch: Any) -> None:
    """Else the environment is commanded twice the force that the policy means, or sees one column for another."""
    monkeypatch.chdir(tmp_path)
    toy_robots.write(tmp_path)
    trained("py/robots.py:Rich", horizon=20)
    about = {"task": "py/robots.py:Rich", "horizon": 20}
    once = evaluated(tmp_path / "one", **about)
    with pytest.raises(CvlctlError, match=r"in another order: mode\[0\]"):
        evaluated(tmp_path / "two", env={"keys": ["mode", "flags", "inner/a", "joint_9", "joint_10"]}, **about)
    about["task"] = "py/robots.py:Wide"
    with pytest.raises(CvlctlError, match=r"are \[-1.0, 1.0\] in its data, and \[-4.0, 4.0\]") as raised:
        evaluated(tmp_path / "two", **about)
    (said,) = re.findall(r"env: \{action_bounds: (.*?)\}", raised.value.hint)
    assert not (tmp_path / "two" / "rows.jsonl").read_text()  # so that it may be done as the hint says
    found = evaluated(tmp_path / "two", env={"action_bounds": json.loads(said)}, **about)
    assert found["table"][0]["return_mean"] == once["table"][0]["return_mean"]


def test_a_fault_in_a_worker_is_two_lines_and_code_2(folder: Path, tmp_path: Path) -> None:
    """By the real command, from a folder of traps, where -P and the file's own path are all that helps."""
    recipe = tmp_path / "e.yaml"
    recipe.write_text(f"runs: [runs/x]\nepisodes: 3\nworkers: 2\nout: {tmp_path / 'scores'}\n")
    (folder / "json.py").write_text("open('sprung', 'w')\n")
    try:
        again = ["task=py/robots.py:Reach", "env.kwargs={breaks: raise}"]
        command = [sys.executable, "-P", "-m", "cvlctl", "evaluate", str(recipe), *again]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        error = done.stderr.strip().splitlines()[-2]
        assert error.startswith("error: py/robots.py:Reach: episode ") and "step 3: IndexError" in error
        assert "(robots.py, line " in error
        assert not (folder / "sprung").exists()
    finally:
        (folder / "json.py").unlink()


def lied(place: Path, **said: Any) -> None:
    """A copy of the run whose checkpoint says something else of its task and environment."""
    found = read(Path("runs/x/checkpoints/last.safetensors"))
    save(place / "checkpoints" / "last.safetensors", unpack(found), {**found.metadata, **said})


TRAPS: list[dict[str, Any]] = [
    {"task": "py/trap.py:Reach"}, {"task": "py/trap:Reach"}, {"task": "gym/trap:Reach-v0"},
    {"task": "py/../trap.py:Reach"},
    {"task": "x", "environment": {"task": "py/trap.py:Reach"}},
    {"task": "x", "environment": {"task": "gym/trap:Reach-v0", "kwargs": {}}},
    {"task": "../../x", "environment": {"task": "../trap", "entry_point": "trap:Reach"}},
    {"task": REACHER, "environment": {"task": REACHER, "kwargs": {"xml_file": "/etc/passwd"}}},
    {"task": REACHER, "environment": {"task": REACHER, "code": "trap.py", "kwargs": "{\"a\": 1}"}},
    {"task": REACHER, "environment": {"task": ["trap"]}},
    {"task": REACHER, "environment": {"task": REACHER, "keys": 3}},
    {"task": "py/" + "a" * 5000}, {"task": "gym/trap:"}, {"task": "py/:"}, {"task": "gym/$(touch sprung)"},
    {"task": "py/trap.py:Reach\x00"}, {"task": "metaworld/../trap"},
]  # fmt: skip


@pytest.mark.parametrize("said", TRAPS, ids=range(len(TRAPS)))
def test_a_strangers_run_imports_and_writes_nothing(said: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    lied(tmp_path / "run", **said)
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, tmp_path.parent):
        (place / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nReach = None\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CvlctlError):
        evaluated(tmp_path / "scores", runs=["run"])
    assert sorted(tmp_path.rglob("*")) == before
    for use in (partial(load_policy, seed=0), partial(export, out=Path("policy.npz"), format="npz")):
        with suppress(CvlctlError):
            use(Path("run/checkpoints/last.safetensors"))
    assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "policy.npz"}
    assert "trap" not in sys.modules


def test_a_run_of_another_name_is_played_where_one_says(tmp_path: Path) -> None:
    """A store of robomimic's, say, whose name is no environment's."""
    lied(tmp_path / "run", task="Lift", environment={"task": "Lift", "kwargs": {"robots": "Panda"}, "keys": ["object"]})
    with pytest.raises(CvlctlError, match="'Lift', which is no environment here; its data came from Lift") as caught:
        evaluated(tmp_path / "scores", runs=[str(tmp_path / "run")])
    assert "task=py/my_env.py:make" in caught.value.hint
    evaluated(tmp_path / "scores", runs=[str(tmp_path / "run")], task=REACH)
    assert {row["task"] for row in rows(tmp_path / "scores")} == {REACH}


def test_tables_count_episodes_that_tell_nothing_as_failures_beside_those_that_do(tmp_path: Path) -> None:
    from dataclasses import replace

    from cvlctl.score.rows import with_failures
    from cvlctl.types import EpisodeResult

    row = EpisodeResult("bc", "a", 0, 1, 0, 1.0, 5, None)
    rows = [row, replace(row, success=True), replace(row, task="b")]
    assert [one.success for one in with_failures(rows)] == [False, True, None]
