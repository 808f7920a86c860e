"""How fast this machine trains: an MLP's update, tiny and large, timed once a machine, in less than a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cvlctl import rates
from cvlctl.rates import Rate

TINY, LARGE = (1, 2, 4), (3, 256, 256)  # members, batch, width
SECONDS = 0.1, 0.3  # that each is timed
LAYERS = 3
CALLS = 19  # of the probe: half of PyTorch's own count, since in a training step indices, names and dicts come on top


def measured(precision: str) -> Rate:
    """What is kept of this machine; where nothing is, it is measured and kept. Of one thread, in its own time: beside
    other work, what several get says nothing of better days.

    Args:
        precision: PyTorch's name of the matrix product that a run chooses by itself, "highest" or "medium".
    """
    if (found := rates.kept()) is not None:
        return found
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)
    try:
        tiny, large = (_least(_update(*size), seconds) for size, seconds in zip((TINY, LARGE), SECONDS, strict=True))
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
    rate = Rate(_flops(*LARGE) / max(large - tiny, 1e-9), tiny / CALLS)
    rates.keep(rate)
    return rate


def _flops(members: int, batch: int, width: int) -> float:
    """Forward, and backward for weights and for all inputs but the first."""
    return 2 * (3 * LAYERS - 1) * members * batch * width * width


def _update(members: int, batch: int, width: int) -> Callable[[], None]:
    """Forward, backward and a moving average of gradients, as in all that we train."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(members, batch, width, generator=g)
    weights = [torch.randn(members, width, width, generator=g) * width**-0.5 for _ in range(LAYERS)]
    biases = [torch.zeros(members, 1, width) for _ in range(LAYERS)]
    parameters = [parameter.requires_grad_() for parameter in (*weights, *biases)]
    averages = [torch.zeros_like(parameter) for parameter in parameters]

    def run() -> None:
        with torch.enable_grad():
            y = x
            for weight, bias in zip(weights, biases, strict=True):
                y = torch.relu(torch.baddbmm(bias, y, weight))
            gradients = torch.autograd.grad(y.square().mean(), parameters)
        with torch.no_grad():
            torch._foreach_lerp_(averages, gradients, 0.1)
            torch._foreach_add_(parameters, averages, alpha=-1e-3)

    return run


def _least(run: Callable[[], None], seconds: float) -> float:
    """Processor seconds of the fastest run."""
    for _ in range(2):
        run()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or least == float("inf"):
        begin = time.thread_time()
        run()
        least = min(least, time.thread_time() - begin)
    return least
