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
