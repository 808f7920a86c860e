"""Units from a store into a run and its policies; columns that never varied; how far an input lies outside the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import CRITIC, load, run, state_of

import cvlctl
from cvlctl.errors import CvlctlError
from cvlctl.learn import networks
from cvlctl.learn.finetune import finetune
from cvlctl.learn.loop import awake
from cvlctl.learn.pretrain import pretrain
from cvlctl.types import Episode

BOUNDS = ([-2.5, -1.0], [2.5, 3.0])
COLUMNS = ("x", "battery", "speed")


def robot(path: Path, battery: float = 24.1, **about: object) -> Path:
    """Actions that follow from x and speed; a battery that holds its voltage throughout."""
    rng, made = np.random.default_rng(0), []
    for _ in range(8):
        observations = rng.normal(size=(21, 3))
        observations[:, 1] = battery
        made.append(Episode(observations, np.tanh(observations[:-1, [0, 2]]), rng.normal(size=20)))
    about = {"action_bounds": BOUNDS, "observation_columns": COLUMNS, "control_period": 0.05} | about
    cvlctl.write_store(path, made, task="robot", **about)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robot")
    run("bc", robot(folder / "robot.zarr"), folder / "bc", "steps=20")
    return folder / "bc"


def test_a_policy_answers_in_the_units_of_the_robot(trained: Path) -> None:
    observations = np.random.default_rng(1).normal(size=(5, 3))
    plain, physical = cvlctl.load_policy(trained), cvlctl.load_policy(trained, units="physical")
    low, high = map(np.array, BOUNDS)
    wanted = low + (plain(observations) + 1) / 2 * (high - low)
    np.testing.assert_allclose(physical(observations), wanted, rtol=1e-6, atol=1e-6)
    assert physical(observations).dtype == np.float32 and physical(observations[0]).shape == (2,)
    assert list(physical.units.observation_columns) == list(COLUMNS) and physical.units.control_period == 0.05
    other = cvlctl.load_policy(trained, units="physical", action_bounds=(-1, 1))
    np.testing.assert_array_equal(other(observations), plain(observations))
    with pytest.raises(CvlctlError, match="no use"):
        cvlctl.load_policy(trained, action_bounds=(-1, 1))
    with pytest.raises(CvlctlError, match="units 'si' are none"):
        cvlctl.load_policy(trained, units="si")


def test_physical_units_that_nobody_told_are_an_error_not_a_guess(tmp_path: Path) -> None:
    run("bc", robot(tmp_path / "silent.zarr", action_bounds=None), tmp_path / "bc", "steps=1")
    cvlctl.load_policy(tmp_path / "bc")
    with pytest.raises(CvlctlError, match="do not say what actions of -1 and 1 stand for") as caught:
        cvlctl.load_policy(tmp_path / "bc", units="physical")
    assert "action_bounds=(low, high)" in caught.value.hint


def test_a_sensor_that_was_constant_in_the_data_and_drifts_moves_no_action(trained: Path) -> None:
    policy = cvlctl.load_policy(trained)
    full = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)
    full[:, 1] = 24.1
    low = full.copy()
    low[:, 1] = 20.0
    np.testing.assert_array_equal(policy(full), policy(low))
    assert (policy.outside(low) == policy.outside(full)).all()


def test_critics_do_not_see_it_either(tmp_path: Path) -> None:
    pretrain(load("pretrain", robot(tmp_path / "a.zarr"), tmp_path / "pre", f"steps: 2, critic: {CRITIC}"))
    critic = cvlctl.load_critic(tmp_path / "pre")
    here, there = np.zeros((2, 3)), np.zeros((2, 3))
    there[:, 1] = 20.0
    actions = np.zeros((2, 2))
    np.testing.assert_array_equal(critic.log_ratio(here, actions, here), critic.log_ratio(there, actions, there))
    here[0, 1] = np.nan
    with pytest.raises(CvlctlError, match="observations hold NaN"):
        critic.log_ratio(here, actions, there)


def test_columns_that_vary_are_normalised_as_before() -> None:
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = 24.1  # no float32, so that its mean is rounded
    rows[:, 2] *= 1e-5  # hardly varies, but does
    rows[:, 3] = 0.0
    state = networks.normaliser_of([0, 1], rows)
    mean, std = rows.double().mean(dim=0).float(), rows.double().std(dim=0, correction=0).float()
    assert state["observation_std"][0].tolist() == [std[0].item(), networks.NEVER_VARIED, 1.0, networks.NEVER_VARIED]
    assert torch.equal(state["observation_mean"][1], mean)


def test_what_wakes_up_in_new_data_is_seen_again() -> None:
    asleep = networks.normaliser_init(
        [0], torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.tensor([True, True, False])
    )
    fresh = networks.normaliser_init(
        [0], torch.full((3,), 5.0), torch.full((3,), 4.0), torch.tensor([False, True, False])
    )
    found = awake(asleep, fresh)
    assert found["observation_mean"].tolist() == [[5.0, 2.0, 3.0]]
    assert found["observation_std"].tolist() == [[4.0, networks.NEVER_VARIED, 1.0]]


def test_outside_is_a_distance_to_the_range_of_the_data(trained: Path) -> None:
    policy, rows = cvlctl.load_policy(trained), cvlctl.open_store(trained.parent / "robot.zarr").observations()
    assert (policy.outside(rows) == 0).all()
    far = rows[0].copy()
    far[2] = rows[:, 2].max() + 3 * rows[:, 2].std()
    assert policy.outside(far) == pytest.approx(3.0, rel=1e-4) and policy.outside(far).shape == ()
    far[0] = rows[:, 0].min() - 5 * rows[:, 0].std()
    assert policy.outside(far) == pytest.approx(5.0, rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_is_an_error_that_names_the_column(trained: Path, value: float) -> None:
    policy, observation = cvlctl.load_policy(trained), np.zeros(3)
    observation[2] = value
    for use in (policy, policy.outside):
        with pytest.raises(CvlctlError, match="NaN or infinity in speed"):
            use(observation)


def test_a_run_and_stores_of_another_scale_do_not_go_together(tmp_path: Path) -> None:
    pretrain(load("pretrain", robot(tmp_path / "a.zarr"), tmp_path / "pre", f"steps: 1, critic: {CRITIC}"))
    text = f"steps: 1, init_from: '{tmp_path / 'pre'}', algorithm: {{name: cvl, hidden: [32]}}"
    other = robot(tmp_path / "b.zarr", action_bounds=(-1, 1))
    with pytest.raises(CvlctlError, match=r"b\.zarr has action bounds \[-1.0, 1.0\], .*pre has"):
        finetune(load("finetune", other, tmp_path / "fine", text))
    finetune(load("finetune", tmp_path / "a.zarr", tmp_path / "fine", text))
    assert (state_of(tmp_path / "fine")["observation_std"][0, 1] == networks.NEVER_VARIED).all()
