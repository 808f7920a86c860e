"""Rewards learned from success examples: losses by hand, classifiers against Bayes, and that TD learners use them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tabular
import torch
from torch import Tensor

import cvlctl
from cvlctl import checkpoints
from cvlctl.experiments.commands import load
from cvlctl.learn import labellers, networks
from cvlctl.learn.algorithms import td3_bc
from cvlctl.learn.finetune import finetune
from cvlctl.learn.losses import rewards
from cvlctl.types import Spec

LOG2, LOG3 = math.log(2.0), math.log(3.0)


def logits() -> tuple[Tensor, Tensor]:
    """sigmoid = 3/4, 1/2 on examples; 1/4, 1/2 on unlabelled states."""
    return torch.tensor([LOG3, 0.0], requires_grad=True), torch.tensor([-LOG3, 0.0], requires_grad=True)


def grads(loss: Tensor, *leaves: Tensor) -> list[list[float]]:
    return [grad.tolist() for grad in torch.autograd.grad(loss, leaves)]


def test_binary_cross_entropy_by_hand() -> None:
    positive, unlabelled = logits()
    loss = rewards.binary_cross_entropy(positive, unlabelled)
    assert loss.item() == pytest.approx((math.log(4 / 3) + LOG2) / 2 * 2)
    on_positive, on_unlabelled = grads(loss, positive, unlabelled)
    assert on_positive == pytest.approx([-0.25 / 2, -0.5 / 2])  # sigmoid - 1
    assert on_unlabelled == pytest.approx([0.25 / 2, 0.5 / 2])  # sigmoid


def test_non_negative_pu_by_hand() -> None:
    positive, unlabelled = logits()
    loss = rewards.non_negative_pu(positive, unlabelled, 0.2)
    as_positive, as_negative = (math.log(4 / 3) + LOG2) / 2, (math.log(4) + LOG2) / 2  # of the examples
    assert loss.item() == pytest.approx(0.2 * as_positive + as_positive - 0.2 * as_negative)
    on_positive, on_unlabelled = grads(loss, positive, unlabelled)
    # eta (sigmoid - 1) - eta sigmoid = -eta, whatever the logit
    assert on_positive == pytest.approx([-0.2 / 2, -0.2 / 2])
    assert on_unlabelled == pytest.approx([0.25 / 2, 0.5 / 2])


def test_non_negative_pu_stops_where_nothing_negative_is_left() -> None:
    positive, unlabelled = torch.tensor([3.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    loss = rewards.non_negative_pu(positive, unlabelled, 0.5)
    assert loss.item() == pytest.approx(0.5 * math.log1p(math.exp(-3)))  # and not less, as without the clamp
    on_positive, on_unlabelled = grads(loss, positive, unlabelled)
    assert on_positive == pytest.approx([-0.5 / (1 + math.exp(3))]) and on_unlabelled == [0.0]


def test_members_are_kept_apart() -> None:
    positive, unlabelled = torch.zeros(2, 3), torch.tensor([[0.0], [5.0]])
    for loss in (rewards.binary_cross_entropy, lambda p, u: rewards.non_negative_pu(p, u, 0.1)):
        both = loss(positive, unlabelled)
        assert both.shape == (2,) and both[1] > both[0] + 1


# --- six states with known densities

STATES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
OF_SUCCESS = np.array([0.0, 0.05, 0.15, 0.2, 0.2, 0.4])  # p(x | success), the density of the examples
OF_OTHERS = np.array([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
PRIOR = 0.25
OF_ALL = PRIOR * OF_SUCCESS + (1 - PRIOR) * OF_OTHERS  # the store's


def rows(density: np.ndarray, num: int) -> Tensor:
    """States, each as often as its density says."""
    return torch.from_numpy(np.repeat(STATES, np.round(num * density).astype(int), axis=0))


def learned(name: str, seeds: list[int], **config: Any) -> np.ndarray:
    """Labels (E, 6) of the six states."""
    settings = {"steps": 800, "batch_size": 256, "hidden": (32, 32), "learning_rate": 2e-3, **config}
    observation = torch.cat([rows(OF_ALL, 2000), torch.from_numpy(STATES)])
    data = tabular.states_of(observation, rows(OF_SUCCESS, 200))
    spec = Spec((observation.shape[1],), 1, 1)
    found = labellers.learn(name, labellers.Config(**settings), spec, data, seeds, "cpu")
    assert found.shape == (len(seeds), len(observation))
    return found[:, -6:].numpy()


def test_oril_finds_the_bayes_optimal_classifier() -> None:
    bayes = OF_SUCCESS / (OF_SUCCESS + OF_ALL)
    labels = learned("oril", [0, 1])
    assert abs(labels - bayes).max() < 0.08
    assert labels[:, -1].max() < 0.9  # every unlabelled state is a negative: sure success is no certainty


def test_purl_finds_the_probability_of_success_where_the_prior_is_true() -> None:
    bayes = PRIOR * OF_SUCCESS / OF_ALL
    labels = learned("purl", [0, 1], positive_prior=PRIOR)
    assert abs(labels - bayes).max() < 0.1
    assert labels[:, -1].min() > 0.93  # states of success alone
    wrong = learned("purl", [0], positive_prior=0.05, steps=200)
    assert abs(wrong - bayes).max() > 0.2  # the prior matters


@pytest.mark.parametrize("name", labellers.LABELLERS)
def test_a_seed_labels_alike_alone_and_in_company(name: str) -> None:
    alone, together = learned(name, [3], steps=100), learned(name, [0, 3], steps=100)
    assert abs(alone[0] - together[1]).max() < 1e-5
    assert abs(together[0] - together[1]).max() > 1e-3
    assert (together > 0).all() and (together < 1).all()
    for index in labellers._draw(labellers.Config(), 1000, 100, [0, 3], 0, "cpu"):
        assert not torch.equal(index[0], index[1])  # not the weights alone: each seed has batches of its own


# --- through the command

LABELLER = "labeller: {steps: 100, batch_size: 32, hidden: [16]}"


def recipe(store: Path, out: Path, name: str = "oril", *overrides: str) -> Any:
    text = f"stores: [{{path: '{store}', rewards: {name}}}], out: '{out}', steps: 20, seeds: [0, 1], {LABELLER}"
    text += ", batch_size: 16, compile: false, threads: 1, log_every_steps: 5, algorithm: {name: td3_bc, hidden: [16]}"
    path = out.with_name(out.name + ".yaml")
    path.write_text(f"{{{text}, success_examples: {{from: '{store}'}}}}")
    return load(path, list(overrides), "finetune")


def labels_of(out: Path) -> Tensor:
    return checkpoints.load(out / "labels.safetensors")[0]["reward"]


def state_of(out: Path) -> dict[str, Tensor]:
    return checkpoints.load(out / "checkpoints" / "last.safetensors")[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of the cliff, in which falling terminates, with distinct observations."""
    path, rng, found = tmp_path_factory.mktemp("store") / "cliff.zarr", np.random.default_rng(0), []
    for episode in tabular.cliff().episodes(20, 15, seed=0):
        noisy = episode.observations + 0.1 * rng.normal(size=episode.observations.shape)
        near = noisy[1:, 0] > 0.5
        found.append(cvlctl.Episode(noisy, episode.actions, -episode.rewards, near, episode.terminated))
    cvlctl.write_store(path, found, task="cliff")
    return path


