"""Tabular MDPs with exact answers, seen by the methods as embedded observations and continuous actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cvlctl import Episode

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

    def episodes(self, num: int, length: int, seed: int) -> list[Episode]:
        rng = np.random.default_rng(seed)
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
                    actions=self.actions[chosen],
                    rewards=self.reward[visited[1:]],
                    successes=self.reward[visited[1:]] >= self.reward.max(),
                    terminated=ended,
                )
            )
        return found


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
