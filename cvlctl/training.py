"""The fast training step, in one place: matmul setting, fused Adam, whole-step compile, CUDA graphs.

A learner's `step(config, state, batch, noise) -> (state, metrics)` is a function of its arguments alone; the state
passed in is *consumed* (updated in place, as with donated buffers), which spares a copy of every weight and moment on
each step and is what a CUDA graph needs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as fused_adam

from cvlctl import networks
from cvlctl.errors import CvlctlError
from cvlctl.machine import num_cpus
from cvlctl.networks import State

Metrics = dict[str, Tensor]
ADAM_BETA1, ADAM_BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
COMPILE_PAYS_AFTER = 8_000  # updates on a CPU: compiling costs 8-40 s, and saves 1-3 ms a step


@dataclass(frozen=True)
class Settings:
    """How a run computes. Fixed when it first starts, written into its checkpoints, used again on resume."""

    device: str
    threads: int
    precision: str  # "float32", the library's default; "medium": oneDNN on a CPU, TF32 on a GPU; "bf16": the layers
    compile: bool
    window_rows: int = 0  # of stores that do not fit in memory; 0: they do

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def have_compiler() -> bool:
    """inductor's CPU back-end needs a C++ compiler and Python's headers; stock Debian has neither."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and Path(sysconfig.get_paths()["include"], "Python.h").exists()


def resolve_settings(
    *, device: str, threads: int | str, precision: str, compile: str, steps: int, say: Callable[[str], None]
) -> Settings:
    """Decide what "auto" means on this machine for a run of `steps` updates, and say so where a user could wonder.

    Raises:
        CvlctlError: where a GPU or a compiler is asked for and there is none.
    """
    if lacking := _lacking(device, compile == "true"):
        raise CvlctlError(*lacking)
    cuda = torch.cuda.is_available()
    where = ("cuda" if cuda else "cpu") if device == "auto" else device
    num_threads = num_cpus() if threads == "auto" else int(threads)
    whole_step = compile == "true"
    if compile == "auto":
        whole_step = steps >= COMPILE_PAYS_AFTER or where != "cpu"
    if whole_step and where == "cpu" and not have_compiler():
        say("no C++ compiler with Python's headers found: training runs eager, about 1.5x slower")
        whole_step = False
    if precision == "auto":
        precision = "medium" if _medium_is_float32(where) else "float32"
    if precision == "bf16" and where == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        say("precision: bf16, but this CPU has no such instructions: float32 is faster here")
    return Settings(where, num_threads, precision, whole_step)


def saved_settings(saved: dict[str, Any]) -> Settings:
    """The settings with which the run of a checkpoint began.

    Raises:
        CvlctlError: where this machine cannot compute like that.
        TypeError: where they are garbled.
    """
    settings = Settings(**saved)
    if lacking := _lacking(settings.device, settings.compile):
        raise CvlctlError(
            f"the run began with {lacking[0]} here", "resume it where it began, or --force starts it over"
        )
    return settings


def _lacking(device: str, compile: bool) -> tuple[str, str] | None:
    """What of this the machine does not have, and what to do about it."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return f"device: {device}, but PyTorch sees no GPU", "use device: auto or cpu"
        if int(device.partition(":")[2] or 0) >= (count := torch.cuda.device_count()):
            return (
                f"device: {device}, but PyTorch sees {count} GPU{'s' * (count > 1)}, from cuda:0 on",
                "use device: auto",
            )
    elif compile and not have_compiler():
        hint = "apt-get install g++ python3-dev, or use compile: auto"
        return "compile: true, but there is no C++ compiler with Python's headers", hint
    return None


@cache
def _medium_is_float32(device: str) -> bool:
    """Whether matmul precision "medium" is still true float32 here. It is on CPUs without AMX, where it merely picks
    oneDNN, up to twice as fast as MKL on AMD. With AMX or on a GPU the same word means bf16 or TF32."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 256, 256, generator=g), torch.randn(1, 256, 256, generator=g)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    fast = (a.to(device) @ b.to(device)).double().cpu()
    torch.set_float32_matmul_precision(before)
    return bool((fast - exact).norm() / exact.norm() < 1e-6)


def configure(settings: Settings) -> None:
    """Apply the settings to this process."""
    torch.set_num_threads(settings.threads)
    if ":" in settings.device:
        torch.cuda.set_device(settings.device)  # where graphs are captured
    medium = settings.precision == "medium" or (settings.precision == "bf16" and _medium_is_float32(settings.device))
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    _keep_freed_memory()
    if settings.compile:
        torch.compiler.reset()  # an experiment's runs share a process, and torch compiles one function 8 times at most


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed. Else temporaries of some MB are mapped and faulted in, page by page, at each
    operation of each step: a third of an eager step at batch 1024. Other C libraries have no mallopt, or ignore it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def value_and_grad(
    loss: Callable[[State], tuple[Tensor, Metrics]], state: State, names: Iterable[str]
) -> tuple[State, Metrics]:
    """Gradients of `loss(parameters)` in the tensors `names` of `state`, and the metrics that it gives beside."""
    parameters = {name: state[name] for name in names}
    if torch.compiler.is_compiling():
        grads, (_, metrics) = torch.func.grad_and_value(loss, has_aux=True)(parameters)
        return grads, metrics
    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad():
        value, metrics = loss(parameters)
    grads = torch.autograd.grad(value, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True)), {k: v.detach() for k, v in metrics.items()}


