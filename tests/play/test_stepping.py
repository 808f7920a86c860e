"""Environments that step together: the same for any number of workers, and no worker is left behind."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from cvlctl.errors import CvlctlError
from cvlctl.play.envs import make
from cvlctl.play.stepping import Stepper

PENDULUM = "gym/Pendulum-v1"


def played(workers: int) -> list[np.ndarray]:
    """Tables of ten rounds of five environments, two of which begin late, one of them anew."""
    actions, tables = np.random.default_rng(0).uniform(-1, 1, (10, 5, 1)), []
    with Stepper(PENDULUM, 7, 30, 5, workers) as envs:
        envs.run({0: 4, 1: 2, 2: 9}, [])
        for at, action in enumerate(actions):
            envs.table["action"] = action
            late = at >= 5
            envs.run({3: 11, 4: 0} if at == 4 else {0: 5} if at == 5 else {}, [1, 2, 3, 4] if late else [1, 2])
            tables.append(envs.table.copy())
    return tables


def test_any_number_of_workers_makes_the_same_table() -> None:
    one, two, many = played(0), played(2), played(9)
    for tables in (two, many):
        assert all(table.tobytes() == other.tobytes() for table, other in zip(one, tables, strict=True))
    env = make(PENDULUM, 7, 30)
    env.reset(2)
    for table in one[:3]:
        observation, reward, *_ = env.step(table["action"][1])
        assert np.array_equal(table["observation"][1], observation) and table["reward"][1] == reward
    assert (one[0]["success"][:3] == -1)[1:].all() and not one[0]["over"].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_action_that_is_not_finite_is_the_policys_error(workers: int) -> None:
    with Stepper(PENDULUM, 0, None, 2, workers) as envs:
        envs.run({0: 0, 1: 1}, [])
        envs.table["action"] = np.nan
        with pytest.raises(CvlctlError, match="finite"):
            envs.run({}, [0, 1])


def test_a_worker_that_dies_is_said_and_none_is_left() -> None:
    with Stepper(PENDULUM, 0, None, 4, 2) as envs:
        envs.run({0: 0, 1: 1}, [])
        ids = [process.pid for process in envs._processes]
        os.kill(ids[1], signal.SIGKILL)
        with pytest.raises(CvlctlError, match="a worker process died"):
            for _ in range(100):
                envs.run({}, [0, 1])
    for number in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
