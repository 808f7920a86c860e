"""The steps of `gpu.py` that measure: updates of seeds together, matrix products, collections at once, evaluation."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import common
import gpu_model
import numpy as np
import torch
from common import EAGER, Contestant
from gpu import HERE, How
from gpu_checks import TINY, TINY_CRITIC, trained, written
from together import LONG, METHODS

from cvlctl.data.load import to_device
from cvlctl.data.samplers import BLOCK
from cvlctl.learn.algorithms import occupancy
from cvlctl.learn.settings import Settings
from cvlctl.machine import num_cpus

BATCHES, SMALL, SEEDS = (256, 1024), (8, 16), 5
Form = tuple[str, int, int]  # eager or graph, batch size, number of seeds
WIDE, WIDE_BATCH = occupancy.Config(hidden=(1024, 1024)), 1024  # the critic whose matrix products are measured
TASKS = 16  # collected at once
PRECISIONS = {"float32": "float32", "TF32": "medium", "bf16": "bf16"}


def settings_of(how: How) -> dict[str, Settings]:
    """Eager, and as cvlctl computes on the device: a graph on a GPU; by these names."""
    threads = 1 if how.small else num_cpus()
    mine = common.our_settings(threads, eager_only=how.small, device=how.device)
    return {"eager": mine[EAGER], "graph": mine[common.best(mine)]}


def contestants(how: How, name: str) -> dict[Form, Contestant]:
    """Functions that make n updates: each form at both batch sizes, and one seed alone at the first."""
    module, config = METHODS[name]
    settings, sizes = settings_of(how), SMALL if how.small else BATCHES
    config = smaller(config) if how.small else config
    data = to_device(common.synthetic(2_000 if how.small else 500_000), how.device)
    forms = [(form, batch, SEEDS) for batch in sizes for form in ("eager", "graph")] + [("graph", sizes[0], 1)]
    return {
        (form, batch, seeds): common.learner(module, config, range(seeds), data, batch, settings[form])
        for form, batch, seeds in forms
    }  # fmt: skip


def smaller(config: Any) -> Any:
    """The same method with networks that take no time."""
    fields: dict[str, Any] = {name: value for name, value in TINY.items() if hasattr(config, name)}
    if hasattr(config, "critic"):
        fields["critic"] = replace(config.critic, **TINY_CRITIC)
    return replace(config, **fields)


def compile_all(how: How) -> dict[str, Any]:
    """Compile the programs of all methods at once, a process each: what is measured afterwards finds them on disk."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import gpu, gpu_rates; "
    code += "gpu_rates.warm(gpu.How(sys.argv[2], sys.argv[3] == 'True', None), sys.argv[1])"
    command = [sys.executable, "-P", "-c", code]
    running = {
        name: subprocess.Popen([*command, name, how.device, str(how.small)], cwd=HERE, stderr=sys.stdout)
        for name in METHODS
    }
    codes = {name: process.wait() for name, process in running.items()}
    if any(codes.values()):
        raise RuntimeError(f"exit codes {codes}")
    return {"curves": []}


def warm(how: How, name: str) -> None:
    """Compile all programs of a method, and make their first updates."""
    for run in contestants(how, name).values():
        run(1 if how.small else 8)


def method(how: How, name: str) -> dict[str, Any]:
    """Agent-updates/s of a method, sampling included: eager and as a graph, two batch sizes, one seed and five."""
    rounds, updates, warm_up = (1, 1, 1) if how.small else (3, 4 * BLOCK, BLOCK)
    runs = contestants(how, name)
    calls = common.measure({str(form): run for form, run in runs.items()}, rounds, updates, warm_up)
    return rates_of(name, {form: np.array(calls[str(form)]) for form in runs}, how.device)


def rates_of(name: str, calls: dict[Form, np.ndarray], device: str) -> dict[str, Any]:
    """The table and the numbers of the aims; `calls`: updates of all seeds a second, in every round."""
    rows, sizes = [], sorted({batch for _, batch, _ in calls})
    for batch in sizes:
        eager, graph = SEEDS * calls["eager", batch, SEEDS], SEEDS * calls["graph", batch, SEEDS]
        rate = float(np.median(graph))
        rows.append([batch, round(float(np.median(eager)), 1), round(rate, 1), *common.spread(graph / eager),
                     round(LONG * SEEDS / rate / 60, 2)])  # fmt: skip
    one, five = (calls["graph", sizes[0], seeds] for seeds in (1, SEEDS))
    numbers = {
        "graph": rows[0][2],
        "gain": rows[0][3],
        "minutes": rows[0][6],
        "five_to_one": common.spread(one / five)[0],
    }
    columns = ["batch", "eager", "graph", "ratio", "least", "most", "minutes"]
    note = (
        f"{device}; minutes of {LONG:,} updates of all; at batch {sizes[0]} five seeds take "
        f"{numbers['five_to_one']:.2f} times as long as one"
    )
    title = f"{name}, {SEEDS} seeds, agent-updates/s"
    return {"numbers": numbers, "curves": [{"title": title, "columns": columns, "rows": rows, "note": note}]}


