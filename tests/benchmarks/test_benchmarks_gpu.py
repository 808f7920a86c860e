"""The command for a GPU machine, in small on a CPU: every step that measures runs for real, and failures are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvlctl.learn.algorithms import bc, occupancy

Script = Callable[[str], Any]
SMALL = ["--device", "cpu", "--small", "--patience", "20"]


@pytest.fixture
def how(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a step is told, and a machine with one thread."""
    found = script("gpu").How("cpu", True, tmp_path)
    monkeypatch.setattr(script("gpu_rates"), "num_cpus", lambda: 1)
    return found


@pytest.mark.parametrize("name", ["CVL", "LAEO", "TD3+BC", "IQL", "CQL"])
def test_every_method_is_measured_in_both_forms(script: Script, how: Any, name: str) -> None:
    found = script("gpu_rates").method(how, name)
    (curve,) = found["curves"]
    assert [row[0] for row in curve["rows"]] == [8, 16]
    assert all(number > 0 for row in curve["rows"] for number in row)
    assert set(found["numbers"]) == {"graph", "gain", "minutes", "five_to_one"}


def test_rates_are_of_all_seeds_and_minutes_of_half_a_million_updates(script: Script) -> None:
    calls = {
        ("eager", 256, 5): [50.0, 100.0], ("graph", 256, 5): [400.0, 800.0], ("graph", 256, 1): [480.0, 960.0],
        ("eager", 1024, 5): [10.0, 10.0], ("graph", 1024, 5): [20.0, 30.0],
    }  # fmt: skip
    found = script("gpu_rates").rates_of("CVL", {form: np.array(rate) for form, rate in calls.items()}, "cuda")
    first, second = found["curves"][0]["rows"]
    assert first == [256, 375.0, 3000.0, 8.0, 8.0, 8.0, round(500_000 / 600 / 60, 2)]
    assert second[:4] == [1024, 50.0, 125.0, 2.5]
    assert found["numbers"] == {"graph": 3000.0, "gain": 8.0, "minutes": first[-1], "five_to_one": 1.2}


def test_products_of_a_step_are_counted_and_measured_bare(script: Script, how: Any) -> None:
    model, found = script("gpu_model"), script("gpu_rates").matmuls(how)
    assert [row[0] for row in found["curves"][0]["rows"]] == ["float32", "TF32", "bf16"]
    shapes = model.counted(occupancy, occupancy.Config(hidden=(16,), latent_dim=8), range(5), 16).products
    layers = [(16, 43, 16), (16, 39, 16), *2 * [(16, 16, 8)], (16, 8, 16)]  # phi, psi of 43 and 39 columns; f
    weights = [(43, 16, 16), (39, 16, 16), *2 * [(16, 16, 8)]]  # their gradients
    back = [*2 * [(16, 8, 16)], (16, 16, 8), (8, 16, 16)]  # hidden layers' gradients, and those of both factors of f
    assert sorted(shapes) == sorted((5, *shape) for shape in layers + weights + back)
    assert found["numbers"]["gflop"] * 1e9 == model.flops_of(shapes)


def test_bytes_and_operations_of_a_step_are_those_of_its_tensors(script: Script) -> None:
    model = script("gpu_model")
    with model.Counting() as counting:
        a = torch.ones(2, 3, 4)  # written
        b = torch.bmm(a, a.transpose(1, 2))  # a view costs nothing
        b.add_(1)
    assert counting.operations == 3
    assert counting.products == [(2, 3, 4, 3)]
    assert counting.product_bytes == 4 * (24 + 24 + 18)
    assert counting.bytes == counting.product_bytes + 4 * (24 + 18 + 18)


def test_a_step_on_the_device_costs_what_the_state_and_its_products_do(script: Script) -> None:
    model = script("gpu_model")
    config = bc.Config(hidden=(16,))
    count = model.counted(bc, config, [0, 1], 8)
    assert count.flops == model.flops_of(count.products)
    assert count.operations > len(count.products) == 5
    assert count.least_bytes == count.product_bytes + 2 * count.state_bytes < count.bytes
    assert model.least_microseconds(count, 10)[0] == 20


@pytest.mark.parametrize("step", ["streamed", pytest.param("variants", marks=pytest.mark.slow)])
def test_every_kind_of_run_goes_through(script: Script, how: Any, step: str) -> None:
    found = getattr(script("gpu_checks"), step)(how)
    assert [row[0] for row in found["curves"][0]["rows"]] in (
        ["in memory", "streamed"], ["twin", "coreset", "time_bins", "bf16", "oril", "purl", "fqe"]
    )  # fmt: skip


