"""precision: bf16: the networks' layers multiply in bfloat16, nothing else does, and what is learned stays right."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from cvlctl.learn import networks
from cvlctl.learn.algorithms import occupancy
from cvlctl.learn.programs import whole_step
from cvlctl.learn.settings import Settings, have_compiler, resolve_settings
from cvlctl.learn.updates import adam_init, value_and_grad
from cvlctl.types import OccupancyBatch, Spec

SPEC = Spec((5,), 2, 10)
SETTINGS = {name: Settings("cpu", 1, name, False) for name in ("float32", "bf16")}


def test_layers_multiply_rounded_numbers_and_add_them_up_in_float32() -> None:
    """1 + 2^-9 is 1 in bfloat16, so that 258 of them are 258, which is a bfloat16; a sum in bfloat16 ends at 256."""
    weight, bias = torch.ones(1, 258, 1), torch.zeros(1, 1, 1)
    x = torch.full((1, 2, 258), 1 + 2.0**-9)
    params = {"net.0.weight": weight, "net.0.bias": bias, "net.1.weight": torch.ones(1, 1, 1), "net.1.bias": bias}
    exact = 258 * (1 + 2.0**-9)
    assert networks.mlp(params, "net", x).flatten().tolist() == [exact, exact]
    with networks.layers_in(torch.bfloat16):
        rounded = networks.mlp(params, "net", x)
    assert rounded.dtype == torch.float32
    assert rounded.flatten().tolist() == [258.0, 258.0]
    assert networks.mlp(params, "net", x).flatten().tolist() == [exact, exact]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradients_are_those_of_float32_to_three_digits(layer_norm: bool) -> None:
    state = networks.mlp_init("net", [0, 1], [5, 64, 64, 3], layer_norm=layer_norm, copies=2)
    x = torch.randn(2, 1, 256, 5, generator=torch.Generator().manual_seed(0))

    def loss(params: networks.State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return networks.mlp(params, "net", x).square().sum(), {}

    exact, _ = value_and_grad(loss, state, list(state))
    with networks.layers_in(torch.bfloat16):
        rounded, _ = value_and_grad(loss, state, list(state))
    for name, grad in exact.items():
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - grad).norm() / grad.norm()
        assert 0 < error < 0.02, name


def step(precision: str) -> tuple[networks.State, dict[str, Any]]:
    """The critic's state after one update of fixed numbers, and its metrics."""
    g = torch.Generator().manual_seed(0)
    o, a, f = (torch.randn(2, 32, width, generator=g) for width in (5, 2, 5))
    none = torch.zeros(2, 0, dtype=torch.int64)
    batch = OccupancyBatch(o, a, f, torch.zeros(2, 0, 5), torch.zeros(2, 0), *[none] * 5)
    config = occupancy.Config(hidden=(32,), latent_dim=8)
    names = networks.critic_init([0, 1], 5, 2, config.hidden, config.latent_dim, layer_norm=False)
    state = {name: value.clone() for name, value in names.items()} | adam_init(names, "critic", list(names))
    state |= networks.no_normaliser([0, 1], 5)
    program = whole_step(partial(occupancy.step, config), SETTINGS[precision])
    return program(state, batch, {})


def test_a_step_in_bf16_keeps_its_state_in_float32_and_leaves_the_process_as_it_was() -> None:
    (exact, exact_metrics), (rounded, metrics) = step("float32"), step("bf16")
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert any(not torch.equal(exact[name], rounded[name]) for name in exact if name.startswith("phi."))
    for name, value in exact_metrics.items():
        assert metrics[name].dtype == torch.float32
        torch.testing.assert_close(metrics[name], value, atol=0.02, rtol=0.02)
    again, _ = step("float32")
    assert all(torch.equal(exact[name], again[name]) for name in exact)


def test_after_a_failed_step_the_process_is_as_it_was() -> None:
    def fails(state: Any, batch: Any, noise: Any) -> Any:
        raise ValueError

    with pytest.raises(ValueError):
        whole_step(fails, SETTINGS["bf16"])({}, None, None)
    x = torch.full((1, 1, 1), 1 + 2.0**-9)
    assert networks.linear(x, torch.ones(1, 1, 1), torch.zeros(1, 1, 1)).item() == 1 + 2.0**-9


@pytest.mark.skipif(not have_compiler(), reason="nothing is compiled here")
@pytest.mark.parametrize("width", [1, 3])
def test_a_compiled_layer_has_the_bits_of_an_eager_one(width: int) -> None:
    """Online learners act on what they compute: one that rounds otherwise collects another replay sooner or later."""
    if width > 1 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("holds where oneDNN has AVX-512: with less, fused layers round otherwise")
    g = torch.Generator().manual_seed(0)
    state = networks.mlp_init("net", [0, 1], [5, 64, width], copies=2)
    x = torch.randn(2, 1, 64, 5, generator=g)
    settings = Settings("cpu", 1, "medium", True)
    program = whole_step(lambda s, batch, noise: ({"y": networks.mlp(s, "net", batch)}, {}), settings)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(program(state, x, None)[0]["y"], networks.mlp(state, "net", x))
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_never_rounds_and_a_cpu_without_the_instructions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    resolve = partial(resolve_settings, device="cpu", threads=1, compile="false", steps=1, say=said.append)
    assert resolve(precision="auto").precision in ("float32", "medium")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve(precision="bf16").precision == "bf16" and not said
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve(precision="bf16").precision == "bf16"
    assert len(said) == 1 and "no such instructions" in said[0]
