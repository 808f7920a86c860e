"""What only a GPU can show: every method there as on the CPU, no waiting between logs, exact resume. `-m cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from toy_runs import ALL, load, run, state_of
from toy_stores import moving_point

from cvlctl import checkpoints
from cvlctl.collect import replay
from cvlctl.data.load import opened, to_device
from cvlctl.data.samplers import BLOCK, Data, batches, gather
from cvlctl.data.writer import write_store
from cvlctl.learn import finetune, loop, pretrain, programs
from cvlctl.learn.algorithms import ONLINE, contrastive_ac
from cvlctl.learn.loop import Learner, take_over
from cvlctl.learn.networks import State
from cvlctl.learn.programs import programs_of
from cvlctl.learn.settings import Settings, configure
from cvlctl.types import Spec

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
OF_A_POLICY = {"fqe", "occupancy-of-policy"}  # these stand on a finished one
OFFLINE = [*ALL, *sorted(OF_A_POLICY)]
SPEC, SEEDS, BATCH = Spec((4,), 2, 30), [0, 1], 64
DEVICE, COMPILED = "cuda", True
ON_GPU = (f"device={DEVICE}", f"compile={str(COMPILED).lower()}")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "point.zarr", moving_point(), task="point").path


def trained(name: str, store: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """A run of 100 steps; of those that stand on a policy, on one of 2."""
    policy = out.parent / "policy"
    if name in OF_A_POLICY:
        run("bc", store, policy, "steps=2", "seeds=[0,1]")
    if name == "occupancy-of-policy":
        return run("occupancy-td", store, out, "critic.loss=td_spectral", f"policy={policy}", *overrides)
    if name == "fqe":
        text = f"algorithm: {{name: fqe, hidden: [32]}}, init_from: '{policy}', steps: 100"
        return finetune.finetune(load("finetune", store, out, text, *overrides))
    return run(name, store, out, *overrides)


class Setting(NamedTuple):
    """A learner, its first state, and the data of its updates, on the CPU."""

    module: Any
    config: Any
    state: State
    data: Data | None  # None: a replay's

    def updates(self, data: Data | None) -> Iterator[tuple[Any, Any]]:
        """Batches and noise, where the data are."""
        draws = self.module.draws(self.config, SPEC, BATCH)
        if data is not None:
            for _, (indices, noise) in batches(data, draws, SEEDS, 0, 10**6):
                yield gather(data, indices, draws), noise
            return
        buffer, rng = replay.Replay(500, SPEC), torch.Generator().manual_seed(0)
        for _ in range(500):
            observation, after, action = (torch.rand(n, generator=rng).numpy() for n in (4, 4, 2))
            buffer.add(observation, action, float(action[0]), False, after)
        for block in range(10**6):
            drawn = replay.draw("sac", draws, SPEC, SEEDS, block)
            for i in range(replay.BLOCK):
                yield drawn.batch(i, buffer, self.config.gamma)


def setting_of(name: str, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """What a run of the method would train, at its first step."""
    if name.startswith("online "):
        module = ONLINE[name.removeprefix("online ")]
        config = module.Config(hidden=(32,))
        online = contrastive_ac.init_online(config, SPEC, SEEDS, 0.1) if module is contrastive_ac else None
        return Setting(module, config, online or module.init(config, SPEC, SEEDS), None)
    found: list[Any] = []

    def noted(recipe: Any, learner: Learner, reading: Any, *others: Any, **more: Any) -> dict[str, Any]:
        if recipe.out == folder / name:
            found.extend((learner, reading))
            return {}
        return loop.train(recipe, learner, reading, *others, **more)  # the policy that it stands on

    with monkeypatch.context() as patch:
        for room in (pretrain, finetune):
            patch.setattr(room, "train", noted)
        trained(name, store, folder / name, "seeds=[0,1]")
    learner, reading = found
    assert isinstance(learner, Learner)
    with opened(reading, 0, BLOCK * BATCH, "cpu") as data:
        assert isinstance(data, Data)
        state = learner.module.init(learner.config, SPEC, SEEDS, data)
        state = take_over(state | (learner.beside or {}), learner.initial or {})
        return Setting(learner.module, learner.config, state, data)


def steps(setting: Setting, device: str, compile: bool, count: int, given: list[tuple[Any, Any]]) -> State:
    """The state after `count` updates on what is given; graphs, whose warm-up does not count, are replayed for each."""
    settings = Settings(device, 1, "float32", compile)
    configure(settings)
    state = {name: value.clone().to(device) for name, value in setting.state.items()}
    chosen = programs_of(setting.module, setting.config, settings)
    moved = [torch.utils._pytree.tree_map(lambda x: x.to(device), pair) for pair in given]
    if compile:
        for program in dict.fromkeys(chosen):
            for _ in range(programs.WARM_UP):
                program(state, *moved[0])
        for name, value in state.items():
            value.copy_(setting.state[name])
    for i, (batch, noise) in enumerate(moved[:count]):
        state, _ = chosen[(i + 1) % len(chosen)](state, batch, noise)
    return {name: value.cpu() for name, value in state.items()}


def alike(found: State, wanted: State) -> None:
    for name, value in wanted.items():
        error = (found[name] - value).norm()
        assert error <= 1e-3 * value.norm() + 1e-6, f"{name}: {error} of {value.norm()}"


@pytest.mark.parametrize("name", [*OFFLINE, *(f"online {name}" for name in ONLINE)])
def test_a_step_is_the_same_on_cpu_and_gpu_and_in_a_graph(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = setting_of(name, store, tmp_path, monkeypatch)
    given = list(islice(setting.updates(setting.data), 4))
    count = 1 + (getattr(setting.config, "actor_every", 1) > 1)  # with a delayed actor: both of its programs
    wanted = steps(setting, "cpu", False, count, given)
    alike(steps(setting, DEVICE, False, count, given), wanted)
    alike(steps(setting, DEVICE, COMPILED, count, given), wanted)


@pytest.mark.parametrize("name", OFFLINE)
def test_nothing_waits_for_the_gpu_between_logs(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = setting_of(name, store, tmp_path, monkeypatch)
    settings = Settings(DEVICE, 1, "float32", COMPILED)
    configure(settings)
    assert setting.data is not None
    state = {key: value.to(DEVICE) for key, value in setting.state.items()}
    chosen = programs_of(setting.module, setting.config, settings)
    stream = setting.updates(to_device(setting.data, DEVICE))
    try:
        for i, (batch, noise) in enumerate(islice(stream, 210)):
            if i == 10:
                torch.cuda.set_sync_debug_mode("error")
            state, _ = chosen[(i + 1) % len(chosen)](state, batch, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(value.isfinite().all()) for value in state.values())


def same_bits(whole: dict[str, Tensor], cut: dict[str, Tensor]) -> None:
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []


CUTS = (2, 3, 5, 70)


@pytest.mark.parametrize("name", ["occupancy", "td3_bc", "contrastive_ac"])
def test_a_cut_run_goes_on_with_the_same_bits(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_fsync: None
) -> None:
    """The whole run and the one in parts each have an empty cache of compiled kernels."""
    from torch._inductor.utils import fresh_cache

    save, seen = checkpoints.save, {}
    on_gpu = (*ON_GPU, "checkpoint_seconds=1e-9")

    def noted(path: Path, state: State, metadata: dict[str, Any]) -> None:
        save(path, state, metadata)
        if metadata["step"] in CUTS:
            seen[metadata["step"]] = {key: value.to("cpu", copy=True) for key, value in state.items()}

    def save_then_die(path: Path, state: State, metadata: dict[str, Any]) -> None:
        save(path, state, metadata)
        if metadata["step"] == where:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", noted)
    with fresh_cache():
        trained(name, store, tmp_path / "whole", *on_gpu)
    monkeypatch.setattr(checkpoints, "save", save_then_die)
    with fresh_cache():
        for where in CUTS:
            with pytest.raises(KeyboardInterrupt):
                trained(name, store, tmp_path / "cut", *on_gpu)
            same_bits(seen[where], state_of(tmp_path / "cut"))
        where = 0
        trained(name, store, tmp_path / "cut", *on_gpu)
    same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


@pytest.mark.parametrize("name", ["occupancy", "td3_bc"])
def test_a_streamed_run_is_captured_while_it_is_read(name: str, tmp_path: Path) -> None:
    many = write_store(tmp_path / "points.zarr", moving_point(20), task="point").path
    more = (*ON_GPU, "steps=500", "memory_gb=3e-5")
    assert trained(name, many, tmp_path / name, *more)["settings"]["window_rows"] > 0
