"""A method from outside: a page in a file, a module or an entry point, without a fork."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cvlctl
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn import methods, recipe
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.learn.finetune import finetune

AWAC = Path(__file__).parents[2] / "examples" / "own_method" / "awac.py"
RECIPE = """algorithm: {{name: {name}, hidden: [16]}}
stores: [x.zarr]
steps: {steps}
batch_size: 32
threads: 1
compile: false
out: {out}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a page and a store: each state asks for the action of its own sign, and is paid for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(AWAC, tmp_path / "awac.py")
    draw = np.random.default_rng(0)
    episodes = []
    for _ in range(60):
        observations, actions = draw.uniform(-1, 1, (11, 1)), draw.uniform(-0.9, 0.9, (10, 1))
        rewards = -((actions - 0.7 * np.sign(observations[:-1]))[:, 0] ** 2)
        episodes.append(cvlctl.Episode(observations, actions, rewards))
    cvlctl.write_store(tmp_path / "x.zarr", episodes, task="signs")
    before, outside = dict(ALGORITHMS), dict(methods._OUTSIDE)
    yield tmp_path
    ALGORITHMS.clear(), ALGORITHMS.update(before)
    methods._OUTSIDE.clear(), methods._OUTSIDE.update(outside)
    recipe._with.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("awac", "own_page"))]:
        del sys.modules[name]


def written(name: str, steps: int = 10, out: str = "run", more: str = "") -> Path:
    file = Path(f"{out}.yaml")
    file.write_text(RECIPE.format(name=name, steps=steps, out=out) + more)
    return file


def test_a_page_in_a_file_learns_and_its_policy_is_read_as_any(folder: Path) -> None:
    finetune(load(written("awac.py", 400), ["algorithm.learning_rate=3e-3", "algorithm.temperature=0.1"]))
    policy = cvlctl.load_policy("run")
    found = policy(np.array([[-0.8], [-0.3], [0.3], [0.8]]))[:, 0]
    assert np.all(found[:2] < -0.3) and np.all(found[2:] > 0.3), found


def test_another_code_does_not_go_on_where_the_first_left_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written("awac.py")
    finetune(load(file))
    assert finetune(load(file))["status"] == "finished already"
    (folder / "awac.py").write_text(AWAC.read_text().replace("temperature: Number = 1.0", "temperature: Number = 1.0 "))
    with pytest.raises(CvlctlError, match=r"algorithm:awac\.py"):
        finetune(load(file))


def test_a_module_and_an_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "site" / "own_page_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(AWAC, package / "awac.py")
    about = folder / "site" / "own_page_of_mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-page-of-mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[cvlctl.algorithms]\nawac = own_page_of_mine.awac\n")
    monkeypatch.syspath_prepend(folder / "site")
    assert load(written("own_page_of_mine.awac")).algorithm.config.temperature == 1.0
    assert load(written("awac"), ["algorithm.temperature=2"]).algorithm.config.temperature == 2.0
    assert load(written("awac")).algorithm.name == "awac"


def test_an_experiment_has_it_too(folder: Path) -> None:
    Path("all.yaml").write_text(
        "out: all\nmatrix: {algorithm: [{name: awac.py}, {name: bc}]}\nstages:\n  train:\n    command: finetune\n"
        "    stores: [x.zarr]\n    steps: 5\n    algorithm: ${algorithm}\n    out: ${out}/${algorithm.name}\n"
    )
    assert [job.recipe.algorithm.name for job in load("all.yaml").jobs] == ["awac.py", "bc"]


BAD = {
    "lacks init, step": ("def init", "def unit", "def step", "def stop"),
    "has LEARNS_FROM = 'reward'": ('LEARNS_FROM = "rewards"', 'LEARNS_FROM = "reward"'),
    "its Config is no frozen dataclass": ("@dataclass(frozen=True)", "@dataclass"),
    "has no default for gamma": ("gamma: Number = 0.99", "gamma: Number"),
    "cannot be imported: ModuleNotFoundError": ("import torch\n", "import torch, no_such_module\n"),
    "cannot be imported: SystemExit": ("LEARNS_FROM =", "raise SystemExit(3) #"),
    "cannot be imported: SyntaxError": ("class Config:", "class Config"),
    "its Config cannot be read from a recipe": ("gamma: Number = 0.99", "gamma: Tensor = 0.99"),
}


@pytest.mark.parametrize("said", BAD)
def test_a_page_that_is_none(folder: Path, said: str) -> None:
    text, pairs = AWAC.read_text(), iter(BAD[said])
    for old in pairs:
        assert old in text
        text = text.replace(old, next(pairs))
    Path("awac.py").write_text(text)
    with pytest.raises(CvlctlError, match=said) as caught:
        load(written("awac.py"))
    assert caught.value.what.startswith("run.yaml, line 1: algorithm awac.py") and caught.value.hint


RAISES = {
    "def step": "    return 1 / 0 #",
    "def init": "    return {}['x'] #",
    "def __post_init__": "        raise RuntimeError('no') #",
}


@pytest.mark.parametrize("begin", RAISES)
def test_what_its_code_raises_is_said_with_its_line(folder: Path, begin: str) -> None:
    lines = AWAC.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith(begin)) + 1
    Path("awac.py").write_text("\n".join([*lines[:at], RAISES[begin], *lines[at:]]))
    with pytest.raises(CvlctlError, match=rf"algorithm awac\.py failed in line {at + 1}: \w+Error: ") as caught:
        finetune(load(written("awac.py")))
    assert str(folder / "awac.py") in caught.value.hint


GIVES = {
    "def step": "    return state #",
    "def init": "    return {'a': {'b': 1}} #",
    "def draws": "    return 5 #",
}


@pytest.mark.parametrize("begin", GIVES)
def test_what_it_returns_is_looked_at(folder: Path, begin: str) -> None:
    lines = AWAC.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(begin)) + 1
    Path("awac.py").write_text("\n".join([*lines[:at], GIVES[begin], *lines[at:]]))
    with pytest.raises(CvlctlError, match=rf"algorithm awac\.py: {begin.split()[1]} returned \w+, not "):
        finetune(load(written("awac.py")))


def test_what_is_not_there_and_what_no_recipe_names(folder: Path) -> None:
    with pytest.raises(CvlctlError, match=r"algorithm none\.py: no file at none\.py"):
        load(written("none.py"))
    with pytest.raises(CvlctlError, match="no module 'nowhere' is installed"):
        load(written("nowhere.awac"))
    with pytest.raises(CvlctlError, match=r"unknown key algorithm\.tempreature") as caught:
        load(written("awac.py"), ["algorithm.tempreature=1"])
    assert "did you mean temperature?" in caught.value.hint
    with pytest.raises(CvlctlError, match="unknown name 'cvll'"):
        load(written("cvll"))
