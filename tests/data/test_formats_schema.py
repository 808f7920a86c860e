"""What the arrays of a file are taken for: which are joined in which order, numbers, pixels, actions, clocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import exchange, formats
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

Arrays = dict[str, Any]
STEPS = 6


pytestmark = pytest.mark.usefixtures("no_fsync")


def robomimic(path: Path, *demos: Arrays) -> Path:
    """Demonstrations of the arrays given; `obs/x` stands for `next_obs/x` too where that is not given."""
    with h5py.File(path, "w") as file:
        for i, arrays in enumerate(demos):
            steps = len(next(iter(arrays.values())))
            plain = {
                "actions": np.zeros((steps, 2)),
                "rewards": np.zeros(steps),
                "dones": np.arange(steps) == steps - 1,
            }
            after = {f"next_{name}": values for name, values in arrays.items() if name.startswith("obs/")}
            for name, values in (plain | after | arrays).items():
                if values is not None:
                    file[f"data/demo_{i}/{name}"] = values
    return path


def minari(folder: Path, *episodes: Arrays) -> Path:
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, arrays in enumerate(episodes):
            steps = len(next(iter(arrays.values()))) - 1
            plain = {"actions": np.zeros((steps, 2)), "rewards": np.zeros(steps), "terminations": np.zeros(steps, bool)}
            for name, values in (plain | arrays).items():
                file[f"episode_{i}/{name}"] = values
    about = {"total_episodes": len(episodes), "total_steps": STEPS * len(episodes), "dataset_id": "some/set-v0"}
    (folder / "data" / "metadata.json").write_text(json.dumps(about))
    return folder


def full(width: int, value: float, rows: int = STEPS) -> np.ndarray:
    return np.full((rows, width), value, np.float32)


def joined(format: str, path: Path, first: Arrays, *others: Arrays, **options: Any) -> list[Episode]:
    """The episodes of a file with these observations in its episodes."""
    if format == "robomimic":
        made = [{f"obs/{name}": values for name, values in arrays.items()} for arrays in (first, *others)]
        return list(formats.FORMATS[format].read(robomimic(path, *made), **options))
    made = [
        {f"observations/{name}": np.concatenate([values, values[-1:]]) for name, values in arrays.items()}
        for arrays in (first, *others)
    ]
    return list(formats.FORMATS[format].read(minari(path, *made), **options))


# ------------------------------------------------------------------------------------------------------------- joining


@pytest.mark.parametrize("format", ["robomimic", "minari"])
def test_what_is_joined_is_settled_by_the_first_episode(tmp_path: Path, format: str) -> None:
    first = {"arm": full(2, 1), "goal": full(3, 2)}
    cases: dict[str, tuple[Arrays, str]] = {
        "as wide together": ({"arm": full(3, 1), "goal": full(2, 2)}, r"arm has rows of shape \(3,\), not \(2,\)"),
        "another name": ({"arm": full(2, 1), "home": full(3, 2)}, "goal is missing, home is new"),
        "one less": ({"arm": full(5, 1)}, r"goal is missing, arm has rows of shape \(5,\)"),
        "one more": (first | {"more": full(1, 0)}, "more is new"),
    }
    for case, (other, message) in cases.items():
        with pytest.raises(CvlctlError, match=f"_1/obs.* is unlike the first: {message}") as caught:
            joined(format, tmp_path / f"{case}.h5", first, other)
        assert "--observation-key" in caught.value.hint
    with pytest.raises(CvlctlError, match=r"arm has rows of shape \(3,\)"):  # named, they must be alike all the same
        joined(format, tmp_path / "named.h5", first, {"arm": full(3, 1)}, observation_keys=["arm"])
    some = joined(format, tmp_path / "some.h5", first, {"arm": full(2, 7), "x": full(9, 0)}, observation_keys=["arm"])
    assert [episode.observations[0].tolist() for episode in some] == [[1, 1], [7, 7]]
    flat = joined(format, tmp_path / "flat.h5", {"a": full(1, 1)[:, 0]}, {"a": full(1, 2)})  # (N,) is (N, 1)
    assert [episode.observations[0].tolist() for episode in flat] == [[1], [2]]


def test_one_array_is_not_several_that_are_as_wide(tmp_path: Path) -> None:
    several, one = {"observations/a": full(1, 0, 7), "observations/b": full(2, 0, 7)}, {"observations": full(3, 0, 7)}
    for i, (first, second, what) in enumerate(((several, one, "one array"), (one, several, "several arrays"))):
        with pytest.raises(CvlctlError, match=f"episode_1/observations: is {what}, unlike the first"):
            list(formats.FORMATS["minari"].read(minari(tmp_path / f"{i}", first, second)))
    with pytest.raises(CvlctlError, match="episode_0/observations: is one array, not several to choose from"):
        list(formats.FORMATS["minari"].read(minari(tmp_path / "keys", one), observation_keys=["a"]))


@pytest.mark.parametrize("format", ["robomimic", "minari"])
def test_numbers_in_names_are_ordered_as_numbers(tmp_path: Path, format: str) -> None:
    values = {f"_index_{i}": full(1, i) for i in range(12)} | {"joint_10/x2": full(1, 13), "joint_9/x10": full(1, 12)}
    (found,) = joined(format, tmp_path / "a.h5", values)
    assert found.observations[0].tolist() == list(range(14))


def test_the_next_observations_of_robomimic_are_those_of_its_observations(tmp_path: Path) -> None:
    obs = {"obs/a": full(1, 1), "obs/b": full(2, 2)}
    more = {"next_obs/a": full(1, 7), "next_obs/b": full(2, 8), "next_obs/image": np.zeros((STEPS, 4, 4, 3), np.uint8)}
    (found,) = formats.FORMATS["robomimic"].read(robomimic(tmp_path / "a.h5", obs | more))
    assert found.observations[-2:].tolist() == [[1, 2, 2], [7, 8, 8]]
    swapped = {"next_obs/a": full(2, 7), "next_obs/b": full(1, 8)}  # as wide together
    with pytest.raises(CvlctlError, match=r"next_obs: is unlike the first: a has rows of shape \(2,\), not \(1,\)"):
        list(formats.FORMATS["robomimic"].read(robomimic(tmp_path / "b.h5", obs | swapped)))


def test_what_is_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", obs=full(2, 0), state=full(3, 0), actions=full(1, 0), timeouts=np.zeros(STEPS))
    out = ["--task", "toy", "--out", str(tmp_path / "a.zarr")]
    command = ["data", "import", "arrays", str(tmp_path / "a.npz"), *out]
    assert execute(app.app, [*command, "--key", "observations=obs", "--key", "observations=state"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--key observations is given twice: observations=obs, observations=state" in said
    with pytest.raises(CvlctlError, match="--key actions is given twice"):
        exchange.import_file("arrays", tmp_path / "a.npz", tmp_path / "a.zarr", keys=["actions=x", "actions=x"])
    for format in ("robomimic", "minari"):
        with pytest.raises(CvlctlError, match="--observation-key a is given twice"):
            joined(format, tmp_path / f"{format}.h5", {"a": full(1, 0)}, observation_keys=["a", "a"])
    assert not (tmp_path / "a.zarr").exists()
    assert execute(app.app, [*command, "--key", "observations=obs"]) == 0


# ----------------------------------------------------------------------------------------------- files of every format


def file_of(format: str, path: Path, observations: np.ndarray, actions: np.ndarray, **more: Any) -> Path:
    """A file of one episode, of observations (T+1, ...) and actions (T, ...); `sb3` has one environment."""
    steps = len(actions)
    last = np.arange(steps) == steps - 1
    rows = {"observations": observations[:-1], "next_observations": observations[1:], "actions": actions,
            "rewards": np.zeros(steps), "terminals": last}  # fmt: skip
    if format == "minari":
        return minari(path, {"observations": observations, "actions": actions})
    if format == "robomimic":
        made = {"obs/x": observations[:-1], "next_obs/x": observations[1:], "actions": actions}
        return robomimic(path, made)
    if format in ("npz", "ogbench", "sb3"):
        arrays: Arrays = {"observations": observations, "actions": actions, "episode_ends": [steps]}
        if format == "ogbench":
            arrays |= {"actions": np.concatenate([actions, actions[-1:]]), "terminals": np.append(~(last | True), True)}
        if format == "sb3":
            arrays = {name: values[:, None] for name, values in rows.items()}
            arrays |= {"dones": arrays["terminals"], "timeouts": ~arrays["terminals"] & False}
        with open(path, "wb") as file:
            np.savez(file, **arrays | more)
        return path
    with h5py.File(path, "w") as file:
        for name, values in (rows | {"timeouts": last & False}).items():
            file[name] = values
    return path


ELSEWHERE = ("lerobot", "rlds", "hdf5", "zarr", "imitation", "table")  # have tests of their own for what is tested here
ALL = [name for name in formats.FORMATS if name not in ELSEWHERE]


def episode_of(format: str, path: Path, **options: Any) -> Episode:
    (found,) = formats.FORMATS[format].read(path, **options)
    return found


@pytest.mark.parametrize("format", ALL)
def test_actions_of_a_discrete_task_are_refused(tmp_path: Path, format: str) -> None:
    observations = np.zeros((STEPS + 1, 2), np.float32)
    kinds = (np.zeros((STEPS, 1), int), np.ones(STEPS, np.int32), np.zeros((STEPS, 2), bool), np.zeros(STEPS, np.uint8))
    for i, actions in enumerate(kinds):
        path = file_of(format, tmp_path / f"{i}.file", observations, actions)
        with pytest.raises(CvlctlError, match=rf"{i}\.file.*actions: .*discrete actions are not supported"):
            episode_of(format, path, clip_actions=True)
    path = file_of(format, tmp_path / "floats.file", observations, np.ones((STEPS, 1), np.float64))
    assert len(episode_of(format, path)) == STEPS


@pytest.mark.parametrize("format", ALL)
def test_bytes_in_a_row_are_numbers_and_in_a_picture_pixels(tmp_path: Path, format: str) -> None:
    values = np.arange((STEPS + 1) * 3, dtype=np.uint8).reshape(-1, 3) + 200
    actions = np.zeros((STEPS, 1), np.float32)
    row = episode_of(format, file_of(format, tmp_path / "a.file", values, actions)).observations
    assert row.dtype == np.float32 and row.tolist() == values.tolist()
    pictures = np.arange((STEPS + 1) * 12, dtype=np.uint8).reshape(-1, 2, 2, 3)
    path = file_of(format, tmp_path / "b.file", pictures, actions)
    chosen = {"observation_keys": ["x"]} if format == "robomimic" else {}
    found = episode_of(format, path, **chosen)
    assert found.observations.shape[1:] == (0,) and found.images["pixels"].dtype == np.uint8
    assert found.images["pixels"].tolist() == pictures.tolist()
    assert Episode(values[:3], np.zeros((2, 1))).observations.dtype == np.float32


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("kind", ["float64", "int64"])
def test_a_clock_that_float32_stops_is_said(
    tmp_path: Path, format: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, steps = np.random.default_rng(0), 200
    values = rng.normal(size=(steps + 1, 3)) * 1000
    values[:, 1] = 1.7e9 + np.arange(steps + 1)
    actions = np.zeros((steps, 1), np.float32)
    path = file_of(format, tmp_path / "a.file", values.astype(kind), actions)
    assert len(np.unique(episode_of(format, path).observations[:, 1])) <= 3
    name = r"x\[1\]" if format == "robomimic" else "column 1"
    said = capsys.readouterr().err
    assert re.search(rf"no longer change where they did: {name} \(\d+ of 200 changes\); of a clock", said)
    assert said.count("changes)") == 1  # of no other column


def test_columns_that_hardly_move_or_that_float32_holds_are_not_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, steps = np.random.default_rng(0), 200
    t = np.arange(steps + 1)
    at_rest, then_moves = 0.8 + 1e-13 * rng.normal(size=steps + 1), np.where(t < 60, 0.3 + 1e-9 * t, t)
    values = np.stack([at_rest, 0.01 * t, 1e6 + t, then_moves])
    actions = np.zeros((steps, 1), np.float32)
    for format in ("d4rl", "npz"):
        episode_of(format, file_of(format, tmp_path / format, values.T, actions))
        assert capsys.readouterr().err == ""
    counts = np.stack([t, 2**24 - 100 + t]).T  # of whole numbers, each one that is lost is said
    episode_of("d4rl", file_of("d4rl", tmp_path / "i", counts, actions))
    assert "column 1 (50 of 200 changes)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- single values, and words


@pytest.mark.parametrize("format", ["npz", "ogbench"])
def test_the_horizon_is_one_value_of_whatever_shape(tmp_path: Path, format: str) -> None:
    observations, actions = np.zeros((STEPS + 1, 2), np.float32), np.zeros((STEPS, 1), np.float32)
    for horizon in (50, np.array([50]), np.array(50.0), np.uint8(50)):
        path = file_of(format, tmp_path / "a.npz", observations, actions, horizon=horizon)
        assert formats.FORMATS[format].facts(path).horizon == 50
    assert formats.import_store(format, path, tmp_path / "a.zarr", task="toy").spec.horizon == 50
    no_steps = [(wrong, "is no number of steps") for wrong in (0, np.nan, "x")]
    for wrong, message in (([5, 6], r"horizon: has shape \(2,\)"), *no_steps):
        path = file_of(format, tmp_path / "a.npz", observations, actions, horizon=wrong)
        with pytest.raises(CvlctlError, match=f"a.npz.*{message}"):
            formats.FORMATS[format].facts(path)


def test_one_number_a_step_is_to_be_a_row_of_one(tmp_path: Path) -> None:
    for format in ("d4rl", "npz", "minari"):
        path = file_of(format, tmp_path / format, np.zeros(STEPS + 1), np.zeros((STEPS, 1)))
        with pytest.raises(CvlctlError, match=r"observations have shape \(7,\)") as caught:
            episode_of(format, path)
        assert caught.value.hint == "give a single number a step as a row of one: (7, 1)"
    with pytest.raises(CvlctlError, match=r"observations of shape \(6,\) for 6 actions") as caught:
        Episode(np.zeros(STEPS), np.zeros((STEPS, 1)))
    assert "final observation" in caught.value.hint
