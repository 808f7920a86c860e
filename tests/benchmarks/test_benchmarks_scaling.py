"""The benchmarks of seeds that train together and of more data, in small."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cvlctl
from cvlctl.collect import replay
from cvlctl.data import samplers
from cvlctl.learn.algorithms import cvl, occupancy, sac
from cvlctl.learn.settings import Settings

EAGER = Settings("cpu", 1, "float32", False)
SMALL_CRITIC = occupancy.Config(hidden=(16,), latent_dim=4)
SMALL_CVL = cvl.Config(critic=SMALL_CRITIC, hidden=(16,), bank_size=32)


@pytest.fixture
def seeds(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with small networks and batches of ours."""
    found = script("seeds")
    small = {"SAC": sac.Config(hidden=(16,)), "CVL": {"16": SMALL_CVL}, "CRITIC": SMALL_CRITIC, "FILLED": 50}
    small |= {"SAC_BATCH": 16, "CVL_BATCH": 16, "CRITIC_BATCH": 16}
    for name, value in small.items():
        monkeypatch.setattr(found, name, value)
    return found


SEEDS_SMALL = [
    "--threads", "1", "--together", "2", "--seeds", "1", "2", "3", "--rounds", "2", "--seconds", "0.2", "--updates",
    "2", "--rows", "2000", "--eager-only",
]  # fmt: skip


