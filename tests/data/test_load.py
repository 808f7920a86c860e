"""What a recipe uses of its stores: labels in part, zeros, the best, and rewards where they arrive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cvlctl.data.load import join, open_stores
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import Data


def test_stores_can_be_labelled_in_part_with_zeros_or_learned_from_their_best(point: Path) -> None:
    def joined(**use: object) -> Data:
        uses = [StoreUse(path=point, **use)]
        return join(open_stores(uses), uses, None, True)

    given = joined()
    rest = joined(fraction=0.34, rest="zeros")  # UDS: all are labelled, two of six episodes with their own rewards
    assert len(rest.labelled) == 180
    paid = rest.arrival_reward[0].reshape(6, 31).any(dim=1)
    assert paid.sum() == 2
    assert torch.equal(rest.arrival_reward[0].reshape(6, 31)[paid], given.arrival_reward[0].reshape(6, 31)[paid])
    assert not joined(rewards="zeros").arrival_reward.any()
    returns = given.arrival_reward[0].reshape(6, 31).sum(dim=1)
    best = joined(top=0.34)
    assert len(best.observation) == 62
    kept = best.arrival_reward[0].reshape(2, 31).sum(dim=1)
    assert torch.allclose(kept.sort()[0], returns.sort()[0][-2:], atol=1e-4)
    assert best.layout.last.unique().tolist() == [30, 61]
    with pytest.raises(ValueError, match="ranks episodes by their return"):
        StoreUse(path=point, rewards="zeros", top=0.5)


def test_labelled_fraction_limits_the_bank_alone(point: Path, tmp_path: Path) -> None:
    use = StoreUse(path=point, fraction=0.34)
    data = join(open_stores([use]), [use], None, True)
    episode = (data.layout.row[data.labelled] // 31).unique()
    assert len(episode) == 2  # of six
    assert len(data.layout.row) == 180  # and all transitions still train the critic
    none = StoreUse(path=point, rewards="none")
    both = join(open_stores([use, none]), [use, none], None, True)
    assert len(both.layout.row) == 360
    assert both.labelled.max() < 180


def test_arrival_reward_is_that_of_the_step_that_arrived(point: Path) -> None:
    use = StoreUse(path=point)
    data = join(open_stores([use]), [use], None, True)
    near = torch.exp(-data.observation[:, 2:].sum(1))  # the observation holds the squared position
    rows = torch.ones(len(near), dtype=torch.bool)
    rows[::31] = False  # first observations are arrived at by no step
    assert (data.arrival_reward[0, rows] - near[rows]).abs().max() < 1e-5
