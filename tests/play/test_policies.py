"""Policies on numpy: the maths, members, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cvlctl.errors import CvlctlError
from cvlctl.play.policies import NumpyPolicy, RandomPolicy, load_policy
from cvlctl.types import Spec

SPEC = {"observation_shape": [3], "action_dim": 2, "horizon": 10, "pixels": False}
SEEDS = [4, 7]


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        "actor.0.weight": (2, 3, 5),
        "actor.0.bias": (2, 1, 5),
        "actor.1.weight": (2, 5, 4),
        "actor.1.bias": (2, 1, 4),
        "observation_mean": (2, 3),
    }
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"observation_std": np.full((2, 3), 0.5, np.float32), "adam.actor.9.weight": np.zeros(3, np.float32)}


def header(**changes: Any) -> dict[str, str]:
    content = {"format": 1, "algorithm": "bc", "task": "t", "spec": SPEC, "seeds": SEEDS, "step": 3}
    return {"cvlctl": json.dumps(content | changes)}


def save(path: Path, tensors: dict[str, np.ndarray] | None = None, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays() if tensors is None else tensors, path, header() if metadata is None else metadata)
    return path


def expected(member: int, observation: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """The formula of the contract, one observation at a time, in float64."""
    a = {name: value[member].astype(np.float64) for name, value in arrays().items() if value.ndim > 1}
    x = np.clip((observation - a["observation_mean"]) / a["observation_std"], -10, 10)
    x = np.maximum(x @ a["actor.0.weight"] + a["actor.0.bias"][0], 0)
    x = x @ a["actor.1.weight"] + a["actor.1.bias"][0]
    return np.tanh(x[:2] if noise is None else x[:2] + np.exp(np.clip(x[2:], -5, 2)) * noise)


def test_actions_follow_the_formula_for_each_member(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors")
    rng = np.random.default_rng(1)
    observations = rng.normal(size=(6, 3)) * [1, 1, 40]  # some beyond the clip
    noise = rng.normal(size=(6, 2))
    for member, seed in enumerate(SEEDS):
        policy = load_policy(path, seed=seed)
        greedy, sampled = policy(observations), policy(observations, noise)
        assert greedy.dtype == sampled.dtype == np.float32
        for i in range(6):
            assert greedy[i] == pytest.approx(expected(member, observations[i]), abs=1e-5)
            assert sampled[i] == pytest.approx(expected(member, observations[i], noise[i]), abs=1e-5)
        assert policy(observations[2]).shape == (2,)
        assert policy(observations[2]) == pytest.approx(greedy[2], abs=1e-6)
    assert policy.spec == Spec((3,), 2, 10)


def test_actions_are_those_of_the_actor_in_training(tmp_path: Path) -> None:
    import torch

    from cvlctl import checkpoints
    from cvlctl.learn import networks

    rng = np.random.default_rng(3)
    state = networks.actor_init(SEEDS, 3, 2, (16, 16))
    state |= networks.normaliser_init(SEEDS, torch.randn(3), torch.rand(3) + 0.5)
    path = tmp_path / "last.safetensors"
    checkpoints.save(path, state, json.loads(header()["cvlctl"]))
    observations = (rng.normal(size=(6, 3)) * [1, 5, 40]).astype(np.float32)
    batch = networks.normalise(state, torch.from_numpy(observations).expand(2, -1, -1))
    expected_actions = networks.actor(state, batch)[0].tanh()
    for member, seed in enumerate(SEEDS):
        actions = load_policy(path, seed)(observations)
        assert actions == pytest.approx(expected_actions[member].numpy(), abs=1e-5)


def test_a_run_directory_has_checkpoints_by_name_and_step(tmp_path: Path) -> None:
    save(tmp_path / "run/checkpoints/last.safetensors")
    save(tmp_path / "run/checkpoints/step-000005000.safetensors", arrays(seed=9))
    observation = np.ones(3)
    last, early = load_policy(tmp_path / "run", 4), load_policy(str(tmp_path / "run"), 4, 5000)
    assert not np.allclose(last(observation), early(observation))
    assert np.array_equal(early(observation), load_policy(tmp_path / "run", 4, "step-000005000")(observation))
    with pytest.raises(CvlctlError, match="step-000000007") as caught:
        load_policy(tmp_path / "run", 4, 7)
    assert "last, step-000005000" in caught.value.hint
    with pytest.raises(CvlctlError, match="no run or checkpoint"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(CvlctlError, match="no checkpoint"):
        load_policy(tmp_path)


def test_an_absent_seed_is_told_with_the_seeds_there(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="no seed 0") as caught:
        load_policy(save(tmp_path / "a.safetensors"), seed=0)
    assert "4, 7" in caught.value.hint


def test_observations_of_another_width_are_refused(tmp_path: Path) -> None:
    policy = load_policy(save(tmp_path / "a.safetensors"), seed=4)
    for shape in ((4,), (2, 4), (1, 2, 3), ()):
        with pytest.raises(CvlctlError, match="observations have shape"):
            policy(np.zeros(shape))


def changed(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    merged = arrays() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in merged.items() if value is not None}


NAN = np.full((2, 5, 4), np.nan, np.float32)
BAD_ARRAYS = {
    "holds no actor": {name: value for name, value in arrays().items() if not name.startswith("actor.")},
    "actor.1.bias has shape none": changed(actor__1__bias=None),
    "actor.0.weight has shape none": changed(actor__0__weight=None),
    "observation_mean has shape none": changed(observation_mean=None),
    "actor.1.weight has shape": changed(actor__1__weight=np.zeros((2, 5, 6), np.float32)),
    "actor.0.weight has shape": changed(actor__0__weight=np.zeros((3, 5), np.float32)),
    "actor.0.bias has shape": changed(actor__0__bias=np.zeros((1, 1, 5), np.float32)),
    "actor.1.weight holds NaN": changed(actor__1__weight=NAN),
    "actor.1.weight has type": changed(actor__1__weight=np.zeros((2, 5, 4), np.int64)),
    "observation_std holds values": changed(observation_std=np.zeros((2, 3), np.float32)),
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, message: str) -> None:
    with pytest.raises(CvlctlError, match=message.replace(".", r"\.")) as caught:
        load_policy(save(tmp_path / "a.safetensors", BAD_ARRAYS[message]), seed=4)
    assert "a.safetensors" in caught.value.what


BAD_HEADERS = {
    "none": {},
    "not JSON": {"cvlctl": "{"},
    "deep JSON": {"cvlctl": "[" * 100_000},
    "a list": {"cvlctl": "[1]"},
    "no format": {"cvlctl": "{}"},
    "newer": header(format=2),
    "spec": header(spec=SPEC | {"action_dim": "2"}),
    "spec negative": header(spec=SPEC | {"observation_shape": [-3]}),
    "spec missing": header(spec=None),
    "pixels": header(spec=SPEC | {"observation_shape": [3, 8, 8], "pixels": True}),
    "seeds": header(seeds="47"),
    "no seeds": header(seeds=[]),
    "seeds and members differ": header(seeds=[4]),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_headers_that_are_wrong_are_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(CvlctlError, match=r"a\.safetensors"):
        load_policy(save(tmp_path / "a.safetensors", metadata=BAD_HEADERS[what]), seed=4)


def test_hostile_and_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.safetensors").read_bytes()
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    bodies = {
        "empty": b"",
        "truncated header": whole[:20],
        "truncated data": whole[:-8],
        "garbage": bytes(range(256)) * 10,
        "huge header": struct.pack("<Q", 2**62) + whole[8:],
        "pickle": pickle.dumps({"actor": Hostile()}),
    }
    for name, body in bodies.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(body)
        with pytest.raises(CvlctlError, match=name):
            load_policy(path, seed=4)
    assert not ran.exists()


def test_random_actions_are_a_pure_function_of_seed_episode_and_step() -> None:
    spec = Spec((3,), 2, 1000)
    one, same, other = RandomPolicy(spec, 1, 5), RandomPolicy(spec, 1, 5), RandomPolicy(spec, 1, 6)
    nothing = np.zeros(3)
    assert np.array_equal(one(nothing, 3), same(nothing, 3))
    assert not np.array_equal(one(nothing, 3), one(nothing, 4))
    assert not np.array_equal(one(nothing, 3), other(nothing, 3))
    actions = np.stack([one(nothing, t) for t in range(1000)])
    assert actions.dtype == np.float32
    assert -1 <= actions.min() < -0.99
    assert 0.99 < actions.max() <= 1
    assert abs(actions.mean()) < 0.05


def test_policies_run_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, cvlctl.play.policies; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def test_a_policy_can_be_built_by_hand() -> None:
    weight = np.array([[2.0, 0.0]])
    policy = NumpyPolicy([(weight, np.zeros(2))], np.zeros(1), np.ones(1), Spec((1,), 1, 5))
    assert policy(np.array([[0.5], [50.0]]))[:, 0] == pytest.approx([np.tanh(1.0), np.tanh(20.0)])
