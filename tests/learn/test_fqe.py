"""Fitted Q evaluation: against exact values, from a finished run, and beside the scores of an evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tabular
import torch

import cvlctl
from cvlctl import checkpoints
from cvlctl.data import samplers
from cvlctl.data.load import join, open_stores
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import batches
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, fqe
from cvlctl.learn.finetune import finetune
from cvlctl.learn.networks import State
from cvlctl.learn.pretrain import pretrain
from cvlctl.learn.updates import adam_init, adam_update, value_and_grad
from cvlctl.play.rollout import PolicyJob, result_row
from cvlctl.runs import read_metrics, read_run
from cvlctl.score.evaluate import as_text, evaluate
from cvlctl.score.rows import parse_row, read_rows, write_rows
from cvlctl.score.tables import OfflineEstimate, offline_table
from cvlctl.types import Spec

PENDULUM = "gym/Pendulum-v1"


def actor_of(state: State, observation: torch.Tensor, action: torch.Tensor) -> State:
    """An actor whose greedy actions (E, S, A) in `observation` (E, S, O), not normalised, are `action`."""
    state = dict(state)
    names = [name for name in state if name.startswith("actor.")]
    state |= adam_init(state, "fit", names)

    def loss(params: State) -> tuple[torch.Tensor, State]:
        found = actors.greedy(params, networks.normalise(state, observation))
        return (found - action).square().sum(), {}

    for _ in range(400):
        adam_update(state, "fit", value_and_grad(loss, state, names)[0], 1e-2)
    assert (actors.greedy(state, networks.normalise(state, observation)) - action).abs().max() < 0.1
    return {name: state[name] for name in names}


@pytest.mark.parametrize("make", [pytest.param(tabular.grid_dense, marks=pytest.mark.slow), tabular.cliff])
def test_the_estimate_is_the_frozen_policys_exact_value(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The best policy, the behaviour policy's most likely actions, and the worst policy, side by side."""
    torch.set_num_threads(1)
    mdp = make()
    data = tabular.data_of(mdp.episodes(400, 60, seed=0))
    q = mdp.optimal_q()
    actions = [q.argmax(1), mdp.policy.argmax(1), q.argmin(1)]
    config = fqe.Config(
        mdp.gamma, ema_rate=0.05, num_initial=100, hidden=(64, 64), policy_hidden=(64,), learning_rate=1e-3
    )
    spec = Spec((8,), 2, 60)
    state = fqe.init(config, spec, [0, 1, 2], data)
    wanted = torch.from_numpy(np.stack([0.97 * mdp.actions[a] for a in actions]))
    state |= actor_of(state, torch.from_numpy(mdp.states).expand(3, -1, -1), wanted)
    frozen = {name: value.clone() for name, value in state.items() if name.startswith(("actor.", "observation_"))}
    draws, metrics = fqe.draws(config, spec, 128), {}
    with torch.no_grad():
        for _, (indices, noise) in batches(data, draws, [0, 1, 2], 0, 1500):
            state, metrics = fqe.step(config, state, samplers.gather(data, indices, draws), noise)
    assert all(torch.equal(state[name], value) for name, value in frozen.items())

    starts = tabular.state_of(mdp, state["initial_observation"][0].numpy())
    exact = [mdp.value(np.eye(q.shape[1])[a])[starts].mean() for a in actions]
    estimate = metrics["estimate"].numpy()
    with capsys.disabled():
        print(f"\n  {mdp.name}: estimates {estimate.round(2)}, exact {np.round(exact, 2)}", end="")
    assert exact[0] > exact[1] > exact[2]
    assert estimate == pytest.approx(exact, abs=0.03 * exact[0])
    assert estimate[0] > estimate[1] > estimate[2]


