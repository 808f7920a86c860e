"""TD3+BC, IQL and CQL beside d3rlpy's: updates a second, and what both libraries learn from the same store.

TD3+BC also stands beside a plain eager PyTorch loop, as it is written into a single file (CORL's way).

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
import copy
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
import torch.nn.functional as F
from common import (
    AS_SHIPPED,
    BF16,
    COMPILED,
    EAGER,
    FORM,
    OUR_SETTING,
    SPEC,
    Contestant,
    best,
    configure,
    finish,
    forms,
    learner,
    machine,
    measure,
    our_settings,
    parser,
    show,
    synthetic,
    versus,
)
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cvlctl.data import samplers
from cvlctl.data.load import join
from cvlctl.data.samplers import Data
from cvlctl.data.store import open_store
from cvlctl.learn.algorithms import ALGORITHMS, cql, iql, td3_bc
from cvlctl.learn.finetune import finetune
from cvlctl.learn.recipe import FinetuneRecipe
from cvlctl.learn.settings import Settings, resolve_settings
from cvlctl.play import envs
from cvlctl.play.envs import Act
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import EVALUATION_SEED, collect_episode, outcome
from cvlctl.score.render import to_rich
from cvlctl.score.tables import pairwise, score_table
from cvlctl.types import EpisodeResult, Spec

METHODS = ("td3_bc", "iql", "cql")
STORES = ("data/methods/gym/Hopper-v5.zarr", "data/methods/metaworld/window-open-v3.zarr")
LIBRARIES = ("cvlctl", "d3rlpy")
BATCH = 256
UPDATES = {"td3_bc": 200, "iql": 200, "cql": 40}  # a round
TITLES = {"td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL"}
D3RLPY, PLAIN = "d3rlpy", "plain eager PyTorch"
TARGETS = {  # at least, aim
    ("td3_bc", D3RLPY + AS_SHIPPED): (2.8, 4.0),
    ("td3_bc", PLAIN + AS_SHIPPED): (1.8, 2.5),
    ("iql", D3RLPY + AS_SHIPPED): (3.0, 4.0),
    ("cql", D3RLPY + AS_SHIPPED): (2.3, 2.8),
    ("cql", BF16): (None, 6.0),  # beside d3rlpy as shipped
}
BARE, PRODUCT = "bare matrix products", 2 * 7680 * 256 * 256
SHARE_NOTE = (
    "GFLOP, of any method: of the matrix products in one update. Share: the part of the rate of bare matrix products "
    "(7680x256 by 256x256, our matmul setting) at which they are done."
)


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


def theirs(algo: Any, buffer: Any, settings: Settings) -> Contestant:
    """What d3rlpy's `fit` does at each step, less its log and progress bar."""
    algo.build_with_dataset(buffer)

    def run(updates: int) -> None:
        configure(settings)
        for _ in range(updates):
            algo.update(buffer.sample_transition_batch(BATCH))

    return run


