"""An occupancy critic that sees pictures of an MDP, against exact answers: from a store of frames to `load_critic`.

The agent is a square, and another one wanders at random: it says nothing of what the agent will do, and all that is
asked of futures is summed over where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tabular
from tabular import MDP

import cvlctl
from cvlctl.data.store import Store
from cvlctl.experiments.commands import load
from cvlctl.learn.pretrain import pretrain
from cvlctl.types import Episode

SIZE, PLACES, FUTURES = 16, 4, 1500  # of a picture; where the wanderer is when asked; futures that are asked about


def corners(mdp: MDP) -> np.ndarray:
    """(S, 2) where the agent's square begins in each state."""
    number = np.arange(len(mdp.reward))
    if mdp.name == "ring":
        angle = 2 * np.pi * number / len(number)
        return (6.5 + 6 * np.stack([np.sin(angle), np.cos(angle)], axis=1)).round().astype(int)
    width = 3 if len(number) == 9 else 4
    return 4 * np.stack([number // width, number % width], axis=1)


def pictures(agent: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n, 16, 16, 3) uint8 of two squares whose corners are at (n, 2), the agent in front."""
    found = np.full((len(agent), SIZE, SIZE, 3), 30, np.uint8)
    for frame, (y, x), (v, u) in zip(found, agent, other, strict=True):
        frame[v : v + 2, u : u + 2] = 60, 90, 220
        frame[y : y + 3, x : x + 3] = 230, 200, 40
    return found


def wandering(count: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2) corners of a square that goes up to two pixels at a time, anywhere."""
    found = [rng.integers(0, SIZE - 1, 2)]
    for step in rng.integers(-2, 3, (count - 1, 2)):
        found.append(np.clip(found[-1] + step, 0, SIZE - 2))
    return np.stack(found)


def filmed(mdp: MDP, path: Path) -> tuple[Store, np.ndarray]:
    """400 episodes of 60 steps, pictures alone, and the state in each row."""
    rng, where, found, states = np.random.default_rng(0), corners(mdp), [], []
    for one in mdp.episodes(400, 60, seed=0):
        states.append(tabular.state_of(mdp, one.observations))
        images = {"above": pictures(where[states[-1]], wandering(len(one) + 1, rng))}
        found.append(Episode(None, one.actions, one.rewards, one.successes, one.terminated, images=images))
    return cvlctl.write_store(path, found, task="pictures"), np.concatenate(states)


SLOW = [
    pytest.param(make, loss, steps, marks=pytest.mark.slow)
    for make, steps in ((tabular.grid_sparse, 1500), (tabular.grid_dense, 2500))
    for loss in ("info_nce", "binary_nce")
]


@pytest.mark.parametrize(
    ("make", "loss", "steps"),
    [
        *((make, loss, steps) for make, steps in ((tabular.ring, 400), (tabular.grid_corner, 600))
          for loss in ("info_nce", "binary_nce")),
        *SLOW,
    ],
)  # fmt: skip
def test_a_critic_that_sees_recovers_occupancy_and_q(
    make: Callable[[], MDP], loss: str, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mdp = make()
    num_states, num_actions = mdp.policy.shape
    store, states = filmed(mdp, tmp_path / "store.zarr")
    text = f"{{stores: ['{store.path}'], out: '{tmp_path / 'run'}', observe: {{cameras: [above], shift: 0}}}}"
    (tmp_path / "recipe.yaml").write_text(text)
    settings = {"gamma": mdp.gamma, "hidden": [128, 128], "latent_dim": 32, "loss": loss, "learning_rate": 1e-3}
    overrides = [f"critic.{key}={value}" for key, value in settings.items()]
    overrides += [f"steps={steps}", "batch_size=128", "threads=1", "compile=false"]
    pretrain(load(tmp_path / "recipe.yaml", overrides, "pretrain"))
    critic, rng = cvlctl.load_critic(tmp_path / "run"), np.random.default_rng(1)

    # futures by the sampler's law: their rows, found by a store of row numbers in the place of observations
    numbers, rewards = rows_of_futures(store, mdp, tmp_path)
    arrived = states[numbers]
    marginal = np.bincount(arrived, minlength=num_states) / FUTURES
    shown = pictures(np.repeat(corners(mdp), PLACES, axis=0), rng.integers(0, SIZE - 1, (num_states * PLACES, 2)))
    shown, actions = np.repeat(shown, num_actions, axis=0), np.tile(mdp.actions, (num_states * PLACES, 1))
    futures = {"above": store.images("above")[numbers]}
    shape = (num_states, PLACES, num_actions)
    ratio = np.exp(critic.log_ratio({"above": shown}, actions, futures).astype(np.float64)).reshape(*shape, -1).mean(1)
    q = critic.q({"above": shown}, actions, futures, rewards).reshape(shape).mean(axis=1)
    occupancy = np.stack([ratio[..., arrived == state].sum(-1) for state in range(num_states)], axis=-1)
    occupancy /= occupancy.sum(-1, keepdims=True)

    transitions = np.delete(states, store.episode_ends() - 1)
    weight = (np.bincount(transitions, minlength=num_states) / len(transitions))[:, None] * mdp.policy

    def off(estimate: np.ndarray) -> float:
        return float((weight * 0.5 * abs(estimate - mdp.occupancy()).sum(-1)).sum())

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        x, y = (v - (weight * v).sum() for v in (x, y))
        return float((weight * x * y).sum() / np.sqrt((weight * x * x).sum() * (weight * y * y).sum()))

    examples = mdp.reward == mdp.reward.max()
    learned, blind = off(occupancy), off(np.broadcast_to(marginal, occupancy.shape))
    of_q = correlation(q, mdp.q())
    laeo = correlation(ratio[..., examples[arrived]].mean(-1), mdp.occupancy()[..., examples].sum(-1))
    with capsys.disabled():
        print(
            f"\n  {mdp.name} in pictures, {loss}: occupancy off by {learned:.3f} (action-blind {blind:.3f}); ", end=""
        )
        print(f"correlation of Q {of_q:.3f}, of LAEO's Q {laeo:.3f}", end="")
    assert blind > 0.2, "actions hardly matter in this MDP: it proves nothing"
    assert learned <= 0.5 * blind
    assert of_q >= 0.95
    assert laeo >= 0.93


def rows_of_futures(store: Store, mdp: MDP, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of futures and their rewards: of a store whose observations are the numbers of its rows."""
    count, episodes = 0, []
    for one in store.episodes():
        rows = np.arange(count, count + len(one) + 1, dtype=np.float32)[:, None]
        episodes.append(Episode(rows, one.actions, one.rewards, terminated=one.terminated))
        count += len(rows)
    numbered = cvlctl.write_store(folder / "numbers.zarr", episodes, task="rows")
    found, rewards = numbered.futures(FUTURES, mdp.gamma, seed=0)
    return found[:, 0].astype(int), rewards