def test_initial_observations_are_the_first_of_labelled_episodes() -> None:
    mdp = tabular.ring()
    data = tabular.data_of(mdp.episodes(6, 5, seed=0))
    firsts = data.observation[::6]
    assert torch.equal(fqe.initial_observations(data, 10), firsts)
    two = fqe.initial_observations(data, 2)
    places = [int((firsts == row).all(1).nonzero()[0]) for row in two]
    assert len(two) == 2 and places == sorted(places)
    last_three = data._replace(labelled=data.labelled[15:])
    assert torch.equal(fqe.initial_observations(last_three, 10), firsts[3:])


def test_one_step_by_hand() -> None:
    """Twins bootstrap apart, in units of value_scale, and stop where an episode terminates."""
    mdp = tabular.ring()
    data = tabular.data_of(mdp.episodes(4, 5, seed=0))
    config = fqe.Config(gamma=0.5, ema_rate=1.0, hidden=(4,), policy_hidden=(4,))
    state = fqe.init(config, Spec((8,), 2, 5), [0], data)
    for name, value in state.items():
        if name.startswith(("critic.", "target/critic.")):
            value.zero_()
    state["target/critic.1.bias"] = torch.tensor([2.0, 6.0]).view(1, 2, 1, 1)
    state["value_scale"] = torch.tensor([[4.0]])
    batch = cvlctl.types.TransitionBatch(
        torch.zeros(1, 2, 8), torch.zeros(1, 2, 2), reward=torch.tensor([[8.0, 4.0]]),
        discount=torch.tensor([[0.5, 0.0]]), next_observation=torch.zeros(1, 2, 8),
    )  # fmt: skip
    assert fqe.estimate(state).tolist() == [16.0]  # 4 (2 + 6) / 2
    _, metrics = fqe.step(config, state, batch, {})
    # targets: 8/4 + .5 (2, 6) = (3, 5) and 4/4 = 1; errors (9 + 1)/2/2 + (25 + 1)/2/2
    assert metrics["critic/td"].item() == pytest.approx(2.5 + 6.5)
    # ema_rate 1: the target is the critic, each bias one Adam step up
    assert metrics["estimate"].item() == pytest.approx(4 * 3e-4, rel=1e-2)


# --- as a run


