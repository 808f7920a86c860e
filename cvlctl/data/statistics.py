"""Statistics of data in memory: what methods normalise observations and scale rewards by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvlctl.data.samplers import Data, arrival_share, future, generator


def observation_statistics(observation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (O,) over all rows, in float64 sums: piece by piece, in one buffer.

    A new float64 tensor a piece fragments the heap: as much as a float64 copy of all rows stayed behind.
    """
    pieces = observation.split(65_536)
    wide = torch.empty_like(pieces[0], dtype=torch.float64)

    def total(value: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([value(wide[: len(x)].copy_(x)).sum(dim=0) for x in pieces]).sum(dim=0)

    mean = total(lambda x: x) / len(observation)
    square = total(lambda x: x.sub_(mean).square_()) / len(observation)
    return mean.float(), square.sqrt().float()


def observation_range(observation: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value (O,) of each column over all rows (rows, O)."""
    low, high = torch.aminmax(observation, dim=0)
    return low, high


def never_varied(observation: Tensor) -> Tensor:
    """(O,) bool: columns of one value over all rows, but for float32's rounding."""
    low, high = observation_range(observation)
    return high - low <= 1e-6 * torch.maximum(low.abs(), high.abs())


def reward_statistics(data: Data, gamma: float, next_states: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1 or E, 1) of the reward at states of a bank, by 65,536 draws.

    The deviation is 1 where all rewards drawn are alike: there is no unit to measure them in.
    """
    g = generator(0, "reward_statistics", 0, data.observation.device)
    device = data.observation.device
    pick = data.labelled[torch.randint(len(data.labelled), (65_536,), generator=g, device=device)]
    u = torch.rand(pick.shape, generator=g, device=device, dtype=torch.float64)
    drawn = future(data.layout, pick, u, 0.0 if next_states else gamma)
    reward = torch.where(drawn.absorbed, 0.0, data.arrival_reward[:, drawn.row]).double()
    if next_states:
        ends = data.layout.terminated[pick] & (drawn.row == data.layout.last[pick])
        reward = arrival_share(reward, ends, gamma)
    mean, std = reward.mean(dim=1, keepdim=True), reward.std(dim=1, keepdim=True)
    return mean.float(), torch.where(_varies(std, mean.abs()), std, 1.0).float()


def _varies(spread: Tensor, size: Tensor) -> Tensor:
    """Whether values of about `size` are spread for more than float32's rounding."""
    return spread > 1e-6 * size + 1e-12


def labelled_rewards(data: Data) -> Tensor:
    """(1 or E, L) float64: the reward of each labelled transition."""
    return data.arrival_reward[:, data.layout.row[data.labelled] + 1].double()


def return_range(data: Data) -> Tensor:
    """Largest minus smallest undiscounted return of the labelled episodes, (1 or E, 1); 0 where all are alike."""
    last = data.layout.last[data.labelled]
    episodes, episode = torch.unique(last, return_inverse=True)
    arrived = labelled_rewards(data)
    returns, sizes = (
        torch.zeros(len(arrived), len(episodes), dtype=torch.float64, device=arrived.device).index_add_(1, episode, x)
        for x in (arrived, arrived.abs())
    )
    spread = returns.amax(dim=1, keepdim=True) - returns.amin(dim=1, keepdim=True)
    return torch.where(_varies(spread, sizes.amax(dim=1, keepdim=True)), spread, 0.0).float()
