"""`cvlctl explain`: what it answers, what it says of gaps, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_runs
from toy_stores import moving_point

import cvlctl
from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.errors import CvlctlError
from cvlctl.learn import attribution, loop
from cvlctl.play import envs
from cvlctl.play.rollout import collect_episode
from cvlctl.score.explain import explain, map_q
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")


def point_episodes(count: int, seed: int, task: str = "") -> list[Episode]:
    """Of a moving point; every third one ends for good."""
    return [
        Episode(e.observations, e.actions, e.rewards, e.successes, i % 3 == 2, task, 1000 * i, seed)
        for i, e in enumerate(moving_point(count, 20, seed))
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, no_fsync: None) -> Callable[..., Path]:
    """Tiny runs by method, on a store of six episodes; each is trained once, and nobody changes it."""
    folder = tmp_path_factory.mktemp("runs")
    store = cvlctl.write_store(folder / "point.zarr", point_episodes(6, 0), task="point").path

    def run(name: str, *overrides: str) -> Path:
        out = folder / "-".join([name, *overrides]).replace("/", "_")
        if not out.exists():
            toy_runs.run(name, store, out, "steps=3", "seeds=[4, 7]", *overrides)
        return out

    return run


def copy(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of its own and its store, to be spoilt: paths in its record are rewritten."""
    store, out = tmp_path / "own.zarr", tmp_path / "run"
    shutil.copytree(run.parent / "point.zarr", store)
    shutil.copytree(run, out)
    text = (out / "run.json").read_text().replace(str(run.parent / "point.zarr"), str(store))
    (out / "run.json").write_text(text)
    return out, store


def test_shares_of_all_states_make_up_q(runs) -> None:
    run = runs("cvl")
    answers = explain(run, episode=1, steps=[0, 7, -1], top="all")
    assert [(one["step"], one["action"]) for one in answers] == [
        (step, action) for step in (0, 7, 19) for action in ("policy", "logged", "rejected")
    ]
    store, gamma = cvlctl.open_store(run.parent / "point.zarr"), cvlctl.load_critic(run, seed=4).gamma
    episodes = list(store.episodes())
    for one in answers:
        weights = np.array([state["weight"] for state in one["states"]])
        assert (np.diff(weights) <= 0).all()
        assert weights.sum() + one["absorbed"] == pytest.approx(1)
        assert one["absorbed"] > 0
        paid = sum(state["weight"] * state["reward"] for state in one["states"])
        assert one["q"] == pytest.approx(paid / (1 - gamma))
        assert len(one["states"]) == 6 * 20
        for state in one["states"][::17]:
            assert state["store"] == str(store.path)
            assert episodes[state["episode"]].rewards[state["time"] - 1] == pytest.approx(state["reward"])
        for group in ("episodes", "tasks", "collected"):
            for key in ("weight", "of_data"):
                assert sum(part[key] for part in one[group]) == pytest.approx(1)
        rest = one["episodes"][0]
        kept = [s for s in one["states"] if s["episode"] != rest["episode"]]
        left = sum(s["weight"] * s["reward"] for s in kept) / (1 - rest["weight"]) / (1 - gamma)
        assert rest["q_without"] == pytest.approx(left)
    policy, logged = answers[3], answers[4]
    np.testing.assert_array_equal(logged["values"], episodes[1].actions[7])
    np.testing.assert_allclose(
        policy["values"], cvlctl.load_policy(run, seed=4)(episodes[1].observations[7]), rtol=1e-6
    )


def test_the_rejected_action_is_the_worst_of_those_that_were_tried(runs) -> None:
    run = runs("cvl")
    rejected = explain(run, steps=[5])[2]
    store, critic = cvlctl.open_store(run.parent / "point.zarr"), cvlctl.load_critic(run, seed=4)
    futures, rewards = store.futures(20_000, critic.gamma, seed=0)
    observation = next(store.episodes()).observations[5]
    tried = np.random.default_rng(1).uniform(-1, 1, (200, 2)).astype(np.float32)
    q = critic.q(np.repeat(observation[None], 201, axis=0), np.vstack([rejected["values"], tried]), futures, rewards)
    assert (q[0] > q[1:]).mean() < 0.1
    assert q[0] == pytest.approx(rejected["q"], rel=0.05)
    assert explain(run, steps=[5])[2] == rejected