def adam_init(state: State, group: str, names: Iterable[str]) -> State:
    """First and second moments of the tensors `names`, and their count of updates, under `adam/<group>/`."""
    moments: State = {f"adam/{group}/count": torch.zeros(())}
    for name in names:
        moments[f"adam/{group}/m/{name}"] = torch.zeros_like(state[name])
        moments[f"adam/{group}/v/{name}"] = torch.zeros_like(state[name])
    return moments


def adam_update(state: State, group: str, grads: State, learning_rate: float) -> None:
    """One Adam step on `state`, in place."""
    count = state[f"adam/{group}/count"]
    if not torch.compiler.is_compiling():
        fused_adam(
            [state[name] for name in grads],
            list(grads.values()),
            [state[f"adam/{group}/m/{name}"] for name in grads],
            [state[f"adam/{group}/v/{name}"] for name in grads],
            [],
            [count.clone() for _ in grads],  # it counts each up by one
            fused=True,
            amsgrad=False,
            beta1=ADAM_BETA1,
            beta2=ADAM_BETA2,
            lr=learning_rate,
            weight_decay=0.0,
            eps=ADAM_EPS,
            maximize=False,
        )
        count.add_(1)
        return
    count.add_(1)
    rate = learning_rate / (1 - ADAM_BETA1**count)
    scale = (1 - ADAM_BETA2**count).sqrt()
    for name, grad in grads.items():
        m, v = state[f"adam/{group}/m/{name}"], state[f"adam/{group}/v/{name}"]
        m.lerp_(grad, 1 - ADAM_BETA1)
        v.mul_(ADAM_BETA2).addcmul_(grad, grad, value=1 - ADAM_BETA2)
        state[name].sub_(rate * m / (v.sqrt() / scale + ADAM_EPS))


def ema_update(state: State, target: str, names: Iterable[str], rate: float) -> None:
    """target <- (1 - rate) target + rate online, in place (Polyak averaging; CVL Algorithm 1 line 10)."""
    for name in names:
        state[f"{target}/{name}"].lerp_(state[name], rate)


Program = Callable[[State, Any, Any], tuple[State, Metrics]]


def whole_step(step: Program, settings: Settings) -> Program:
    """`step(state, batch, noise)` as one program: eager, compiled as a whole, or on a GPU captured in a CUDA graph."""
    program = _program(step, settings)
    if settings.precision != "bf16":
        return program

    def run(state: State, batch: Any, noise: Any) -> tuple[State, Metrics]:
        with networks.layers_in(torch.bfloat16):
            return program(state, batch, noise)

    return run


def _program(step: Program, settings: Settings) -> Program:
    if not settings.compile:
        return torch.no_grad()(step)
    warnings.filterwarnings("ignore", module=r"torch\._inductor")  # its own deprecations are no news to our users
    compiled = torch.no_grad()(torch.compile(step, fullgraph=True, dynamic=False))
    return _captured(compiled) if settings.device.startswith("cuda") else compiled


def programs(module: ModuleType, config: Any, settings: Settings) -> list[Program]:
    """The module's step, or where the actor learns every n-th step alone: n of them, the first of which updates it.

    Update number i, counted from 1, is by programs[i % n].
    """
    every = getattr(config, "actor_every", 1)
    if every == 1:
        return [whole_step(lambda s, b, n: module.step(config, s, b, n), settings)]
    both = whole_step(lambda s, b, n: module.step(config, s, b, n, True), settings)
    critic_alone = whole_step(lambda s, b, n: module.step(config, s, b, n, False), settings)
    return [both, *[critic_alone] * (every - 1)]


def _captured(step: Program) -> Program:
    """`step` replayed as a CUDA graph: inputs are copied into fixed buffers, the state is updated where it lies."""
    buffers: Any = None
    graph: torch.cuda.CUDAGraph | None = None
    metrics: Metrics = {}
    calls = 0

    def run(state: State, batch: Any, noise: Any) -> tuple[State, Metrics]:
        nonlocal buffers, graph, metrics, calls
        calls += 1
        if calls <= 3:  # warm-up: compile and let the allocator settle
            return step(state, batch, noise)
        leaves, spec = torch.utils._pytree.tree_flatten((batch, noise))
        if graph is None:
            buffers = [leaf.clone() for leaf in leaves]
            static_batch, static_noise = torch.utils._pytree.tree_unflatten(buffers, spec)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and runs nothing
                _, metrics = step(state, static_batch, static_noise)
        else:
            torch._foreach_copy_(buffers, leaves)
        graph.replay()
        return state, metrics

    return run
