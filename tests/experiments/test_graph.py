"""Cells, their names, and which of them wait for which; what "auto" becomes in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.experiments.fixed import FILE, Machine, fixed, machine_of
from cvlctl.experiments.graph import CELLS, Cell, below, cells_of, in_order
from cvlctl.experiments.run import chosen
from cvlctl.recipes.values import Computed

BUILD = {"command": "build-dataset", "task": "${task}", "source": {"name": "random", "episodes": 1}}
TRAIN = {"command": "finetune", "stores": ["${out}/data/${task}.zarr"], "steps": 10}
STAGES: dict[str, Any] = {
    "data": {**BUILD, "out": "${out}/data/${task}.zarr"},
    "sac": {**BUILD, "source": {"name": "sac", "steps": 10}, "out": "../sac/${task}.zarr"},
    "again": {**BUILD, "source": {"name": "policy", "checkpoints": {"run": "../sac/${task}.policies", "reaches": 0.5},
                                  "episodes": 1}, "out": "${out}/again/${task}.zarr"},
    "critic": {"command": "pretrain", "stores": ["${out}/data/${task}.zarr"], "steps": 10,
               "out": "${out}/critic/${task}"},
    "train": {**TRAIN, "algorithm": "${method}", "init_from": "${out}/critic/${task}",
              "out": "${out}/on/${task}/${method}"},
    "bc": {**TRAIN, "algorithm": "bc", "out": "${out}/on/${task}/bc", "success_examples": {"from": "other.zarr"}},
    "file": {"command": "build-dataset", "task": "gym/Hopper-v5", "out": "${out}/file.zarr",
             "source": {"name": "policy", "episodes": 1,
                        "checkpoints": ["${out}/on/gym/Pendulum-v1/cvl/checkpoints/last.safetensors"]}},
    "one": {"command": "evaluate", "runs": ["${out}/on/${task}/*"], "out": "${out}/one/${task}"},
    "all": {"command": "evaluate", "runs": ["${out}/on/**"], "out": "${out}/all"},
}  # fmt: skip


def experiment(tmp_path: Path, stages: dict[str, Any], **more: Any) -> Any:
    matrix = {"task": ["gym/Pendulum-v1", "gym/Hopper-v5"], "method": ["cvl", "laeo"]}
    for stage in stages.values():
        if stage.get("algorithm") == "${method}":
            stage["success_examples"] = {"from": "other.zarr"}
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump({"out": "e", "matrix": matrix, "stages": stages, **more}, sort_keys=False))
    return load(path, (), "run")


def cells(tmp_path: Path, stages: dict[str, Any] = STAGES, **more: Any) -> list[Cell]:
    found = experiment(tmp_path, stages, **more)
    return cells_of(found.out, found.jobs)


def test_a_cell_needs_the_cells_that_write_what_it_reads(tmp_path: Path) -> None:
    needs = {cell.name: list(cell.needs) for cell in cells(tmp_path)}
    assert needs["data/gym/Pendulum-v1.zarr"] == []
    assert needs["_~sac~gym~Pendulum-v1.zarr"] == []
    assert needs["again/gym/Pendulum-v1.zarr"] == ["_~sac~gym~Pendulum-v1.zarr"]  # the policies beside its store
    assert needs["critic/gym/Hopper-v5"] == ["data/gym/Hopper-v5.zarr"]
    assert needs["on/gym/Hopper-v5/cvl"] == ["data/gym/Hopper-v5.zarr", "critic/gym/Hopper-v5"]
    assert needs["on/gym/Hopper-v5/bc"] == ["data/gym/Hopper-v5.zarr"]  # other.zarr is nobody's
    assert needs["file.zarr"] == ["on/gym/Pendulum-v1/cvl"]  # a file in a run
    assert needs["one/gym/Hopper-v5"] == [f"on/gym/Hopper-v5/{name}" for name in ("cvl", "laeo", "bc")]
    runs = [f"on/gym/{task}/{name}" for task in ("Pendulum-v1", "Hopper-v5") for name in ("cvl", "laeo")]
    assert needs["all"] == [
        *runs,
        "on/gym/Pendulum-v1/bc",
        "on/gym/Hopper-v5/bc",
    ]


def test_patterns_are_those_of_glob(tmp_path: Path) -> None:
    def needs(*patterns: str) -> list[str]:
        stages = {**STAGES, "all": {"command": "evaluate", "runs": list(patterns), "out": "${out}/all"}}
        return list(cells(tmp_path, stages)[-1].needs)

    assert needs("${out}/on/*") == []  # * is one folder
    assert needs("${out}/o[nm]/*/Hop*/b?") == ["on/gym/Hopper-v5/bc"]
    assert needs("./e/critic/gym/Hopper-v5/", "${out}/on/*/*/cvl")[-1:] == ["on/gym/Hopper-v5/cvl"]
    assert len(needs("**/bc")) == 2


def test_stages_may_stand_in_any_order(tmp_path: Path) -> None:
    backwards = dict(reversed(STAGES.items()))
    found = in_order(cells(tmp_path, backwards))
    place = {cell.name: number for number, cell in enumerate(found)}
    assert len(place) == len(cells(tmp_path))
    assert all(place[need] < place[cell.name] for cell in found for need in cell.needs)


def test_a_circle_is_one_clear_error(tmp_path: Path) -> None:
    stages = {
        "data": {**BUILD, "source": {"name": "policy", "checkpoints": ["${out}/p/${task}"], "episodes": 1},
                 "out": "${out}/d/${task}.zarr"},
        "train": {**TRAIN, "stores": ["${out}/d/${task}.zarr"], "algorithm": "bc", "out": "${out}/p/${task}"},
    }  # fmt: skip
    with pytest.raises(
        CvlctlError, match=r"circle: data \(d/gym/Pendulum-v1.zarr\), which reads train \(p/.*\), which re"
    ):
        cells(tmp_path, stages)


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [("../o/a~b", "../o/a/b", "both be the cell _~o~a~b"), ("${out}/x", "${out}/x/log.txt", "keeps a file of its"),
     ("${out}/x/state.json/y", "${out}/x", "keeps a file"), ("${out}/x", "${out}/machine.json", "keeps a file"),
     ("${out}/x", "${out}/cells/y", "keeps a file"), ("${out}/x", "${out}/cells", "keeps a file"),
     ("${out}/x", "${out}/y/log.txt", None), ("${out}/x", "${out}/log.txt", None), ("${out}/x", "${out}", None)],
)  # fmt: skip
def test_no_two_cells_say_what_they_say_in_one_place(tmp_path: Path, one: str, other: str, why: str | None) -> None:
    stages = {name: {**TRAIN, "stores": ["a.zarr"], "algorithm": "bc", "out": out} for name, out in
              (("one", one), ("other", other))}  # fmt: skip
    if why is None:
        assert len(cells(tmp_path, stages)) == 2
    else:
        with pytest.raises(CvlctlError, match=why):
            cells(tmp_path, stages)


def test_a_path_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    stages = {"data": STAGES["data"], "train": {**TRAIN, "algorithm": "bc", "out": "${out}/bc/${task}",
              "stores": [str(Path.cwd() / "e/data/${task}.zarr")]}}  # fmt: skip
    assert cells(tmp_path, stages)[-1].needs == ("data/gym/Hopper-v5.zarr",)


def test_what_waits_for_what_by_whatever_way(tmp_path: Path) -> None:
    found = in_order(cells(tmp_path))
    assert below(found, {"critic/gym/Hopper-v5"}) == {
        "critic/gym/Hopper-v5", "on/gym/Hopper-v5/cvl", "on/gym/Hopper-v5/laeo", "one/gym/Hopper-v5", "all",
    }  # fmt: skip


def test_only_takes_what_it_names_and_what_that_needs(tmp_path: Path) -> None:
    found = cells(tmp_path)
    names = [cell.name for cell in chosen(found, "stage=train task=*Hopper* method=cvl")]
    assert names == ["data/gym/Hopper-v5.zarr", "critic/gym/Hopper-v5", "on/gym/Hopper-v5/cvl"]
    assert len(chosen(found, "")) == len(found)
    assert [cell.name for cell in chosen(found, "cell=data/*")] == [
        f"data/gym/{t}.zarr" for t in ("Pendulum-v1", "Hopper-v5")
    ]
    assert "one/gym/Hopper-v5" not in [cell.name for cell in chosen(found, "method=*")]  # it is of no method
    with pytest.raises(CvlctlError, match="--only: 'stag=train' is no condition"):
        chosen(found, "stag=train")
    with pytest.raises(CvlctlError, match="no cell is of 'stage=none'"):
        chosen(found, "stage=none")


MACHINE = Machine("cpu", 8, "medium", True, 4.0, 120e9, 6e-6)


def test_no_auto_that_decides_about_bits_is_left(tmp_path: Path) -> None:
    found = {cell.name: cell.job.recipe for cell in fixed(cells(tmp_path), MACHINE)}
    for name, recipe in found.items():
        if isinstance(recipe, Computed):
            left = [key for key, value in recipe.resolved().items() if value == "auto" and key != "mode"]
            assert left in ([], ["compile"]), name  # of rollouts, which train nothing
    assert found["critic/gym/Hopper-v5"].threads == 4  # two critics on eight CPUs
    assert found["on/gym/Hopper-v5/cvl"].threads == 2
    assert found["file.zarr"].threads == 1
    assert found["on/gym/Hopper-v5/cvl"].memory_gb == 4.0
    on_gpu = {cell.name: cell.job.recipe for cell in fixed(cells(tmp_path), MACHINE._replace(device="cuda"))}
    assert (on_gpu["critic/gym/Hopper-v5"].device, on_gpu["critic/gym/Hopper-v5"].precision) == ("cuda", "float32")
    assert on_gpu["_~sac~gym~Hopper-v5.zarr"].device == "cpu"  # an online learner belongs there


def test_what_a_recipe_says_stays(tmp_path: Path) -> None:
    said = {"device": "cpu", "threads": 3, "precision": "float32", "compile": True, "memory_gb": 1.5}
    stages = {"critic": {**STAGES["critic"], **said}}
    (one, _) = fixed(cells(tmp_path, stages), MACHINE)
    assert {key: one.job.recipe.resolved()[key] for key in said} == {**said, "compile": "true"}


def test_compiling_is_decided_by_the_machine_that_began(tmp_path: Path) -> None:
    stages = {"critic": {**STAGES["critic"], "steps": 3_000}}
    slow, fast = (fixed(cells(tmp_path, stages), MACHINE._replace(flops=flops))[0] for flops in (1e9, 1e13))
    assert (slow.job.recipe.compile, fast.job.recipe.compile) == ("true", "false")
    none = fixed(cells(tmp_path, stages), MACHINE._replace(flops=1e9, compiles=False))[0]
    assert none.job.recipe.compile == "false"


def test_the_first_run_decides_for_all(tmp_path: Path) -> None:
    out = tmp_path / "e"
    plan = machine_of(out, None, keep=False)
    assert plan.precision == "auto"
    assert not out.exists()  # a plan leaves nothing behind
    first = machine_of(out, False, keep=True)
    assert first.device == "cpu"
    assert first.precision in ("medium", "float32")
    changed = first._replace(cpus=64, flops=1e15)
    (out / CELLS / FILE).write_text(json.dumps(changed._asdict()))
    assert machine_of(out, True, keep=True) == changed == machine_of(out, None, keep=False)
    for damage in ({"device": "cpu"}, changed._asdict() | {"flops": 0.0}, changed._asdict() | {"call": float("nan")}):
        (out / CELLS / FILE).write_text(json.dumps(damage))
        with pytest.raises(CvlctlError, match=r"machine\.json is damaged"):
            machine_of(out, None, keep=False)


def test_of_two_that_begin_at_once_one_decides_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(gpus: bool | None) -> Machine:
        (tmp_path / CELLS).mkdir()
        (tmp_path / CELLS / FILE).write_text(json.dumps(MACHINE._asdict()))
        return MACHINE._replace(cpus=64)

    monkeypatch.setattr("cvlctl.experiments.fixed._here", meanwhile)
    assert machine_of(tmp_path, None, keep=True) == machine_of(tmp_path, None, keep=True) == MACHINE
    assert [file.name for file in (tmp_path / CELLS).iterdir()] == [FILE]


def test_settings_of_engines_are_the_stages_over_the_experiments(tmp_path: Path) -> None:
    stages = {"critic": {**STAGES["critic"], "local": {"gpus": 0}}, "bc": STAGES["bc"]}
    found = {cell.job.stage: cell.job.engines["local"] for cell in cells(tmp_path, stages, local={"processes": 3})}
    assert (found["critic"].processes, found["critic"].gpus, found["bc"].gpus) == (3, 0, "auto")
    with pytest.raises(CvlctlError, match=r"stages\.critic\.local\.gpu.*"):
        cells(tmp_path, {"critic": {**STAGES["critic"], "local": {"gpu": 0}}})


def test_what_was_decided_for_a_result_that_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stages = {name: STAGES[name] for name in ("critic", "data", "sac")}
    then = {"threads": 7, "device": "auto", "precision": "float32", "compile": "false", "memory_gb": 9.0}
    run, policies, store = Path("e/critic/gym/Hopper-v5"), Path("../sac/gym/Hopper-v5.policies"), Path("e/data/gym")
    for place in (run, policies):
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps({"status": "finished", "recipe": then}))
    (store / "Hopper-v5.zarr").mkdir(parents=True)
    provenance = {"attributes": {"provenance": {"recipe": then | {"threads": "nonsense"}}}}
    (store / "Hopper-v5.zarr" / "zarr.json").write_text(json.dumps(provenance))
    found = {cell.name: cell.job.recipe for cell in fixed(cells(tmp_path, stages), MACHINE._replace(flops=1e9))}
    critic = found["critic/gym/Hopper-v5"]
    assert (critic.threads, critic.device, critic.precision, critic.memory_gb) == (7, "cpu", "float32", 9.0)
    assert critic.compile == "false"
    assert found["critic/gym/Pendulum-v1"].precision == "medium"
    assert found["_~sac~gym~Hopper-v5.zarr"].precision == "float32"
    assert found["data/gym/Hopper-v5.zarr"].precision == "float32"
    assert found["data/gym/Hopper-v5.zarr"].threads == 1