def matmuls(how: How) -> dict[str, Any]:
    """The critic's step at batch 1024 and hidden 1024x1024 beside its own matrix products and nothing else."""
    config, batch = (occupancy.Config(**TINY_CRITIC), 16) if how.small else (WIDE, WIDE_BATCH)
    data = to_device(common.synthetic(2_000 if how.small else 500_000), how.device)
    shapes = gpu_model.counted(occupancy, config, range(SEEDS), batch).products
    flops = gpu_model.flops_of(shapes)
    settings = settings_of(how)["graph"]
    rows, shares = [], {}
    for name, precision in PRECISIONS.items():
        mine = replace(settings, precision=precision)
        runs = {
            "step": common.learner(occupancy, config, range(SEEDS), data, batch, mine),
            "bare": bare(shapes, mine),
        }
        rates = common.measure(runs, 1 if how.small else 5, 1 if how.small else BLOCK, first=1 if how.small else BLOCK)
        step, alone = (float(np.median(rates[one])) for one in ("step", "bare"))
        shares[name] = common.spread(np.array(rates["step"]) / np.array(rates["bare"]))
        rows.append([name, round(step * flops / 1e12, 2), round(alone * flops / 1e12, 2), *shares[name]])
    columns = ["products in", "the step, TFLOP/s", "bare, TFLOP/s", "share", "least", "most"]
    size = f"{common.size_of(config.hidden)}, batch {batch}, {SEEDS} seeds"
    note = (
        f"{how.device}; {len(shapes)} products, {flops / 1e9:.2f} GFLOP a step; bare: torch.matmul of the same shapes"
    )
    numbers = {"share": shares["float32"][0], "gflop": flops / 1e9}
    return {"numbers": numbers, "curves": [{"title": f"The critic's step, {size}", "columns": columns, "rows": rows,
                                            "note": note}]}  # fmt: skip


def bare(shapes: list[gpu_model.Product], settings: Settings) -> Contestant:
    """n times the matrix products of those shapes, on a GPU as a graph."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    make = partial(torch.randn, device=settings.device, dtype=dtype)
    pairs = [(make(batches, m, k), make(batches, k, n)) for batches, m, k, n in shapes]
    graph = None

    def products() -> None:
        for a, b in pairs:
            torch.matmul(a, b)

    def run(updates: int) -> None:
        nonlocal graph
        common.configure(settings)
        if settings.device == "cuda" and graph is None:
            products()  # cuBLAS makes its workspace
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                products()
        for _ in range(updates):
            graph.replay() if graph else products()
        if settings.device == "cuda":
            torch.cuda.synchronize()

    return run


def collected(how: How, device: str, task: str) -> tuple[float, float]:
    """SAC on one task, in a process of its own: frames/s once it learns, and seconds in all."""
    import sac

    frames, starts, hidden = (700, 100, (16,)) if how.small else (2500, 1000, (256, 256))
    settings = settings_of(how._replace(device=device))["graph"]
    seen = sac.our_frames(replace(settings, threads=1), frames, starts, hidden, task)
    return sac.steady(seen, starts)[0], seen[-1][1] - seen[0][1]


def sac_at_once(how: How) -> dict[str, Any]:
    """SAC on many Metaworld tasks at once, a process each, learning on the device and on the CPU."""
    from cvlctl.play import envs

    count = 2 if how.small else TASKS
    tasks = [task for task in envs.list_tasks() if task.startswith("metaworld/")][:count]
    rows = []
    for device in dict.fromkeys((how.device, "cpu")):
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            found = np.array(list(pool.map(partial(collected, how, device), tasks)))
        rows.append([device, count, round(float(found[:, 0].sum()), 1), *(round(float(x), 1) for x in
                     (found[:, 0].min(), found[:, 0].max(), found[:, 1].max()))])  # fmt: skip
    columns = ["learns on", "tasks", "frames/s", "slowest", "fastest", "seconds"]
    note = f"{num_cpus()} CPUs; one update a frame; frames/s from 500 learning frames on, seconds with compiling"
    return {"curves": [{"title": "SAC on Metaworld tasks at once", "columns": columns, "rows": rows, "note": note}]}


def evaluation(how: How) -> dict[str, Any]:
    """Metaworld episodes of several seeds: in workers, with all policies on the device, and in EnvPool."""
    from cvlctl.collect.build import build
    from cvlctl.collect.recipe import BuildRecipe
    from cvlctl.score.evaluate import evaluate
    from cvlctl.score.recipe import EvaluateRecipe

    task, store, seeds, number = "metaworld/drawer-close-v3", how.folder / "data.zarr", 2 if how.small else SEEDS, 50
    source = {"name": "scripted", "episodes": 1}
    build(BuildRecipe.model_validate({"task": task, "source": source, "out": str(store)}))
    actor = {"stores": [str(store)], "algorithm": {"name": "bc", "hidden": [256, 256]}, "steps": 5, "batch_size": 32}
    file, run = written(how._replace(small=True), "actor", seeds=list(range(seeds)), **actor)
    trained("finetune", file)
    ways: dict[str, dict[str, Any]] = {"workers": {"device": "cpu"}}
    ways |= {"workers, policies on the GPU": {"device": "cuda"}} if how.device == "cuda" else {}
    ways |= {"EnvPool": {"backend": "envpool"}} if find_spec("envpool") else {}
    sizes = {"episodes": 1, "horizon": 10, "workers": 1} if how.small else {"episodes": number}
    rows = []
    for name, way in ways.items():
        recipe = {"runs": [run], "out": str(how.folder / f"scores-{len(rows)}"), **sizes, **way}
        rows.append([name, round(common.seconds(partial(evaluate, EvaluateRecipe.model_validate(recipe))), 2)])
    title = f"{sizes['episodes']} episodes of {task} by {seeds} seeds"
    note = f"{num_cpus()} CPUs; whole `cvlctl evaluate`, starts of workers and tables included"
    return {"curves": [{"title": title, "columns": ["", "seconds"], "rows": rows, "note": note}]}
