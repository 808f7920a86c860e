"""TD3+BC, IQL and CQL beside d3rlpy's: updates a second, and what both libraries learn from the same store.

    python benchmarks/td_learners.py [--threads 2] [--json speed.json]     updates/s of all, side by side in one process
    python benchmarks/td_learners.py --learn --seeds 0 1 --json scores.json     train both on real stores, play both

Needs the extra `bench` (d3rlpy). Both sides do the same work: batch 256 drawn from memory, twin critic and actor (and
IQL's value) of 256x256, Adam, float32, one seed; the hyper-parameters are cvlctl's defaults, which are the papers', and
d3rlpy is set to the same (`peer` says how). Speed rounds alternate between the contestants, so that a busy machine
slows all alike; a ratio is the median over rounds.

`--learn`: the same transitions (those that end by time bootstrap, those that terminate do not), the same number of
updates, and the same greedy episodes in the same environment. A run that `--json` already holds is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import cvlctl  # noqa: F401 (before torch: it says how OpenMP's threads are to wait)

# isort: split
import numpy as np
import torch
from common import SPEC, Contestant, conditions, machine, measure, summary, synthetic
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from cvlctl import envs, report, samplers, scores, training
from cvlctl.algorithms import ALGORITHMS, cql, iql, td3_bc
from cvlctl.commands import train
from cvlctl.commands.finetune import finetune
from cvlctl.envs import Act
from cvlctl.policies import load_policy
from cvlctl.recipes import FinetuneRecipe
from cvlctl.rollout import EVALUATION_SEED, collect_episode, outcome
from cvlctl.samplers import Data
from cvlctl.store import open_store
from cvlctl.training import Settings
from cvlctl.types import EpisodeResult

METHODS = ("td3_bc", "iql", "cql")
STORES = ("data/methods/gym/Hopper-v5.zarr", "data/methods/metaworld/window-open-v3.zarr")
LIBRARIES = ("cvlctl", "d3rlpy")
BATCH = 256
BARE, PRODUCT = "bare matrix products", 2 * 7680 * 256 * 256


def library() -> ModuleType:
    """d3rlpy, without gym's notice and its own log of every buffer."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    return d3rlpy


def default_config(method: str, num_actions: int) -> Any:
    """cvlctl's own defaults; CQL draws `num_actions` of each kind."""
    return cql.Config(num_actions=num_actions) if method == "cql" else ALGORITHMS[method].Config()


def peer(method: str, config: Any, data: Data) -> Any:
    """d3rlpy's learner with the hyper-parameters of `config` and the statistics of `data`; not built yet.

    Its squared TD error has no factor 1/2, so that the weight of CQL's penalty beside it is twice that of CQL Eq. 4.
    """
    d3rlpy = library()
    mean, std = (x.numpy() for x in samplers.observation_statistics(data.observation))
    encoder = d3rlpy.models.VectorEncoderFactory(list(config.hidden))
    settings: dict[str, Any] = {
        "observation_scaler": d3rlpy.preprocessing.StandardObservationScaler(mean, std),
        "batch_size": BATCH,
        "gamma": config.gamma,
        "tau": config.ema_rate,
        "actor_learning_rate": config.learning_rate,
        "critic_learning_rate": config.learning_rate,
        "actor_encoder_factory": encoder,
        "critic_encoder_factory": encoder,
    }
    if isinstance(config, td3_bc.Config):
        settings |= {
            "alpha": config.q_coefficient,
            "target_smoothing_sigma": config.policy_noise,
            "target_smoothing_clip": config.noise_clip,
            "update_actor_interval": config.actor_every,
        }
        return d3rlpy.algos.TD3PlusBCConfig(**settings).create(device="cpu")
    if isinstance(config, iql.Config):
        scale = iql.RETURN_RANGE / float(samplers.return_range(data))
        settings |= {
            "expectile": config.expectile,
            "weight_temp": config.inverse_temperature,
            "reward_scaler": d3rlpy.preprocessing.MultiplyRewardScaler(scale),
            "value_encoder_factory": encoder,
        }
        return d3rlpy.algos.IQLConfig(**settings).create(device="cpu")
    settings |= {
        "actor_learning_rate": config.actor_learning_rate,
        "temp_learning_rate": config.actor_learning_rate,
        "conservative_weight": 2 * config.conservative_weight,
        "alpha_learning_rate": 0.0,  # the weight stays: no Lagrange multiplier
        "initial_alpha": 1.0,
        "n_action_samples": config.num_actions,
        "soft_q_backup": False,
    }
    return d3rlpy.algos.CQLConfig(**settings).create(device="cpu")


