"""Numbers below 1.2e-38, which cost an Intel processor a hundred cycles each, are 0 in every thread that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tabular
import torch
from toy_runs import load, run

from cvlctl import checkpoints
from cvlctl.data.writer import write_store
from cvlctl.learn import labellers, settings
from cvlctl.learn.critics import load_critic
from cvlctl.learn.losses import occupancy_q
from cvlctl.learn.pretrain import pretrain
from cvlctl.learn.settings import Settings, configure
from cvlctl.types import Spec

TINY = 1e-39


def denormals(x: torch.Tensor) -> int:
    """By their bits: a comparison with 0 would take them for 0 where they are flushed."""
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    return int(((bits > 0) & (bits < 0x00800000)).sum())


def test_the_flag_is_on_here_and_in_threads_of_openmp_that_were_there_before() -> None:
    x = torch.full((2**20,), TINY)
    torch.set_num_threads(2)
    assert denormals(x * 1) == len(x)  # and there are two threads now
    torch.set_flush_denormal(True)
    assert denormals(x * 1) == len(x) // 2
    configure(Settings("cpu", 2, "float32", False))
    assert denormals(x * 1) == 0


def stopped(store: Path, out: Path) -> Path:
    """A run after two of its five updates, with dead units whose Adam moments have decayed as far as they go."""
    run("bc", store, out, "steps=5")
    torch.set_flush_denormal(False)  # else 1e-39 were 0 already
    last = out / "checkpoints" / "last.safetensors"
    state, metadata = checkpoints.load(last)
    for name, value in state.items():
        if name.startswith("adam/") and value.ndim > 1:
            value.fill_(TINY)
        elif name.endswith("0.bias"):
            value.fill_(-1e3)
    checkpoints.save(last, state, metadata | {"step": 2})
    record = out / "run.json"
    record.write_text(record.read_text().replace("finished", "started"))
    return last


@pytest.mark.parametrize("flushed", [True, False])
def test_a_trained_state_holds_none(
    flushed: bool, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = stopped(store, tmp_path / "run")
    if not flushed:
        monkeypatch.setattr(settings, "flush_denormals", lambda: None)
    run("bc", store, tmp_path / "run", "steps=5")
    state, metadata = checkpoints.load(last)
    found = sum(denormals(value) for value in state.values() if value.dtype == torch.float32)
    assert metadata["step"] == 5 and (found == 0) == flushed


def test_nor_do_learned_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(labellers, "flush_denormals", lambda: called.append(True))
    x = torch.zeros(8, 2)
    config = labellers.Config(steps=1, hidden=(4,), batch_size=2)
    labellers.learn("oril", config, Spec((2,), 1, 1), tabular.states_of(x, x), [0], "cpu")
    assert called


@pytest.fixture
def flag() -> Iterator[Callable[[bool], None]]:
    """Sets whether denormals are flushed in this thread."""
    yield lambda on: torch.set_flush_denormal(on) and None
    torch.set_flush_denormal(False)


def test_no_readout_hangs_on_numbers_that_are_flushed(flag: Callable[[bool], None]) -> None:
    """Ratios spread over e^+-90 put the tails of every softmax below 1.2e-38, and some sums there too."""
    g = torch.Generator().manual_seed(0)
    logits, rewards = 30 * torch.randn(1, 64, 256, generator=g), torch.rand(1, 1, 256, generator=g)
    phi, psi = torch.randn(1, 64, 8, generator=g), 6 * torch.randn(1, 256, 8, generator=g)
    assert logits.min() < -90 < 90 < logits.max()
    found = []
    for on in (False, True):
        flag(on)
        assert (denormals(torch.softmax(logits, dim=-1)) == 0) == on
        frequencies = torch.randn(1, 128, 8, generator=torch.Generator().manual_seed(1))
        features, scales = occupancy_q.fourier_features(psi, frequencies)
        sums, factor = occupancy_q.fourier_sums(features, scales, rewards[0])
        own = occupancy_q.fourier_features(phi, frequencies)
        found.append([
            occupancy_q.q_self_normalised(logits, rewards), occupancy_q.q_raw(logits.clamp(max=80), rewards),
            occupancy_q.log_q_examples(logits), sums, occupancy_q.q_fourier(*own, sums, factor),
        ])  # fmt: skip
    for kept, flushed in zip(*found, strict=True):
        assert kept.isfinite().all()
        torch.testing.assert_close(flushed, kept, rtol=1e-6, atol=1e-30)


def test_a_tabular_critic_is_the_same_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = tabular.ring()
    place = write_store(tmp_path / "ring.zarr", mdp.episodes(50, 60, seed=0), task="ring").path
    num_states, num_actions = mdp.policy.shape
    pairs = (np.repeat(mdp.states, num_actions, 0), np.tile(mdp.actions, (num_states, 1)))
    found = []
    for name in ("flushed", "kept"):
        recipe = load("pretrain", place, tmp_path / name, "steps: 300, critic: {hidden: [32], latent_dim: 8}")
        pretrain(recipe)
        torch.set_flush_denormal(False)
        found.append(load_critic(tmp_path / name).log_ratio(*pairs, mdp.states))
        monkeypatch.setattr(settings, "flush_denormals", lambda: None)
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)
