"""The replay that travels with the project: sound, small, and what its card says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cvlctl.data.look import episode_returns
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.experiments.commands import load

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "build" / "door-close-replay.yaml"
CARD = ROOT / "data" / "README.md"


@pytest.fixture(scope="module")
def place() -> Path:
    return ROOT / load(RECIPE, (), "build-dataset").out


def test_it_is_whole_small_and_built_by_its_recipe(place: Path) -> None:
    store, recipe = open_store(place), load(RECIPE, (), "build-dataset")
    assert verify_store(place) == []
    recipe.check_built(store.provenance["recipe"])
    assert store.num_transitions == recipe.source.steps
    files = [file for file in place.rglob("*") if file.is_file()]
    assert len(files) < 30
    assert sum(file.stat().st_size for file in files) < 2e6


def test_it_is_what_the_card_says(place: Path) -> None:
    store, card = open_store(place), CARD.read_text()
    success = store.successes("given")
    ends = store.episode_ends()
    solved = np.logical_or.reduceat(success, np.concatenate([[0], ends[:-1]]))
    assert f"| digest | `{store.digest()}` |" in card
    assert f"{int(solved.sum())} of {store.num_episodes} episodes succeed, each from another start" in card
    assert len(np.unique(store.observations()[np.concatenate([[0], ends[:-1]])[solved]], axis=0)) == solved.sum()
    assert f"return {episode_returns(store).mean():.0f} on average" in card
    half = len(solved) // 2
    assert solved[half:].mean() > solved[:half].mean()
    assert 0.15 <= solved.mean() <= 0.5


def test_the_quickstart_learns_from_it_alone(place: Path) -> None:
    experiment = load(ROOT / "recipes" / "quickstart.yaml", (), "run")
    read = [job.recipe for job in experiment.jobs if job.command in ("pretrain", "finetune")]
    assert len(read) == 4
    assert {ROOT / store.path for recipe in read for store in recipe.stores} == {place}
    examples = {recipe.success_examples.from_ for recipe in read if getattr(recipe, "success_examples", None)}
    assert {ROOT / source for source in examples} == {place}


def test_git_carries_it(place: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    chunk = next(place.rglob("c/0*"))
    for file, code in ((chunk, 1), (place / "zarr.json", 1), (ROOT / "data" / "mine.zarr", 0)):
        assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", str(file)], check=False).returncode == code


def test_the_card_quotes_the_references(place: Path) -> None:
    reference = open_store(place).attributes["reference"]
    card = CARD.read_text()
    assert re.search(rf"random[^|]*\| {reference['min']:.0f} \| {reference['random_success']:.0%} \|", card)
    assert re.search(rf"scripted[^|]*\| {reference['max']:.0f} \| {reference['scripted_success']:.0%} \|", card)
