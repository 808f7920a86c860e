"""The sampler against exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from cvlctl.data import samplers, statistics


def law(remaining: int, terminated: bool, gamma: float) -> np.ndarray:
    """Exact probabilities of offsets 1..K, and of absorption last."""
    inside = (1 - gamma) * gamma ** np.arange(remaining)
    if terminated:
        return np.append(inside, gamma**remaining)
    return np.append(inside / (1 - gamma**remaining), 0.0)


@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize(("remaining", "gamma"), [(1, 0.9), (4, 0.9), (4, 0.6), (5, 0.99)])
def test_offsets_follow_the_law(remaining: int, gamma: float, terminated: bool) -> None:
    num = 40_000
    u = torch.rand(num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset = samplers.geometric_offset(u, torch.full((num,), remaining), torch.full((num,), terminated), gamma)
    counts = np.bincount(np.minimum(offset.numpy(), remaining + 1) - 1, minlength=remaining + 1)
    expected = law(remaining, terminated, gamma)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert chisquare(counts[possible], num * expected[possible]).pvalue > 1e-3
    if remaining > 1:  # the test can tell the two laws apart
        other = law(remaining, not terminated, gamma)
        wrong = abs(counts / num - other).sum()
        assert wrong > 5 * abs(counts / num - expected).sum()


def test_rounding_never_leaves_the_episode() -> None:
    u = torch.tensor([1 - 2**-53, 1 - 2**-24, 0.0], dtype=torch.float64)
    for gamma in (0.5, 0.9, 0.99, 0.999):
        for remaining in (1, 2, 50, 500):
            k = torch.full((3,), remaining)
            offset = samplers.geometric_offset(u, k, torch.zeros(3, dtype=torch.bool), gamma)
            assert offset.min() >= 1
            assert offset.max() <= remaining


def test_gamma_zero_is_the_next_state() -> None:
    u = torch.rand(10, dtype=torch.float64)
    assert (
        samplers.geometric_offset(u, torch.full((10,), 5), torch.zeros(10, dtype=torch.bool), 0.0).tolist() == [1] * 10
    )


def test_layout_by_hand() -> None:
    """Episodes of two and one transitions: rows 0 1 (2) and 3 (4)."""
    where = samplers.layout(np.array([3, 5]), np.array([False, True]))
    assert where.row.tolist() == [0, 1, 3]
    assert where.last.tolist() == [2, 2, 4]
    assert where.terminated.tolist() == [False, False, True]


def test_absorbed_futures_are_the_final_observation_without_reward() -> None:
    where = samplers.layout(np.array([3]), np.array([True]))
    drawn = samplers.future(where, torch.tensor([0, 0, 0]), torch.tensor([0.05, 0.15, 0.9], dtype=torch.float64), 0.9)
    # P(1) = .1, P(2) = .09, then absorbed
    assert drawn.row.tolist() == [1, 2, 2]
    assert drawn.absorbed.tolist() == [False, False, True]


def data(num_rows: int = 50) -> samplers.Data:
    rows = torch.arange(float(num_rows)).unsqueeze(1)
    where = samplers.layout(np.array([num_rows // 2, num_rows]), np.array([False, True]))
    return samplers.Data(rows, rows, rows.T, where, torch.arange(len(where.row)), torch.zeros(0, 1))


def test_a_seed_sees_the_same_batches_alone_and_in_company() -> None:
    draws = samplers.Draws(8, gamma=0.9, futures=True, bank=16, noise=(("action", (8, 2)),))
    alone, noise_alone = samplers.draw(data(), draws, [3], 5, 4)
    together, noise_together = samplers.draw(data(), draws, [0, 3], 5, 4)
    for one, both in zip(alone, together, strict=True):
        assert torch.equal(one[:, 0], both[:, 1])
        assert not torch.equal(one[:, 0], both[:, 0]) or one.dtype == torch.bool
    assert torch.equal(noise_alone["action"][:, 0], noise_together["action"][:, 1])


def test_blocks_differ_and_repeat() -> None:
    draws = samplers.Draws(8, gamma=0.9, futures=True)
    first, again, other = (samplers.draw(data(), draws, [0], block, 4)[0].row for block in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gather_by_hand() -> None:
    d = data()
    indices = samplers.Indices(
        torch.tensor([[0, 1]]), torch.zeros(1, 0, dtype=torch.bool), torch.tensor([[4, 5]]), torch.tensor([[7, 8]]),
        torch.tensor([[False, True]]), torch.tensor([[6, 7]]), *[torch.zeros(1, 0, dtype=torch.bool)] * 2,
    )  # fmt: skip
    batch = samplers.gather(d, indices, samplers.Draws(2, futures=True, bank=2))
    assert batch.observation.tolist() == [[[0.0], [1.0]]]
    assert batch.future_observation.tolist() == [[[4.0], [5.0]]]
    assert batch.bank_reward.tolist() == [[7.0, 0.0]]  # the absorbed one pays nothing


def test_examples_fill_the_bank() -> None:
    d = data()._replace(examples=torch.tensor([[100.0], [200.0]]))
    draws = samplers.Draws(4, examples=200)
    indices, _ = samplers.draw(d, draws, [0, 1], 0, 2)
    batch = samplers.gather(d, samplers.Indices(*(x[0] for x in indices)), draws)
    # all of them, as there are fewer than 200
    assert batch.bank_observation.squeeze(-1).tolist() == [[100.0, 200.0]] * 2
    assert batch.bank_reward.tolist() == [[1.0, 1.0]] * 2


def test_transitions_are_those_of_labelled_episodes_and_end_where_the_episode_terminated() -> None:
    d = data()
    labelled = torch.arange(len(d.layout.row))[2:]
    rewards = torch.stack([d.arrival_reward[0], -d.arrival_reward[0]])  # learned labels: a row a member
    d = d._replace(labelled=labelled, arrival_reward=rewards)
    draws = samplers.Draws(500, gamma=0.9, transitions=True)
    indices, _ = samplers.draw(d, draws, [0, 1], 0, 1)
    batch = samplers.gather(d, samplers.Indices(*(x[0] for x in indices)), draws)
    row = batch.observation.squeeze(-1).long()  # observations of this data are their own row numbers
    assert set(row.flatten().tolist()) == set(d.layout.row[labelled].tolist())
    assert torch.equal(batch.next_observation.squeeze(-1), (row + 1).float())
    sign = torch.tensor([[1.0], [-1.0]])
    assert torch.equal(batch.reward, sign * rewards[0][row + 1])
    last = {int(end) - 2 for end, ended in zip([25, 50], [False, True], strict=True) if ended}
    assert last
    for r, discount in zip(row.flatten().tolist(), batch.discount.flatten().tolist(), strict=True):
        assert discount == pytest.approx(0.0 if r in last else 0.9)


def test_return_range_by_hand() -> None:
    d = data()._replace(arrival_reward=torch.ones(1, len(data().observation)))
    d = d._replace(labelled=torch.arange(30), layout=samplers.layout(np.array([11, 50]), np.array([False, True])))
    assert statistics.return_range(d).item() == 20 - 10  # the second episode is labelled for 20 of its steps