def peer_buffer(data: Data) -> Any:
    """d3rlpy's replay buffer of the same transitions.

    Of n rows it makes n - 1 transitions where an episode was cut off, and n where it terminated, the last of these
    without a next observation: so the final observation goes in, with its padding action, or stays out.
    """
    d3rlpy = library()
    observation, action = data.observation.numpy(), data.action.numpy()
    received = np.append(data.arrival_reward[0, 1:].numpy(), np.float32(0))  # after the action of the row
    where = data.layout
    last, first = np.unique(where.last.numpy(), return_index=True)
    episodes = []
    for start, end, terminated in zip(where.row.numpy()[first], last, where.terminated.numpy()[first], strict=True):
        rows = slice(start, end if terminated else end + 1)
        reward = received[rows].copy()
        if not terminated:
            reward[-1] = 0.0  # the padding row's, which belongs to the next episode
        episodes.append(
            d3rlpy.dataset.Episode(observation[rows], action[rows], reward[:, None], terminated=bool(terminated))
        )
    return d3rlpy.dataset.ReplayBuffer(d3rlpy.dataset.InfiniteBuffer(), episodes=episodes)


def ours(method: str, config: Any, data: Data, settings: Settings) -> Contestant:
    """The training loop's own pieces: draws in blocks, gather, one program (two where the actor learns more rarely)."""
    module = ALGORITHMS[method]
    draws = module.draws(config, SPEC, BATCH)
    state = module.init(config, SPEC, [0], data)
    programs = training.programs(module, config, settings)
    stream = train.batches(data, draws, [0], 0, 2**40)

    def run(updates: int) -> None:
        training.configure(settings)
        for _ in range(updates):
            step, (indices, noise) = next(stream)
            programs[(step + 1) % len(programs)](state, samplers.gather(data, indices, draws), noise)

    return run


def theirs(algo: Any, buffer: Any, settings: Settings) -> Contestant:
    """What d3rlpy's `fit` does at each step, less its log and progress bar."""
    algo.build_with_dataset(buffer)

    def run(updates: int) -> None:
        training.configure(settings)
        for _ in range(updates):
            algo.update(buffer.sample_transition_batch(BATCH))

    return run


def bare_products(settings: Settings) -> Contestant:
    """What an update could not outdo: matrix products of hidden layers and nothing else, PRODUCT floating-point
    operations in each, as wide as those of CQL's sampled actions."""
    x, weight = torch.randn(7680, 256), torch.randn(256, 256)

    def run(updates: int) -> None:
        training.configure(settings)
        for _ in range(updates):
            torch.mm(x, weight)

    return run


def operations(run: Contestant) -> float:
    """Floating-point operations of the matrix products in one update, forward and backward, counted over two."""
    with FlopCounterMode(display=False) as counter:
        run(2)
    return counter.get_total_flops() / 2


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Updates/s of every form of every method, the ratio to d3rlpy as shipped, and the operations in an update and the
    share of the rate of bare matrix products at which they are done."""
    before = machine()
    data = synthetic(args.rows)
    buffer = peer_buffer(data)
    compiled = not args.eager_only and training.have_compiler()
    eager, whole = (
        training.resolve_settings(
            device="cpu", threads=args.threads, precision="auto", compile=word, steps=1, say=print
        )
        for word in ("false", "true" if compiled else "false")
    )  # fmt: skip
    as_shipped = Settings("cpu", args.threads, "float32", False)
    base = "d3rlpy, as shipped"
    tables = {}
    for method in args.methods:
        config = default_config(method, args.num_actions)
        contestants = {
            base: theirs(peer(method, config, data), buffer, as_shipped),
            "d3rlpy, our matmul setting": theirs(peer(method, config, data), buffer, eager),
            "cvlctl, eager": ours(method, config, data, eager),
        }
        work = {name: operations(run) for name, run in contestants.items()}
        if compiled:
            contestants["cvlctl, whole step compiled"] = ours(method, config, data, whole)
            work["cvlctl, whole step compiled"] = work["cvlctl, eager"]
        rates = measure({**contestants, BARE: bare_products(eager)}, args.rounds, args.updates)
        best = np.array(rates.pop(BARE)) * PRODUCT
        table: dict[str, dict[str, float]] = summary(rates, base)
        for name, row in table.items():
            row["gflop"] = round(work[name] / 1e9, 3)
            row["share_of_bare_products"] = round(float(np.median(np.array(rates[name]) * work[name] / best)), 3)
        tables[method] = table
    return {
        "updates": tables,
        "settings": eager.as_dict() | {"compile": whole.compile},
        "sizes": {"hidden": list(td3_bc.Config().hidden), "batch_size": BATCH, "rows": len(data.observation),
                  "cql_num_actions": args.num_actions},
        "rounds": args.rounds, "updates_a_round": args.updates,
        "d3rlpy": library().__version__, "machine": before, "load_average_after": machine()["load_average"],
    }  # fmt: skip


def recipe_of(method: str, config: Any, store: Path, steps: int, seed: int, threads: int, out: Path) -> FinetuneRecipe:
    settings = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
    return FinetuneRecipe.model_validate(
        {"stores": [{"path": store, "rewards": "given"}], "algorithm": {"name": method, **settings}, "steps": steps,
         "batch_size": BATCH, "seeds": [seed], "threads": threads, "out": out}
    )  # fmt: skip


def learn_ours(recipe: FinetuneRecipe, method: str, config: Any) -> tuple[Act, float]:
    """What `cvlctl finetune` does; the greedy policy, and the seconds of training."""
    seconds = finetune(recipe)["seconds"]
    policy = load_policy(recipe.out, recipe.seeds[0])
    return lambda observation, step: policy(observation), seconds


def learn_theirs(recipe: FinetuneRecipe, method: str, config: Any) -> tuple[Act, float]:
    """The same with d3rlpy, on the transitions that the recipe names, and with the recipe's matmul setting."""
    settings = training.resolve_settings(
        device="cpu", threads=recipe.threads, precision=recipe.precision, compile="false", steps=1, say=print
    )
    data = train.join([open_store(recipe.stores[0].path)], recipe.stores, None, True)
    buffer = peer_buffer(data)
    library().seed(recipe.seeds[0])
    algo = peer(method, config, data)
    run = theirs(algo, buffer, settings)
    begin = time.perf_counter()
    run(recipe.steps)
    return lambda observation, step: algo.predict(observation[None])[0], time.perf_counter() - begin


