"""A trained occupancy critic, for people: numpy in, numpy out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.learn import encoders, networks
from cvlctl.learn.algorithms import occupancy
from cvlctl.learn.losses import occupancy_q
from cvlctl.learn.networks import State
from cvlctl.play.sights import FRAMES_AT_ONCE, VECTOR, Seen, checked, seen_by
from cvlctl.types import Observation, Seeing, Spec, Views, require_finite

CHUNK = 4096  # state-action pairs against the whole bank at a time: bounds memory


class Critic:
    """One seed of an occupancy critic.

    Observations and futures are arrays (N, O); of a critic that learned from frames what `load_policy` takes: by camera
    (N, H, W, C) uint8, or (N, S, H, W, C) of stacks, and "vector" (N, O) where it sees one.
    """

    def __init__(self, config: occupancy.Config, spec: Spec, state: State) -> None:
        self.config, self.spec, self._state = config, spec, state

    @property
    def gamma(self) -> float:
        """The discount that its futures were drawn with."""
        return self.config.gamma

    @property
    def by_next(self) -> bool:
        """Whether its p(s+) is the law of next states (a td_ loss): `Store.futures(..., next_states=True)`."""
        return occupancy.by_next(self.config)

    def log_ratio(self, observations: Seen, actions: np.ndarray, futures: Seen) -> np.ndarray:
        """f(s, a, s+) = log p(s+ | s, a) / p(s+); of a spectral critic, whose f is the ratio, its logarithm (of 1e-6
        where it comes out below).

        Args:
            observations: (N, O); actions: (N, A); futures: (M, O).

        Returns:
            (N, M) float32.
        """
        psi = self._psi(futures)
        found = np.concatenate([self._smaller(phi @ psi.mT).numpy() for phi in self._phi(observations, actions)])
        return np.log(np.maximum(found, 1e-6)) if occupancy.linear(self.config) else found

    def q(
        self,
        observations: Seen,
        actions: np.ndarray,
        futures: Seen,
        rewards: np.ndarray,
        normaliser: str = "self",
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        """Q of the policy that collected the data (of that which a td_ loss learned about): discounted rewards from
        the next step on (CVL Eq. 2 and 11).

        Args:
            observations: (N, O); actions: (N, A).
            futures, rewards: (M, O), (M,), drawn from the marginal p(s+): see `Store.futures`.
            normaliser: "self" divides by the same average with r = 1; "none" is Eq. 11 as written.
            weights: (M,) above 0, the futures' probabilities (`samplers.marginal`); None: all alike.

        Returns:
            (N,) float32.
        """
        if normaliser not in ("self", "none"):
            raise CvlctlError(f"normaliser {normaliser!r} is not one of self, none")
        psi, reward = self._psi(futures), torch.from_numpy(np.asarray(rewards, dtype=np.float32))
        if reward.shape != psi.shape[-2:-1]:
            raise CvlctlError(f"{len(reward)} rewards for {len(psi)} futures", "give one reward for each future")
        reward, share = reward.expand(*psi.shape[:-1]), None
        if weights is not None:  # in float64, as a share of hundreds of thousands of states asks for
            share = torch.from_numpy(len(weights) * np.asarray(weights, np.float64))
            reward = reward.double()

        def read(phi: Tensor) -> Tensor:
            if occupancy.linear(self.config):
                return occupancy_q.q_linear(phi, psi, reward, normaliser, share)
            logits = phi @ psi.mT + (0 if share is None else share.log())
            return (occupancy_q.q_self_normalised if normaliser == "self" else occupancy_q.q_raw)(logits, reward)

        chunks = [self._smaller(read(phi)).numpy() for phi in self._phi(observations, actions)]
        return (np.concatenate(chunks) / (1 - self.gamma)).astype(np.float32)

    def _smaller(self, both: Tensor) -> Tensor:
        return both.amin(dim=0) if self.config.twin else both

    def digest(self) -> str:
        """sha256 of all that it computes with."""
        total = hashlib.sha256(repr(self.config).encode())
        for name in sorted(self._state):
            total.update(name.encode() + self._state[name].numpy().tobytes())
        return total.hexdigest()

    @torch.no_grad()
    def _psi(self, futures: Seen) -> Tensor:
        parts = [occupancy.bank_psi(self.config, self._state, part) for part in self._shown("futures", futures)]
        return torch.cat(parts, dim=-2)[0]

    @torch.no_grad()
    def _phi(self, observations: Seen, actions: np.ndarray) -> list[Tensor]:
        shown = (networks.normalise(self._state, part) for part in self._shown("observations", observations))
        observation = torch.cat([occupancy.seen(self._state, part) for part in shown], dim=1)
        action = self._batch("actions", actions, None)
        if action.shape[1] != observation.shape[1]:
            raise CvlctlError(f"{observation.shape[1]} observations, but {action.shape[1]} actions")
        pairs = zip(observation.split(CHUNK, dim=1), action.split(CHUNK, dim=1), strict=True)
        return [occupancy.phi(self.config, self._state, o, a)[0] for o, a in pairs]

    def _shown(self, name: str, value: Seen) -> list[Observation]:
        """As networks see it, not normalised; frames in pieces that fit in memory."""
        if not isinstance(self.spec, Seeing):
            return [self._batch(name, np.asarray(value), "observation_mean")]
        seen = checked(value, self.spec.observe, self.spec.cameras, encoders.vector_size(self.spec))
        own = [np.require(seen[key], requirements=("C", "W")) for key in (VECTOR, *self.spec.observe.cameras)]
        arrays = [torch.from_numpy(array) for array in own]
        pieces = zip(*(array.unsqueeze(0).split(FRAMES_AT_ONCE, dim=1) for array in arrays), strict=True)
        return [Views(vector, tuple(frames)) for vector, *frames in pieces]

    def _batch(self, name: str, value: np.ndarray, statistic: str | None) -> Tensor:
        array = np.asarray(value, dtype=np.float32)
        width = self._state[statistic].shape[1] if statistic else self.spec.action_dim
        if array.ndim != 2 or array.shape[1] != width:
            raise CvlctlError(f"{name} have shape {array.shape}; expected (N, {width})")
        require_finite(name, array)
        return torch.from_numpy(np.ascontiguousarray(array)).unsqueeze(0)


class Trained(NamedTuple):
    """What a checkpoint holds of occupancy critics."""

    config: occupancy.Config
    spec: Spec
    seeds: list[int]
    state: State  # all of the checkpoint: (E, ...), but for counts of updates


def read_critics(run: Path, checkpoint: str | int = "last") -> Trained:
    """The critics of all seeds, and what lies beside them in the checkpoint.

    Raises:
        CvlctlError: there is no such run or checkpoint, it is damaged, or has no critic.
    """
    return critics_of(checkpoints.read(checkpoints.checkpoint_file(run, checkpoint)), run)


def critics_of(found: checkpoints.Saved, run: Path) -> Trained:
    """The critics in a checkpoint of `run` that was read; raises as `read_critics` does."""
    state, metadata = checkpoints.unpack(found), found.metadata
    if "critic" in metadata and metadata["critic"] is None:
        what = f"{run} ({metadata.get('algorithm')}) has no occupancy critic"
        raise CvlctlError(what, "name a run of cvlctl pretrain, or one finetuned by cvl or laeo")
    try:
        values = metadata["critic"]
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = occupancy.Config(**settings)
        spec = encoders.seeing(*seen_by(metadata))
        seeds = [int(seed) for seed in metadata["seeds"]]
        for name, shape in _shapes(config, spec, state).items():
            if tuple(state[name].shape) != (len(seeds), *shape):
                got = tuple(state[name].shape)
                raise ValueError(f"{name} has shape {got}; expected {len(seeds)} members and width {shape[-1]}")
            if state[name].dtype != torch.float32:
                raise ValueError(f"{name} is {state[name].dtype}; expected float32")
        if any(value.dim() and len(value) != len(seeds) for value in state.values()):
            raise ValueError(f"not all tensors have {len(seeds)} members")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{found.path} is not the checkpoint of an occupancy critic ({type(error).__name__}: {error})"
        raise CvlctlError(what, "it is damaged, or not of cvlctl: pretrain again") from error
    return Trained(config, spec, seeds, state)


def _shapes(config: occupancy.Config, spec: Spec, state: State) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of critics has to hold of each member; moments all together, or none in a numbered one."""
    expected = {name: tuple(value.shape[1:]) for name, value in occupancy.weights(config, spec, [0]).items()}
    shapes = dict.fromkeys(("observation_mean", "observation_std"), (encoders.vector_size(spec),)) | expected
    if config.ema_rate > 0:
        shapes |= {f"ema/{name}": shape for name, shape in expected.items() if name.startswith("psi.")}
    if any(name.startswith("adam/critic/") for name in state):
        shapes |= {f"adam/critic/{part}/{name}": shape for name, shape in expected.items() for part in ("m", "v")}
    return shapes


def load_critic(run: str | Path, seed: int = 0, checkpoint: str | int = "last") -> Critic:
    """The critic of one seed of a pretrained or finetuned run.

    Args:
        run: a run directory, or a checkpoint file (.safetensors).
        seed: the training seed, as named in the recipe.
        checkpoint: in a run directory: "last", or a step such as 5000.

    Raises:
        CvlctlError: no such run, checkpoint or seed; no critic in it; or a file that is damaged or not a checkpoint.
    """
    return critic_of(read_critics(Path(run), checkpoint), seed, run)


def critic_of(found: Trained, seed: int, run: str | Path) -> Critic:
    """The critic of one seed of what was read of `run`. CvlctlError where it has no such seed."""
    if seed not in found.seeds:
        raise CvlctlError(f"{run} has no seed {seed}", f"its seeds: {', '.join(map(str, found.seeds))}")
    member = found.seeds.index(seed)
    keep = ("phi.", "psi.", "ema/", "observation_")
    kept = {name: value[member : member + 1] for name, value in found.state.items() if name.startswith(keep)}
    return Critic(found.config, found.spec, kept)
