"""A trained occupancy critic, for people: numpy in, numpy out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvlctl import checkpoints, networks
from cvlctl.algorithms import occupancy
from cvlctl.errors import CvlctlError
from cvlctl.losses import occupancy_q
from cvlctl.networks import State

CHUNK = 4096  # state-action pairs against the whole bank at a time: bounds memory


class Critic:
    """One seed of an occupancy critic."""

    def __init__(self, config: occupancy.Config, state: State) -> None:
        self.config, self._state = config, state

    @property
    def gamma(self) -> float:
        """The discount that its futures were drawn with."""
        return self.config.gamma

    def log_ratio(self, observations: np.ndarray, actions: np.ndarray, futures: np.ndarray) -> np.ndarray:
        """f(s, a, s+) = log p(s+ | s, a) / p(s+).

        Args:
            observations: (N, O); actions: (N, A); futures: (M, O).

        Returns:
            (N, M) float32.
        """
        psi = self._psi(futures)
        return np.concatenate([(phi @ psi.mT).numpy() for phi in self._phi(observations, actions)])

    def q(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        futures: np.ndarray,
        rewards: np.ndarray,
        normaliser: str = "self",
    ) -> np.ndarray:
        """Q of the policy that collected the data, discounted rewards from the next step on (CVL Eq. 2 and 11).

        Args:
            observations: (N, O); actions: (N, A).
            futures, rewards: (M, O), (M,), drawn from the marginal p(s+): see `Store.futures`.
            normaliser: "self" divides by the same average with r = 1; "none" is Eq. 11 as written.

        Returns:
            (N,) float32.
        """
        if normaliser not in ("self", "none"):
            raise CvlctlError(f"normaliser {normaliser!r} is not one of self, none")
        psi, reward = self._psi(futures), torch.from_numpy(np.asarray(rewards, dtype=np.float32))
        if reward.shape != psi.shape[:1]:
            raise CvlctlError(f"{len(reward)} rewards for {len(psi)} futures", "give one reward for each future")
        read = occupancy_q.q_self_normalised if normaliser == "self" else occupancy_q.q_raw
        chunks = [read(phi @ psi.mT, reward).numpy() for phi in self._phi(observations, actions)]
        return np.concatenate(chunks) / (1 - self.gamma)

    @torch.no_grad()
    def _psi(self, futures: np.ndarray) -> Tensor:
        return occupancy.bank_psi(self.config, self._state, self._batch("futures", futures, "observation_mean"))[0]

    @torch.no_grad()
    def _phi(self, observations: np.ndarray, actions: np.ndarray) -> list[Tensor]:
        observation = networks.normalise(self._state, self._batch("observations", observations, "observation_mean"))
        action = self._batch("actions", actions, None)
        if action.shape[1] != observation.shape[1]:
            raise CvlctlError(f"{observation.shape[1]} observations, but {action.shape[1]} actions")
        pairs = zip(observation.split(CHUNK, dim=1), action.split(CHUNK, dim=1), strict=True)
        return [occupancy.phi(self.config, self._state, o, a)[0] for o, a in pairs]

    def _batch(self, name: str, value: np.ndarray, statistic: str | None) -> Tensor:
        array = np.asarray(value, dtype=np.float32)
        action_dim = self._state["phi.0.weight"].shape[1] - self._state["observation_mean"].shape[1]
        width = self._state[statistic].shape[1] if statistic else action_dim
        if array.ndim != 2 or array.shape[1] != width:
            raise CvlctlError(f"{name} have shape {array.shape}; expected (N, {width})")
        return torch.from_numpy(np.ascontiguousarray(array)).unsqueeze(0)


def critic_config(metadata: dict[str, Any]) -> occupancy.Config:
    """The critic's configuration in a checkpoint's metadata."""
    values = dict(metadata["critic"] or {})
    return occupancy.Config(**{**values, "hidden": tuple(values.get("hidden", ()))})


def load_critic(run: str | Path, seed: int = 0, checkpoint: str = "last") -> Critic:
    """The critic of `seed` in a pretrain or finetune run directory.

    Raises:
        CvlctlError: where there is no such run, seed or critic.
    """
    path = Path(run) / "checkpoints" / f"{checkpoint}.safetensors"
    state, metadata = checkpoints.load(path)
    if metadata.get("critic") is None:
        raise CvlctlError(f"{path}: the run has no occupancy critic (algorithm: {metadata.get('algorithm')})")
    if seed not in metadata["seeds"]:
        raise CvlctlError(f"{path} has no seed {seed}", f"it has seeds {metadata['seeds']}")
    member = metadata["seeds"].index(seed)
    keep = ("phi.", "psi.", "ema/", "observation_")
    kept = {name: value[member : member + 1] for name, value in state.items() if name.startswith(keep)}
    return Critic(critic_config(metadata), kept)
