"""What recipes may say: the page, the schemas, completion, and the recipes that travel with cvlctl."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cvlctl.cli import recipes as cli_recipes
from cvlctl.errors import CvlctlError
from cvlctl.experiments import shelf
from cvlctl.experiments.commands import COMMANDS, model
from cvlctl.recipes import completion, shipped
from cvlctl.recipes.meanings import meanings
from cvlctl.recipes.schema import rows, schema

ROOT = Path(__file__).parents[2]


def test_the_page_and_the_schemas_are_those_of_the_models() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "docs/generate_recipes.py", "--check"], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_has_a_meaning(command: str) -> None:
    whole = schema(model(command))
    nodes = {"": whole, **whole.get("$defs", {})}
    silent = [f"{name}.{row.key}" for name, node in nodes.items() for row in rows(node) if not row.meaning]
    assert silent == []


def test_meanings_are_the_comments_at_the_end_of_a_line_or_above_it_also_of_what_is_inherited() -> None:
    from cvlctl.collect.source_recipes import RandomSource
    from cvlctl.experiments.recipe import ExperimentRecipe
    from cvlctl.learn.algorithms import cvl

    assert meanings(cvl.Config)["num_actions"] == "[N_a] policy samples a state"
    assert meanings(ExperimentRecipe)["matrix"].startswith("lists of values: a stage runs once")
    assert meanings(RandomSource)["backend"].startswith("what simulates")


def _valid(whole: dict, node: dict, value: object) -> bool:
    """Whether a schema takes a value: of JSON Schema what ours use."""
    if "$ref" in node:
        return _valid(whole, whole["$defs"][node["$ref"].split("/")[-1]], value)
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None),
             "array": (list, tuple), "object": dict}  # fmt: skip
    named = node.get("type", [])
    named = [named] if isinstance(named, str) else named
    flag = isinstance(value, bool)
    if named and not any(isinstance(value, kinds[kind]) and (kind == "boolean" or not flag) for kind in named):
        return False
    if ("const" in node and value != node["const"]) or ("enum" in node and value not in node["enum"]):
        return False
    for choice in ("anyOf", "oneOf"):
        if choice in node and not any(_valid(whole, one, value) for one in node[choice]):
            return False
    for rule in node.get("allOf", ()):
        if _valid(whole, rule["if"], value) and not _valid(whole, rule["then"], value):
            return False
    if isinstance(value, dict):
        known, more = node.get("properties", {}), node.get("additionalProperties", True)
        if any(key not in value for key in node.get("required", ())):
            return False
        for key, one in value.items():
            if key in known or isinstance(more, dict):
                if not _valid(whole, known.get(key, more), one):
                    return False
            elif more is False:
                return False
    items = node.get("items")
    return not (isinstance(value, list) and items) or all(_valid(whole, items, one) for one in value)


def test_the_schemas_take_every_shipped_recipe_as_an_editor_reads_it_and_no_misspelt_key() -> None:
    schemas = {command: shelf.schema(command) for command in COMMANDS}
    for row in shelf.ls(ROOT / "recipes"):
        data = yaml.safe_load(Path(row["path"]).read_text())
        whole = schemas[row["command"]]
        assert _valid(whole, whole, data), row["path"]
        line = [text for text in Path(row["path"]).read_text().splitlines() if "yaml-language-server" in text]
        (place,) = [text.split("$schema=")[1] for text in line]
        assert (Path(row["path"]).parent / place).resolve() == ROOT / "recipes" / "schemas" / f"{row['command']}.json"
    whole = schemas["finetune"]
    sound = {"algorithm": {"name": "cvl", "bank_size": 64}, "stores": ["x.zarr"], "steps": 10, "out": "y"}
    assert _valid(whole, whole, sound)
    assert not _valid(whole, whole, {**sound, "setps": 10})
    assert not _valid(whole, whole, {**sound, "algorithm": {"name": "bc", "bank_size": 64}})
    assert not _valid(whole, whole, {**sound, "steps": True})


def test_completion_of_keys_and_values(tmp_path: Path) -> None:
    recipe = tmp_path / "x.yaml"
    recipe.write_text("algorithm: {name: laeo}\nstores: [x.zarr]\n")
    assert completion.keys("finetune", recipe, "algorithm.bc") == ["algorithm.bc_coefficient="]
    assert "algorithm.num_examples=" in completion.keys("finetune", recipe, "algorithm.num")
    assert completion.keys("finetune", recipe, "algorithm.bank") == []  # cvl's
    assert completion.keys("finetune", None, "algorithm.bank") == ["algorithm.bank_size="]
    assert completion.keys("finetune", recipe, "algorithm.crit") == ["algorithm.critic."]
    assert completion.keys("finetune", recipe, "algorithm.readout=p") == ["algorithm.readout=posterior"]
    assert completion.keys("pretrain", recipe, "critic.penalty=") == [
        "critic.penalty=log_mean",
        "critic.penalty=log_sum",
    ]
    recipe.write_text("stages: {a: {command: pretrain}, b: {command: finetune, algorithm: bc}}\n")
    assert completion.keys("run", recipe, "stages.") == ["stages.a.", "stages.b."]
    assert completion.keys("run", recipe, "stages.a.critic.lo") == ["stages.a.critic.loss="]
    assert completion.keys("run", recipe, "stages.b.algorithm.h") == ["stages.b.algorithm.hidden="]
    recipe.write_text("][")
    assert completion.keys("finetune", recipe, "see") == ["seeds="]
    assert completion.keys("finetune", tmp_path / "none.yaml", "nothing.at.all") == []


def test_the_command_line_knows_the_commands() -> None:
    assert set(cli_recipes.COMMANDS) == set(COMMANDS)


def test_recipes_that_came_along_are_found_by_name_and_copied_with_their_data(tmp_path: Path) -> None:
    assert shipped.find("quickstart") == shipped.find("recipes/quickstart.yaml") == ROOT / "recipes" / "quickstart.yaml"
    assert shipped.find("rewards").name == "rewards.yaml"
    with pytest.raises(CvlctlError, match="no recipe 'quickstrat'") as caught:
        shipped.find("quickstrat")
    assert "did you mean quickstart?" in caught.value.hint
    with pytest.raises(CvlctlError, match="no recipe"):
        shipped.find("../../etc/passwd")
    made = shelf.copy("quickstart", tmp_path)
    assert made["command"] == "run" and Path(made["data"][0], "zarr.json").is_file()
    text = (tmp_path / "quickstart.yaml").read_text()
    assert f"$schema={ROOT / 'recipes' / 'schemas' / 'run.json'}" in text
    assert shelf.copy("quickstart", tmp_path)["data"] == []  # what is there stays
    (tmp_path / "quickstart.yaml").write_text(text + "# mine\n")
    with pytest.raises(CvlctlError, match="exists"):
        shelf.copy("quickstart", tmp_path)
    assert (tmp_path / "quickstart.yaml").read_text().endswith("# mine\n")
    with pytest.raises(CvlctlError, match="no directory"):
        shelf.copy("quickstart", tmp_path / "nowhere" / "x.yaml")


def test_several_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("recipes/quickstart.yaml", "recipes/a/x.yaml", "recipes/b/x.yaml"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.setattr(shipped, "root", lambda: tmp_path)
    with pytest.raises(CvlctlError, match="2 recipes are called x") as caught:
        shipped.find("x")
    assert caught.value.hint == "say which: a/x, b/x"
    assert shipped.find("b/x") == tmp_path / "recipes" / "b" / "x.yaml"


def test_where_no_recipes_lie_those_that_came_along_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "methods/rewards" in [row["name"] for row in shelf.ls()]
    with pytest.raises(CvlctlError, match="no command 'finetun'") as caught:
        shelf.schema("finetun")
    assert "did you mean finetune?" in caught.value.hint
    json.dumps(shelf.schema("run"))


DRY = "algorithm: bc\nstores: [{store}]\nsteps: 10\nout: {out}\n"


def test_dry_run_of_a_command(tmp_path: Path) -> None:
    recipe, store = tmp_path / "x.yaml", ROOT / "data" / "door-close-replay.zarr"
    recipe.write_text(DRY.format(store=store, out=tmp_path / "run"))
    line = [sys.executable, "-P", "-m", "cvlctl", "finetune", str(recipe), "--dry-run"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert f"out: {tmp_path / 'run'} (to do)\nreads: {store}\n" in shown
    told = json.loads(subprocess.run([*line, "stores=[no.zarr]", "--json"], capture_output=True, check=True).stdout)
    assert told["reads"] == [{"path": "no.zarr", "found": False}] and told["recipe"]["batch_size"] == 256
    assert not (tmp_path / "run").exists()
