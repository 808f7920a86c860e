"""Goal-conditioned contrastive RL: f ranks actions as Q does, where it must and where it need not; policies arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tabular
import torch
from tabular import MDP

import cvlctl
from cvlctl import checkpoints
from cvlctl.data import samplers
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn.algorithms import goal_conditioned, laeo, occupancy
from cvlctl.learn.finetune import finetune
from cvlctl.learn.losses import contrastive, occupancy_q
from cvlctl.learn.pretrain import pretrain
from cvlctl.play import envs
from cvlctl.play.lockstep import run_lockstep
from cvlctl.play.players import run_episodes
from cvlctl.play.policies import NumpyPolicy, RandomPolicy, load_policy
from cvlctl.play.rollout import GoalUse, PolicyJob, collect_episode
from cvlctl.score.evaluate import evaluate
from cvlctl.types import Spec

FAST = "batch_size: 256, compile: false, threads: 1"


def write(path: Path, text: str, kind: str) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{{text}}}")
    return load(path, [], kind)


# --- argmax_a f = argmax_a Q: the statement, on tables


def share_of_best(q: np.ndarray, f: np.ndarray, weight: np.ndarray) -> float:
    """Share of (state, goal), states by `weight` (S,), in which argmax_a f is a best action under q, (S, A, G)."""
    chosen = np.take_along_axis(q, f.argmax(1)[:, None], axis=1)[:, 0]
    return float((weight[:, None] * (chosen >= q.max(1) * (1 - 1e-9))).sum() / q.shape[2])


def log_ratio(mdp: MDP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact log Q_g(s, a) / p(g) (S, A, G), the weight d(s, a) and the marginal p(g) = sum d Q."""
    q = torch.from_numpy(mdp.occupancy())
    weight = torch.from_numpy(mdp.policy / len(mdp.policy))
    marginal = torch.einsum("sa,sag->g", weight, q)
    return (q / marginal).log(), weight, marginal


@pytest.mark.parametrize("make", [tabular.ring, tabular.grid_dense])
def test_what_the_losses_fix_of_f_and_what_infonce_leaves_free(make) -> None:
    """c(s, a) is free under InfoNCE and overturns the ranking; it costs under the penalty, and under binary NCE."""
    mdp = make()
    f, weight, _ = log_ratio(mdp)
    q = mdp.occupancy()
    uniform = np.full(len(q), 1 / len(q))
    assert share_of_best(q, f.numpy(), uniform) == 1.0
    g = torch.Generator().manual_seed(0)
    c = 3 * torch.randn(weight.shape, generator=g, dtype=torch.float64)
    shifted = f + c.unsqueeze(-1)
    assert share_of_best(q, shifted.numpy(), uniform) < 0.5

    size = 4096
    pair = torch.multinomial(weight.flatten(), size, replacement=True, generator=g)
    future = torch.multinomial(torch.from_numpy(q).flatten(0, 1)[pair], 1, generator=g).squeeze(1)
    loss = {}
    for name, table in (("ratio", f), ("shifted", shifted)):
        logits = table.flatten(0, 1)[pair][:, future]
        partition = contrastive.log_partition(logits)
        loss[name] = {
            "info_nce": contrastive.info_nce(logits, partition).mean().item(),
            "penalty": contrastive.partition_penalty(partition, size).mean().item(),
            "binary_nce": contrastive.binary_nce(logits).mean().item(),
        }
    assert loss["shifted"]["info_nce"] == pytest.approx(loss["ratio"]["info_nce"], abs=1e-9)
    assert loss["ratio"]["penalty"] < 0.01 < 1 < loss["shifted"]["penalty"]
    assert loss["shifted"]["binary_nce"] > loss["ratio"]["binary_nce"] + 0.1


