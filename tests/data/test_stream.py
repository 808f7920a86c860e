"""Windows on stores that do not fit in memory: the law of what is drawn, exact resume, and what cannot be streamed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import cvlctl
from cvlctl import checkpoints
from cvlctl.data import samplers, stream, writer
from cvlctl.data.load import join
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import Draws
from cvlctl.data.store import Store, open_store
from cvlctl.data.stream import SLOTS, Stream, window_rows
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn.finetune import finetune
from cvlctl.learn.pretrain import pretrain
from cvlctl.runs import read_metrics

GAMMA = 0.8


def episodes(num: int, seed: int) -> list[cvlctl.Episode]:
    """Of 3 to 20 steps; an observation says which episode of which store it is of, and how far in."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(num):
        length = int(rng.integers(3, 21))
        observation = np.stack([np.full(length + 1, 1000 * seed + i), np.arange(length + 1)], axis=1)
        reward = 100 * i + np.arange(length) + 1  # on arriving at step t + 1
        action = rng.uniform(-1, 1, size=(length, 2))
        found.append(cvlctl.Episode(observation, action, reward, reward % 3 == 0, terminated=bool(rng.integers(2))))
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Chunks of 64 rows: neither episodes nor segments end where chunks do."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_ROWS", 64)
        return [cvlctl.write_store(folder / f"{k}.zarr", episodes(60 + 30 * k, k), task="toy") for k in (1, 2)]


def uses(stores: list[Store], **more: Any) -> list[StoreUse]:
    return [StoreUse(path=store.path, **more) for store in stores]


def stream_of(stores: list[Store], rows: int = 9 * 60, per_block: int = 64 * 8, **more: Any) -> Stream:
    return Stream(stores, uses(stores, **more), None, True, rows, per_block, "cpu")


def test_a_pass_draws_every_transition_equally_often(stores: list[Store]) -> None:
    """A pass has every segment once, and wherever it stands, its windows' updates / transitions have the same sum."""
    s = stream_of(stores)
    count = len(s._segments)
    assert count > 20 and len(set(s._lengths.tolist())) > 5
    assert sorted(s._segment(place) for place in range(count, 2 * count)) == list(range(count))
    share = {}
    for place in range(count, 2 * count):
        windows = range(place - SLOTS + 1, place + 1)  # those that hold it
        sizes = [sum(s._lengths[s._segment(w + i)] for i in range(SLOTS)) for w in windows]
        share[place] = sum(s._blocks(w) / size for w, size in zip(windows, sizes, strict=True))
    s.close()
    assert list(share.values()) == pytest.approx([share[count]] * count)


