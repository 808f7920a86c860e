"""Tabular MDPs with exact answers, seen by the methods as embedded observations and continuous actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cvlctl import Episode
from cvlctl.data import samplers

Array = np.ndarray


@dataclass(frozen=True)
class MDP:
    """transition (S, A, S), behaviour policy (S, A), reward on arrival (S,), terminal (S,), and embeddings."""

    name: str
    transition: Array
    policy: Array
    reward: Array
    terminal: Array
    states: Array  # (S, O)
    actions: Array  # (A, dims) in [-1, 1]
    gamma: float

    def occupancy(self) -> Array:
        """(S, A, S): (1 - gamma) sum_k gamma^(k-1) P(s_k | s, a); a terminal state keeps its mass."""
        under_policy = np.einsum("sa,sat->st", self.policy, self.transition)
        under_policy[self.terminal] = np.eye(len(self.reward))[self.terminal]
        series = np.linalg.inv(np.eye(len(self.reward)) - self.gamma * under_policy)
        return (1 - self.gamma) * self.transition @ series

    def q(self) -> Array:
        """(S, A): expected discounted reward on arrival; a terminal state pays once."""
        under_policy = np.einsum("sa,sat->st", self.policy, self.transition)
        under_policy[self.terminal] = 0
        series = np.linalg.inv(np.eye(len(self.reward)) - self.gamma * under_policy)
        return self.transition @ series @ self.reward

    def value(self, policy: Array) -> Array:
        """(S,): exact value of another policy (S, A); 0 in terminal states."""
        value = (policy * replace(self, policy=policy).q()).sum(-1)
        return np.where(self.terminal, 0.0, value)

    def optimal_q(self) -> Array:
        """(S, A): value iteration until nothing moves."""
        q = np.zeros(self.policy.shape)
        while True:
            after = np.where(self.terminal, 0.0, q.max(-1))
            better = self.transition @ (self.reward + self.gamma * after)
            if abs(better - q).max() < 1e-10:
                return better
            q = better

    def action_of(self, actions: Array) -> Array:
        """Index of the embedded action that is nearest to each of (..., dims)."""
        return ((actions[..., None, :] - self.actions) ** 2).sum(-1).argmin(-1)

    def greedy(self, actions: Array) -> Array:
        """The policy (S, A) that takes in state s the embedded action nearest to `actions[s]`, (S, dims)."""
        return np.eye(len(self.actions))[self.action_of(actions)]

    def episodes(self, num: int, length: int, seed: int, *, spread: bool = False) -> list[Episode]:
        """Episodes of the behaviour policy. `spread`: logged actions are uniform in [-1, 1], among those whose nearest
        embedded action is the one taken, so that the MDP is one of continuous actions, known at each of them."""
        rng = np.random.default_rng(seed)
        cells: list[Array] = []
        if spread:
            cloud = rng.uniform(-1, 1, (20_000, self.actions.shape[1])).astype(np.float32)
            cells = [cloud[self.action_of(cloud) == a] for a in range(len(self.actions))]
        found = []
        starts = np.flatnonzero(~self.terminal)
        for _ in range(num):
            visited, chosen, ended = [rng.choice(starts)], [], False
            while len(chosen) < length and not ended:
                action = rng.choice(len(self.actions), p=self.policy[visited[-1]])
                chosen.append(action)
                visited.append(rng.choice(len(self.reward), p=self.transition[visited[-1], action]))
                ended = bool(self.terminal[visited[-1]])
            found.append(
                Episode(
                    observations=self.states[visited],
                    actions=np.stack([rng.choice(cells[a]) for a in chosen]) if spread else self.actions[chosen],
                    rewards=self.reward[visited[1:]],
                    successes=self.reward[visited[1:]] >= self.reward.max(),
                    terminated=ended,
                )
            )
        return found


def data_of(episodes: Sequence[Episode], examples: Array | None = None) -> samplers.Data:
    """Episodes as a training step sees them, without a store between."""
    ends = np.cumsum([len(episode) + 1 for episode in episodes])
    where = samplers.layout(ends, np.array([episode.terminated for episode in episodes]))
    observation = np.concatenate([episode.observations for episode in episodes])
    pad = np.zeros((1, episodes[0].actions.shape[1]), np.float32)
    action = np.concatenate([part for episode in episodes for part in (episode.actions, pad)])
    zero = np.zeros(1, np.float32)
    arrival = np.concatenate([part for episode in episodes for part in (zero, episode.rewards)])
    none = np.zeros((0, observation.shape[1]), np.float32)
    return samplers.Data(
        observation=torch.from_numpy(observation),
        action=torch.from_numpy(action),
        arrival_reward=torch.from_numpy(arrival).unsqueeze(0),
        layout=where,
        labelled=torch.arange(len(where.row)),
        examples=torch.from_numpy(none if examples is None else examples.astype(np.float32)),
    )


def states_of(observation: torch.Tensor, examples: torch.Tensor) -> samplers.Data:
    """States (rows, O), and examples (X, O) of success: one row after the other, without actions and rewards."""
    where = samplers.layout(np.array([len(observation)]), np.array([False]))
    nothing, none = torch.zeros(len(observation), 1), torch.arange(0)
    return samplers.Data(observation, nothing, nothing.T, where, none, examples)


def state_of(mdp: MDP, observations: Array) -> Array:
    """Index of each observation's state."""
    return ((observations[:, None] - mdp.states[None]) ** 2).sum(-1).argmin(1)


