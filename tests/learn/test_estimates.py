"""How long a run will take, and whether compiling pays: by the work in it and this machine's rate."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cvlctl import rates
from cvlctl.collect import replay
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data import samplers
from cvlctl.data.samplers import Data, batches, gather
from cvlctl.experiments import commands
from cvlctl.learn import settings, speed
from cvlctl.learn.algorithms import ALGORITHMS, ONLINE, occupancy
from cvlctl.learn.programs import programs_of
from cvlctl.learn.recipe import FinetuneRecipe, PretrainRecipe
from cvlctl.learn.settings import Settings, configure, resolve_settings
from cvlctl.rates import Rate
from cvlctl.recipes.estimates import COMPILE_PAYS_AFTER, Update
from cvlctl.types import Spec

SLOW, FAST = Rate(20e9, 20e-6), Rate(400e9, 2e-6)
SPEC = Spec((39,), 4, 500)


def pretraining(**change: Any) -> PretrainRecipe:
    return PretrainRecipe.model_validate({"stores": ["a"], "steps": 6_000, "threads": 1, "out": "b", **change})


def finetuning(name: str, *, threads: int = 1, steps: int = 6_000, seeds: tuple[int, ...] = (0,), **config: Any) -> Any:
    return FinetuneRecipe.model_validate({
        "stores": ["a"], "algorithm": {"name": name, **config}, "success_examples": {"from": "a"}, "steps": steps,
        "seeds": seeds, "threads": threads, "out": "b",
    })  # fmt: skip


def compiled(recipe: Any, rate: Rate, monkeypatch: pytest.MonkeyPatch, **change: Any) -> bool:
    """What auto decides at this rate."""
    monkeypatch.setattr(settings, "have_compiler", lambda: True)
    monkeypatch.setattr(settings, "measured", lambda precision: rate)
    critic = getattr(recipe, "critic", None) or getattr(getattr(recipe.algorithm, "config", None), "critic", None)
    asked = {"device": "cpu", "threads": 1, "precision": "float32", "compile": "auto", "say": print, **change}
    return resolve_settings(steps=recipe.steps, update=recipe.update(critic), **asked).compile


def test_work_decides_and_not_the_number_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = partial(compiled, monkeypatch=monkeypatch)
    # three seeds of CVL, 6,000 updates on a busy core: twelve minutes eager
    assert auto(finetuning("cvl", seeds=(0, 1, 2)), SLOW)
    # the same number of small updates, and as large ones for a moment
    assert not auto(finetuning("bc", hidden=[16]), SLOW)
    assert not auto(finetuning("cvl", seeds=(0, 1, 2), steps=100), SLOW)
    # seeds, width and batch are work
    narrow = {"critic": {"hidden": [128, 128]}, "batch_size": 256}
    assert not auto(pretraining(**narrow), SLOW)
    assert auto(pretraining(**narrow, seeds=list(range(20))), SLOW)
    assert auto(pretraining(critic={"hidden": [512, 512]}, batch_size=256), SLOW)
    assert auto(pretraining(critic={"hidden": [128, 128]}, batch_size=4096), SLOW)
    # and another machine may decide otherwise
    td3 = finetuning("td3_bc", steps=8_000)
    assert auto(td3, SLOW) and not auto(td3, FAST)
    assert not auto(td3, SLOW, compile="false") and auto(td3, FAST, compile="true")


def test_where_it_is_clear_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "have_compiler", lambda: True)
    monkeypatch.setattr(settings, "measured", lambda precision: pytest.fail("measured"))
    auto = partial(resolve_settings, device="cpu", threads=1, precision="float32", compile="auto", say=print)
    assert not auto(steps=50).compile and auto(steps=10**7).compile


def test_a_machine_is_measured_once_and_decides_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(settings, "have_compiler", lambda: True)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    begin = time.process_time()
    first = speed.measured("medium")
    assert time.process_time() - begin < 1
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)
    assert 2e9 < first.flops < 4e12 and 1e-6 < first.call < 3e-4
    assert first == speed.measured("medium") == rates.kept()

    monkeypatch.setattr(speed, "_least", lambda run, seconds: pytest.fail("measured again"))
    update = Update(1e9, 100)
    near = int(COMPILE_PAYS_AFTER / update.seconds(first.by(2)))
    auto = partial(resolve_settings, device="cpu", threads=2, precision="float32", compile="auto", say=print)
    assert [auto(steps=near + more, update=update).compile for more in (-1, 2) * 2] == [False, True] * 2


def test_what_cannot_be_kept_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(speed, "SECONDS", (0.01, 0.01))
    assert speed.measured("highest").flops > 0 and rates.kept() is None


def test_the_plan_counts_by_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = finetuning("td3_bc", steps=1000)
    usual = recipe.work().seconds
    assert usual == pytest.approx(1000 * recipe.update(None).seconds(rates.USUAL))
    rates.keep(SLOW)
    eager = 1000 * recipe.update(None).seconds(SLOW)
    assert recipe.work().seconds == pytest.approx(eager) and eager < COMPILE_PAYS_AFTER
    long = finetuning("td3_bc", steps=100_000).work().seconds
    assert 50 * eager < long < 100 * eager  # compiled


def test_a_plan_says_how_many_threads_and_why() -> None:
    cpus = finetuning("bc", threads="auto").num_threads  # type: ignore[arg-type]
    assert finetuning("bc").about_threads == f"1 of {cpus} (so says the recipe)"
    assert pretraining(threads="auto").about_threads == f"{cpus} of {cpus} (auto: all CPUs)"
    plain = {"task": "gym/Hopper-v5", "out": "a"}
    online = BuildRecipe.model_validate({**plain, "source": {"name": "sac", "steps": 10}})
    assert online.num_threads == 1 and (online.about_threads or "").startswith(f"1 of {cpus} (auto: a step this small")
    assert BuildRecipe.model_validate({**plain, "source": {"name": "random", "episodes": 1}}).about_threads is None


class Calls(TorchDispatchMode):
    """Counts calls of PyTorch."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def synthetic(rows: int = 2_004) -> Data:
    g = torch.Generator().manual_seed(0)
    ends = torch.arange(501, rows + 1, 501).numpy()
    where = samplers.layout(ends, (0 * ends).astype(bool))
    observation = torch.randn(rows, *SPEC.observation_shape, generator=g)
    action, reward = torch.rand(rows, SPEC.action_dim, generator=g) * 2 - 1, torch.rand(1, rows, generator=g)
    return Data(observation, action, reward, where, torch.arange(len(where.row)), observation[:1000])