def test_what_is_drawn_is_drawn_by_the_law(stores: list[Store]) -> None:
    """Transitions uniform, their futures by the sampler's law within their own episodes, over twelve passes."""
    s = stream_of(stores)
    draws = Draws(batch_size=8, gamma=GAMMA, futures=True, bank=8)
    whole = join(stores, uses(stores), None, True)
    blocks = int(12 * s._lengths.sum() * SLOTS * s._blocks_per_transition)
    drawn, future, bank = [], [], []
    for block in range(blocks):
        data = s.at(block)
        indices, _ = samplers.draw(data, draws, [0], block, 64)
        drawn.append(data.observation[indices.row.flatten()])
        future.append(data.observation[indices.future_row.flatten()])
        bank.append(data.observation[indices.bank_row.flatten()])
    s.close()
    now, later, there = (torch.cat(x).numpy() for x in (drawn, future, bank))
    assert (now[:, 0] == later[:, 0]).all() and (later[:, 1] > now[:, 1]).mean() > 0.9
    # every transition about equally often: rounding to blocks and chance stay within six standard deviations
    _, counts = np.unique(now[:, 0] * 100 + now[:, 1], return_counts=True)
    mean = len(now) / sum(len(store) for store in stores)
    assert len(counts) == sum(len(store) for store in stores)
    assert np.abs(counts - mean).max() < 6 * np.sqrt(mean) + 0.02 * mean
    # the bank's marginal is that of the stores in memory
    g = torch.Generator().manual_seed(0)
    pick = torch.randint(len(whole.layout.row), (len(there),), generator=g)
    u = torch.rand(len(there), dtype=torch.float64, generator=g)
    expected = whole.observation[samplers.future(whole.layout, pick, u, GAMMA).row].numpy()
    table = np.array([np.bincount(x[:, 1].astype(int), minlength=21)[1:] for x in (there, expected)])
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_window_holds_what_the_stores_hold(stores: list[Store]) -> None:
    s = stream_of(stores)
    whole = join(stores, uses(stores), None, True)
    key = {tuple(x): i for i, x in enumerate(whole.observation[whole.layout.row].tolist())}
    seen = set()
    for block in range(int(2 * s._lengths.sum() * SLOTS * s._blocks_per_transition)):
        data, where = s.at(block), s.at(block).layout
        mine = [key[tuple(x)] for x in data.observation[where.row].tolist()]
        seen |= set(mine)
        their = whole.layout
        assert torch.equal(data.action[where.row], whole.action[their.row[mine]])
        assert torch.equal(data.observation[where.row + 1], whole.observation[their.row[mine] + 1])
        assert torch.equal(data.observation[where.last], whole.observation[their.last[mine]])
        assert torch.equal(data.arrival_reward[0, where.row + 1], whole.arrival_reward[0, their.row[mine] + 1])
        assert torch.equal(where.terminated, their.terminated[mine])
        assert torch.equal(samplers._times(data, where.row[None])[0], data.observation[where.row, 1].long())
        assert len(data.labelled) == len(where.row)
    s.close()
    assert len(seen) == len(key)


def test_statistics_come_from_episodes_of_all_the_stores(stores: list[Store]) -> None:
    s = stream_of(stores, rows=9 * 300)
    data = s.sample()
    s.close()
    assert len(data.observation) <= 300 and set((data.observation[:, 0] // 1000).tolist()) == {1.0, 2.0}
    assert len(data.layout.row) + len(data.layout.first) == len(data.observation)  # no row between the episodes


def test_zeros_and_a_fraction_with_zeros_for_the_rest(stores: list[Store]) -> None:
    for more in ({"rewards": "zeros"}, {"fraction": 0.25, "rest": "zeros"}):
        s = stream_of(stores, **more)
        share = np.mean(
            [float((s.at(b).arrival_reward[0, s.at(b).layout.row + 1] > 0).double().mean()) for b in (0, 30)]
        )
        s.close()
        assert share == 0 if "rewards" in more else 0.05 < share < 0.6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"top": 0.5}, "top: 0.5 needs the returns"),
        ({"fraction": 0.5}, "without a label"),
        ({"rewards": "none"}, "without a label"),
        ({"rewards": "oril"}, "rewards: oril is learned"),
        ({"rows": 9 * 15}, "longest episode"),
    ],
)
def test_what_cannot_be_streamed_says_so(stores: list[Store], more: dict[str, Any], words: str) -> None:
    with pytest.raises(CvlctlError, match=words) as caught:
        stream_of(stores, **more)
    assert "memory_gb" in caught.value.what + caught.value.hint


