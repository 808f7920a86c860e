"""Rewards that are learned from success examples: a classifier of states, whose output labels every row of the data.

A labeller is no algorithm: any learner of `LEARNS_FROM = "rewards"` takes its labels (`rewards: oril` in a recipe).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlctl.data.samplers import generator
from cvlctl.learn import networks
from cvlctl.learn.losses import rewards
from cvlctl.learn.networks import State
from cvlctl.learn.settings import flush_denormals
from cvlctl.learn.updates import Metrics, adam_init, adam_update, value_and_grad
from cvlctl.progress import Progress
from cvlctl.types import Number, Whole, check_widths

LABELLERS = {
    "oril": "binary cross-entropy of examples against the store's states (Zolna et al. 2020)",
    "purl": "non-negative positive-unlabelled loss (Xu and Denil 2019)",
}
BLOCK = 64  # steps whose randomness is drawn together
CHUNK = 65_536  # rows labelled at a time


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


def learn(
    name: str, config: Config, observation: Tensor, examples: Tensor, seeds: Sequence[int], device: str
) -> Tensor:
    """Rewards (E, rows) in (0, 1), one labelling a seed, on the CPU: sigmoid of a classifier of states.

    Args:
        name: a key of `LABELLERS`.
        observation: (rows, O), all states of the stores: what is not known to be success.
        examples: (X, O) of success.
    """
    flush_denormals()
    observation, examples = observation.to(device), examples.to(device)
    state = networks.normaliser_of(seeds, observation)
    classifier = networks.mlp_init("reward", seeds, [observation.shape[1], *config.hidden, 1])
    state |= classifier | adam_init(classifier, "reward", classifier)
    state = {key: value.to(device) for key, value in state.items()}
    with Progress(f"labeller {name} ({len(seeds)} seeds)", config.steps, "updates") as progress, torch.no_grad():
        for step in range(config.steps):
            if step % BLOCK == 0:
                drawn = _draw(config, len(observation), len(examples), seeds, step // BLOCK, device)
            unlabelled, positive = (index[:, step % BLOCK] for index in drawn)
            metrics = _update(name, config, state, list(classifier), observation[unlabelled], examples[positive])
            if step % 100 == 99:
                progress.update(step + 1, f"loss {float(metrics['loss'].mean()):.3g}")
        progress.update(config.steps)
        return torch.cat([_label(state, rows) for rows in observation.split(CHUNK)], dim=1).cpu()


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


def _logits(state: State, params: State, observation: Tensor) -> Tensor:
    return networks.mlp(params, "reward", networks.normalise(state, observation)).squeeze(-1)


def _update(name: str, config: Config, state: State, names: list[str], unlabelled: Tensor, positive: Tensor) -> Metrics:
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


def _label(state: State, rows: Tensor) -> Tensor:
    members = len(state["observation_mean"])
    return torch.sigmoid(_logits(state, state, rows.expand(members, *rows.shape)))
