"""The steps of `gpu.py` that ask whether cvlctl works on a device: what is there, tests, every kind of run in small."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from gpu import ROOT, How

from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.machine import num_cpus

CLI = [sys.executable, "-P", "-m", "cvlctl"]
VARIANTS: dict[str, dict[str, Any]] = {
    "twin": {"algorithm": {"name": "cvl", "critic": {"twin": True}}},
    "coreset": {"algorithm": {"name": "cvl", "readout": "coreset"}},
    "time_bins": {"algorithm": {"name": "cvl", "readout": "fourier", "time_bins": 10}},
    "bf16": {"algorithm": {"name": "cvl"}, "precision": "bf16"},
    "oril": {"algorithm": {"name": "td3_bc"}, "rewards": "oril"},
    "purl": {"algorithm": {"name": "td3_bc"}, "rewards": "purl"},
    "fqe": {"algorithm": {"name": "fqe"}, "init_from": "purl"},
}
TINY_CRITIC: dict[str, Any] = {"hidden": (16,), "latent_dim": 8}
TINY = {"hidden": (16,), "bank_size": 16, "coreset_size": 8, "num_features": 16, "num_actions": 2}  # of those it has


def command(*arguments: str, say: bool = True) -> str:
    """What a command prints on stdout; RuntimeError where it fails."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=sys.stdout, text=True, cwd=ROOT)
    if say:
        print(done.stdout)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(arguments)}")
    return done.stdout


def facts(title: str, rows: list[list[Any]]) -> dict[str, Any]:
    return {"title": title, "columns": ["what", ""], "rows": rows, "note": ""}


def machine(how: How) -> dict[str, Any]:
    """Driver, torch, Triton, compiler, EGL; and all of `cvlctl doctor`."""
    smi = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv,noheader"]
    cuda = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton")
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    rows = [
        ["GPU and driver", command(smi, *query, say=False).strip() if smi else "no nvidia-smi"],
        ["torch, its CUDA", f"{torch.__version__}, {torch.version.cuda}"],
        ["torch sees", torch.cuda.get_device_name(0) if cuda else "no GPU"],
        ["compute capability", ".".join(map(str, torch.cuda.get_device_capability(0))) if cuda else ""],
        ["Triton", importlib.import_module("triton").__version__ if triton else "none"],
        ["C compiler", command(compiler, "--version", say=False).splitlines()[0] if compiler else "none"],
        ["EGL", find_library("EGL") or "none"],
        ["python", sys.version.split()[0]],
    ]
    if how.device == "cuda" and not cuda:
        raise RuntimeError(f"torch sees no GPU: {rows}")
    curves = [facts("What is there", rows)]
    if all(importlib.util.find_spec(package) for package in ("pydantic", "typer", "rich")):
        doctor = json.loads(command(*CLI, "doctor", "--json"))
        told = [[name, str(value)] for name, value in doctor.items() if name not in ("packages", "extras")]
        curves.append(facts("cvlctl doctor", told))
    return {"machine": common.machine(), "curves": curves}


