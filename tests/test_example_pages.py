"""The pages of `examples/`, command by command, with fewer updates: whether all of it runs, not what is learned."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cvlctl.cli.app import app
from cvlctl.cli.console import execute

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"pretrain": ["steps=30"], "finetune": ["steps=30"], "evaluate": ["episodes=2"], "references": ["--episodes=1"]}


def follow(page: Path) -> list[list[str]]:
    """Run a page's commands in a copy of its folder, which is the current one from then on; the commands."""
    shutil.copytree(page.parent, ".", dirs_exist_ok=True)
    commands = [shlex.split(line) for line in re.findall(r"^    ((?:python|cvlctl) .+)$", page.read_text(), re.M)]
    for program, *words in commands:
        if program == "cvlctl":
            cvlctl(*words)
        else:
            subprocess.run([sys.executable, "-P", *words], check=True)
    return commands


def cvlctl(*words: str) -> None:
    assert execute(app, [*words, *SMALL.get(words[0], [])]) == 0, " ".join(words)


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("algorithm", "seed", "episode", "episode_return")} for row in found]


def told(policy: str) -> dict:
    return json.loads(str(np.load(policy, allow_pickle=False)["cvlctl"]))


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_own_robot(tmp_path: Path) -> None:
    """From raw logs to an exported policy; the sensor that never varied in the logs may drift without harm."""
    page = EXAMPLES / "own_robot" / "README.md"
    commands = follow(page)
    assert [words[1] for words in commands if words[0] == "cvlctl"] == [
        "data", "data", "pretrain", "finetune", "finetune", "evaluate", "explain", "export",
    ]  # fmt: skip
    (other,) = re.findall(r"`cvlctl (evaluate [^`]*battery[^`]*)`", page.read_text().replace("\n", " "))
    cvlctl(*shlex.split(other))
    assert rows(tmp_path / "scores" / "low") == rows(tmp_path / "scores" / "table")
    about = told("policy.npz")
    assert about["units"] == "physical" and about["observation_columns"][-1] == "battery"


def test_minari(tmp_path: Path) -> None:
    """A dataset that Minari's own code writes is evaluated in the environment that it says, named by no recipe."""
    commands = follow(EXAMPLES / "minari" / "README.md")
    assert [words[1] for words in commands if words[0] == "cvlctl"] == [
        "data", "data", "finetune", "finetune", "references", "evaluate", "explain", "export",
    ]  # fmt: skip
    assert "task:" not in (tmp_path / "scores.yaml").read_text()
    table = json.loads((tmp_path / "scores" / "arm" / "table.json").read_text())["table"]
    assert {(row["task"], row["algorithm"]) for row in table} == {("gym/Reacher-v5", "cvl"), ("gym/Reacher-v5", "bc")}
    assert all(row["normalised_mean"] is not None for row in table)
    assert told("policy.npz")["task"] == "gym/Reacher-v5"
