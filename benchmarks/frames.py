"""Learning from frames: a critic's update beside plain eager PyTorch, and an actor on features beside one on frames.

    python benchmarks/frames.py [--threads 2] [--rounds 5] [--updates 4] [--rows 5000] [--json frames.json]

Two seeds, InfoNCE with small encoders (16-32-64-64) of single frames, batch 256. The peer is what people write: a
module a seed with nn.Conv2d, one after the other, Adam, frames kept as bytes in (C, H, W); no shifts on either side.
Then CVL on a frozen critic of three stacked frames: its actor on features that were computed once, beside one that
encodes each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import AS_SHIPPED, EAGER, FORM, OUR_SETTING, Contestant
from torch import Tensor, nn

from cvlctl.data import samplers
from cvlctl.data.samplers import Data
from cvlctl.learn import encoders
from cvlctl.learn.algorithms import cvl, occupancy
from cvlctl.learn.programs import programs_of
from cvlctl.learn.settings import Settings
from cvlctl.types import Observe, Spec

SEEDS, STACK = [0, 1], 3
PEER = "plain eager PyTorch"
CRITIC = occupancy.Config()


def spec_of(size: int, stack: int) -> Spec:
    observe = Observe(cameras=("front",), stack=stack, shift=0)
    return encoders.seeing(Spec((0,), 4, 500, cameras={"front": (size, size, 3)}), observe)


def filmed(rows: int, size: int) -> Data:
    """The synthetic episodes as noise on frames, and no vector."""
    data = common.synthetic(rows)
    frames = np.random.default_rng(0).integers(0, 256, (len(data.observation), size, size, 3), dtype=np.uint8)
    return data._replace(observation=data.observation[:, :0], frames=(torch.from_numpy(frames),))


class PlainCritic(nn.Module):
    """Two convolutional encoders with heads, and their inner products."""

    def __init__(self, size: int, features: int, config: occupancy.Config) -> None:
        super().__init__()
        self.see_phi, self.see_psi = self._encoder(size, features), self._encoder(size, features)
        self.phi, self.psi = (self._head(features + more, config) for more in (4, 0))

    @staticmethod
    def _encoder(size: int, features: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, out in ((3, 16), (16, 32), (32, 64), (64, 64)):
            layers, size = [*layers, nn.Conv2d(before, out, 3, 2, 1), nn.ReLU()], (size - 1) // 2 + 1
        last = [nn.Flatten(), nn.Linear(64 * size * size, features), nn.LayerNorm(features), nn.Tanh()]
        return nn.Sequential(*layers, *last)

    @staticmethod
    def _head(width: int, config: occupancy.Config) -> nn.Sequential:
        sizes, layers = [width, *config.hidden], []
        for before, out in zip(sizes, config.hidden, strict=False):
            layers += [nn.Linear(before, out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], config.latent_dim))

    def forward(self, now: Tensor, action: Tensor, future: Tensor) -> Tensor:
        phi = self.phi(torch.cat([self.see_phi(now / 255 - 0.5), action], dim=-1))
        return phi @ self.psi(self.see_psi(future / 255 - 0.5)).T


def theirs(data: Data, size: int, batch_size: int, settings: Settings) -> Contestant:
    """Plain PyTorch: a loop over the seeds, each with its own module, optimiser and batch."""
    frames = data.frames[0].permute(0, 3, 1, 2).contiguous()
    critics = [PlainCritic(size, Observe(cameras=("front",)).features, CRITIC) for _ in SEEDS]
    optimisers = [torch.optim.Adam(critic.parameters(), lr=CRITIC.learning_rate) for critic in critics]
    row, last, target = data.layout.row, data.layout.last, torch.arange(batch_size)

    def run(updates: int) -> None:
        common.configure(settings)
        for _ in range(updates):
            for critic, optimiser in zip(critics, optimisers, strict=True):
                index = torch.randint(len(row), (batch_size,))
                left = last[index] - row[index]
                u = torch.rand(batch_size, dtype=torch.float64)
                future = row[index] + samplers.geometric_offset(u, left, torch.zeros(1, dtype=torch.bool), CRITIC.gamma)
                logits = critic(frames[row[index]], data.action[row[index]], frames[future])
                partition = logits.logsumexp(dim=-1) - float(np.log(batch_size))
                loss = F.cross_entropy(logits, target) + CRITIC.partition_coefficient * partition.square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    return run


def ours(module: Any, config: Any, data: Data, size: int, batch_size: int, settings: Settings) -> Contestant:
    spec = spec_of(size, data.stack)
    state, draws = module.init(config, spec, SEEDS, data), module.draws(config, spec, batch_size)
    return common.updates_from(data, draws, SEEDS, state, programs_of(module, config, settings), settings)


def with_features(data: Data) -> Data:
    """The data with features of both seeds in the place of frames; of what does not matter to how fast they are."""
    width = 2 * Observe(cameras=("front",)).features
    return data._replace(frames=(torch.rand(len(data.observation), len(SEEDS), width),), stack=1)


def benchmark(
    threads: int, rounds: int, updates: int, rows: int, size: int, batch_size: int, eager_only: bool = False
) -> dict[str, Any]:
    data, mine = filmed(rows, size), common.our_settings(threads, eager_only)
    shipped, alike, chosen = PEER + AS_SHIPPED, PEER + OUR_SETTING, common.best(mine)
    made = partial(ours, occupancy, CRITIC, data, size, batch_size)
    contestants = {
        shipped: theirs(data, size, batch_size, common.shipped(threads)),
        alike: theirs(data, size, batch_size, mine[EAGER]),
    } | {form: made(settings) for form, settings in mine.items()}
    rates = common.measure(contestants, rounds, updates)
    work = f"InfoNCE critic of {size}x{size} frames, batch {batch_size}, two seeds, {FORM[chosen]}"
    versus = partial(common.versus, threads=threads)
    comparisons = [
        versus(work, shipped, rates[chosen], rates[shipped], least=1.5, aim=2),
        versus(work, alike, rates[chosen], rates[alike]),
    ]
    config = cvl.Config(mode="frozen", critic=CRITIC)
    stacked = data._replace(stack=STACK)
    frozen = {
        name: ours(cvl, config, seen, size, batch_size, mine[EAGER])
        for name, seen in (("features", with_features(stacked)), ("frames", stacked))
    }
    rates = common.measure(frozen, rounds, updates)
    work = f"CVL's actor on a frozen critic of {STACK} stacked frames of {size}x{size}, batch {batch_size}, two seeds"
    comparisons.append(versus(work, "encoding each batch", rates["features"], rates["frames"], least=10, aim=10))
    return {"comparisons": comparisons, "settings": mine[chosen].as_dict(), "rounds": rounds, "updates": updates}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, rounds=5, updates=4, rows=5_000, forms=True)
    options.add_argument("--size", type=int, default=64)
    options.add_argument("--batch-size", type=int, default=256)
    common.main(
        options,
        lambda a: benchmark(a.threads, a.rounds, a.updates, a.rows, a.size, a.batch_size, a.eager_only),
        arguments,
    )


if __name__ == "__main__":
    main()
