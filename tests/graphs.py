"""CUDA graphs where there is no GPU: captures run nothing, replays run what was captured, on the same tensors.

A captured step may compile nothing, and copies of other threads may not spoil it: both are held here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo  # before anything is replaced

from cvlctl.learn import programs
from cvlctl.learn.programs import Program, programs_of
from cvlctl.learn.settings import Settings


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.replays: list[Callable[[], None]] = []

    def replay(self) -> None:
        assert self.replays, "nothing was captured"
        for again in self.replays:
            again()


@contextmanager
def capture(graph: Graph, *, capture_error_mode: str = "global") -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    assert capture_error_mode == "thread_local", "a copy in another thread would invalidate this capture"
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


def recordable(step: Program) -> Program:
    """A compiled step that a capture records: it then leaves the state alone, and a replay runs it."""

    def run(state: Any, batch: Any, noise: Any) -> Any:
        graph = Graph.capturing
        if graph is None:
            return step(state, batch, noise)
        outputs = step({name: value.clone() for name, value in state.items()}, batch, noise)[1]

        @torch.no_grad()
        def again() -> None:
            for name, value in step(state, batch, noise)[1].items():
                outputs[name].copy_(value)

        graph.replays.append(again)
        return state, outputs

    return run


@contextmanager
def emulated() -> Iterator[list[Graph]]:
    """Within, captures are recorded; steps are traced once and run by PyTorch's own kernels. Gives the graphs."""
    compile_, made = torch.compile, []

    class Counted(Graph):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    def compile(step: Any, **options: Any) -> Any:
        shape = {name: options[name] for name in ("fullgraph", "dynamic")}
        return recordable(compile_(step, backend="eager", **shape))

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(error_on_recompile=True):
        patch.setattr(torch, "compile", compile)
        patch.setattr(torch.cuda, "CUDAGraph", Counted)
        patch.setattr(torch.cuda, "graph", capture)
        torch.compiler.reset()
        yield made
    assert made and all(graph.replays for graph in made), "nothing was captured"


def as_on_a_gpu(module: ModuleType, config: Any, settings: Settings) -> list[Program]:
    """The programs of a run on a GPU."""
    return programs_of(module, config, replace(settings, device="cuda", compile=True))


assert programs.WARM_UP >= 2  # a run that is captured at once would not be told from one that is never
