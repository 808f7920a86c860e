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

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"pretrain": ["steps=30"], "finetune": ["steps=30"], "evaluate": ["episodes=2"]}


def follow(page: Path, folder: Path) -> list[list[str]]:
    """Run a page's commands in its folder's copy; the commands."""
    shutil.copytree(page.parent, folder, dirs_exist_ok=True)
    commands = [shlex.split(line) for line in re.findall(r"^    ((?:python|cvlctl) .+)$", page.read_text(), re.M)]
    for program, *words in commands:
        small = SMALL.get(words[0], []) if program == "cvlctl" else []
        start = [sys.executable, "-P", *(["-m", "cvlctl"] if program == "cvlctl" else [])]
        done = subprocess.run([*start, *words, *small], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{program} {' '.join(words)}\n{done.stdout}{done.stderr}"
    return commands


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("algorithm", "seed", "episode", "episode_return")} for row in found]


def test_own_robot(tmp_path: Path) -> None:
    """From raw logs to an exported policy; the sensor that never varied in the logs may drift without harm."""
    page = EXAMPLES / "own_robot" / "README.md"
    commands = follow(page, tmp_path)
    assert [words[1] for words in commands if words[0] == "cvlctl"] == [
        "data", "data", "pretrain", "finetune", "finetune", "evaluate", "export",
    ]  # fmt: skip
    (other,) = re.findall(r"`cvlctl (evaluate [^`]*battery[^`]*)`", page.read_text().replace("\n", " "))
    line = [sys.executable, "-P", "-m", "cvlctl", *shlex.split(other), "episodes=2"]
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)
    assert rows(tmp_path / "scores" / "low") == rows(tmp_path / "scores" / "table")
    policy = np.load(tmp_path / "policy.npz", allow_pickle=False)
    about = json.loads(str(policy["cvlctl"]))
    assert about["units"] == "physical" and about["observation_columns"][-1] == "battery"
