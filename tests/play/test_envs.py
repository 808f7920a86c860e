"""Environments: episodes are pure functions of (task, seed, episode), goals are seen, limits truncate, bounds scale."""

from __future__ import annotations

import pickle  # what Metaworld packs its own goals in
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch

from cvlctl.errors import CvlctlError
from cvlctl.play.envs import (
    ENVS,
    FETCH_TASKS,
    GYM_TASKS,
    METAWORLD_TASKS,
    NUM_GOALS,
    Env,
    check_task,
    goals,
    list_tasks,
    make,
    references,
    scripted_policy,
)
from cvlctl.play.policies import RandomPolicy

STEPS = 90  # enough for the scripted experts to be in contact with their objects


def play(env: Env, episode: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observations and rewards of an episode under fixed actions, up to its end."""
    observations, rewards = [env.reset(episode)], []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.array(observations), np.array(rewards)


def actions_for(env: Env, episode: int) -> np.ndarray:
    """An episode's worth of actions that touch things: the scripted expert's where there is one."""
    if not env.task.startswith("metaworld/"):
        steps = min(STEPS, env.spec.horizon)
        return np.stack([RandomPolicy(env.spec, 5, episode)(np.zeros(0), t) for t in range(steps)])
    act, actions = scripted_policy(env.task), []
    observation = env.reset(episode)
    for t in range(STEPS):
        actions.append(act(observation, t))
        observation, *_ = env.step(actions[-1])
    return np.stack(actions)


PURE = [
    "metaworld/door-open-v3", "metaworld/pick-place-v3", "gym/Hopper-v5", "gym/Ant-v5", "gym/Pendulum-v1",
    "gym/FetchReach-v4", "gym/FetchPush-v4", "gym/FetchPush-v4-fixed",
]  # fmt: skip


@pytest.mark.parametrize("task", PURE)
def test_an_episode_does_not_depend_on_what_was_played_before(task: str) -> None:
    first = make(task, seed=3)
    actions = actions_for(first, 4)
    observations, rewards = play(first, 4, actions)
    other = make(task, seed=3)
    play(other, 9, actions_for(other, 9))  # another goal, with contacts
    other.reset(2)
    other.step(actions[0])  # an episode left half way
    again, again_rewards = play(other, 4, actions)
    assert observations.tobytes() == again.tobytes()
    assert rewards.tobytes() == again_rewards.tobytes()
    another, _ = play(other, 5, actions)
    assert not np.array_equal(another[0], observations[0])
    another_seed, _ = play(make(task, seed=4), 4, actions)
    assert not np.array_equal(another_seed[0], observations[0])


def test_fifty_episodes_visit_each_of_metaworlds_fifty_goals_and_show_them() -> None:
    import metaworld

    env = make("metaworld/reach-v3", seed=1)
    seen = {tuple(env.reset(episode)[-3:]) for episode in range(NUM_GOALS)}
    goals = [pickle.loads(t.data)["rand_vec"][3:] for t in metaworld.MT1("reach-v3", seed=0).train_tasks]
    assert seen == {tuple(np.asarray(goal, dtype=np.float32)) for goal in goals}
    assert len(seen) == NUM_GOALS
    block = [tuple(env.reset(episode)[-3:]) for episode in range(NUM_GOALS, NUM_GOALS + 3)]
    assert block != [tuple(env.reset(episode)[-3:]) for episode in range(3)]


def test_metaworld_truncates_at_its_limit_and_reports_success() -> None:
    env = make("metaworld/drawer-close-v3", seed=0)
    assert (env.spec.observation_shape, env.spec.action_dim, env.spec.horizon) == ((39,), 4, 500)
    act, observation = scripted_policy(env.task), env.reset(0)
    assert observation.dtype == np.float32
    ends, successes, rewards = [], [], []
    for t in range(500):
        observation, reward, terminated, truncated, success = env.step(act(observation, t))
        assert not terminated
        ends.append(truncated)
        successes.append(success)
        rewards.append(reward)
    assert ends == [False] * 499 + [True]
    assert successes[0] is False
    assert successes[-1] is True
    assert 0 <= min(rewards) <= max(rewards) <= 10
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4))
    versions = env.versions()
    assert versions["metaworld"] == "3.1.1"
    assert versions["reward_function"] == "v2"


def test_a_scripted_expert_leaves_the_observation_alone() -> None:
    act = scripted_policy("metaworld/door-open-v3")  # it edits what it is given
    observation = np.arange(39, dtype=np.float32) / 39
    before = observation.copy()
    act(observation, 0)
    assert np.array_equal(observation, before)


def test_gym_actions_are_scaled_to_the_environments_bounds() -> None:
    env = make("gym/Pendulum-v1", seed=0)
    raw = gymnasium.make("Pendulum-v1").unwrapped
    observation = env.reset(0)
    for action in (-1.0, -0.25, 0.5, 1.0, 7.0):
        angle = np.arctan2(observation[1], observation[0])
        raw.reset(seed=0)
        raw.state = np.array([angle, observation[2]])  # type: ignore[attr-defined]
        expected, expected_reward, *_ = raw.step(np.array([2 * min(action, 1.0)], dtype=np.float32))
        observation, reward, *_, success = env.step(np.array([action]))
        assert observation == pytest.approx(expected, abs=1e-4)
        assert reward == pytest.approx(float(expected_reward), abs=1e-4)
        assert success is None


def test_gym_termination_is_not_truncation() -> None:
    env = make("gym/Hopper-v5", seed=0)
    env.reset(0)
    random = RandomPolicy(env.spec, 0)
    for t in range(env.spec.horizon):
        _, _, terminated, truncated, _ = env.step(random(np.zeros(0), t))
        if terminated or truncated:
            break
    assert terminated  # a hopper that flails falls
    assert not truncated
    pendulum = make("gym/Pendulum-v1", seed=0)
    pendulum.reset(0)
    ends = [pendulum.step(np.zeros(1))[2:4] for _ in range(200)]
    assert ends == [(False, False)] * 199 + [(False, True)]


def test_fetch_shows_the_commanded_goal_and_succeeds_within_5_cm_of_it() -> None:
    env = make("gym/FetchReach-v4", seed=0)
    assert (env.spec.observation_shape, env.spec.action_dim, env.spec.horizon) == ((13,), 4, 50)
    other, observation = env.reset(1), env.reset(0)
    goal = observation[-3:]
    assert not np.array_equal(other[-3:], goal)
    ends, distances, successes, rewards = [], [], [], []
    for _ in range(50):
        towards = np.clip(10 * (goal - observation[:3]), -1, 1)
        observation, reward, terminated, truncated, success = env.step(np.append(towards, 0))
        assert np.array_equal(observation[-3:], goal)
        ends.append((terminated, truncated))
        distances.append(np.linalg.norm(observation[:3] - goal))
        successes.append(success)
        rewards.append(reward)
    assert ends == [(False, False)] * 49 + [(False, True)]
    assert successes == [bool(distance < 0.05) for distance in distances]
    assert rewards == [0.0 if success else -1.0 for success in successes]
    assert successes[0] is False and successes[-1] is True
    assert env.versions()["gymnasium-robotics"]


@pytest.mark.parametrize(("task", "goal"), [("FetchReach", (1.3, 0.3, 0.9)), ("FetchPush", (1.4, 0.9, 0.4247))])
def test_laeos_fixed_goals_are_commanded_and_judged(task: str, goal: tuple[float, ...]) -> None:
    env = make(f"gym/{task}-v4-fixed", seed=2)
    free = make(f"gym/{task}-v4", seed=2)
    for episode in (0, 1):
        observation, other = env.reset(episode), free.reset(episode)
        assert observation[-3:] == pytest.approx(goal)
        assert np.array_equal(observation[:-3], other[:-3])  # the same start, another goal
    if task == "FetchReach":
        for _ in range(50):
            observation, reward, *_, success = env.step(np.append(np.clip(10 * (goal - observation[:3]), -1, 1), 0))
        assert np.linalg.norm(observation[:3] - goal) < 0.05
        assert (success, reward) == (True, 0.0)


def test_making_a_fetch_environment_says_nothing() -> None:
    code = "from cvlctl.play.envs import make; make('gym/FetchReach-v4', 0).reset(0)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_an_episode_that_terminates_at_the_limit_is_not_truncated() -> None:
    class Raw:
        action_space = observation_space = gymnasium.spaces.Box(-1, 1, (1,))

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            return np.zeros(1), 1.0, True, True, {}

    env = Env("fake", 0, Raw(), lambda episode: np.zeros(1), horizon=1, has_success=False, versions={})
    env.reset(0)
    assert env.step(np.zeros(1))[2:4] == (True, False)


def test_a_policy_gone_wrong_is_told() -> None:
    env = make("gym/Pendulum-v1", seed=0)
    env.reset(0)
    for action in (np.array([np.nan]), np.zeros(2), np.zeros((1, 1))):
        with pytest.raises(CvlctlError, match="Pendulum"):
            env.step(action)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("metaworld/draw-close-v3", "metaworld/drawer-close-v3"),
        ("drawer-close", "metaworld/drawer-close-v3"),
        ("Hopper-v5", "gym/Hopper-v5"),
        ("gym/Hoper-v5", "gym/Hopper-v5"),
        ("FetchReach-v3", "gym/FetchReach-v4"),
        ("door/open/v3", "metaworld/door-open-v3"),
        ("zzzz", "legal tasks"),
        ("", "legal tasks"),
    ],
)
def test_unknown_tasks_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(CvlctlError) as caught:
        make(name, 0)
    assert near in caught.value.hint


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(CvlctlError, match="negative"):
        make("gym/Pendulum-v1", -1)


def test_scripted_experts_are_metaworlds_only() -> None:
    with pytest.raises(CvlctlError, match="no scripted expert"):
        scripted_policy("gym/Hopper-v5")


def test_the_table_of_tasks_is_metaworlds_own() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert {f"{name}-v3" for name in METAWORLD_TASKS} == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(list_tasks()) == len(set(list_tasks())) == 50 + len(GYM_TASKS) + len(FETCH_TASKS)
    assert {task.split("/")[0] for task in list_tasks()} == set(ENVS)
    for task in list_tasks():
        check_task(task)


def test_every_metaworld_task_and_locomotion_have_references() -> None:
    for task in list_tasks():
        found = references(task)
        if task in ("gym/MountainCarContinuous-v0", "gym/Pendulum-v1") or "Fetch" in task:
            assert found is None
            continue
        assert found is not None
        assert found["min"] < found["max"]
        assert found["source"]
    hopper = references("gym/Hopper-v5")
    assert hopper is not None
    assert (hopper["min"], hopper["max"]) == (-20.272305, 3234.3)


def test_importing_envs_loads_no_simulator() -> None:
    heavy = ("gymnasium", "mujoco", "metaworld", "torch")
    code = f"import sys, cvlctl.play.envs; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    )


@pytest.mark.parametrize("task", [task for task in list_tasks() if "Fetch" in task])
def test_goals_of_fetch_are_where_hindsight_looks_for_them(task: str) -> None:
    """Its own achieved goal, and its own reward, at every step of two random episodes; the dense one in float32."""
    env, found = make(task, seed=0), goals(task)
    assert found is not None
    rng, rewards = np.random.default_rng(0), []
    for episode in range(2):
        env.reset(episode)
        for _ in range(env.spec.horizon):
            observation, reward, *_ = env.step(rng.uniform(-1, 1, 4))
            inside = env.raw.inside
            np.testing.assert_array_equal(observation[found.achieved], np.float32(inside._get_obs()["achieved_goal"]))
            np.testing.assert_array_equal(observation[found.desired], np.float32(inside.goal))
            at, to = (torch.from_numpy(observation[columns]) for columns in (found.achieved, found.desired))
            assert float(found.reward(at, to)) == pytest.approx(reward, abs=1e-6)
            rewards.append(reward)
    assert len(set(rewards)) > 1 or "Dense" not in task
    env.close()


def test_only_fetch_is_told_goals() -> None:
    assert [task for task in list_tasks() if goals(task)] == [task for task in list_tasks() if "Fetch" in task]


@pytest.mark.parametrize("task", ["pick-place", "push", "shelf-place"])
def test_a_grasp_is_felt_as_metaworld_feels_it(task: str) -> None:
    """Along an expert's episode, step by step: in the air, in touch, and holding."""
    env, act = make(f"metaworld/{task}-v3", seed=0), scripted_policy(f"metaworld/{task}-v3")
    observation, felt = env.reset(0), []
    for step in range(120):
        geom = env.raw._get_id_main_object()
        felt.append(env.raw.touching_object(geom))
        assert felt[-1] == type(env.raw).touching_object(env.raw, geom)
        observation = env.step(act(observation, step))[0]
    assert set(felt) == {False, True}