def test_a_variant_that_fails_is_named_and_the_others_run(
    script: Script, how: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = script("gpu_checks")
    seen: list[str] = []

    def trained(kind: str, recipe: str) -> dict[str, Any]:
        seen.append(Path(recipe).stem)
        if seen[-1] == "coreset":
            raise RuntimeError("not finite")
        return {}

    monkeypatch.setattr(checks, "trained", trained)
    with pytest.raises(RuntimeError, match=r"coreset: .*not finite"):
        checks.variants(how)
    assert seen == list(checks.VARIANTS)


def test_steps_that_fail_are_late_or_lack_a_package_do_not_stop_the_next(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = script("gpu")
    monkeypatch.setitem(gpu.STEPS, "quickstart", gpu.Step("gpu_checks.quickstart", 9, ("no_such_package",)))
    for name in ("killed", "streamed"):  # whatever packages are here
        monkeypatch.setitem(gpu.STEPS, name, gpu.Step(f"gpu_checks.{name}", 9, alone=False))
    monkeypatch.setitem(gpu.STEPS, "CQL", gpu.Step("gpu_rates.method", 0.01))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    script("gpu_page")
    (tmp_path / "gpu.py").write_text(
        "import json, pathlib, sys, time\n"
        "name, file = sys.argv[2], pathlib.Path(sys.argv[6])\n"
        "print('begun', name)\n"
        "if name == 'machine': sys.exit('it has no GPU')\n"
        "if name == 'CQL': time.sleep(600)\n"
        "pathlib.Path(name).touch()\n"
        "other = {'killed': 'streamed', 'streamed': 'killed'}.get(name, name)\n"
        "while not pathlib.Path(other).exists(): time.sleep(0.01)\n"
        "file.write_text(json.dumps({'numbers': {'graph': 10_000.0}, 'curves': []}))\n"
    )
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    steps = ["machine", "quickstart", "killed", "streamed", "CQL", "IQL"]  # two of which wait for each other
    assert gpu.main(["--device", "cpu", "--out", str(out), "--patience", "20", "--steps", *steps]) == 1
    found = json.loads((out / "results.json").read_text())["steps"]
    assert {name: step["state"] for name, step in found.items()} == dict(
        zip(steps, ("failed", "skipped", "done", "done", "failed", "done"), strict=True)
    )
    assert found["machine"]["why"] == "exit code 1" and found["machine"]["last"][-1] == "it has no GPU"
    assert found["quickstart"]["why"] == "no package no_such_package"
    assert found["CQL"]["why"] == "not done in 0 s"
    page = (out / "results.md").read_text()
    assert "it has no GPU" in page and "| IQL | done |" in page
    assert "no package no_such_package" in capsys.readouterr().out


def test_what_measures_runs_alone(script: Script) -> None:
    gpu = script("gpu")
    several = [names for names in gpu.groups(list(gpu.STEPS)) if len(names) > 1]
    assert several == [["quickstart", "killed", "streamed", "variants"]]
    assert gpu.groups(["tests", "variants", "CVL", "killed"]) == [["tests"], ["variants"], ["CVL"], ["killed"]]


def test_tests_of_a_method_share_a_process_and_runs_begin_first(script: Script) -> None:
    ids = ["f::test_a_step[bc]", "f::test_a_step[iql]", "f::test_nothing_waits[bc]", "f::test_a_cut_run_goes[bc]"]
    found = script("gpu_checks").by_method(ids)
    assert found == [["f::test_a_cut_run_goes[bc]"], ["f::test_a_step[bc]", "f::test_nothing_waits[bc]"], [ids[1]]]


def test_aims_are_open_until_a_gpu_has_been_measured(script: Script) -> None:
    page = script("gpu_page")
    columns, rows = page.aims(None)
    assert {row[-1] for row in rows} == {page.OPEN} and len(columns) == 4
    numbers = {"minutes": 2.5, "five_to_one": 1.4, "graph": 9_000.0, "gain": 5.0}
    steps: dict[str, Any] = {name: {"state": "done", "numbers": numbers} for name in page.METHODS}
    steps["CQL"] = {"state": "done", "numbers": numbers | {"gain": 3.0}}
    steps["tests"] = {"state": "done"}
    found = {"device": "cuda", "small": False, "steps": steps}
    assert [row[-1] for row in page.aims(found)[1]] == [
        "reached", "**missed**", "**missed**", "**missed**", "**missed**", page.OPEN, "reached",
    ]  # fmt: skip
    assert page.aims(found | {"device": "cpu"}) == page.aims(found | {"small": True}) == page.aims(None)
    del steps["LAEO"]  # of five methods one is missing: open
    assert page.aims(found)[1][4][-1] == page.OPEN


def test_the_model_is_held_against_the_aims(script: Script) -> None:
    """One seed of CVL: 200 us of launches and a fifth of the other 100."""
    limits = {"CVL": [200, 40.0, 60.0, 300, 1800, 2.5]}
    limits |= {name: [90, 5.0, 5.0, 100, 500, 1] for name in ("TD3+BC", "IQL")}
    told = script("run").of_the_aims(limits)
    for words in ("in 2.5 minutes", "five seeds at 1.36 times", "TD3+BC 50,000, IQL 50,000", "at least 5.0 times"):
        assert words in told


def test_wheels_of_the_versions_that_were_tested_are_listed_and_used(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = script("gpu_wheels")
    said: list[str] = []
    monkeypatch.setattr(wheels, "_have_pip", lambda: False)
    versions = wheels.pinned()
    for name in ("pydantic_core", "zarr"):
        tags = "cp311-cp311-manylinux_2_28_x86_64" if name == "pydantic_core" else "py3-none-any"
        file = tmp_path / f"{name}-{versions[name.replace('_', '-')]}-{tags}.whl"
        with zipfile.ZipFile(file, "w") as made:
            made.writestr(f"of_{name}.py", f"NAME = {name!r}\n")
    lacking = wheels.fill(tmp_path, said.append)
    assert len(lacking) == len(wheels.WHEELS) - 1 and not any("zarr" in line for line in lacking)
    assert f"missing      pydantic-core=={versions['pydantic-core']}" in said  # there is one of another Python
    unpacked = wheels.unpack(tmp_path)
    told = subprocess.run(
        [sys.executable, "-P", "-c", "import of_zarr; print(of_zarr.NAME)"],
        env={**os.environ, "PYTHONPATH": str(unpacked)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == "zarr\n"
    assert wheels.unpack(unpacked) == unpacked


@pytest.mark.slow
def test_all_steps_in_small(script: Script, tmp_path: Path) -> None:
    gpu = script("gpu")
    steps = [name for name in gpu.STEPS if name != "tests"]
    assert gpu.main([*SMALL, "--out", str(tmp_path), "--steps", *steps]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {step["state"] for step in found.values()} == {"done"}