def tests(how: How) -> dict[str, Any]:
    """tests/test_gpu.py: each method in three forms, resume at every cut, no synchronisation between logs. Most of it
    is compiling: the tests of a method in a process of their own, as many at once as there are CPUs."""
    file = ROOT / "tests" / "test_gpu.py"
    if not file.exists():
        raise RuntimeError(f"there is no {file.relative_to(ROOT)}")
    listed = run_pytest("--collect-only", str(file)).stdout
    ids = [line for line in listed.splitlines() if "::" in line and not line.startswith("ERROR")]
    if not ids:
        raise RuntimeError(f"pytest finds no tests: {listed}")
    with ThreadPoolExecutor(num_cpus()) as pool:
        all_done = list(pool.map(lambda some: run_pytest("-rs", "--durations", "3", *some), by_method(ids)))
    counts: Counter[str] = Counter()
    for done in all_done:
        print(done.stdout)
        counts.update({word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)})
    codes = {done.returncode for done in all_done}
    if codes != {0} or (how.device == "cuda" and not counts["passed"]):
        raise RuntimeError(f"pytest ended with exit codes {sorted(codes)}: {dict(counts)}")
    return {"numbers": dict(counts), "curves": [facts("Tests", [[word, number] for word, number in counts.items()])]}


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it on tests that want a GPU. Each process compiles in few others, since there are many at once. A -q is in
    pyproject.toml; a second one would take names and counts away."""
    command = [sys.executable, "-P", "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "--tb", "short"]
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", **os.environ}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)  # fmt: skip


def by_method(ids: Sequence[str]) -> list[list[str]]:
    """Tests in groups of one method, which find each other's kernels; those of runs, which compile anew, by themselves
    and first, since they take longest."""
    groups: dict[str, list[str]] = {}
    for name in sorted(ids, key=lambda name: "_run_" not in name):
        method = name.partition("[")[2]
        groups.setdefault(name if "_run_" in name else method, []).append(name)
    return list(groups.values())


def quickstart(how: How) -> dict[str, Any]:
    """The whole pipeline in small, all of it on the device."""
    steps, frames = (10, 600) if how.small else (300, 2000)
    changes = [
        f"out={how.folder / 'run'}", f"stages.data.source.steps={frames}",
        "stages.finetune.success_examples.rule=last", f"stages.scores.episodes={1 if how.small else 5}",
    ]  # fmt: skip
    changes += [f"stages.{stage}.steps={steps}" for stage in ("pretrain", "finetune", "cloning")]
    changes += [
        f"stages.{stage}.device={how.device}" for stage in ("data", "pretrain", "finetune", "cloning", "scores")
    ]
    if how.small:
        changes += ["stages.data.source.learning_starts=580", "stages.scores.horizon=20"]
        changes += [f"stages.{stage}.seeds=[0,1]" for stage in ("pretrain", "finetune", "cloning")]
    begin = time.monotonic()
    command(*CLI, "run", "recipes/quickstart.yaml", *changes)
    return {"curves": [facts("Quickstart in small", [["seconds", round(time.monotonic() - begin, 1)]])]}


def written(how: How, name: str, **recipe: Any) -> tuple[str, str]:
    """The recipe in a file, and the folder that it makes."""
    out = str(how.folder / name)
    file = how.folder / f"{name}.yaml"
    compiled = "false" if how.small else "auto"
    file.write_text(json.dumps({"out": out, "device": how.device, "compile": compiled, "threads": 1, **recipe}))
    return str(file), out


def killed(how: How) -> dict[str, Any]:
    """SAC's collection, killed and resumed, makes the same store as one that was left alone."""
    import cvlctl

    frames, starts = (1000, 900) if how.small else (2000, 600)
    source = {"name": "sac", "steps": frames, "learning_starts": starts, "hidden": [16] if how.small else [256, 256]}
    recipe = {"task": "gym/Pendulum-v1", "source": source, "checkpoint_seconds": 0.001}
    whole, whole_store = written(how, "whole.zarr", **recipe)
    cut, cut_store = written(how, "cut.zarr", **recipe)
    command(*CLI, "build-dataset", whole)
    saved = how.folder / "cut.policies" / "checkpoints"
    with subprocess.Popen([*CLI, "build-dataset", cut], cwd=ROOT, stdout=sys.stdout, stderr=sys.stdout) as process:
        while process.poll() is None and not learned(saved, starts // 200 + 1):
            time.sleep(0.01)
        process.kill()
    if Path(cut_store).exists():
        raise RuntimeError("the collection was over before it could be killed")
    command(*CLI, "build-dataset", cut)
    same = cvlctl.open_store(whole_store).digest() == cvlctl.open_store(cut_store).digest()
    if not same:
        raise RuntimeError("the store of the collection that was killed is another")
    return {"curves": [facts("SAC killed and resumed", [["frames", frames], ["the same store", same]])]}


def learned(folder: Path, episodes: int) -> bool:
    """Whether a state of so many episodes or more is saved there."""
    numbers = [int(file.stem.removeprefix("episodes-")) for file in folder.glob("episodes-*.safetensors")]
    return max(numbers, default=0) >= episodes


def episodes(rows: int) -> Iterator[Any]:
    """Random ones of 100 steps with rewards, whose last step succeeds in every second one."""
    import cvlctl

    rng = np.random.default_rng(0)
    for number in range(max(2, rows // 101)):
        success = np.zeros(100, dtype=bool)
        success[-1] = number % 2 == 0
        yield cvlctl.Episode(
            rng.standard_normal((101, 11), dtype=np.float32), rng.uniform(-1, 1, (100, 3)).astype(np.float32),
            rng.uniform(0, 1, 100).astype(np.float32), success,
        )  # fmt: skip


def trained(command_name: str, recipe: str) -> dict[str, Any]:
    """A run in this process; RuntimeError where a metric of it is not finite."""
    from cvlctl.experiments import commands
    from cvlctl.learn.finetune import finetune
    from cvlctl.learn.pretrain import pretrain

    result = (pretrain if command_name == "pretrain" else finetune)(commands.load(recipe, [], command_name))
    lines = (Path(result["out"]) / "metrics.jsonl").read_text().splitlines()
    values = [number for line in lines for value in json.loads(line).values() for number in np.ravel(value)]
    if not values or not all(math.isfinite(number) for number in values):
        raise RuntimeError(f"{recipe}: its metrics are not finite")
    return result


def streamed(how: How) -> dict[str, Any]:
    """A critic on a store of which a tenth is in memory, beside one with all of it there."""
    import cvlctl
    from cvlctl.data.stream import row_bytes

    rows, steps = (20_000, 70) if how.small else (500_000, 1000)
    store = cvlctl.write_store(how.folder / "data.zarr", episodes(rows), task="synthetic")
    gigabytes = store.num_rows * row_bytes(store) / 1e9
    recipe = {
        "stores": [str(store.path)],
        "steps": steps,
        "batch_size": 32 if how.small else 256,
        "log_every_steps": 10,
    }
    recipe |= {"critic": TINY_CRITIC} if how.small else {}
    found = []
    for name, share in (("in memory", 2.0), ("streamed", 0.1)):
        file, out = written(how, name.replace(" ", "_"), memory_gb=share * gigabytes, **recipe)
        rate = trained("pretrain", file)["updates_per_second"]
        window = settings_of(Path(out))["window_rows"]
        if (window > 0) != (name == "streamed"):
            raise RuntimeError(f"{name}: a window of {window} rows")
        found.append([name, round(rate, 1), window])
    return {"curves": [{"title": "A store larger than memory", "columns": ["data", "updates/s", "rows of a window"],
                        "rows": found, "note": "compiling is in these rates"}]}  # fmt: skip


def settings_of(run: Path) -> dict[str, Any]:
    from cvlctl import checkpoints

    settings = checkpoints.load(run / "checkpoints" / "last.safetensors")[1]["settings"]
    return dict(settings)


def tiny(algorithm: dict[str, Any]) -> dict[str, Any]:
    """The same with small networks."""
    fields = ALGORITHMS[algorithm["name"]].Config.__dataclass_fields__
    made = {name: value for name, value in TINY.items() if name in fields} | algorithm
    return made | {"critic": TINY_CRITIC | algorithm.get("critic", {})} if "critic" in fields else made


def variants(how: How) -> dict[str, Any]:
    """What the usual methods leave out, a short run of each. One that fails does not keep the next from its turn."""
    import cvlctl

    steps = 5 if how.small else 70
    store = cvlctl.write_store(how.folder / "data.zarr", episodes(3_000), task="synthetic")
    rows, failed = [], []
    for name, variant in VARIANTS.items():
        recipe: dict[str, Any] = {
            "steps": steps,
            "batch_size": 32 if how.small else 256,
            "log_every_steps": 1,
        } | variant
        recipe |= {"labeller": {"steps": 5, "hidden": [16]}} if how.small else {}
        recipe["algorithm"] = tiny(variant["algorithm"]) if how.small else variant["algorithm"]
        recipe |= {"success_examples": {"from": str(store.path), "rule": "last", "num": 20}}
        recipe |= {"stores": [{"path": str(store.path), "rewards": recipe.pop("rewards", "given")}]}
        if "init_from" in recipe:
            recipe["init_from"] = str(how.folder / recipe["init_from"])
        begin = time.monotonic()
        try:
            trained("finetune", written(how, name, **recipe)[0])
            state = "done"
        except Exception as error:
            print(f"{name}: {error!r}")
            failed.append(f"{name}: {error!r}")
            state = "failed"
        rows.append([name, state, round(time.monotonic() - begin, 1)])
    if failed:
        raise RuntimeError("; ".join(failed))
    curve = {"title": f"{steps} updates of each", "columns": ["variant", "", "seconds"], "rows": rows, "note": ""}
    return {"curves": [curve]}