def test_laeo_names_the_success_examples(runs) -> None:
    run = runs("laeo")
    answers = explain(run, steps=[3], top="all")
    episodes = list(cvlctl.open_store(run.parent / "point.zarr").episodes())
    critic = cvlctl.load_critic(run, seed=4)
    for one in answers:
        states = one["states"]
        assert sum(state["weight"] for state in states) == pytest.approx(1)
        assert all(episodes[state["episode"]].successes[state["time"] - 1] for state in states)
        assert {state["reward"] for state in states} == {None}
        examples = np.stack([episodes[state["episode"]].observations[state["time"]] for state in states])
        pair = episodes[0].observations[3:4], np.array([one["values"]], dtype=np.float32)
        ratio = np.exp(critic.log_ratio(*pair, examples)[0].astype(np.float64))
        assert one["q"] == pytest.approx(ratio.mean(), rel=1e-5)
        np.testing.assert_allclose([state["weight"] for state in states], ratio / ratio.sum(), rtol=1e-5)
    assert any("not of the posterior" in note for note in answers[0]["notes"])


def test_examples_of_a_file_are_its_rows(runs, tmp_path: Path) -> None:
    store = runs("cvl").parent / "point.zarr"
    np.save(tmp_path / "good.npy", cvlctl.open_store(store).observations()[:9])
    examples = f"success_examples={{file: {tmp_path / 'good.npy'}}}"
    toy_runs.run("laeo", store, tmp_path / "run", "steps=2", examples)
    answers = explain(tmp_path / "run", steps=[0], top="all")
    assert sorted(state["time"] for state in answers[0]["states"]) == list(range(9))
    assert {(s["store"], s["episode"]) for s in answers[0]["states"]} == {(str(tmp_path / "good.npy"), None)}
    np.save(tmp_path / "good.npy", np.zeros((9, 4), dtype=np.float32))
    with pytest.raises(CvlctlError, match=r"is not what .* was trained on"):
        explain(tmp_path / "run")


def test_several_stores_and_tasks_by_the_law_that_the_run_learned_from(runs, tmp_path: Path) -> None:
    a = cvlctl.write_store(tmp_path / "a.zarr", point_episodes(4, 1, "near"), task="both").path
    b = cvlctl.write_store(tmp_path / "b.zarr", point_episodes(6, 2, "far"), task="both").path
    stores = f"stores=[{{path: {a}, fraction: 0.5}}, {{path: {b}, top: 0.5}}]"
    toy_runs.run("cvl", a, tmp_path / "run", "steps=2", stores)
    (one, *_) = explain(tmp_path / "run", episode=2, steps=[0], store=b, top="all")
    assert {task["task"]: task["of_data"] for task in one["tasks"]} == {"near": 0.4, "far": pytest.approx(0.6)}
    counted = {(Path(state["store"]).name, state["episode"]) for state in one["states"]}
    returns = [episode.rewards.sum() for episode in cvlctl.open_store(b).episodes()]
    best = {("b.zarr", int(i)) for i in np.argsort(returns)[3:]}
    assert {place for place in counted if place[0] == "b.zarr"} == best
    assert len(counted) == 5


@pytest.mark.parametrize(
    ("name", "overrides", "note"),
    [
        ("cvl-fourier", (), "readout: fourier: shown is the exact Q"),
        ("cvl", ("algorithm.normaliser=none",), "normaliser: none: weights are shares of mean e"),
        ("occupancy", (), "the policy's action is not shown"),
        ("occupancy", (), "trained without rewards: Q is of label 'given'"),
        ("goal_conditioned", (), "the policy's action is not shown"),
        ("goal_conditioned-command", (), "psi sees columns 0, 1 of a state"),
    ],
)
def test_what_is_shown_and_what_is_not_is_said(name: str, overrides: tuple[str, ...], note: str, runs) -> None:
    answers = explain(runs(name, *overrides), steps=[2])
    assert any(note in one for one in answers[0]["notes"])
    assert ("policy" in {one["action"] for one in answers}) == (
        name in ("cvl", "cvl-fourier", "goal_conditioned-command")
    )
    assert all(one["q"] is not None for one in answers)


