"""Frames on their way to features: stacks, shifts, and encoders of several members."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cvlctl.data import samplers
from cvlctl.errors import CvlctlError
from cvlctl.learn import encoders, networks
from cvlctl.play import convolutions
from cvlctl.types import Observe, Spec, Views

KINDS = ["small", "drq", "impala"]


def spec_of(kind: str, size: int = 16, stack: int = 2, **more: object) -> Spec:
    observe = Observe(cameras=("left",), stack=stack, encoder=kind, features=8, **more)  # type: ignore[arg-type]
    return encoders.seeing(Spec((0,), 2, 10, cameras={"left": (size, size, 3)}), observe)


def frames(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def views(*shape: int) -> Views:
    return Views(torch.zeros(*shape[:2], 0), (frames(*shape),))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_sees_alike_alone_and_in_company(kind: str) -> None:
    together, seen = encoders.init("critic", spec_of(kind), [0, 3]), views(2, 5, 2, 16, 16)
    alone = encoders.init("critic", spec_of(kind), [3])
    both = networks.see(together, "critic", seen)
    assert both.shape == (2, 5, 8) and both.dtype == torch.float32
    one = networks.see(alone, "critic", Views(seen.vector[1:], (seen.frames[0][1:],)))
    torch.testing.assert_close(one[0], both[1], rtol=0, atol=1e-6)
    assert (both[0] - both[1]).abs().max() > 0.1
    assert both.std(dim=1).mean() > 0.1, "frames that differ look alike"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind: str) -> None:
    state = {name: value.double() for name, value in encoders.init("phi", spec_of(kind), [0, 1]).items()}
    seen, g = views(2, 3, 2, 16, 16), torch.Generator().manual_seed(0)
    seen = seen._replace(vector=seen.vector.double())
    weight = torch.randn(2, 3, 8, generator=g, dtype=torch.float64)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (networks.see(params, "phi", seen) * weight).sum()

    asked = {name: value.clone().requires_grad_() for name, value in state.items()}
    grads = dict(zip(asked, torch.autograd.grad(loss(asked), list(asked.values())), strict=True))
    for name, value in state.items():
        way = torch.randn(value.shape, generator=g, dtype=torch.float64)
        ahead, behind = (loss({**state, name: value + step * way}) for step in (1e-8, -1e-8))
        assert float((ahead - behind) / 2e-8) == pytest.approx(float((grads[name] * way).sum()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (15, 21), (33, 18)])
def test_shapes_are_those_of_what_is_computed(kind: str, size: tuple[int, int]) -> None:
    shapes = convolutions.shapes(kind, (*size, 3), 2, 8)
    layers = [(torch.zeros(shape), torch.zeros(shape[0] if len(shape) == 4 else shape[1])) for shape in shapes]
    assert convolutions.encode(kind, layers, frames(4, 2, *size)).shape == (4, 8)


def test_frames_too_small_for_an_encoder_are_refused() -> None:
    with pytest.raises(CvlctlError, match="drq: the frames of camera left, 14x14, are too small"):
        encoders.init("critic", spec_of("drq", size=14), [0])
    assert encoders.init("critic", spec_of("small", size=1), [0])


def test_features_without_gradient_where_weights_are_not_asked_for() -> None:
    """A vector, and features, are passed on as they are: the very tensor."""
    vector = torch.zeros(1, 2, 3)
    assert networks.see({}, "critic", vector) is vector
    assert networks.shown({"actor.0.weight": vector}, vector, vector) is vector


# --- stacks and shifts


def data(stack: int = 1, shift: int = 0) -> samplers.Data:
    """Two episodes of 3 and 2 transitions; each frame says its row."""
    where = samplers.layout(np.array([4, 7]), np.array([False, True]))
    camera = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(-1, 5, 6, 3).contiguous()
    vector = torch.arange(7.0)[:, None]
    return samplers.Data(
        vector, vector, vector.T, where, torch.arange(5), vector[:0], (camera,), (), stack=stack, shift=shift
    )


def test_an_episodes_first_frame_is_repeated_before_it() -> None:
    seen = samplers.observed(data(stack=3), torch.tensor([[0, 1, 3, 4, 5, 6]]), samplers.NO_SHIFT)
    assert isinstance(seen, Views) and seen.frames[0].shape == (1, 6, 3, 5, 6, 3)
    assert seen.frames[0][0, :, :, 2, 2, 1].tolist() == [
        [0, 0, 0], [0, 0, 1], [1, 2, 3], [4, 4, 4], [4, 4, 5], [4, 5, 6],
    ]  # fmt: skip
    assert seen.vector[0, :, 0].tolist() == [0, 1, 3, 4, 5, 6]


def test_shifted_by_hand() -> None:
    camera = frames(3, 4, 5)  # rows, H, W
    index, shift = torch.tensor([[[0], [2]], [[1], [1]]]), torch.tensor([[[0, 0], [1, 0]], [[0, -2], [-1, 2]]])
    found = samplers._frames(camera, index, shift, 2)[:, :, 0]
    assert torch.equal(found[0, 0], camera[0])
    down = camera[2][[0, 0, 1, 2]]  # one pixel down: the upper edge stands twice
    left = camera[1][:, [2, 3, 4, 4, 4]]  # two to the left
    both = camera[1][[1, 2, 3, 3]][:, [0, 0, 0, 1, 2]]  # one up and two to the right
    assert torch.equal(found[0, 1], down) and torch.equal(found[1, 0], left) and torch.equal(found[1, 1], both)


def test_every_observation_of_a_batch_has_a_shift_of_its_own_and_always_the_same() -> None:
    draws = samplers.Draws(40, 0.9, futures=True, bank=30)
    (one, _), (two, _) = (samplers.draw(data(shift=3), draws, seeds, 5, 2) for seeds in ([7], [0, 7]))
    assert one.shift.shape == (2, 1, 110, 2) and torch.equal(one.shift[:, 0], two.shift[:, 1])
    assert set(one.shift.flatten().tolist()) == set(range(-3, 4))
    plain, _ = samplers.draw(data(), draws, [7], 5, 2)
    assert plain.shift.shape == (2, 1, 0, 2)
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], plain[:-1], strict=True)), "shifts changed what is drawn"