def updating(module: Any, config: Any, seeds: tuple[int, ...], batch_size: int) -> Any:
    """A function that makes n eager updates, sampling included."""
    data, how = synthetic(), Settings("cpu", 1, "float32", False)
    configure(how)
    state, draws = module.init(config, SPEC, list(seeds), data), module.draws(config, SPEC, batch_size)
    programs, stream = programs_of(module, config, how), batches(data, draws, list(seeds), 0, 10**6)

    def run(updates: int) -> None:
        for _ in range(updates):
            step, (indices, noise) = next(stream)
            programs[(step + 1) % len(programs)](state, gather(data, indices, draws), noise)

    return run


def of_online(name: str) -> Any:
    module = ONLINE[name]
    config = module.Config()
    state, wanted = module.init(config, SPEC, [0]), module.draws(config, SPEC, 256)
    (program,) = programs_of(module, config, Settings("cpu", 1, "float32", False))
    buffer = replay.Replay(300, SPEC)
    for _ in range(300):
        buffer.add(torch.randn(39).numpy(), torch.rand(4).numpy(), 0.0, False, torch.randn(39).numpy())
    draws = replay.draw(name, wanted, SPEC, [0], 0)

    def run(updates: int) -> None:
        for i in range(updates):
            batch = buffer.gather((draws.place[i] * 300).long(), config.gamma, "cpu")
            program(state, batch, {name: value[i] for name, value in draws.noise.items()})

    return run


CASES: dict[str, Any] = {name: finetuning(name) for name in ALGORITHMS if name != "fqe"} | {
    "occupancy": pretraining(), "occupancy, small": pretraining(critic={"hidden": [64, 64]}, batch_size=64),
    "occupancy, td": pretraining(critic={"hidden": [64, 64], "loss": "td_info_nce"}, batch_size=64),
    "cvl, iterated": finetuning("cvl", critic={"hidden": [256, 256], "loss": "td_spectral"}, improvement="iterated"),
    "cvl, small": finetuning("cvl", critic={"hidden": [256, 256]}), "bc, tiny": finetuning("bc", hidden=[16, 16]),
    "td3_bc, wide": finetuning("td3_bc", hidden=[1024, 1024]), "laeo, together": finetuning("laeo", seeds=(0, 1, 2)),
}  # fmt: skip