def test_what_fits_is_not_streamed(stores: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    assert window_rows(stores, "auto", "cpu") == 0 and window_rows(stores, 1.0, "cpu") == 0
    assert 500 < window_rows(stores, 5e-5, "cpu") < 1000
    monkeypatch.setattr(stream, "free_memory", lambda: 100_000)
    assert 500 < window_rows(stores, "auto", "cpu") < 1000
    monkeypatch.undo()
    assert 2**28 < stream.free_memory() < 2**43


# --- training

COMMON = "batch_size: 8, compile: false, threads: 1, log_every_steps: 50, memory_gb: 4e-5"
CRITIC = "{hidden: [16], latent_dim: 8, gamma: 0.8}"
ALGORITHMS = {
    "occupancy": f"critic: {CRITIC}",
    "cvl": f"algorithm: {{name: cvl, hidden: [16], bank_size: 32, critic: {CRITIC}}}",
    "laeo": f"algorithm: {{name: laeo, hidden: [16], critic: {CRITIC}}}",
    "td3_bc": "algorithm: {name: td3_bc, hidden: [16]}",
    "bc": "algorithm: {name: bc, hidden: [16]}",
}


def run(name: str, stores: list[Store], out: Path, *overrides: str) -> dict[str, Any]:
    examples = f"success_examples: {{from: '{stores[0].path}'}}," if name == "laeo" else ""
    paths = ", ".join(f"'{store.path}'" for store in stores)
    path = out.with_suffix(".yaml")
    path.write_text(f"{{stores: [{paths}], out: '{out}', steps: 400, {COMMON}, {examples} {ALGORITHMS[name]}}}")
    kind, command = ("pretrain", pretrain) if name == "occupancy" else ("finetune", finetune)
    return command(load(path, list(overrides), kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["occupancy", "cvl", pytest.param("laeo", marks=pytest.mark.slow), "td3_bc"])
def test_a_streamed_run_goes_on_with_the_same_bits(
    name: str, stores: list[Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, stores, tmp_path / "whole")
    assert "streaming" in capsys.readouterr().err
    save = checkpoints.save

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        if metadata["step"] in (90, 300, 400):  # at every step it would take long
            save(path, state, metadata)
        if metadata["step"] in (90, 300):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_then_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(name, stores, tmp_path / "cut", "checkpoint_seconds=1e-9")
        monkeypatch.setattr(stream, "free_memory", lambda: 2**40)  # what was decided at first stays
    assert run(name, stores, tmp_path / "cut", "checkpoint_seconds=1e-9")["status"] == "trained"
    whole, cut = (checkpoints.load(tmp_path / n / "checkpoints" / "last.safetensors")[0] for n in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


def test_streamed_and_in_memory_learn_alike(stores: list[Store], tmp_path: Path) -> None:
    """Not the same batches, but the same law: the critic's loss ends within a tenth."""
    run("occupancy", stores, tmp_path / "streamed", "steps=2000")
    run("occupancy", stores, tmp_path / "whole", "steps=2000", "memory_gb=1")
    ends = [np.mean([x["critic/nce"] for x in read_metrics(tmp_path / n)[-10:]]) for n in ("streamed", "whole")]
    assert ends[0] == pytest.approx(ends[1], rel=0.1)


def test_a_damaged_chunk_is_named_when_its_turn_comes(stores: list[Store], tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "damaged.zarr"
    shutil.copytree(stores[1].path, path)
    chunk = path / "data" / "observation" / "c" / "11" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"\0" * 9)
    with pytest.raises(CvlctlError, match=r"observation chunk 11 .*crc"):
        run("bc", [open_store(path)], tmp_path / "out", "memory_gb=2e-5")


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A store of 80 MB, 5 MB of memory: the process grows by less than a third of the store."""
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_ROWS", 4_000)
        store = cvlctl.write_store(
            tmp_path / "big.zarr",
            (
                cvlctl.Episode(rng.standard_normal((501, 96), np.float32), np.zeros((500, 4)), np.ones(500))
                for _ in range(400)
            ),
            task="toy",
        )
    script = """
import resource, sys
from cvlctl.data import samplers
from cvlctl.data.stream import Stream
from cvlctl.data.recipe import StoreUse
from cvlctl.data.store import open_store
store = open_store(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = int(float(sys.argv[2]))
stream = Stream([store], [StoreUse(path=store.path)], None, True, rows, 64 * 256, "cpu")
for block in range(60):
    data = stream.at(block)
    indices, _ = samplers.draw(data, samplers.Draws(256, 0.99, futures=True, bank=64), [0], block, 1)
stream.close()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    rows = 5e6 / stream.row_bytes(store)
    command = [sys.executable, "-P", "-c", script, str(store.path), str(rows)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 27e6