def test_a_critic_of_data_without_rewards_has_shares_and_no_q(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [Episode(e.observations, e.actions) for e in moving_point(3, 10)]
    store = cvlctl.write_store(tmp_path / "bare.zarr", bare, task="point").path
    toy_runs.run("occupancy", store, tmp_path / "run", "steps=2")
    (one,) = explain(tmp_path / "run", steps=[0])
    assert (one["action"], one["q"], one["states"][0]["reward"]) == ("logged", None, None)
    assert any("no rewards" in note for note in one["notes"])
    with pytest.raises(CvlctlError, match="no Q to draw"):
        map_q(tmp_path / "run", (0, 1))
    assert execute(app.app, ["explain", str(tmp_path / "run")]) == 0
    assert "the states that carry Q" in capsys.readouterr().out


def test_an_unfinished_run_is_shown_as_far_as_it_is(runs, tmp_path: Path) -> None:
    run, _ = copy(runs("cvl"), tmp_path)
    record = json.loads((run / "run.json").read_text())
    record["status"], record["recipe"]["steps"] = "started", 90
    (run / "run.json").write_text(json.dumps(record))
    assert any("not finished: shown is its critic at step 3 of 90" in x for x in explain(run)[0]["notes"])


@pytest.mark.parametrize("name", ["cvl", "occupancy"])
def test_episodes_that_were_held_out_of_training_are_left_out(name: str, runs, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []
    apart = loop._apart
    monkeypatch.setattr(loop, "_apart", lambda *given: [learned.append(x := apart(*given)), x][1])
    answers = explain(runs(name, "validation=0.4"), steps=[0], top="all")
    rows = learned[0][0].layout.row.numpy()
    assert {state["episode"] for state in answers[0]["states"]} == set((rows // 21).tolist())
    assert "validation: the 2 episodes" in " ".join(answers[0]["notes"])


def test_learned_rewards_are_those_that_the_run_learned(runs, tmp_path: Path) -> None:
    run = runs("cvl").parent / "point.zarr"
    learned = [f"stores=[{{path: {run}, rewards: oril}}]", f"success_examples={{from: {run}}}", "labeller.steps=2"]
    toy_runs.run("cvl", run, tmp_path / "run", "steps=2", "seeds=[0, 1]", *learned)
    kept = toy_runs.checkpoints.load(tmp_path / "run" / "labels.safetensors")[0]["reward"]
    (one, *_) = explain(tmp_path / "run", seed=1, steps=[0], top="all")
    for state in one["states"][::11]:
        assert state["reward"] == pytest.approx(float(kept[1, 21 * state["episode"] + state["time"]]))


def test_psi_is_computed_once_for_a_critic_and_its_data(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = copy(runs("cvl"), tmp_path)
    first = explain(run)
    with monkeypatch.context() as patch:
        patch.setattr(attribution, "psi_of", lambda *_: pytest.fail("computed again"))
        assert explain(run) == first
        assert map_q(run, (0, 1))["points"] == 120
    assert explain(run, seed=7) != first
    assert sorted(path.name for path in (run / "explain").glob("psi*")) == [
        "psi-4.json", "psi-4.npy", "psi-7.json", "psi-7.npy"
    ]  # fmt: skip


def test_pictures_are_written_and_nothing_is_replaced_unasked(runs, tmp_path: Path) -> None:
    run, _ = copy(runs("cvl"), tmp_path)
    target = tmp_path / "picture.png"
    explain(run, plot=target)
    map_q(run, (1, 0))
    assert target.read_bytes()[:4] == (run / "explain" / "map-1-0.png").read_bytes()[:4] == b"\x89PNG"
    target.write_bytes(b"mine")
    for draw in (lambda: explain(run, plot=target), lambda: map_q(run, (1, 0), plot=target)):
        with pytest.raises(CvlctlError, match="exists"):
            draw()
    explain(run, plot=target, force=True)
    assert target.read_bytes()[:4] == b"\x89PNG"


def test_an_episode_is_played_by_the_policy_as_evaluations_do(tmp_path: Path) -> None:
    env = envs.make("gym/Pendulum-v1", 0)
    rng = np.random.default_rng(0)
    data = [collect_episode(env, lambda *_: rng.uniform(-1, 1, 1), number) for number in range(2)]
    store = cvlctl.write_store(tmp_path / "swing.zarr", data, task=env.task).path
    toy_runs.run("cvl", store, tmp_path / "run", "steps=2")
    answers = explain(tmp_path / "run", play=True, episode=3, steps=[0, -1])
    assert [one["action"] for one in answers] == ["policy", "rejected"] * 2
    assert answers[2]["step"] == 199
    from cvlctl.play.rollout import EVALUATION_SEED

    start = envs.make(env.task, EVALUATION_SEED).reset(3)
    np.testing.assert_allclose(answers[0]["values"], cvlctl.load_policy(tmp_path / "run")(start), rtol=1e-5)
    assert any("episode 3 of gym/Pendulum-v1, played now: 200 steps" in note for note in answers[0]["notes"])


Spoilt = Callable[[Path, Path], Any]


def replaced(run: Path, store: Path) -> None:
    cvlctl.write_store(store, point_episodes(5, 3), task="point", force=True)


def relabelled(run: Path, store: Path) -> None:
    same = [Episode(e.observations, e.actions, 2 * e.rewards, e.successes, e.terminated, collected_at=e.collected_at)
            for e in point_episodes(6, 0)]  # fmt: skip
    cvlctl.write_store(store, same, task="point", force=True)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run, store: shutil.rmtree(store), "own.zarr"),
        (replaced, "is not what .* was trained on"),
        (relabelled, "own.zarr:given is not what .* was trained on"),
        (lambda run, store: (run / "run.json").unlink(), "is not a run"),
        (lambda run, store: (run / "checkpoints" / "last.safetensors").unlink(), "has no checkpoint"),
        (lambda run, store: (run / "run.json").write_text('{"status": "finished", "inputs": {}}'), "says of no stores"),
    ],
)
def test_a_run_whose_data_or_record_are_not_there_is_refused(spoil: Spoilt, told: str, runs, tmp_path: Path) -> None:
    run, store = copy(runs("cvl"), tmp_path)
    spoil(run, store)
    with pytest.raises(CvlctlError, match=told):
        explain(run)


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("bc", [], "has no occupancy critic"),
        ("td3_bc", [], "has no occupancy critic"),
        ("cvl", ["--episode", "6"], "episodes 0 to 5"),
        ("cvl", ["--episode", "-1"], "episodes 0 to 5"),
        ("cvl", ["--steps", "0,20"], "steps 0 to 19"),
        ("cvl", ["--steps", "a"], "--steps a is not a list of whole numbers"),
        ("cvl", ["--seed", "9"], "has no seed 9"),
        ("cvl", ["--checkpoint", "50"], "has no checkpoint"),
        ("cvl", ["--label", "mine"], "no label 'mine'"),
        ("laeo", ["--label", "given"], "learned from success examples"),
        ("cvl", ["--top", "0"], "top is 0"),
        ("cvl", ["--top", "1,2"], "--top 1,2 is no whole number"),
        ("cvl", ["--map", "0"], "is not two columns"),
        ("cvl", ["--map", "0,4"], "columns 0 to 3"),
        ("cvl", ["--play"], "is of 'point', which is no environment here"),
        ("occupancy", ["--play"], "has no policy that could be played"),
        ("cvl", ["--play", "--store", "x"], "both say which episode"),
        ("cvl", ["--store", "x.zarr"], "x.zarr"),
    ],
)
def test_what_cannot_be_answered_is_one_error(
    name: str, arguments: list[str], told: str, runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(name)
    capsys.readouterr()
    assert execute(app.app, ["explain", str(run), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("error: ")) == ("", 1)
    assert told in err.replace("\n", " ")


def test_of_another_robot_or_task(runs, tmp_path: Path) -> None:
    other = cvlctl.write_store(tmp_path / "other.zarr", moving_point(2, 8), task="elsewhere").path
    assert any("is of elsewhere, the run of point" in x for x in explain(runs("cvl"), store=other)[0]["notes"])
    wide = [Episode(np.zeros((4, 5)), np.zeros((3, 2)), np.zeros(3))]
    with pytest.raises(CvlctlError, match="knows"):
        explain(runs("cvl"), store=cvlctl.write_store(tmp_path / "wide.zarr", wide, task="point").path)


def test_the_command_prints_tables_and_json(runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs("cvl"))
    assert execute(app.app, ["explain", run, "--steps", "0,5"]) == 0
    text = capsys.readouterr().out
    for word in ("policy", "rejected", "absorbed", "Q without it", "of the data", "to 5,000"):
        assert word in text
    assert execute(app.app, ["explain", run, "--steps", "0", "--top", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == cvlctl.explain(run, steps=[0], top="all")
    assert execute(app.app, ["explain", run, "--map", "0,1"]) == 0
    assert capsys.readouterr().out.strip().endswith("explain/map-0-1.png")
