"""The environments that imported stores came from: remembered, offered, and never imported for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from toy_files import minari_episode, minari_folder, npz, robomimic_file, rows

from cvlctl.data import formats, look
from cvlctl.data.store import Store, open_store
from cvlctl.data.transform import merge
from cvlctl.errors import CvlctlError
from cvlctl.learn.finetune import finetune
from cvlctl.learn.recipe import FinetuneRecipe
from cvlctl.play import envs
from cvlctl.score.evaluate import evaluate
from cvlctl.score.recipe import EvaluateRecipe

pytestmark = pytest.mark.usefixtures("no_fsync")
ENVIRONMENT = "environment"


def imported(format: str, path: Path, **options: Any) -> Store:
    return formats.import_store(format, path, path.parent / f"{path.stem}-{format}.zarr", **options)


def spec(env: str, **more: Any) -> dict[str, str]:
    return {"env_spec": json.dumps({"id": env, "entry_point": "trap:Reach", "max_episode_steps": 50, **more})}


def goal_episode(length: int = 3) -> dict[str, Any]:
    episode = minari_episode(length)
    del episode["observations"]
    names = {"observation": 10, "achieved_goal": 3, "desired_goal": 3}
    return episode | {
        f"observations/{name}": np.full((length + 1, width), float(number))
        for number, (name, width) in enumerate(names.items())
    }


def test_minari_says_id_and_kwargs(tmp_path: Path) -> None:
    folder = minari_folder(tmp_path / "a", [minari_episode()], **spec("PointMaze-v3", kwargs={"maze_map": [[1, 0]]}))
    store = imported("minari", folder)
    assert store.attributes[ENVIRONMENT] == {"task": "gym/PointMaze-v3", "kwargs": {"maze_map": [[1, 0]]}}
    assert store.task == "gym/PointMaze-v3" and store.spec.horizon == 50
    told = dict(look.facts(look.info(store.path)))["environment"]
    assert told == "task gym/PointMaze-v3, kwargs {'maze_map': [[1, 0]]}"
    again = formats.import_store("minari", folder, tmp_path / "own.zarr", task="mine")
    assert (again.task, again.attributes[ENVIRONMENT]["task"]) == ("mine", "gym/PointMaze-v3")
    without = imported("minari", minari_folder(tmp_path / "b", [minari_episode()]))
    assert ENVIRONMENT not in without.attributes and "environment" not in dict(look.facts(look.info(without.path)))
    assert formats.import_store("minari", folder, tmp_path / "c.zarr").digest() == store.digest()  # no part of it


def test_it_goes_through_derived_stores_and_exports(tmp_path: Path) -> None:
    stores = [imported("minari", minari_folder(tmp_path / name, [minari_episode()], **spec("A-v3"))) for name in "ab"]
    merge([store.path for store in stores], tmp_path / "merged.zarr")
    merged = open_store(tmp_path / "merged.zarr")
    assert merged.attributes[ENVIRONMENT] == {"task": "gym/A-v3"}
    formats.export_store("minari", merged, tmp_path / "out-v0")
    assert imported("minari", tmp_path / "out-v0").attributes[ENVIRONMENT] == {"task": "gym/A-v3"}


@pytest.mark.parametrize(("env", "recorded"), [("FetchReach-v4", False), ("FetchReach-v2", True)])
def test_fetch_has_the_columns_of_our_own(tmp_path: Path, env: str, recorded: bool) -> None:
    spaces = {name: {"type": "Box"} for name in ("observation", "achieved_goal", "desired_goal")}
    space = json.dumps({"type": "Dict", "subspaces": spaces})
    folder = minari_folder(tmp_path / "f", [goal_episode()], observation_space=space, **spec(env))
    store = imported("minari", folder)
    assert store.observations()[0].tolist() == [0.0] * 10 + [2.0] * 3
    assert store.attributes[ENVIRONMENT].get("keys") == (["observation", "desired_goal"] if recorded else None)
    chosen = formats.import_store("minari", folder, tmp_path / "c.zarr", observation_keys=["achieved_goal"])
    assert chosen.observations()[0].tolist() == [1.0] * 3
    assert chosen.attributes[ENVIRONMENT]["keys"] == ["achieved_goal"]
    other = minari_folder(tmp_path / "o", [goal_episode()], observation_space=space, **spec("Maze-v2"))
    assert imported("minari", other).spec.observation_shape == (16,)  # by name, all of them


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("cube-single-play-v0", "gym/cube-single-v0"), ("puzzle-3x3-noisy-v0-val", "gym/puzzle-3x3-v0"),
        ("antmaze-large-navigate-v0", "gym/antmaze-large-v0"), ("mine", None), ("play-v0", None),
    ],
)  # fmt: skip
def test_ogbench_names_its_environment(tmp_path: Path, name: str, task: str | None) -> None:
    arrays = rows()
    ends = arrays["terminals"] | arrays["timeouts"]
    keep = {key: arrays[key] for key in ("observations", "actions")} | {"terminals": ends.astype(np.float32)}
    keep["terminals"][:] = 0
    keep["terminals"][-1] = 1
    path = npz(tmp_path / f"{name}.npz", keep)
    if task is None:
        with pytest.raises(CvlctlError, match="does not say which task"):
            imported("ogbench", path)
    else:
        store = imported("ogbench", path)
        assert store.task == task and store.attributes[ENVIRONMENT] == {"task": task}


def test_robomimic_says_name_and_arguments(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "r.hdf5")
    with h5py.File(path, "a") as file:
        arguments = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": "Panda"}}
        file["data"].attrs["env_args"] = json.dumps(arguments)
    store = imported("robomimic", path)
    assert store.task == "Lift"
    assert store.attributes[ENVIRONMENT] == {"task": "Lift", "kwargs": {"robots": "Panda"}}


@pytest.mark.parametrize("env", ["trap:Reach-v0", "../trap", "py/trap.py:Reach", "FetchReach-v4", 7, None, ["a"]])
def test_a_strangers_store_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: Any) -> None:
    """Nor does whatever is done with it: look, export, derive, train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    about = spec(env, kwargs={"xml_file": "trap.py"})
    folder = minari_folder(tmp_path / "m", [minari_episode(9)], **about)
    store = imported("minari", folder)
    formats.export_store("minari", store, tmp_path / "out-v0")
    formats.export_store("npz", store, tmp_path / "out.npz")
    merge([store.path, store.path], tmp_path / "merged.zarr")
    plain = {"stores": [str(store.path)], "algorithm": {"name": "bc", "hidden": [4]}, "steps": 2, "batch_size": 4}
    finetune(FinetuneRecipe.model_validate({**plain, "seeds": [0], "out": "runs/x", "compile": "false"}))
    with pytest.raises(CvlctlError):
        evaluate(EvaluateRecipe.model_validate({"runs": ["runs/x"], "episodes": 1, "workers": 0, "out": "scores"}))
    assert "trap" not in sys.modules and not (tmp_path / "sprung").exists()


