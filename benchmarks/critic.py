"""The occupancy critic's update beside plain eager PyTorch: two seeds, 512x512->64, batch 1024, sampling included.

    python benchmarks/critic.py [--threads 2] [--rounds 7] [--updates 64] [--json critic.json]

The peer is what people write: one nn.Module critic a seed, trained one after the other in a loop with torch.optim.Adam.
Both sides draw transitions and their truncated geometric futures from the same 500k rows in memory, and minimise the
same InfoNCE loss with its partition penalty; the peer's observations are normalised beforehand. An update is one
gradient step of *both* seeds. Rounds alternate between the contestants, so that a busy machine slows all alike; a ratio
is the median over rounds. "Our matmul setting" is what `training.resolve_settings` chooses on this machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cvlctl  # noqa: F401 (before torch: it says how OpenMP's threads are to wait)

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from common import SPEC, Contestant, conditions, configure, machine, measure, summary, synthetic
from torch import Tensor, nn

from cvlctl import samplers, training
from cvlctl.algorithms import cvl, occupancy
from cvlctl.commands.train import batches
from cvlctl.networks import State
from cvlctl.samplers import Data
from cvlctl.training import Settings
from cvlctl.types import Spec

CRITIC = occupancy.Config()  # InfoNCE, 512x512->64
SEEDS = [0, 1]
BATCH, CVL_BATCH = 1024, 256  # the recipes' defaults: pretrain, finetune


def ours(module: Any, config: Any, data: Data, batch_size: int, settings: Settings) -> Contestant:
    """The training loop's own pieces: draws in blocks, gather, one program for all seeds."""
    draws = module.draws(config, SPEC, batch_size)
    state = module.init(config, SPEC, SEEDS, data)
    program = training.whole_step(partial(module.step, config), settings)
    stream = batches(data, draws, SEEDS, 0, 2**40)

    def run(updates: int) -> None:
        configure(settings)
        for _ in range(updates):
            _, (indices, noise) = next(stream)
            program(state, samplers.gather(data, indices, draws), noise)

    return run


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
    mean, std = samplers.observation_statistics(data.observation)
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
        configure(settings)
        for _ in range(updates):
            for critic, optimiser in zip(critics, optimisers, strict=True):
                plain_update(critic, optimiser, *sample())

    return run


def benchmark(threads: int, rounds: int, updates: int, rows: int, with_compiled: bool = True) -> dict[str, Any]:
    """Both tables, and the state of the machine before and after."""
    before = machine()
    data = synthetic(rows)
    compiled = with_compiled and training.have_compiler()
    resolve = partial(training.resolve_settings, device="cpu", threads=threads, precision="auto", steps=1, say=print)
    eager, whole = resolve(compile="false"), resolve(compile="true" if compiled else "false")
    as_shipped = Settings("cpu", threads, "float32", False)

    base = "plain PyTorch, as shipped"
    critics = {
        base: theirs(data, CRITIC, BATCH, as_shipped),
        "cvlctl, eager": ours(occupancy, CRITIC, data, BATCH, eager),
        "plain PyTorch, our matmul setting": theirs(data, CRITIC, BATCH, eager),
    }
    config = cvl.Config()
    full = {"CVL's whole update, eager": ours(cvl, config, data, CVL_BATCH, eager)}
    if compiled:
        critics["cvlctl, whole step compiled"] = ours(occupancy, CRITIC, data, BATCH, whole)
        full["CVL's whole update, compiled"] = ours(cvl, config, data, CVL_BATCH, whole)
    return {
        "critic": summary(measure(critics, rounds, updates), base),
        "cvl": summary(measure(full, rounds, updates), "CVL's whole update, eager"),
        "settings": eager.as_dict() | {"compile": whole.compile},
        "sizes": {"seeds": len(SEEDS), "hidden": CRITIC.hidden, "latent_dim": CRITIC.latent_dim, "batch_size": BATCH,
                  "cvl_batch_size": CVL_BATCH, "cvl_bank_size": config.bank_size, "rows": len(data.observation)},
        "rounds": rounds, "updates_a_round": updates,
        "machine": before, "load_average_after": machine()["load_average"],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=64, help="updates a round")
    parser.add_argument("--rows", type=int, default=500_000, help="rows in memory")
    parser.add_argument("--eager-only", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args(arguments)
    found = benchmark(args.threads, args.rounds, args.updates, args.rows, not args.eager_only)
    title = f"updates of {len(SEEDS)} seeds, {args.threads} threads"
    for table in ("critic", "cvl"):
        print(f"{title:40}{'median/s':>10}{'ratio':>8}{'min':>8}{'max':>8}")
        for name, row in found[table].items():
            print(f"{name:40}{row['updates_per_second']:10.1f}{row['ratio']:7.2f}x"
                  f"{row['ratio_min']:7.2f}x{row['ratio_max']:7.2f}x")  # fmt: skip
    state, settings = found["machine"], found["settings"]
    print(f"{conditions(found)}; torch {state['versions']['torch']}, threads {settings['threads']}, "
          f"precision {settings['precision']}, GOMP_SPINCOUNT {state['gomp_spincount']}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