@pytest.mark.parametrize("name", labellers.LABELLERS)
def test_the_learner_sees_the_learned_rewards_and_no_others(name, store: Path, tmp_path: Path, monkeypatch) -> None:
    """Every reward of every batch is its own member's label, kept in the run, of the observation arrived at."""
    seen = []

    def step(config: Any, state: Any, batch: Any, noise: Any, update_actor: bool = True) -> Any:
        seen.append(batch)
        return original(config, state, batch, noise, update_actor)

    original = td3_bc.step
    monkeypatch.setattr(td3_bc, "step", step)
    finetune(recipe(store, tmp_path / "run", name))
    labels, observation = labels_of(tmp_path / "run"), torch.from_numpy(cvlctl.open_store(store).observations())
    assert labels.shape == (2, len(observation)) and len(seen) == 20
    assert (labels[0] - labels[1]).abs().max() > 1e-3
    for batch in seen:
        for member in range(2):
            distance = (batch.next_observation[member][:, None] - observation[None]).abs().amax(dim=2)
            assert distance.amin(dim=1).max() == 0
            assert torch.equal(batch.reward[member], labels[member][distance.argmin(dim=1)])


def test_the_critic_learns_the_labels(store: Path, tmp_path: Path, monkeypatch) -> None:
    """Without a future (gamma 0) Q is the label of where the action leads: other labels, another critic."""
    settings = ["algorithm.gamma=0", "steps=400", "batch_size=64", "algorithm.learning_rate=3e-3", "seeds=[0]"]
    opened = cvlctl.open_store(store)
    arrived = np.delete(np.arange(len(opened.observations())), np.concatenate([[0], opened.episode_ends()[:-1]]))
    left = arrived - 1
    found = {}
    for kind, sign in (("learned", 1.0), ("turned", -1.0)):
        with monkeypatch.context() as patch:
            learn = labellers.learn
            patch.setattr(labellers, "learn", lambda *a, sign=sign, learn=learn: sign * learn(*a))
            finetune(recipe(store, tmp_path / kind, "oril", *settings))
        state, labels = state_of(tmp_path / kind), labels_of(tmp_path / kind)[0].numpy()
        seen = networks.normalise(state, torch.from_numpy(opened.observations()[left]).unsqueeze(0))
        pair = torch.cat([seen, torch.from_numpy(opened.actions()[left]).unsqueeze(0)], dim=-1).unsqueeze(1)
        found[kind] = networks.mlp(state, "critic", pair)[0, 0, :, 0].numpy()
        assert np.corrcoef(found[kind], labels[arrived])[0, 1] > 0.5
    assert np.corrcoef(found["learned"], found["turned"])[0, 1] < -0.5


