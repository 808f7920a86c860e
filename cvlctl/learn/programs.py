"""The training step as one program: eager, compiled as a whole, or captured in a CUDA graph.

A learner's `step(config, state, batch, noise) -> (state, metrics)` is a function of its arguments alone; the state
passed in is *consumed* (updated in place, as with donated buffers), which spares a copy of every weight and moment on
each step and is what a CUDA graph needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from cvlctl.learn import networks
from cvlctl.learn.networks import State
from cvlctl.learn.settings import Settings
from cvlctl.learn.updates import Metrics

Program = Callable[[State, Any, Any], tuple[State, Metrics]]

# A GPU's kernels are not to be chosen by how fast they were when they were tried: a resumed run would choose others,
# which add up in another order.
NO_TIMING = {
    "deterministic": True,
    "max_autotune": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "shape_padding": False,
}
WARM_UP = 3  # calls before a CUDA graph is captured: the first compiles, then the allocator settles


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
    on_gpu = settings.device.startswith("cuda")
    compiled = torch.compile(step, fullgraph=True, dynamic=False, options=dict(NO_TIMING) if on_gpu else None)
    compiled = torch.no_grad()(compiled)
    return _captured(compiled) if on_gpu else compiled


def programs_of(module: ModuleType, config: Any, settings: Settings) -> list[Program]:
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
    """`step` replayed as a CUDA graph: inputs are copied into fixed buffers, the state is updated where it lies.

    The warm-up computes on the buffers too: dense ones, whatever strides the inputs have. What is captured is then what
    was compiled before; compiling amid a capture fails.
    """
    buffers: list[torch.Tensor] = []
    fixed: tuple[Any, Any] | None = None  # batch and noise, made of the buffers
    graph: torch.cuda.CUDAGraph | None = None
    metrics: Metrics = {}
    calls = 0

    def run(state: State, batch: Any, noise: Any) -> tuple[State, Metrics]:
        nonlocal buffers, fixed, graph, metrics, calls
        leaves, spec = torch.utils._pytree.tree_flatten((batch, noise))
        if fixed is None:
            buffers = [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
            fixed = torch.utils._pytree.tree_unflatten(buffers, spec)
        else:
            torch._foreach_copy_(buffers, leaves)
        calls += 1
        if calls <= WARM_UP:
            return step(state, *fixed)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # records, and runs nothing; a thread that meanwhile copies the next segment of a store to the device does
            # not spoil it, as it would by default
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                _, metrics = step(state, *fixed)
        graph.replay()
        return state, metrics

    return run