@pytest.mark.parametrize(("name", "penalty"), [("binary_nce", 0.0), ("info_nce", 1.0), ("info_nce", 0.0)])
def test_the_log_ratio_is_the_optimum_that_descent_finds(name: str, penalty: float) -> None:
    """Population losses minimised over all tables f, from a start with c(s, a) in it: binary NCE, and InfoNCE with the
    penalty, come to rank actions as Q does; plain InfoNCE comes to rest with the c that it started with."""
    mdp = tabular.ring()
    ratio, weight, marginal = log_ratio(mdp)
    q = torch.from_numpy(mdp.occupancy())
    g = torch.Generator().manual_seed(1)
    table = (3 * torch.randn((*weight.shape, 1), generator=g, dtype=torch.float64)).repeat(1, 1, q.shape[2])
    table.requires_grad_()
    optimiser = torch.optim.LBFGS([table], lr=1, max_iter=400, history_size=30, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        if name == "binary_nce":
            softplus = torch.nn.functional.softplus
            rows = (q * softplus(-table) + marginal * softplus(table)).sum(-1)
        else:
            log_mean = (marginal.log() + table).logsumexp(-1)
            rows = log_mean - (q * table).sum(-1) + penalty * log_mean.square()
        loss = (weight * rows).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimiser.step(closure)
    found = table.detach()
    uniform = np.full(len(q), 1 / len(q))
    agree = share_of_best(q.numpy(), found.numpy(), uniform)
    if name == "info_nce" and penalty == 0:
        offset = found - ratio  # it learned the ratio, up to c(s, a)
        assert (offset - offset.mean(-1, keepdim=True)).abs().max() < 0.05
        assert offset.mean(-1).std() > 1
        assert agree < 0.6
    else:
        assert (found - ratio).abs().max() < 0.05
        assert agree > 0.95


# --- argmax_a f = argmax_a Q: trained critics


@pytest.mark.parametrize("loss", ["binary_nce", "info_nce"])
def test_a_trained_critic_ranks_actions_as_exact_q_does(loss: str, tmp_path: Path, capsys) -> None:
    mdp = tabular.ring()
    cvlctl.write_store(tmp_path / "ring.zarr", mdp.episodes(300, 120, seed=0), task="ring")
    critic = f"{{loss: {loss}, gamma: {mdp.gamma}, hidden: [64, 64], latent_dim: 16, learning_rate: 1e-3}}"
    text = f"stores: ['{tmp_path / 'ring.zarr'}'], out: '{tmp_path / 'run'}', steps: 1000, critic: {critic}, {FAST}"
    pretrain(write(tmp_path / "recipe.yaml", text, "pretrain"))
    num_states, num_actions = mdp.policy.shape
    pairs = np.repeat(mdp.states, num_actions, 0), np.tile(mdp.actions, (num_states, 1))
    f = cvlctl.load_critic(tmp_path / "run").log_ratio(*pairs, mdp.states).reshape(num_states, num_actions, -1)
    store = cvlctl.open_store(tmp_path / "ring.zarr")
    rows = np.delete(tabular.state_of(mdp, store.observations()), store.episode_ends() - 1)
    visits = np.bincount(rows, minlength=num_states) / len(rows)
    q = mdp.occupancy()
    chosen = np.take_along_axis(q, f.argmax(1)[:, None], axis=1)[:, 0]
    agree, kept = share_of_best(q, f, visits), float((visits[:, None] * chosen / q.max(1)).sum() / num_states)
    with capsys.disabled():
        print(f"\n  {loss}: the best action in {agree:.0%} of (state, goal), {kept:.1%} of its Q kept", end="")
    assert share_of_best(q, np.broadcast_to(mdp.policy[..., None], q.shape), visits) < 0.6  # whatever the goal
    assert agree > 0.8
    assert kept > 0.95


# --- LAEO with a single example is goal reaching


def test_laeo_with_one_example_is_goal_reaching(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Q that LAEO's own step hands to its actor, for one example, is e^f of that example as goal."""
    critic = occupancy.Config(loss="binary_nce", hidden=(32, 32), latent_dim=8)
    spec, seeds = Spec((4,), 2, 30), [0, 1]
    played = point_episode(np.random.default_rng(0))
    example = played.observations[7:8]
    data = tabular.data_of([cvlctl.Episode(played.observations, played.actions, np.zeros(30))], example)
    config = goal_conditioned.Config(critic=critic)
    state = goal_conditioned.init(config, spec, seeds, data)
    g = torch.Generator().manual_seed(0)
    observation, action = torch.randn((2, 9, 4), generator=g), torch.rand((2, 9, 2), generator=g) * 2 - 1
    psi = occupancy.bank_psi(critic, state, data.examples.expand(2, 1, 4))
    f = goal_conditioned.f(config, state, observation, action, psi)
    assert f.std() > 0.01

    handed: dict[str, Any] = {}
    monkeypatch.setattr(laeo.actors, "improve", lambda *arguments, **_: handed.update(q=arguments[3]) or {})
    for readout in ("posterior", "ratio"):
        own = laeo.Config(critic=critic, mode="frozen", readout=readout, num_examples=1)
        wanted = laeo.draws(own, spec, 9)
        indices, noise = samplers.draw(data, wanted, seeds, 0, 1)
        batch = samplers.gather(data, samplers.Indices(*(x[0] for x in indices)), wanted)
        laeo.step(own, state, batch, {name: value[0] for name, value in noise.items()})
        q = handed["q"](observation, action)
        log_q = q.logit() if readout == "posterior" else q.log() + f.amax(dim=-1, keepdim=True)
        assert torch.allclose(log_q, f, atol=1e-5), readout
    logits = occupancy.phi(critic, state, observation, action) @ psi.mT
    assert torch.equal(occupancy_q.log_q_examples(logits), logits.squeeze(-1))  # the mean of one, to the last bit


# --- policies


def point_episode(rng: np.random.Generator, length: int = 30) -> cvlctl.Episode:
    """A point (2) that moves by its action; two columns state a goal drawn for the episode, and nobody follows it."""
    actions = rng.uniform(-1, 1, size=(length, 2)).astype(np.float32)
    start = rng.uniform(-1, 1, size=(1, 2))
    position = np.clip(np.cumsum(np.concatenate([start, 0.3 * actions]), axis=0), -3, 3)
    goal = np.broadcast_to(rng.uniform(-2, 2, size=2), position.shape)
    return cvlctl.Episode(np.concatenate([position, goal], axis=1), actions)


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("points") / "store.zarr"
    rng = np.random.default_rng(0)
    cvlctl.write_store(path, [point_episode(rng) for _ in range(200)], task="point")
    return path


def distances(policy: NumpyPolicy, steps: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Distances from 64 random goals before and after `steps` of the point."""
    rng = np.random.default_rng(9)
    position, goal = rng.uniform(-1, 1, (64, 2)), rng.uniform(-1.5, 1.5, (64, 2))
    elsewhere = np.zeros((64, 2))  # what the environment itself commands is of no concern
    before = np.linalg.norm(position - goal, axis=1)
    for _ in range(steps):
        observations = np.concatenate([position, elsewhere], axis=1).astype(np.float32)
        seen = [policy.command(o, np.array([*g, 0, 0])) for o, g in zip(observations, goal, strict=True)]
        position = np.clip(position + 0.3 * policy(np.stack(seen)), -3, 3)
    return before, np.linalg.norm(position - goal, axis=1)


COLUMNS = {"beside": "future_columns: [0, 1]", "commanded": "future_columns: [0, 1], command_columns: [2, 3]"}


@pytest.mark.parametrize("how", COLUMNS)
def test_a_policy_arrives_at_goals(how: str, points: Path, tmp_path: Path) -> None:
    critic = f"{{gamma: 0.8, hidden: [64, 64], latent_dim: 16, learning_rate: 1e-3, {COLUMNS[how]}}}"
    algorithm = f"{{name: goal_conditioned, hidden: [64, 64], learning_rate: 1e-3, critic: {critic}}}"
    text = f"stores: ['{points}'], out: '{tmp_path / 'run'}', steps: 350, algorithm: {algorithm}, {FAST}"
    finetune(write(tmp_path / "recipe.yaml", text, "finetune"))
    policy = load_policy(tmp_path / "run")
    assert policy.needs_goal == (how == "beside")
    assert policy.spec.observation_shape == (4,)
    before, after = distances(policy)
    assert before.mean() > 1.0
    assert after.mean() < 0.35
    assert (after < before).mean() > 0.85


def test_neither_encoder_sees_the_command_and_psi_sees_the_goal_alone(points: Path, tmp_path: Path) -> None:
    critic = f"{{hidden: [16], latent_dim: 4, {COLUMNS['commanded']}}}"
    text = f"stores: ['{points}'], out: '{tmp_path / 'run'}', steps: 5, critic: {critic}, {FAST}"
    pretrain(write(tmp_path / "recipe.yaml", text, "pretrain"))
    critic = cvlctl.load_critic(tmp_path / "run")
    x, a = np.ones((3, 4), np.float32), np.zeros((3, 2), np.float32)
    other = x.copy()
    other[:, 2:] = -5
    assert np.array_equal(critic.log_ratio(x, a, x), critic.log_ratio(other, a, other))
    other[:, 0] = 0
    assert not np.array_equal(critic.log_ratio(x, a, x), critic.log_ratio(other, a, x))
    assert not np.array_equal(critic.log_ratio(x, a, x), critic.log_ratio(x, a, other))
    # a policy on this critic takes its columns over
    algorithm = "{name: goal_conditioned, mode: frozen, hidden: [16]}"
    text = f"stores: ['{points}'], out: '{tmp_path / 'policy'}', steps: 5, algorithm: {algorithm}, {FAST}, "
    finetune(write(tmp_path / "policy.yaml", text + f"init_from: '{tmp_path / 'run'}'", "finetune"))
    policy = load_policy(tmp_path / "policy")
    assert policy.goals == ((0, 1), (2, 3))
    assert np.array_equal(policy.command(x, np.array([7, 8, 0, 0])), [[1, 1, 7, 8]] * 3)
    state, _ = checkpoints.load(tmp_path / "policy" / "checkpoints" / "last.safetensors")
    assert torch.equal(state["observation_mean"][:, 2:], state["observation_mean"][:, :2])
    assert torch.equal(state["observation_std"][:, 2:], state["observation_std"][:, :2])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("future_columns: []", "future_columns must not be empty"),
        ("future_columns: [-1]", "future_columns must be different numbers at or above 0"),
        ("future_columns: [0, 1], command_columns: [2]", "give as many of these"),
        ("command_columns: [2]", "give as many of these"),
        ("future_columns: [0, 1], command_columns: [1, 2]", "must not share a column"),
        ("future_columns: [0, 4]", "observations have 4 columns"),
        ("future_columns: [0], command_columns: [9]", "observations have 4 columns"),
    ],
)
def test_columns_that_make_no_sense_are_told(columns: str, message: str, points: Path, tmp_path: Path) -> None:
    text = f"stores: ['{points}'], out: '{tmp_path / 'run'}', steps: 1, critic: {{{columns}}}, {FAST}"
    with pytest.raises(CvlctlError, match=message):
        pretrain(write(tmp_path / "recipe.yaml", text, "pretrain"))


def test_cloning_needs_pairs_with_their_own_goals() -> None:
    with pytest.raises(ValueError, match="random_goals"):
        goal_conditioned.Config(random_goals=1.0)


# --- evaluation


@pytest.fixture(scope="module")
def fetch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of random FetchReach episodes, and policies of few updates with and without a command."""
    folder = tmp_path_factory.mktemp("fetch")
    env = envs.make("gym/FetchReach-v4", 0)
    played = [collect_episode(env, RandomPolicy(env.spec, 0, i), i) for i in range(40)]
    cvlctl.write_store(folder / "store.zarr", played, task=env.task)
    for name, command in (("commanded", ", command_columns: [10, 11, 12]"), ("beside", "")):
        critic = "gamma: 0.9, hidden: [64, 64], latent_dim: 16, learning_rate: 2e-3, future_columns: [0, 1, 2]"
        algorithm = f"{{name: goal_conditioned, hidden: [64, 64], learning_rate: 2e-3, critic: {{{critic}{command}}}}}"
        text = f"stores: [{{path: '{folder / 'store.zarr'}', rewards: none}}], out: '{folder / name}', steps: 300, "
        finetune(write(folder / f"{name}.yaml", text + f"algorithm: {algorithm}, {FAST}", "finetune"))
    return folder


def test_random_actions_teach_fetch_to_reach_commanded_goals(fetch: Path, tmp_path: Path) -> None:
    text = f"runs: ['{fetch / 'commanded'}'], episodes: 10, workers: 0, out: '{tmp_path / 'scores'}'"
    result = evaluate(write(tmp_path / "recipe.yaml", text, "evaluate"))
    (row,) = result["table"]
    assert row["success_mean"] >= 0.7  # random actions: 0.16
    assert row["return_mean"] > -25


def test_goals_from_a_store(fetch: Path, tmp_path: Path) -> None:
    """Both kinds of policy are sent to states of the store; workers, this process and lock-step agree on the rows."""
    goals = f"{{from: '{fetch / 'store.zarr'}', num: 6, within: 0.05}}"
    text = f"runs: ['{fetch}/*'], episodes: 4, out: '{tmp_path / 'scores'}', goals: {goals}"
    recipe = write(tmp_path / "recipe.yaml", text, "evaluate")
    result = evaluate(recipe)
    assert {row["algorithm"]: row["success_mean"] >= 0.75 for row in result["table"]} == {
        "goal_conditioned/beside": True,
        "goal_conditioned/commanded": True,
    }
    assert evaluate(recipe)["status"] == "finished already"
    states = np.load(tmp_path / "scores" / "goals.npy")
    assert states.shape == (6, 13)
    use = GoalUse(tmp_path / "scores" / "goals.npy", within=0.05)
    jobs = [PolicyJob(name, "gym/FetchReach-v4", 0, 300, fetch / name, goals=use) for name in ("beside", "commanded")]
    here = run_episodes(jobs, episodes=2, workers=0)
    assert here == run_episodes(jobs, episodes=2, workers=2)
    lockstep = run_lockstep(jobs, episodes=2, device="cpu", workers=2)
    assert [row.success for row in lockstep] == [row.success for row in here]
    # by hand: the policy was sent to state 1 in episode 1, and came within 5 cm or not
    policy, env = load_policy(fetch / "beside"), envs.make("gym/FetchReach-v4", 1_000_003)
    observation, near = env.reset(1), False
    for _ in range(50):
        observation, *_ = env.step(policy(np.concatenate([observation, states[1, :3]])))
        near = near or bool(np.linalg.norm(observation[:3] - states[1, :3]) < 0.05)
    assert here[1].success == near


def test_goals_that_are_missing_or_do_not_fit_are_told(fetch: Path, points: Path, tmp_path: Path) -> None:
    def play(goals: str, name: str = "beside") -> None:
        text = f"runs: ['{fetch / name}'], episodes: 1, workers: 0, out: '{tmp_path / 'scores'}'{goals}"
        evaluate(write(tmp_path / "recipe.yaml", text, "evaluate"), force=True)

    with pytest.raises(CvlctlError, match=r"sees the observation and a goal beside it, and no goal is given\n.*goals"):
        play("")
    with pytest.raises(CvlctlError, match=r"goals\.from: .*shape \(\d+, 4\); expected \(X, 13\)"):
        play(f", goals: {{from: '{points}'}}")
    with pytest.raises(CvlctlError, match=r"goals\.file: no file at .*nowhere\.npy"):
        play(f", goals: {{file: '{tmp_path / 'nowhere.npy'}'}}")
    with pytest.raises(CvlctlError, match=r"goals\.columns: \[13\] of states with 13 columns"):
        play(f", goals: {{from: '{fetch / 'store.zarr'}', columns: [0, 13], within: 0.1}}")
    goals = f", goals: {{from: '{fetch / 'store.zarr'}'}}"
    play(goals)
    text = f"runs: ['{fetch / 'beside'}'], episodes: 1, workers: 0, out: '{tmp_path / 'scores'}'"
    with pytest.raises(CvlctlError, match="holds another evaluation: goals was"):
        evaluate(write(tmp_path / "recipe.yaml", text + goals.replace("'}", "', num: 3}"), "evaluate"))


def test_a_policy_without_goals_is_judged_by_columns_that_the_recipe_names(fetch: Path, tmp_path: Path) -> None:
    text = f"stores: ['{fetch / 'store.zarr'}'], out: '{tmp_path / 'bc'}', steps: 5, algorithm: bc, {FAST}"
    finetune(write(tmp_path / "bc.yaml", text, "finetune"))

    def play(columns: str) -> Any:
        goals = f"{{from: '{fetch / 'store.zarr'}', within: 9{columns}}}"
        text = f"runs: ['{tmp_path / 'bc'}'], episodes: 1, workers: 0, out: '{tmp_path / 'scores'}', goals: {goals}"
        return evaluate(write(tmp_path / "recipe.yaml", text, "evaluate"), force=True)

    with pytest.raises(CvlctlError, match=r"goals\.within: bc has no goals.*\n.*goals\.columns"):
        play("")
    assert play(", columns: [0, 1, 2]")["table"][0]["success_mean"] == 1.0  # within nine metres


def test_damaged_goal_columns_are_one_clear_error(fetch: Path, tmp_path: Path) -> None:
    state, metadata = checkpoints.load(fetch / "beside" / "checkpoints" / "last.safetensors")
    for bad in ([99], ["x"], 7):
        critic = {**metadata["critic"], "future_columns": bad}
        checkpoints.save(tmp_path / "bad.safetensors", state, {**metadata, "critic": critic})
        with pytest.raises(CvlctlError, match=r"bad\.safetensors"):
            load_policy(tmp_path / "bad.safetensors")