def play(name: str, task: str, act: Act, seed: int, steps: int, episodes: int) -> list[EpisodeResult]:
    """Greedy episodes 0, 1, ... of the environment that `cvlctl evaluate` plays."""
    env = envs.make(task, EVALUATION_SEED)
    rows = []
    for number in range(episodes):
        episode = collect_episode(env, act, number)
        total, success = outcome(episode)
        rows.append(EpisodeResult(name, task, seed, steps, number, total, len(episode), success))
    return rows


def learn(args: argparse.Namespace) -> dict[str, Any]:
    """Every run that is not in `args.json` yet, and the tables of all: scores, and cvlctl's difference from d3rlpy."""
    budget = {"steps": args.steps, "episodes": args.episodes, "cql_num_actions": args.num_actions}
    found: dict[str, Any] = {"budget": budget, "runs": {}, "machine": machine()}
    if args.json and args.json.exists():
        found = json.loads(args.json.read_text())
        if found["budget"] != budget:
            raise SystemExit(f"{args.json} is of another budget, {found['budget']}: name another file")
    for store in args.stores:
        task, digest = open_store(store).task, open_store(store).digest()[:16]
        for seed, method, name in itertools.product(args.seeds, args.methods, args.only):
            config = default_config(method, args.num_actions)
            key = f"{name} {method} {task} seed {seed} store {digest}"
            if key in found["runs"]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                recipe = recipe_of(method, config, store, args.steps, seed, args.threads, Path(folder) / "run")
                act, seconds = (learn_ours if name == "cvlctl" else learn_theirs)(recipe, method, config)
                rows = play(f"{method}, {name}", task, act, seed, args.steps, args.episodes)
            found["runs"][key] = {"seconds": round(seconds, 1), "rows": [asdict(row) for row in rows]}
            print(f"{key}: return {np.mean([row.episode_return for row in rows]):.1f}, {seconds:.0f} s", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    rows = [EpisodeResult(**row) for run in found["runs"].values() for row in run["rows"]]
    found["scores"] = scores.score_table(rows, aggregates=[])
    found["differences"] = [
        record
        for method in dict.fromkeys(row.algorithm.split(",")[0] for row in rows)
        for record in scores.pairwise(rows, baseline=f"{method}, d3rlpy")
        if record["algorithm"] == f"{method}, cvlctl"
    ]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-actions", type=int, default=10, help="that CQL draws of each kind")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=40, help="updates a round")
    parser.add_argument("--rows", type=int, default=100_000, help="rows in memory")
    parser.add_argument("--eager-only", action="store_true", help="compile nothing")
    parser.add_argument("--learn", action="store_true", help="train and play instead of measuring speed")
    parser.add_argument("--stores", nargs="+", type=Path, default=STORES)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args(arguments)
    if args.learn:
        found = learn(args)
        console = Console()
        console.print(report.to_rich(found["scores"], "greedy episodes"))
        if found["differences"]:
            console.print(report.to_rich(found["differences"], "cvlctl less d3rlpy"))
    else:
        found = speed(args)
        for method, table in found["updates"].items():
            print(f"{f'{method}, updates/s, {args.threads} threads':40}{'median':>10}{'ratio':>8}{'min':>8}{'max':>8}"
                  f"{'GFLOP':>8}{'of GEMM':>9}")  # fmt: skip
            for name, row in table.items():
                print(f"{name:40}{row['updates_per_second']:10.1f}{row['ratio']:7.2f}x"
                      f"{row['ratio_min']:7.2f}x{row['ratio_max']:7.2f}x"
                      f"{row['gflop']:8.2f}{row['share_of_bare_products']:9.0%}")  # fmt: skip
        state = found["machine"]
        print(f"{conditions(found)}; torch {state['versions']['torch']}, "
              f"d3rlpy {found['d3rlpy']}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
