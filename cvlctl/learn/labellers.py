"""Rewards that are learned from success examples: a classifier of states, whose output labels every row of the data.

A labeller is no algorithm: any learner of `LEARNS_FROM = "rewards"` takes its labels (`rewards: oril` in a recipe).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlctl.data.load import to_device
from cvlctl.data.samplers import NO_SHIFT, Data, generator, observed, observed_example
from cvlctl.learn import encoders, networks
from cvlctl.learn.losses import rewards
from cvlctl.learn.networks import State
from cvlctl.learn.settings import flush_denormals
from cvlctl.learn.updates import Metrics, adam_init, adam_update, value_and_grad
from cvlctl.progress import Progress
from cvlctl.types import Number, Observation, Spec, Whole, check_widths

LABELLERS = {
    "oril": "binary cross-entropy of examples against the store's states (Zolna et al. 2020)",
    "purl": "non-negative positive-unlabelled loss (Xu and Denil 2019)",
}
BLOCK = 64  # steps whose randomness is drawn together
CHUNK, LOOKED_AT = 65_536, 512  # rows labelled at a time, and rows with frames


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = {"extra": "forbid"}

    steps: Whole = 2_000
    batch_size: Whole = 256
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4
    positive_prior: Number = 0.5  # [eta], purl only: the share of successes among the store's states

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if min(self.steps, self.batch_size) < 1 or self.learning_rate <= 0:
            raise ValueError("steps, batch_size and learning_rate must be above 0")
        if not 0 < self.positive_prior < 1:
            raise ValueError("positive_prior must lie in (0, 1)")


def learn(name: str, config: Config, spec: Spec, data: Data, seeds: Sequence[int], device: str) -> Tensor:
    """Rewards (E, rows) in (0, 1), one labelling a seed, on the CPU: sigmoid of a classifier of states.

    Args:
        name: a key of `LABELLERS`.
        spec: what the classifier is made for (`encoders.seeing`).
        data: all rows of which are not known to be success, and the examples of it.
    """
    flush_denormals()
    data = to_device(data._replace(shift=0), device)
    rows, examples = len(data.observation), len(data.examples)
    state = networks.normaliser_of(seeds, data.observation)
    classifier = networks.mlp_init("reward", seeds, [*spec.observation_shape, *config.hidden, 1])
    classifier |= encoders.init("reward", spec, seeds)
    state |= classifier | adam_init(classifier, "reward", classifier)
    state = {key: value.to(device) for key, value in state.items()}
    with Progress(f"labeller {name} ({len(seeds)} seeds)", config.steps, "updates") as progress, torch.no_grad():
        for step in range(config.steps):
            if step % BLOCK == 0:
                drawn = _draw(config, rows, examples, seeds, step // BLOCK, device)
            unlabelled, positive = (index[:, step % BLOCK] for index in drawn)
            states, shown = observed(data, unlabelled, NO_SHIFT), observed_example(data, positive, NO_SHIFT)
            metrics = _update(name, config, state, list(classifier), states, shown)
            if step % 100 == 99:
                progress.update(step + 1, f"loss {float(metrics['loss'].mean()):.3g}")
        progress.update(config.steps)
        size = LOOKED_AT if data.frames else CHUNK
        return torch.cat([_label(state, data, part) for part in torch.arange(rows, device=device).split(size)], 1).cpu()


def _draw(
    config: Config, rows: int, examples: int, seeds: Sequence[int], block: int, device: str
) -> tuple[Tensor, Tensor]:
    """Indices (E, BLOCK, B) of states and of examples."""
    pairs = []
    for seed in seeds:
        g = generator(seed, "labeller", block, device)
        shape = (BLOCK, config.batch_size)
        pairs.append([torch.randint(n, shape, generator=g, device=device) for n in (rows, examples)])
    unlabelled, positive = (torch.stack(column) for column in zip(*pairs, strict=True))
    return unlabelled, positive


def _logits(state: State, params: State, observation: Observation) -> Tensor:
    seen = networks.see(params, "reward", networks.normalise(state, observation))
    return networks.mlp(params, "reward", seen).squeeze(-1)


def _update(
    name: str, config: Config, state: State, names: list[str], unlabelled: Observation, positive: Observation
) -> Metrics:
    def loss(params: State) -> tuple[Tensor, Metrics]:
        of_positive, of_unlabelled = _logits(state, params, positive), _logits(state, params, unlabelled)
        if name == "oril":
            value = rewards.binary_cross_entropy(of_positive, of_unlabelled)
        else:
            value = rewards.non_negative_pu(of_positive, of_unlabelled, config.positive_prior)
        return value.sum(), {"loss": value}

    grads, metrics = value_and_grad(loss, state, names)
    adam_update(state, "reward", grads, config.learning_rate)
    return metrics


def _label(state: State, data: Data, rows: Tensor) -> Tensor:
    members = len(state["observation_mean"])
    return torch.sigmoid(_logits(state, state, observed(data, rows.expand(members, -1), NO_SHIFT)))