def recorded(folder: Path, name: str) -> Path:
    """A dataset of random actions as Minari records one: spaces and the environment's own spec in its metadata."""
    import gymnasium_robotics
    from minari.serialization import serialize_space

    gymnasium.register_envs(gymnasium_robotics)
    env, episodes = gymnasium.make(name), []
    for seed in range(2):
        env.action_space.seed(seed)
        seen, steps = [env.reset(seed=seed)[0]], []
        while not (steps and (steps[-1][2] or steps[-1][3])):
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            seen.append(observation)
            steps.append((action, reward, terminated, truncated))
        columns = dict(
            zip(("actions", "rewards", "terminations", "truncations"), zip(*steps, strict=True), strict=True)
        )
        arrays = {key: np.array(values) for key, values in columns.items()}
        episodes.append(arrays | {f"observations/{key}": np.stack([one[key] for one in seen]) for key in seen[0]})
    assert env.spec is not None
    spaces = {kind: serialize_space(getattr(env, kind)) for kind in ("observation_space", "action_space")}
    return minari_folder(folder, episodes, env_spec=env.spec.to_json(), **spaces)


def test_a_minari_dataset_is_evaluated_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = imported("minari", recorded(tmp_path / "reach-v0", "FetchReach-v4"))
    assert (store.task, store.spec.horizon) == ("gym/FetchReach-v4", 50)
    ours = envs.make("gym/FetchReach-v4", 0)
    ours.raw.inside.reset(seed=0)
    assert np.allclose(store.observations()[0], ours.raw.seen().astype(np.float32), atol=1e-5)
    plain = {"stores": [str(store.path)], "algorithm": {"name": "bc", "hidden": [4]}, "steps": 2, "batch_size": 4}
    finetune(FinetuneRecipe.model_validate({**plain, "seeds": [0], "out": "runs/x", "compile": "false"}))
    recipe = {"runs": ["runs/x"], "episodes": 1, "workers": 0, "out": "scores"}
    (row,) = evaluate(EvaluateRecipe.model_validate(recipe))["table"]
    assert row["task"] == "gym/FetchReach-v4" and row["success_runs"] is not None