def test_a_rate_counts_until_the_last_update_is_finished(seeds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def update(num: int) -> None:
        nonlocal clock
        clock += 0.3 * num

    monkeypatch.setattr(seeds.time, "perf_counter", lambda: clock)
    assert seeds.rate(update, 1.0) == pytest.approx(4 / 1.2)


def test_every_sac_seed_samples_its_own_transitions(seeds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    gather = replay.Replay.gather

    def spied(self: Any, index: torch.Tensor, *rest: Any) -> Any:
        assert self.size == 3 * 50
        seen.append(index)
        return gather(self, index, *rest)

    monkeypatch.setattr(replay.Replay, "gather", spied)
    seeds.sac_together(3, EAGER)(70)  # beyond a block of draws
    index = torch.stack(seen)
    assert index.shape == (70, 3, 16)
    for member in range(3):
        assert (index[:, member].min(), index[:, member].max()) == (50 * member, 50 * member + 49)
    assert len(torch.unique(index[:, 0].flatten(1), dim=0)) == 70  # no batch twice


def test_a_turn_is_one_update_of_every_seed_a_call(seeds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, original = [], occupancy.step

    def step(config: Any, state: Any, batch: Any, noise: Any) -> Any:
        shapes.append(tuple(batch.observation.shape))
        return original(config, state, batch, noise)

    monkeypatch.setattr(seeds.occupancy, "step", step)
    seeds.common.learner(occupancy, SMALL_CRITIC, range(3), seeds.common.synthetic(1_100), 16, EAGER)(5)
    assert shapes == [(3, 16, 39)] * 5


def test_rates_are_of_all_seeds_and_cost_is_of_the_same_round(seeds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # calls a second, in two rounds; the machine halves its speed in between
    monkeypatch.setattr(seeds.common, "measure", lambda runs, *rest: {"1": [12.0, 6.0], "4": [8.0, 4.0]})
    rates = seeds.rates_by_seeds(occupancy, SMALL_CRITIC, [1, 4], seeds.common.synthetic(1_100), 16, EAGER, 2, 1)
    assert {num: found.tolist() for num, found in rates.items()} == {1: [12.0, 6.0], 4: [32.0, 16.0]}
    assert seeds.curve("critic", rates, "")["rows"] == [[1, 9.0, 1.0, 1.0, 1.0], [4, 24.0, 1.5, 1.5, 1.5]]


def test_seeds_script_beside_stable_baselines3(seeds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stable_baselines3")
    seeds.main([*SEEDS_SMALL, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    shipped, alike, together = found["comparisons"]
    assert shipped["work"] == "SAC update, 2 seeds together"
    assert shipped["peer"] == "2 processes of Stable-Baselines3, as shipped"
    assert (shipped["least"], shipped["aim"], alike["least"], together["least"]) == (2.2, 3.0, None, 1.5)
    assert min(shipped["theirs"], alike["theirs"]) > 0
    assert [row[0] for row in found["curves"][0]["rows"]] == [1, 2, 3]
    assert found["curves"][1]["rows"][0][2:] == [1, 1, 1]
    assert "seeds together" in capsys.readouterr().out


def test_seeds_script_without_stable_baselines3(
    seeds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "stable_baselines3" else find(name))
    seeds.main([*SEEDS_SMALL, "--json", str(tmp_path / "found.json")])
    assert "left out, it is not installed; pip install -e '.[bench]'" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["work"] for row in found["comparisons"]] == ["CVL update, critic 16, 2 seeds together, cpu"]


def test_smaller_data_are_the_first_episodes_and_no_copy(script: Callable[[str], Any]) -> None:
    scaling = script("scaling")
    data = scaling.common.synthetic(4 * 501)
    part = scaling.beginning(data, 1_000)
    assert [len(x) for x in (part.observation, part.layout.row, part.labelled)] == [2 * 501, 1_000, 1_000]
    assert part.observation.data_ptr() == data.observation.data_ptr()
    draws = cvl.draws(SMALL_CVL, scaling.SPEC, 64)
    indices, _ = samplers.draw(part, draws, [0], 0, 64)
    rows = torch.cat([indices.row.flatten(), indices.future_row.flatten(), indices.bank_row.flatten()])
    assert (rows.min() < 100) and (900 < rows.max() < 2 * 501)
    expected = samplers.layout(np.array([501, 1002]), np.zeros(2, dtype=bool))
    assert all(torch.equal(a, b) for a, b in zip(part.layout, expected, strict=True))


@pytest.mark.slow
def test_peak_memory_is_the_child_s_own_and_grows_with_the_data(script: Callable[[str], Any]) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("VmHWM is Linux's")
    scaling = script("scaling")
    ballast = np.ones(2**27)  # 1 GB: would be the child's peak by getrusage
    (_, few_mb, few, _), (_, many_mb, many, difference) = scaling.memory([100_000, 500_000], 2)["rows"]
    assert ballast.sum() > many > few
    assert (few_mb, many_mb) == (23, 113)
    assert many < 1_000
    assert (many - few) / (many_mb - few_mb) > 0.3  # loading takes some memory that the data then reuse
    assert difference == pytest.approx(many - many_mb, abs=1)


@pytest.mark.slow
def test_scaling_script(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("VmHWM is Linux's")
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "CVL", SMALL_CVL)
    monkeypatch.setattr(scaling, "BATCH", 16)
    scaling.main(
        ["--threads", "1", "--transitions", "2000", "1000", "--rounds", "2", "--updates", "2", "--memory-updates", "2",
         "--eager-only", "--json", str(tmp_path / "found.json")]
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    speed, memory = found["curves"]
    assert [row[0] for row in speed["rows"]] == [row[0] for row in memory["rows"]] == [1_000, 2_000]
    assert speed["rows"][0][2:] == [1, 1, 1]
    assert found["comparisons"][0]["ratio"] == pytest.approx(speed["rows"][1][2], abs=0.006)
    assert re.search(r"each MB of data takes -?[\d.]+ MB", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        scaling.main(["--transitions", "1000", "1300"])
    assert "multiples of 500" in capsys.readouterr().err
    assert cvlctl.__version__ == found["machine"]["versions"]["cvlctl"]


@pytest.mark.slow
def test_together_counts_every_seed_s_update(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = script("together")
    small = ["--threads", "1", "--seeds", "3", "--rounds", "1", "--updates", "1", "--rows", "2000", "--eager-only"]
    together.main([*small, "--methods", "TD3+BC", "IQL", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row[0] for row in found["curves"][0]["rows"]] == ["TD3+BC", "IQL"] and len(found["curves"]) == 1
    assert "3 seeds of each method together" in capsys.readouterr().out
    # calls a second of both forms; a call is an update of each of three seeds
    monkeypatch.setattr(together.common, "best", lambda mine: "fast")
    monkeypatch.setattr(together.common, "our_settings", lambda *args: {together.EAGER: EAGER, "fast": EAGER})
    monkeypatch.setattr(
        together.common, "measure", lambda runs, *rest: {together.EAGER: [10.0, 5.0], "fast": [40.0, 20.0]}
    )
    together.main([*small, "--methods", "CVL", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["curves"][0]["rows"] == [["CVL", 22.5, 90.0, 4, 4, 4, round(1_500_000 / 90 / 60, 1)]]
    assert (found["comparisons"][0]["ours"], found["comparisons"][0]["ratio"]) == (90, 4)
