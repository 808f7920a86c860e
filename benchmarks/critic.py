"""The occupancy critic's update beside plain eager PyTorch, CVL's and LAEO's whole updates beside their eager forms.

    python benchmarks/critic.py [--threads 2] [--rounds 7] [--updates 64] [--json critic.json]

Two seeds, critic 512x512->64, batch 1024, sampling included. The peer is what people write: one nn.Module critic a
seed, trained one after the other in a loop with torch.optim.Adam.
Both sides draw transitions and their truncated geometric futures from the same 500k rows in memory, and minimise the
same InfoNCE loss with its partition penalty; the peer's observations are normalised beforehand. An update is one
gradient step of *both* seeds. Rounds alternate between the contestants, so that a busy machine slows all alike; a ratio
is the median over rounds. "Our matmul setting" is what `settings.resolve_settings` chooses on this machine.
td_info_nce is beside info_nce with as many states: at most twice as long an update.
CVL and LAEO train critic and actor, as without a pretrained critic; no peer has them, so each is beside its eager form:
"as shipped" with PyTorch's own matrix products, and under our matmul setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import AS_SHIPPED, BF16, COMPILED, EAGER, FORM, HIDDEN, OUR_SETTING, SPEC, Contestant
from torch import Tensor, nn

from cvlctl.data import statistics
from cvlctl.data.samplers import Data
from cvlctl.learn.algorithms import cvl, laeo, occupancy
from cvlctl.learn.networks import State
from cvlctl.learn.settings import Settings
from cvlctl.types import Spec

CRITIC = occupancy.Config()  # InfoNCE, 512x512->64
SEEDS = [0, 1]
BATCH, CVL_BATCH = 1024, 256  # the recipes' defaults: pretrain, finetune
PEER = "plain eager PyTorch"
WHOLE = {"CVL": cvl, "LAEO": laeo}


class PlainCritic(nn.Module):
    """Two encoders and their inner products."""

    def __init__(self, spec: Spec, hidden: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        (observation_dim,), action_dim = spec.observation_shape, spec.action_dim
        self.phi = self._encoder(observation_dim + action_dim, hidden, latent_dim)
        self.psi = self._encoder(observation_dim, hidden, latent_dim)

    @staticmethod
    def _encoder(width: int, hidden: Sequence[int], latent_dim: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        return nn.Sequential(*layers, nn.Linear(width, latent_dim))

    def forward(self, observation: Tensor, action: Tensor, future: Tensor) -> Tensor:
        return self.phi(torch.cat([observation, action], dim=-1)) @ self.psi(future).T

    def load(self, state: State, member: int) -> None:
        """Take the weights of one member of ours (the test that both sides do the same work)."""
        for name in ("phi", "psi"):
            linears = [layer for layer in getattr(self, name) if isinstance(layer, nn.Linear)]
            for i, layer in enumerate(linears):
                layer.weight.data.copy_(state[f"{name}.{i}.weight"][member].T)
                layer.bias.data.copy_(state[f"{name}.{i}.bias"][member, 0])


def plain_update(
    critic: PlainCritic, optimiser: torch.optim.Optimizer, observation: Tensor, action: Tensor, future: Tensor
) -> Tensor:
    """One gradient step on InfoNCE with the log-mean partition penalty; returns the loss."""
    logits = critic(observation, action, future)
    nce = F.cross_entropy(logits, torch.arange(len(logits)))
    log_mean = torch.logsumexp(logits, dim=1) - np.log(len(logits))
    loss = nce + CRITIC.partition_coefficient * log_mean.square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()


def theirs(data: Data, config: occupancy.Config, batch_size: int, settings: Settings) -> Contestant:
    """Plain PyTorch: a loop over the seeds, each with its own module, optimiser and batch."""
    mean, std = statistics.observation_statistics(data.observation)
    observations = (data.observation - mean) / std
    row, last = data.layout.row, data.layout.last
    log_gamma = float(np.log(config.gamma))
    critics = [PlainCritic(SPEC, config.hidden, config.latent_dim) for _ in SEEDS]
    optimisers = [torch.optim.Adam(critic.parameters(), lr=config.learning_rate) for critic in critics]

    def sample() -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(len(row), (batch_size,))
        now, left = row[index], last[index] - row[index]
        u = torch.rand(batch_size, dtype=torch.float64)
        mass = 1 - torch.exp(left * log_gamma)
        offset = 1 + torch.floor(torch.log(1 - u * mass) / log_gamma).long()
        return observations[now], data.action[now], observations[now + torch.minimum(offset, left)]

    def run(updates: int) -> None:
        common.configure(settings)
        for _ in range(updates):
            for critic, optimiser in zip(critics, optimisers, strict=True):
                plain_update(critic, optimiser, *sample())

    return run


def benchmark(threads: int, rounds: int, updates: int, rows: int, eager_only: bool = False) -> dict[str, Any]:
    """All comparisons, and every form's rates."""
    data, mine = common.synthetic(rows), common.our_settings(threads, eager_only)
    shipped, alike, chosen = PEER + AS_SHIPPED, PEER + OUR_SETTING, common.best(mine)
    contestants = {
        shipped: theirs(data, CRITIC, BATCH, common.shipped(threads)),
        alike: theirs(data, CRITIC, BATCH, mine[EAGER]),
    }
    made = partial(common.learner, occupancy, CRITIC, SEEDS, data, BATCH)
    contestants |= {form: made(settings) for form, settings in mine.items()}
    rates = common.measure(contestants, rounds, updates)
    work = f"InfoNCE critic, {common.size_of(CRITIC.hidden)}->{CRITIC.latent_dim}, batch {BATCH}, two seeds"
    comparisons = [
        common.versus(f"{work}, {FORM[chosen]}", shipped, rates[chosen], rates[shipped], threads=threads, least=2),
        common.versus(f"{work}, {FORM[chosen]}", alike, rates[chosen], rates[alike], threads=threads),
    ]
    if BF16 in mine:
        row = common.versus(f"{work}, {FORM[BF16]}", shipped, rates[BF16], rates[shipped], threads=threads, aim=3.5)
        comparisons.append(row)
    curves = [common.forms(f"{work}, {threads} threads", rates, shipped)]
    comparisons += beyond_one_step(data, mine[chosen], FORM[chosen], threads, rounds, updates)
    for (name, module), hidden in product(WHOLE.items(), HIDDEN):
        more_comparisons, curve = whole_update(name, module, hidden, data, mine, threads, rounds, updates)
        comparisons += more_comparisons
        curves.append(curve)
    return {
        "comparisons": comparisons,
        "curves": curves,
        "settings": mine[chosen].as_dict(),
        "sizes": {"seeds": len(SEEDS), "hidden": CRITIC.hidden, "latent_dim": CRITIC.latent_dim, "batch_size": BATCH,
                  "whole_batch_size": CVL_BATCH, "whole_hidden": HIDDEN, "rows": len(data.observation)},
        "rounds": rounds, "updates_a_round": updates,
    }  # fmt: skip