class PlainTD3BC:
    """TD3+BC as people write it: a module a network, copies as targets, one update after the other."""

    def __init__(self, spec: Spec, config: td3_bc.Config) -> None:
        (width,), self.config, self.count = spec.observation_shape, config, 0
        self.actor = nn.Sequential(*self._layers(width, config.hidden, spec.action_dim), nn.Tanh())
        self.critic_1 = nn.Sequential(*self._layers(width + spec.action_dim, config.hidden, 1))
        self.critic_2 = nn.Sequential(*self._layers(width + spec.action_dim, config.hidden, 1))
        self.modules = [self.actor, self.critic_1, self.critic_2]
        self.targets = [copy.deepcopy(module) for module in self.modules]
        both = [*self.critic_1.parameters(), *self.critic_2.parameters()]
        self.critic_optimiser = torch.optim.Adam(both, lr=config.learning_rate)
        self.actor_optimiser = torch.optim.Adam(self.actor.parameters(), lr=config.learning_rate)

    @staticmethod
    def _layers(width: int, hidden: Sequence[int], outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        return [*layers, nn.Linear(width, outputs)]

    def update(
        self, observation: Tensor, action: Tensor, reward: Tensor, discount: Tensor, after: Tensor, noise: Tensor
    ) -> None:
        """One update on (B, ...), observations normalised; the actor and the targets every `actor_every`-th time."""
        config, (actor_target, *critic_targets) = self.config, self.targets
        self.count += 1
        with torch.no_grad():
            disturbance = (noise * config.policy_noise).clamp(-config.noise_clip, config.noise_clip)
            pair = torch.cat([after, (actor_target(after) + disturbance).clamp(-1, 1)], dim=1)
            next_q = torch.min(*[critic(pair) for critic in critic_targets]).squeeze(1)
            y = reward + discount * next_q
        pair = torch.cat([observation, action], dim=1)
        loss = F.mse_loss(self.critic_1(pair).squeeze(1), y) + F.mse_loss(self.critic_2(pair).squeeze(1), y)
        self.critic_optimiser.zero_grad()
        loss.backward()
        self.critic_optimiser.step()
        if self.count % config.actor_every:
            return
        chosen = self.actor(observation)
        q = self.critic_1(torch.cat([observation, chosen], dim=1))
        loss = F.mse_loss(chosen, action) - config.q_coefficient / q.abs().mean().detach() * q.mean()
        self.actor_optimiser.zero_grad()
        loss.backward()
        self.actor_optimiser.step()
        for module, target in zip(self.modules, self.targets, strict=True):
            for weight, average in zip(module.parameters(), target.parameters(), strict=True):
                average.data.copy_(config.ema_rate * weight.data + (1 - config.ema_rate) * average.data)


def plain(config: td3_bc.Config, data: Data, settings: Settings) -> Contestant:
    """PlainTD3BC on batches indexed from tensors in memory, as wide as ours."""
    mean, std = samplers.observation_statistics(data.observation)
    row, ends = data.layout.row, data.layout.terminated & (data.layout.row + 1 == data.layout.last)
    observations, actions = (data.observation[row] - mean) / std, data.action[row]
    next_observations, rewards = (data.observation[row + 1] - mean) / std, data.arrival_reward[0, row + 1]
    discounts = config.gamma * (~ends).float()
    learner = PlainTD3BC(SPEC, config)

    def run(updates: int) -> None:
        configure(settings)
        for _ in range(updates):
            index = torch.randint(len(row), (BATCH,))
            action = actions[index]
            learner.update(
                observations[index], action, rewards[index], discounts[index], next_observations[index],
                torch.randn_like(action),
            )  # fmt: skip

    return run


def bare_products(settings: Settings) -> Contestant:
    """What an update could not outdo: matrix products of hidden layers and nothing else, PRODUCT floating-point
    operations in each, as wide as those of CQL's sampled actions."""
    x, weight = torch.randn(7680, 256), torch.randn(256, 256)

    def run(updates: int) -> None:
        configure(settings)
        for _ in range(updates):
            torch.mm(x, weight)

    return run


def operations(run: Contestant) -> float:
    """Floating-point operations of the matrix products in one update, forward and backward, counted over two."""
    with FlopCounterMode(display=False) as counter:
        run(2)
    return counter.get_total_flops() / 2


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Updates/s of every form of every method beside the peers', and the operations in an update and the share of the
    rate of bare matrix products at which they are done."""
    before, data, mine = machine(), synthetic(args.rows), our_settings(args.threads, args.eager_only)
    made: dict[str, list[dict[str, Any]]] = {"comparisons": [], "curves": []}
    for method in args.methods:
        rows, curve = compare(method, args, data, mine)
        made["comparisons"] += rows
        made["curves"].append(curve)
        show(curve)
    made["curves"][-1]["note"] = SHARE_NOTE
    return made | {
        "settings": mine[best(mine)].as_dict(),
        "sizes": {"hidden": list(td3_bc.Config().hidden), "batch_size": BATCH, "rows": len(data.observation),
                  "cql_num_actions": args.num_actions},
        "rounds": args.rounds, "updates_a_round": args.updates or UPDATES,
        "d3rlpy": library().__version__, "machine": before, "load_average_after": machine()["load_average"],
    }  # fmt: skip


def compare(
    method: str, args: argparse.Namespace, data: Data, mine: dict[str, Settings]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The comparisons of one method, and the table of all its forms; `mine`: what ours computes with, by form."""
    config, buffer = default_config(method, args.num_actions), peer_buffer(data)
    contestants = {}
    for suffix, settings in ((AS_SHIPPED, Settings("cpu", args.threads, "float32", False)), (OUR_SETTING, mine[EAGER])):
        contestants[D3RLPY + suffix] = theirs(peer(method, config, data), buffer, settings)
        if method == "td3_bc":
            contestants[PLAIN + suffix] = plain(config, data, settings)
    module = ALGORITHMS[method]
    contestants |= {form: learner(module, config, [0], data, BATCH, settings) for form, settings in mine.items()}
    work = {name: operations(run) for name, run in contestants.items() if name not in (COMPILED, BF16)}
    work |= dict.fromkeys(mine, work[EAGER])  # the counter cannot see into compiled programs
    rates = measure({**contestants, BARE: bare_products(mine[EAGER])}, args.rounds, args.updates or UPDATES[method])
    products = np.array(rates.pop(BARE)) * PRODUCT
    title = f"{TITLES[method]}'s update, batch {BATCH}, {'x'.join(map(str, config.hidden))}"
    pairs = [(best(mine), name) for name in contestants if name not in mine]
    pairs += [(BF16, D3RLPY + AS_SHIPPED)] * (BF16 in mine)
    comparisons = []
    for form, name in pairs:
        least, aim = TARGETS.get((method, BF16 if form == BF16 else name), (None, None))
        row = versus(
            f"{title}, {FORM[form]}", name, rates[form], rates[name], threads=args.threads, least=least, aim=aim
        )
        comparisons.append(row)
    curve = forms(f"{title}, {args.threads} threads", rates, D3RLPY + AS_SHIPPED)
    curve["columns"] += ["GFLOP", "share"]
    for row in curve["rows"]:
        share = np.median(np.array(rates[row[0]]) * work[row[0]] / products)
        row += [round(work[row[0]] / 1e9, 3), round(float(share), 3)]
    return comparisons, curve


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
    settings = resolve_settings(
        device="cpu", threads=recipe.threads, precision=recipe.precision, compile="false", steps=1, say=print
    )
    data = join([open_store(recipe.stores[0].path)], recipe.stores, None, True)
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
    found["scores"] = score_table(rows, aggregates=[])
    found["differences"] = [
        record
        for method in dict.fromkeys(row.algorithm.split(",")[0] for row in rows)
        for record in pairwise(rows, baseline=f"{method}, d3rlpy")
        if record["algorithm"] == f"{method}, cvlctl"
    ]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options.add_argument("--num-actions", type=int, default=10, help="that CQL draws of each kind")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--updates", type=int, help=f"a round; if not given {UPDATES}")
    options.add_argument("--rows", type=int, default=100_000, help="rows in memory")
    options.add_argument("--eager-only", action="store_true", help="compile nothing")
    options.add_argument("--learn", action="store_true", help="train and play instead of measuring speed")
    options.add_argument("--stores", nargs="+", type=Path, default=STORES)
    options.add_argument("--steps", type=int, default=10_000)
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--episodes", type=int, default=20)
    options.add_argument("--only", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    args = options.parse_args(arguments)
    if not args.learn:
        return finish(speed(args), args)
    found = learn(args)
    console = Console()
    console.print(to_rich(found["scores"], "greedy episodes"))
    if found["differences"]:
        console.print(to_rich(found["differences"], "cvlctl less d3rlpy"))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
