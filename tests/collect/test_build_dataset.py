"""The front door of building stores: the same bits as ever, finished and other recipes, and keys that are wrong."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
from toy_builds import PENDULUM, recipe_for

from cvlctl.collect.build import build
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load

# source; digests of its data and of its label, as they were before the code stood in rooms
DRIFT: dict[str, tuple[dict[str, Any], str, str]] = {
    PENDULUM: (
        {"name": "random", "episodes": 2},
        "687b21df44f44bd7469789f146996cb5955defcd3c8fd816da365ddc2dcf8ba6",
        "c893fabb8b4a4d5ebd156d86208839eb28ac71dcee13975dd0c91a80da88ccc8",
    ),
    "metaworld/drawer-close-v3": (
        {"name": "scripted", "episodes": 2},
        "6b8e135ebfb4d9a22d187ea2f2300abdd2384cf6356f073f0198a9c1e12c0ab6",
        "d1608f81843982cce4e4d58abe5847945c9a8307d1ad76708fbf88056d4124f9",
    ),
}


def other_versions(*packages: str) -> list[str]:
    """Which of the packages are not here in the version of constraints.txt."""
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    found = {name: f"{name}=={importlib.metadata.version(name)}" for name in packages}
    return [pin for pin in found.values() if pin not in pins]


@pytest.mark.parametrize("task", DRIFT)
def test_collections_do_not_drift(tmp_path: Path, task: str) -> None:
    """A change of these bits is a change of behaviour, and wants a word in CHANGELOG.md.

    Thirty steps: too few for the last bit of a sine, which processors round differently, to reach a float32.
    """
    if others := other_versions("numpy", "gymnasium", "mujoco", "metaworld"):
        pytest.skip(f"recorded with the versions in constraints.txt, and here is {', '.join(others)}")
    source, digest, label_digest = DRIFT[task]
    build(recipe_for(tmp_path / "a.zarr", source, task=task, horizon=30))
    store = open_store(tmp_path / "a.zarr")
    assert store.lengths().tolist() == [30, 30]
    assert (store.digest(), store.label_digest()) == (digest, label_digest)


def test_finished_and_other_recipes(tmp_path: Path) -> None:
    out = tmp_path / "random.zarr"
    first = build(recipe_for(out, {"name": "random", "episodes": 2}))
    again = build(recipe_for(out, {"name": "random", "episodes": 2}))
    assert again["status"] == "finished already"
    assert {**again, "status": "built", "seconds": first["seconds"]} == first
    with pytest.raises(CvlctlError, match="--force"):
        build(recipe_for(out, {"name": "random", "episodes": 3}))
    assert open_store(out).num_episodes == 2
    assert build(recipe_for(out, {"name": "random", "episodes": 3}), force=True)["episodes"] == 3


def test_a_store_of_an_earlier_version_is_still_of_its_recipe(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "r.zarr", {"name": "random", "episodes": 1})
    build(recipe)
    attributes = tmp_path / "r.zarr" / "zarr.json"
    text = json.loads(attributes.read_text())
    recorded = text["attributes"]["provenance"]["recipe"]
    del recorded["horizon"], recorded["source"]["transitions"]  # keys that came later
    attributes.write_text(json.dumps(text))
    assert build(recipe)["status"] == "finished already"


@pytest.mark.parametrize(
    ("source", "what", "hint"),
    [
        ("{name: contrastive_ac, steps: 9, gat: none}", "unknown key source.gat", "did you mean gate"),
        ("{name: contrastive_ac, steps: 9, gate: off}", "expected 'contrastive', 'actor' or 'none'", ""),
        ("{name: contrastive_ac, steps: 9, slack: 0}", "slack must be above 0", ""),
        ("{name: contrastive, steps: 9}", "unknown name 'contrastive'", "did you mean contrastive_ac"),
        ("{name: sac, steps: 9, hindsight: 0.8}", "relabels goals, and gym/Pendulum-v1 is told none", ""),
        ("{name: sac, steps: 9, hindsight: 2}", "source.hindsight: expected a number of at most 1", ""),
        (
            "{name: sac, steps: 9, gate: none}",
            "unknown key source.gate",
            "legal keys here: batch_size, ema_rate",
        ),
    ],
)
def test_wrong_keys_of_online_sources(tmp_path: Path, source: str, what: str, hint: str) -> None:
    (tmp_path / "r.yaml").write_text(f"task: {PENDULUM}\nout: {tmp_path}/x.zarr\nsource: {source}\n")
    with pytest.raises(CvlctlError, match=re.escape(what)) as caught:
        load(tmp_path / "r.yaml")
    assert hint in caught.value.hint


def test_how_much_is_rolled_out() -> None:
    for wrong in ({"name": "random"}, {"name": "random", "episodes": 1, "transitions": 5}):
        with pytest.raises(ValueError, match="exactly one of episodes and transitions"):
            recipe_for(Path("x.zarr"), wrong)