def _embed(num_states: int, num_actions: int, rng: np.random.Generator) -> tuple[Array, Array]:
    states = rng.normal(size=(num_states, 8)).astype(np.float32)
    angle = 2 * np.pi * np.arange(num_actions) / num_actions
    return states, np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _make(
    name: str, moves: Array, slip: float, reward: Array, gamma: float, seed: int, terminal: Array | None = None
) -> MDP:
    """moves (S, A): where each action leads; with probability `slip` one of the others' targets instead."""
    num_states, num_actions = moves.shape
    transition = np.zeros((num_states, num_actions, num_states))
    for s in range(num_states):
        for a in range(num_actions):
            for b in range(num_actions):
                transition[s, a, moves[s, b]] += (1 - slip) * (a == b) + slip / num_actions
    rng = np.random.default_rng(seed)
    policy = rng.dirichlet(np.ones(num_actions), size=num_states) * 0.6 + 0.4 / num_actions
    states, actions = _embed(num_states, num_actions, rng)
    ends = np.zeros(num_states, dtype=bool) if terminal is None else terminal
    return MDP(name, transition, policy, reward.astype(np.float32), ends, states, actions, gamma)


def _grid_moves(width: int, height: int) -> Array:
    moves = np.zeros((width * height, 4), dtype=int)
    for y in range(height):
        for x in range(width):
            for a, (dx, dy) in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
                nx, ny = min(max(x + dx, 0), width - 1), min(max(y + dy, 0), height - 1)
                moves[y * width + x, a] = ny * width + nx
    return moves


def grid_dense() -> MDP:
    """4x4 slippery grid, rewards in [0, 10]."""
    reward = np.random.default_rng(1).uniform(0, 10, size=16)
    return _make("grid, dense rewards", _grid_moves(4, 4), 0.2, reward, 0.9, seed=1)


def grid_sparse() -> MDP:
    """4x3 slippery grid, one rewarding corner."""
    reward = np.zeros(12)
    reward[11] = 10.0
    return _make("grid, sparse reward", _grid_moves(4, 3), 0.2, reward, 0.85, seed=2)


def grid_corner() -> MDP:
    """3x3 slippery grid, one rewarding corner: small enough to be solved in seconds."""
    reward = np.zeros(9)
    reward[8] = 10.0
    return _make("small grid", _grid_moves(3, 3), 0.2, reward, 0.8, seed=7)


def ring() -> MDP:
    """A ring of 12 states: left, right, stay."""
    index = np.arange(12)
    moves = np.stack([(index + 1) % 12, (index - 1) % 12, index], axis=1)
    reward = np.random.default_rng(3).uniform(0, 10, size=12)
    return _make("ring", moves, 0.2, reward, 0.9, seed=3)


def cliff() -> MDP:
    """A 4x3 grid in which falling off the lower edge ends the episode; every step alive pays 1."""
    moves = _grid_moves(4, 3)
    moves = np.concatenate([moves, np.zeros((1, 4), dtype=int)])
    moves[8:12, 1] = 12  # down from the lowest row
    moves[12] = 12
    reward = np.ones(13)
    reward[12] = 0.0
    terminal = np.arange(13) == 12
    return _make("cliff (terminal state)", moves, 0.1, reward, 0.9, seed=4, terminal=terminal)


def crossroads() -> MDP:
    """At the start a small prize, or a crossroads with a large one, where the behaviour policy mostly falls. Its Q says
    small prize: one step of improvement takes it, and only learning from the improved policy's own future does not."""
    start, crossing, fallen, small, large = range(5)
    transition = np.zeros((5, 2, 5))
    transition[start, [0, 1], [small, crossing]] = 1.0
    transition[crossing, [0, 1], [fallen, large]] = 1.0
    terminal = np.arange(5) >= fallen
    transition[terminal] = np.eye(5)[terminal, None]
    policy = np.full((5, 2), 0.5)
    policy[crossing] = 0.7, 0.3
    states, _ = _embed(5, 2, np.random.default_rng(5))
    reward = np.array([0.0, 0.0, 0.0, 1.0, 3.0], np.float32)
    actions = np.array([[-1.0], [1.0]], np.float32)
    return MDP("crossroads", transition, policy, reward, terminal, states, actions, 0.9)