def episodes(num: int = 8, length: int = 20) -> list[cvlctl.Episode]:
    rng = np.random.default_rng(0)
    return [
        cvlctl.Episode(
            rng.normal(size=(length + 1, 3)), rng.uniform(-1, 1, (length, 1)), rng.uniform(0, 1, length)
        )
        for _ in range(num)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "pendulum.zarr"
    cvlctl.write_store(path, episodes(), task=PENDULUM)
    return path


def run(store: Path, out: Path, algorithm: str, *overrides: str, **more: Any) -> dict[str, Any]:
    text = {"steps": 30, "batch_size": 16, "compile": "false", "threads": 1, "log_every_steps": 10, **more}
    lines = [f"stores: ['{store}']", f"out: '{out}'", f"algorithm: {algorithm}"]
    path = out.with_name(f"{out.name}.yaml")
    path.write_text("\n".join(lines + [f"{key}: {value}" for key, value in text.items()]))
    return finetune(load(path, list(overrides), "finetune"))


def state_of(out: Path) -> State:
    return checkpoints.load(out / "checkpoints" / "last.safetensors")[0]


FQE = "{name: fqe, hidden: [32], gamma: 0.9}"


@pytest.fixture(scope="module")
def policy(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hidden layers: another depth than the evaluation's own default for the critic here."""
    out = tmp_path_factory.mktemp("policy") / "bc"
    run(store, out, "{name: bc, hidden: [16, 8]}", seeds=[0, 1, 2])
    return out


def test_a_run_evaluates_the_policy_of_its_seed_and_leaves_it_alone(policy: Path, store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "fqe", FQE, init_from=policy, seeds=[2, 0])
    before, after = state_of(policy), state_of(tmp_path / "fqe")
    names = [name for name in before if name.startswith(("actor.", "observation_"))]
    assert len(names) == 8
    assert all(torch.equal(after[name], before[name][[2, 0]]) for name in names)
    assert {name for name in after if name.startswith("actor.")} < set(names)
    observation = np.ones((4, 3), np.float32)
    ours, theirs = (cvlctl.load_policy(run, seed=2)(observation) for run in (tmp_path / "fqe", policy))
    assert np.array_equal(ours, theirs)
    metrics, record = read_metrics(tmp_path / "fqe"), read_run(tmp_path / "fqe")
    assert [line["step"] for line in metrics] == [10, 20, 30]
    assert len(metrics[-1]["estimate"]) == 2
    assert record["metrics"]["estimate"] == metrics[-1]["estimate"]
    assert record["inputs"].keys() >= {f"init_from:{policy}"}


def test_another_policy_is_another_run(policy: Path, store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "fqe", FQE, init_from=policy)
    run(store, tmp_path / "bc", "{name: bc, hidden: [16, 8]}", steps=31)
    with pytest.raises(CvlctlError, match="holds another run: init_from"):
        run(store, tmp_path / "fqe", FQE, init_from=tmp_path / "bc")


def test_a_seed_is_evaluated_alike_alone_and_in_company(policy: Path, store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "alone", FQE, init_from=policy, seeds=[1], steps=100)
    run(store, tmp_path / "together", FQE, init_from=policy, seeds=[0, 1], steps=100)
    alone, together = state_of(tmp_path / "alone"), state_of(tmp_path / "together")
    assert alone.keys() == together.keys()
    assert all((value[0] - together[key][1]).abs().max() < 1e-5 for key, value in alone.items() if value.dim())
    estimates = read_metrics(tmp_path / "together")[-1]["estimate"]
    assert abs(estimates[0] - estimates[1]) > 1e-3


def test_a_resumed_run_ends_with_the_same_bits(policy: Path, store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run(store, tmp_path / "whole", FQE, init_from=policy)
    save = checkpoints.save

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        save(path, state, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(store, tmp_path / "cut", FQE, "checkpoint_seconds=1e-9", init_from=policy)
    monkeypatch.setattr(checkpoints, "save", save)
    assert run(store, tmp_path / "cut", FQE, "checkpoint_seconds=1e-9", init_from=policy)["status"] == "trained"
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


def test_what_cannot_be_evaluated_is_said(policy: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match=r"fqe evaluates a finished policy, and needs init_from"):
        run(store, tmp_path / "fqe", FQE)
    with pytest.raises(CvlctlError, match=r"init_from: .*has no seed 7\n.*0, 1, 2"):
        run(store, tmp_path / "fqe", FQE, init_from=policy, seeds=[7])
    with pytest.raises(CvlctlError, match=r"init_from: no run or checkpoint at"):
        run(store, tmp_path / "fqe", FQE, init_from=tmp_path / "nowhere")
    recipe = tmp_path / "pre.yaml"
    recipe.write_text(f"{{stores: ['{store}'], out: '{tmp_path / 'pre'}', steps: 1, compile: false, threads: 1}}")
    pretrain(load(recipe, [], "pretrain"))
    with pytest.raises(CvlctlError, match=r"init_from: .*holds no actor"):
        run(store, tmp_path / "fqe", FQE, init_from=tmp_path / "pre")
    other = tmp_path / "other.zarr"
    cvlctl.write_store(other, [dataclasses.replace(e, actions=np.tile(e.actions, 2)) for e in episodes(1)], task="x")
    with pytest.raises(CvlctlError, match=r"init_from: .*1 action dimensions; the stores here have \(3,\) and 2"):
        run(other, tmp_path / "fqe", FQE, init_from=policy)
    assert not (tmp_path / "fqe").exists()


def test_the_step_is_one_graph(policy: Path, store: Path) -> None:
    """Compiled as a whole, without a break, it does what it does eager."""
    use = StoreUse(path=store)
    data = join(open_stores([use]), [use], None, True)
    config, spec = fqe.Config(hidden=(16,), policy_hidden=(16,)), cvlctl.open_store(store).spec
    draws = fqe.draws(config, spec, 16)
    indices, noise = samplers.draw(data, draws, [0, 1], 0, 1)
    batch = samplers.gather(data, samplers.Indices(*(x[0] for x in indices)), draws)
    step = torch.compile(lambda s, b: fqe.step(config, s, b, {}), fullgraph=True, backend="eager")
    with torch.no_grad():
        _, compiled = step(fqe.init(config, spec, [0, 1], data), batch)
        _, eager = fqe.step(config, fqe.init(config, spec, [0, 1], data), batch, noise)
    for name, value in eager.items():
        assert torch.allclose(value, compiled[name], atol=1e-5), name


# --- beside the scores


def test_the_discounted_return_of_an_episode() -> None:
    job = PolicyJob("fqe", PENDULUM, 0, 1, Path("x"), gamma=0.5)
    assert result_row(job, 0, [1.0, 2.0, 4.0], [None] * 3).discounted_return == 1 + 1 + 1
    assert result_row(dataclasses.replace(job, gamma=None), 0, [1.0], [None]).discounted_return is None


def test_rows_with_and_without_a_discounted_return(tmp_path: Path) -> None:
    row = cvlctl.types.EpisodeResult("fqe", "t", 0, 1, 0, 3.0, 2, None, 2.5)
    write_rows(tmp_path / "rows.jsonl", [row, dataclasses.replace(row, discounted_return=None)])
    assert [r.discounted_return for r in read_rows(tmp_path / "rows.jsonl")] == [2.5, None]
    line = (tmp_path / "rows.jsonl").read_text().splitlines()[0]
    assert parse_row(line.replace(', "discounted_return": 2.5', "").encode()).discounted_return is None


def test_offline_table_averages_over_seeds() -> None:
    rows = [
        cvlctl.types.EpisodeResult(name, "t", seed, 1, i, 0.0, 2, None, 10.0 * seed + i)
        for name in ("fqe", "partly") for seed in (0, 1) for i in (0, 1)
    ]  # fmt: skip
    estimates = {("fqe", "t", seed): OfflineEstimate(3.0 + seed, 0.9) for seed in (0, 1)}
    estimates["partly", "t", 0] = OfflineEstimate(1.0, 0.9)
    (record,) = offline_table(rows, estimates)
    assert (record["algorithm"], record["runs"], record["episodes"], record["gamma"]) == ("fqe", 2, 4, 0.9)
    assert (record["offline_mean"], record["offline_runs"]) == (3.5, [3.0, 4.0])
    assert (record["discounted_mean"], record["discounted_runs"]) == (5.5, [0.5, 10.5])
    assert record["offline_mean_low"] < 3.5 < record["offline_mean_high"]


def test_evaluation_prints_the_estimate_beside_the_online_score(policy: Path, store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "fqe", FQE, init_from=policy, seeds=[0, 1])
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text(
        f"{{runs: ['{tmp_path / 'fqe'}', '{policy}'], episodes: 1, workers: 0, out: '{tmp_path / 'scores'}'}}"
    )
    result = evaluate(load(recipe, [], "evaluate"))
    (record,) = result["offline"]
    assert record["offline_runs"] == read_run(tmp_path / "fqe")["metrics"]["estimate"]
    rows = read_rows(tmp_path / "scores" / "rows.jsonl")
    of_fqe, of_bc = ([row for row in rows if row.algorithm == name] for name in ("fqe", "bc"))
    assert record["discounted_runs"] == [row.discounted_return for row in of_fqe]
    assert all(row.discounted_return is None for row in of_bc)
    # the same policies: the same episodes
    assert [row.episode_return for row in of_fqe] == [row.episode_return for row in of_bc[:2]]
    assert all(-170 < row.discounted_return < 0 and row.episode_return < row.discounted_return for row in of_fqe)
    text = as_text(result, "markdown")
    assert "| task | algorithm | seeds | episodes | offline estimate | discounted return |" in text
    assert "(gamma 0.9)" in text
    assert evaluate(load(recipe, [], "evaluate"))["offline"] == result["offline"]