def test_resume_reads_the_labels_that_it_has(store: Path, tmp_path: Path, monkeypatch) -> None:
    finetune(recipe(store, tmp_path / "whole"))
    save = checkpoints.save

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        save(path, state, metadata)
        if path.name == "last.safetensors":
            raise KeyboardInterrupt

    def never(*_: Any) -> Tensor:
        raise AssertionError("labels are learned once")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe(store, tmp_path / "cut", "oril", "checkpoint_seconds=1e-9"))
    before = (tmp_path / "cut" / "labels.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(labellers, "learn", never)
        assert finetune(recipe(store, tmp_path / "cut", "oril", "checkpoint_seconds=1e-9"))["status"] == "trained"
    assert (tmp_path / "cut" / "labels.safetensors").read_bytes() == before
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert torch.equal(labels_of(tmp_path / "whole"), labels_of(tmp_path / "cut"))


def test_a_labelled_run_opens_no_reward_of_the_store(store: Path, tmp_path: Path) -> None:
    """The store's rewards are minus one at each step: not one of the labels, and nothing that the run hangs on."""
    bare = tmp_path / "bare.zarr"
    opened = cvlctl.open_store(store)
    ends, flags = opened.episode_ends(), opened.terminated()
    starts = [0, *ends[:-1]]
    cvlctl.write_store(
        bare,
        [
            cvlctl.Episode(opened.observations()[a:b], opened.actions()[a : b - 1], terminated=bool(flag))
            for a, b, flag in zip(starts, ends, flags, strict=True)
        ],
        task="cliff",
    )
    rows = np.flatnonzero(opened.successes("given")) + 1
    np.save(tmp_path / "examples.npy", opened.observations()[rows])
    overrides = [f"success_examples.file={tmp_path / 'examples.npy'}", "success_examples.from=null"]
    overrides += ["success_examples.num=1000"]
    finetune(recipe(store, tmp_path / "with", "oril", *overrides))
    finetune(recipe(bare, tmp_path / "without", "oril", *overrides))
    assert torch.equal(labels_of(tmp_path / "with"), labels_of(tmp_path / "without"))
    a, b = state_of(tmp_path / "with"), state_of(tmp_path / "without")
    assert all(torch.equal(a[key], b[key]) for key in a)