def case(name: str) -> tuple[Any, Update, int]:
    """A function that makes n updates, what the plan takes one for, and how many make a whole turn."""
    recipe = CASES[name]
    if name.startswith("occupancy"):
        return updating(occupancy, recipe.critic, recipe.seeds, recipe.batch_size), recipe.update(recipe.critic), 1
    config = recipe.algorithm.config
    run = updating(ALGORITHMS[recipe.algorithm.name], config, recipe.seeds, recipe.batch_size)
    return run, recipe.update(getattr(config, "critic", None)), getattr(config, "actor_every", 1)


def counted(run: Any, turn: int) -> Update:
    run(turn)
    with FlopCounterMode(display=False) as flops:
        run(turn)
    with Calls() as calls:
        run(turn)
    return Update(flops.get_total_flops() / turn, calls.num // turn)


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_taken_for_what_it_is(name: str) -> None:
    run, estimate, turn = case(name)
    found = counted(run, turn)
    assert 0.75 < estimate.calls / found.calls < 1.33, found
    assert 0.75 < estimate.flops / found.flops < 1.4, found


@pytest.mark.parametrize("name", ["sac", "cvl"])
def test_so_are_online_learners(name: str) -> None:
    source = BuildRecipe.model_validate({"task": "gym/Hopper-v5", "source": {"name": name, "steps": 9}, "out": "a"})
    found, estimate = counted(of_online(name), 1), source.source.update
    assert 0.75 < estimate.calls / found.calls < 1.33 and 0.75 < estimate.flops / found.flops < 1.4, found


def test_a_frozen_critic_is_not_learned() -> None:
    critic = replace(ALGORITHMS["cvl"].Config().critic, hidden=(256, 256))
    learned = finetuning("cvl").update(critic)
    plain = finetuning("cvl").model_dump(mode="json", by_alias=True, exclude_unset=True)
    plain["algorithm"] |= {"mode": "frozen"}
    frozen = FinetuneRecipe.model_validate(plain | {"init_from": "c"}).update(critic)
    assert learned.flops - frozen.flops == pytest.approx(pretraining(batch_size=256).update(critic).flops)


def test_frames_take_what_their_encoder_does_and_a_frozen_critic_sees_them_once() -> None:
    def flops(**more: Any) -> float:
        plain = finetuning("cvl").model_dump(mode="json", by_alias=True, exclude_unset=True)
        plain["algorithm"] |= more.pop("algorithm", {})
        return FinetuneRecipe.model_validate(plain | more).update(ALGORITHMS["cvl"].Config().critic).flops

    small, drq = ({"observe": {"cameras": ["a", "b"], "encoder": encoder}} for encoder in ("small", "drq"))
    batch, bank = finetuning("cvl").batch_size, ALGORITHMS["cvl"].Config().bank_size
    assert flops(**small) - flops() == pytest.approx(6 * 2 * (2 * batch + bank / 3) * 7e6)
    assert flops(**drq) - flops() == pytest.approx(6 * (flops(**small) - flops()))
    frozen = {"algorithm": {"mode": "frozen"}, "init_from": "c"}
    assert flops(**small, **frozen) == flops(algorithm={"mode": "frozen"}, init_from="c")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_and_takes_as_long_within_a_factor_of_two(name: str) -> None:
    run, estimate, turn = case(name)
    torch.set_float32_matmul_precision("highest")
    rate = speed.measured("highest")
    run(2 * turn)
    taken = []
    for _ in range(max(5, int(1 / estimate.seconds(rate)) // turn)):
        begin = time.process_time()  # of this thread alone: other work on the machine is not ours
        run(turn)
        taken.append((time.process_time() - begin) / turn)
    found = sorted(taken)[len(taken) // 4]
    print(f"\n  {name}: {found * 1e3:.2f} ms, estimated {estimate.seconds(rate) * 1e3:.2f} ms", end="")
    assert 0.5 < estimate.seconds(rate) / found < 2


def test_commands_hand_their_work_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = settings.resolve_settings
    monkeypatch.setattr("cvlctl.learn.loop.resolve_settings", lambda **a: seen.append(a["update"]) or real(**a))
    path = tmp_path / "r.yaml"
    path.write_text(f"{{stores: ['{store}'], out: '{tmp_path}/run', steps: 2, batch_size: 8, critic: {{hidden: [8]}}}}")
    recipe = commands.load(path, [], "pretrain")
    commands.function("pretrain")(recipe, force=False)
    assert seen == [recipe.update(recipe.critic)]
