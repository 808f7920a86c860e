"""States as old as they get: what Adam leaves of units that died long ago, at once instead of after 6,000 updates.

A unit that is never active has no gradient; its first moments fall by a tenth an update, below 1.2e-38 after a thousand
or two, and stay there. Arithmetic on such numbers costs an Intel processor a hundred cycles each, and a fresh state has
none. Real runs of 6,000 updates have about 1 % of dead units (20,789 of 2.4M numbers in CVL's state), so we kill as
many of every hidden layer, ours and peers' alike, and set the moments of their weights to where they end. They keep no
gradient, and nothing else of the work changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from cvlctl.learn.networks import State

SHARE, DEAD, LEFT = 0.01, -1e3, 1e-40  # of units; their bias; what is left of a moment


def aged(state: State) -> State:
    """Ours, in place: weights are (..., in, out)."""
    torch.set_flush_denormal(False)  # else LEFT is 0 before it is written
    for name in [name for name in state if re.fullmatch(r"[^/]+\.\d+\.weight", name)]:
        network, number, _ = name.rsplit(".", 2)
        moments = {key.partition("/m/")[2]: value for key, value in state.items() if "/m/" in key}
        bias, after = f"{network}.{number}.bias", f"{network}.{int(number) + 1}.weight"
        if after in moments and name in moments:
            num = units(state[name].shape[-1])
            state[name][..., :num] = 0
            state[bias][..., :num] = DEAD
            moments[name][..., :num] = moments[bias][..., :num] = LEFT
            moments[after][..., :num, :] = LEFT
    return state


@torch.no_grad()
def age(optimiser: torch.optim.Optimizer) -> None:
    """A peer's: the weights (out, in) and biases of its layers, in their order, and Adam's moments of them."""
    torch.set_flush_denormal(False)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for weight, bias, after in zip(parameters, parameters[1:], parameters[2:], strict=False):
        layers = weight.ndim == after.ndim == 2 and bias.shape == weight.shape[:1] == after.shape[1:]
        if layers and all("exp_avg" in optimiser.state[parameter] for parameter in (weight, bias, after)):
            num = units(len(weight))
            weight[:num], bias[:num] = 0, DEAD
            for parameter in (weight, bias):
                optimiser.state[parameter]["exp_avg"][:num] = LEFT
            optimiser.state[after]["exp_avg"][:, :num] = LEFT


def units(width: int) -> int:
    """That are dead, of a layer's."""
    return max(1, round(SHARE * width))


@contextmanager
def watched() -> Iterator[list[torch.optim.Optimizer]]:
    """All of PyTorch's optimisers that make a step meanwhile, whosoever they are."""
    seen: dict[int, torch.optim.Optimizer] = {}

    def note(optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen[id(optimiser)] = optimiser

    found: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_post_hook(note)
    try:
        yield found
    finally:
        handle.remove()
        found += seen.values()
