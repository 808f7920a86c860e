"""Critics of a finished policy's occupancy (`policy: RUN`), and such as learn the ratio itself (`spectral`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import CRITIC, load, run

import cvlctl
from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, occupancy
from cvlctl.learn.finetune import finetune
from cvlctl.learn.networks import State
from cvlctl.learn.pretrain import pretrain
from cvlctl.play.policies import load_policy
from cvlctl.score.explain import explain
from cvlctl.types import OccupancyBatch, Spec

TEXT = f"critic: {CRITIC[:-1]}, loss: td_info_nce}}"
SPEC = Spec((3,), 2, 10)


def batch() -> OccupancyBatch:
    g = torch.Generator().manual_seed(0)
    observation, future = torch.randn(2, 16, 3, generator=g), torch.randn(2, 16, 3, generator=g)
    action = torch.rand(2, 16, 2, generator=g) * 2 - 1
    none, flags = torch.zeros(2, 0, 3), torch.zeros(2, 16, dtype=torch.bool)
    return OccupancyBatch(
        observation, action, future, none, none[..., 0], none[..., 0], none[..., 0], -action, flags, ~flags
    )


def test_the_next_actions_are_the_policy_s_greedy_ones() -> None:
    config = occupancy.Config(hidden=(16,), latent_dim=4, gamma=0.9, loss="td_info_nce")
    critic = networks.critic_init([0, 1], 3, 2, (16,), 4, False)
    critic |= networks.normaliser_init([0, 1], torch.tensor([0.1, 0.0, -0.2]), torch.tensor([1.0, 0.5, 2.0]))
    names = occupancy.parameter_names(critic)
    critic |= occupancy.adam_init(critic, "critic", names) | {f"target/{name}": critic[name] + 0.1 for name in names}
    policy = networks.actor_init([5, 6], 3, 2, (8,))

    def after(state: State, batch: OccupancyBatch) -> State:
        return occupancy.step(config, {name: value.clone() for name, value in state.items()}, batch, {})[0]

    by_policy = after(critic | {f"policy{name[5:]}": value for name, value in policy.items()}, batch())
    greedy = actors.greedy(policy, networks.normalise(critic, batch().future_observation))
    by_hand = after(critic, occupancy.of_policy(batch(), greedy))
    logged = after(critic, batch()._replace(cut=batch().ended))
    assert all(torch.equal(by_policy[name], by_hand[name]) for name in names)
    assert not torch.equal(by_policy["phi.0.weight"], logged["phi.0.weight"])


def test_it_is_the_run_s_policy_and_sees_as_that_does(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "bc", "steps=20", "seeds=[0, 1]")
    recipe = load("pretrain", store, tmp_path / "pre", f"steps: 6, {TEXT}, policy: '{tmp_path / 'bc'}', seeds: [1]")
    pretrain(recipe.model_copy(update={"steps": 3}))
    pretrain(recipe)  # goes on
    whole = recipe.model_copy(update={"out": tmp_path / "whole"})
    pretrain(whole)
    state, metadata = checkpoints.load(tmp_path / "pre" / "checkpoints" / "last.safetensors")
    assert all(torch.equal(state[k], v) for k, v in checkpoints.load(
        tmp_path / "whole" / "checkpoints" / "last.safetensors")[0].items())  # fmt: skip
    before, _ = checkpoints.load(tmp_path / "bc" / "checkpoints" / "last.safetensors")
    for name, value in before.items():
        if name.startswith(("actor.", "observation_")):
            assert torch.equal(state[name.replace("actor.", "policy.")], value[1:]), name
    assert metadata["step"] == 6
    with pytest.raises(CvlctlError, match="holds no actor"):
        load_policy(tmp_path / "pre", seed=1)


def test_policies_that_cannot_be(store: Path, tmp_path: Path) -> None:
    def refuse(words: str, text: str) -> None:
        with pytest.raises(CvlctlError, match=words):
            pretrain(load("pretrain", store, tmp_path / "pre", f"steps: 2, {text}"))
        assert not (tmp_path / "pre").exists()

    run("bc", store, tmp_path / "bc", "steps=2")
    run("occupancy-td", store, tmp_path / "critic", "steps=2")
    run("goal_conditioned", store, tmp_path / "goals", "steps=2")
    bc = f"policy: '{tmp_path / 'bc'}'"
    refuse("needs a critic of a td_ loss; info_nce knows", f"critic: {CRITIC}, {bc}")
    refuse("policy contradicts init_from", f"init_from: '{tmp_path / 'critic'}', {bc}")
    refuse("has no seed 7", f"{TEXT}, {bc}, seeds: [0, 7]")
    refuse("policy: .*holds no actor", f"{TEXT}, policy: '{tmp_path / 'critic'}'")
    refuse("policy: .*goals: its policy is told a goal", f"{TEXT}, policy: '{tmp_path / 'goals'}'")
    refuse("policy: ", f"{TEXT}, policy: '{tmp_path / 'nowhere'}'")


def test_fitted_q_evaluation_of_a_policy_that_waits_for_a_goal_is_refused(store: Path, tmp_path: Path) -> None:
    run("goal_conditioned", store, tmp_path / "goals", "steps=2")
    text = f"steps: 2, init_from: '{tmp_path / 'goals'}', algorithm: fqe"
    with pytest.raises(CvlctlError, match=r"init_from: .*goals: its policy is told a goal"):
        finetune(load("finetune", store, tmp_path / "fqe", text))


# --- critics of the ratio itself


@pytest.mark.parametrize("twin", ["true", "false"])
def test_a_spectral_critic_s_q_is_linear_and_explain_refuses_it(twin: str, store: Path, tmp_path: Path) -> None:
    critic = f"{{hidden: [32, 32], latent_dim: 8, gamma: 0.9, loss: spectral, twin: {twin}}}"
    pretrain(load("pretrain", store, tmp_path / "pre", f"steps: 20, critic: {critic}"))
    found, data = cvlctl.load_critic(tmp_path / "pre"), cvlctl.open_store(store)
    bank, rewards = data.futures(64, 0.9, seed=0)
    observations, actions = data.observations()[:5], data.actions()[:5]
    phi, psi = found._phi(observations, actions)[0], found._psi(bank)
    f = (phi @ psi.mT).double().numpy()
    weights = np.random.default_rng(0).dirichlet(np.ones(64))
    for law in (None, weights):
        share = np.full(64, 1 / 64) if law is None else law
        by_hand = f @ (share * rewards) if twin == "false" else (f @ (share * rewards)).min(0)
        given = found.q(observations, actions, bank, rewards, "none", law)
        np.testing.assert_allclose(given, by_hand / 0.1, rtol=1e-3, atol=1e-4)
    ratio = f if twin == "false" else f.min(0)
    np.testing.assert_allclose(found.log_ratio(observations, actions, bank), np.log(ratio.clip(1e-6)), atol=1e-3)
    with pytest.raises(CvlctlError, match="loss: spectral, whose Q has no shares of states"):
        explain(tmp_path / "pre", steps=[0])
    with pytest.raises(CvlctlError, match="readout"):
        load(
            "finetune", store, tmp_path / "x", f"steps: 2, algorithm: {{name: cvl, readout: coreset, critic: {critic}}}"
        )
