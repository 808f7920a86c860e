"""What an occupancy critic's Q stands on: the share of every state in it, exactly.

A self-normalised Q is a weighted mean of rewards. Over all states j of the data, with the probability w_j of arriving
there and v_j of having been absorbed there under the marginal p(s+) (`samplers.marginal`),

    Q(s,a) = 1/(1-gamma) sum_j W_j r_j,    W_j = w_j e^f(s,a,j) / Z,    Z = sum_k (w_k + v_k) e^f(s,a,k).

The W_j and the absorbed share sum_j v_j e^f / Z, which pays nothing, sum to one. Read out as Eq. 11 is written, Q is Z
times that. A mean of e^f over success examples (LAEO Eq. 7) is the case w_j = 1/X, v_j = 0, r_j = 1 of this, without
1/(1-gamma). Without an episode, the critic held fixed, its terms are left out of both sums, and of w and v.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl.errors import CvlctlError
from cvlctl.files import read_json, sweep, write_atomically, write_json
from cvlctl.learn.critics import Critic
from cvlctl.play.sights import Seen
from cvlctl.progress import Progress, say

PAIRS, CACHED = 512, 4096  # pairs at a time, and states: what their logits take stays in the processor's cache
LEAST = 1e-9  # of the weight: what is left of less is rounding


class States(NamedTuple):
    """The states that Q is read out of."""

    psi: np.ndarray  # (copies, M, latent) float32: two copies of a twin critic, else one
    arrival: np.ndarray  # [w] (M,) float64
    absorbed: np.ndarray  # [v] (M,) float64
    reward: np.ndarray  # (M,) float64, on arriving there


class Shares(NamedTuple):
    """What one Q stands on; of a twin critic, the smaller one."""

    q: float
    arrival: np.ndarray  # [W] (M,) float64
    absorbed: np.ndarray  # (M,) float64; both sum to one together
    mass: float  # [Z] 1 where f is the log ratio

    def effective(self) -> float:
        """The effective number of states: 1 / sum of squared shares."""
        return float(1 / np.square(self.arrival + self.absorbed).sum())


class Readout:
    """Q of one critic, read out of `states`.

    Args:
        normaliser: "self"; "none": Eq. 11 as written; "examples": a mean of e^f, LAEO's.
    """

    def __init__(self, critic: Critic, states: States, normaliser: str = "self") -> None:
        self.critic, self.states, self.normaliser = critic, states, normaliser
        self._scale = 1.0 if normaliser == "examples" else 1 / (1 - critic.gamma)
        self._seen = (states.arrival + states.absorbed) > 0

    def q(self, observations: Seen, actions: np.ndarray) -> np.ndarray:
        """Q (N,) float64 of observations (N, O), or frames, and actions (N, A), in memory that does not grow with the
        states."""
        parts = [np.zeros(0)]
        for phi in self._phi(observations, actions):
            top, sums = self._sums(phi)
            q = sums[..., 0] / sums[..., 1] if self.normaliser == "self" else sums[..., 0] * np.exp(top)
            parts.append(q.min(axis=0) * self._scale)
        return np.concatenate(parts)

    def shares(self, observation: Seen, action: np.ndarray) -> Shares:
        """The share of every state in Q at an observation (O,), or (1, O), or one of frames, and an action (A,)."""
        one = observation if isinstance(observation, Mapping) else observation.reshape(1, -1)
        (phi,) = self._phi(one, action[None])
        found = [self._shares(psi @ copy[0].numpy()) for psi, copy in zip(self.states.psi, phi, strict=True)]
        return min(found, key=lambda one: one.q)

    def without(self, shares: Shares, groups: np.ndarray, mass: np.ndarray) -> np.ndarray:
        """Q (n,) without each of n groups of states, the critic held fixed; NaN where next to nothing is left.

        Args:
            groups: (n + 1,) rows at which groups begin, and the number of rows.
            mass: (n,) of each group under the marginal.
        """
        paid, weight = (
            by_group(x, groups) for x in (shares.arrival * self.states.reward, shares.arrival + shares.absorbed)
        )
        left, rest = paid.sum() - paid, 1 - weight
        with np.errstate(divide="ignore", invalid="ignore"):
            q = left / rest if self.normaliser == "self" else left * shares.mass / (1 - mass)
        return np.where((rest > LEAST) & (mass < 1 - LEAST), q * self._scale, np.nan)

    def _phi(self, observations: Seen, actions: np.ndarray) -> list[Tensor]:
        """(copies, at most PAIRS, latent) each."""
        shape = (len(self.states.psi), -1, self.states.psi.shape[-1])
        return [
            part for phi in self.critic._phi(observations, actions) for part in phi.reshape(shape).split(PAIRS, dim=1)
        ]

    def _sums(self, phi: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """log factor (copies, N), and sums (copies, N, 2) over states of e^(f - log factor) times w r, and w + v."""
        psi, arrival, absorbed, reward = self.states
        columns = torch.from_numpy(np.stack([arrival * reward, arrival + absorbed], axis=1))
        seen = torch.from_numpy(np.where(self._seen, np.float32(0), np.float32(-np.inf)))  # beside f: no part otherwise
        top, sums = torch.full(phi.shape[:2], -torch.inf), torch.zeros(*phi.shape[:2], 2, dtype=torch.float64)
        for begin in range(0, len(arrival), CACHED):
            rows = slice(begin, begin + CACHED)
            if not self._seen[rows].any():
                continue
            f = torch.baddbmm(seen[rows], phi, torch.from_numpy(psi[:, rows]).mT)
            highest = torch.maximum(top, f.amax(dim=-1))
            sums *= (top - highest).exp().double().unsqueeze(-1)
            sums += f.sub_(highest.unsqueeze(-1)).exp_().double() @ columns[rows]
            top = highest
        return top.double().numpy(), sums.numpy()

    def _shares(self, f: np.ndarray) -> Shares:
        logits = f.astype(np.float64)
        top = logits[self._seen].max()
        ratio = np.exp(np.where(self._seen, logits - top, -np.inf))
        arrival, absorbed = self.states.arrival * ratio, self.states.absorbed * ratio
        total = arrival.sum() + absorbed.sum()
        mass = float(total * np.exp(top))
        mean = float(arrival @ self.states.reward) / total
        q = mean if self.normaliser == "self" else mean * mass
        return Shares(q * self._scale, arrival / total, absorbed / total, mass)


def by_group(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sums (n,) of values (M,) over groups that begin at groups (n + 1,)."""
    return np.add.reduceat(values, groups[:-1])