def beyond_one_step(
    data: Data, settings: Settings, form: str, threads: int, rounds: int, updates: int
) -> list[dict[str, Any]]:
    """td_info_nce beside info_nce, with as many states: the critic's update, and all of CVL that iterates."""
    small = replace(CRITIC, hidden=HIDDEN[0])
    by_td = replace(small, loss="td_info_nce")
    pairs = {
        "critic's": (occupancy, by_td, small),
        "CVL's whole": (cvl, cvl.Config(critic=by_td, improvement="iterated"), cvl.Config(critic=small)),
    }
    comparisons = []
    for name, (module, ours, theirs) in pairs.items():
        updating = {
            loss: common.learner(module, config, SEEDS, data, CVL_BATCH, settings)
            for loss, config in (("td_info_nce", ours), ("info_nce", theirs))
        }
        rates = common.measure(updating, rounds, updates)
        work = f"{name} update by td_info_nce, {common.size_of(small.hidden)}, batch {CVL_BATCH}, two seeds, {form}"
        found = rates["td_info_nce"], rates["info_nce"]
        comparisons.append(common.versus(work, "by info_nce", *found, threads=threads, least=0.5))
    return comparisons


def whole_update(
    name: str,
    module: Any,
    hidden: tuple[int, ...],
    data: Data,
    mine: dict[str, Settings],
    threads: int,
    rounds: int,
    updates: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Critic and actor, the critic of this size, beside the same step as PyTorch runs it by itself."""
    config = common.with_critic(module, hidden)
    plain, same = "its own eager form" + AS_SHIPPED, "its own eager form" + OUR_SETTING
    made = partial(common.learner, module, config, SEEDS, data, CVL_BATCH)
    updating = {form: made(settings) for form, settings in mine.items()}
    updating[plain] = made(common.shipped(threads))
    rates = common.measure(updating, rounds, updates)
    work = f"{name}'s whole update, critic {common.size_of(hidden)}, batch {CVL_BATCH}, two seeds"
    comparisons = []
    for form, least, aim in ((COMPILED, 2, 3), (BF16, None, None)):
        if form in mine:
            row = partial(common.versus, f"{work}, {FORM[form]}", threads=threads)
            comparisons.append(row(plain, rates[form], rates[plain], least=least, aim=aim))
            comparisons.append(row(same, rates[form], rates[EAGER]))
    return comparisons, common.forms(f"{work}, {threads} threads", rates, plain)


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, rounds=7, updates=64, rows=500_000, forms=True)
    common.main(options, lambda a: benchmark(a.threads, a.rounds, a.updates, a.rows, a.eager_only), arguments)


if __name__ == "__main__":
    main()
