"""What updates are made of: gradients, fused Adam, moving averages; in place, on a flat dict of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam as fused_adam

from cvlctl.learn.networks import State

Metrics = dict[str, Tensor]
ADAM_BETA1, ADAM_BETA2, ADAM_EPS = 0.9, 0.999, 1e-8


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
            [grad.contiguous() for grad in grads.values()],  # it goes through memory; a convolution's lie channels last
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
