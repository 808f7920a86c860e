"""The front door of building stores: finished and other recipes, and keys that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from toy_builds import PENDULUM, recipe_for

from cvlctl.collect.build import build
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load


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