def psi_of(critic: Critic, observations: Seen) -> np.ndarray:
    """psi (copies, M, latent) of observations (M, O), or frames, as readouts use it."""
    psi = critic._psi(observations)
    return (psi if critic.config.twin else psi.unsqueeze(0)).numpy()


def kept_psi(
    critic: Critic, rows: int, observations: Callable[[], Iterator[Seen]], file: Path, digest: str
) -> np.ndarray:
    """psi (copies, rows, latent) of many observations, as kept in `file`, or computed and kept there.

    Args:
        observations: yields them in order, (n, O) at a time, or frames: as many as fit in memory.
        file: .npy. Beside it lies what it is of: without that, or with another digest, it is made anew.
        digest: of the critic and the data.
    """
    copies, latent = 2 if critic.config.twin else 1, critic.config.latent_dim
    about, shape = file.with_suffix(".json"), (copies, rows, latent)
    found = _kept(file, about, digest, shape)
    if found is not None:
        return found
    psi, done = np.empty(shape, dtype=np.float32), 0
    with Progress("psi of all states", rows, "states") as progress:
        for chunk in observations():
            found = psi_of(critic, chunk)
            psi[:, done : done + found.shape[1]] = found
            done += found.shape[1]
            progress.update(done)
    content = psi.data.cast("B")
    try:
        sweep(file.parent, file.name, about.name)
        write_atomically(file, _npy_header(psi), content)
        write_json(about, {"digest": digest, "crc32": zlib.crc32(content)})
    except (CvlctlError, OSError) as error:  # a run of somebody else's, a full disk: the answer does not depend on it
        what = error.what if isinstance(error, CvlctlError) else error
        say(f"psi is not kept, and will be computed again: {what}")
    return psi


def _kept(file: Path, about: Path, digest: str, shape: tuple[int, ...]) -> np.ndarray | None:
    told = read_json(about)
    if told is None or told.get("digest") != digest:
        return None
    try:
        if file.is_file():  # what lies there may be a pipe, on which one would wait for ever
            found = np.load(file, mmap_mode="c", allow_pickle=False)  # never written to
            alike = found.shape == shape and found.dtype == np.float32
            if alike and zlib.crc32(found.data.cast("B")) == told.get("crc32"):
                return np.asarray(found)
    except (OSError, ValueError, TypeError):
        pass
    say(f"{file} is damaged, and made anew")
    return None


def _npy_header(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, np.lib.format.header_data_from_array_1_0(array))
    return data.getvalue()
