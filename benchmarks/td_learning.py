"""What our TD learners and d3rlpy's learn from the same stores: `python benchmarks/td_learners.py --learn`."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import numpy as np
from rich.console import Console
from td_peers import BATCH, default_config, library, peer, peer_buffer, theirs

from cvlctl.data.load import join
from cvlctl.data.store import open_store
from cvlctl.learn.finetune import finetune
from cvlctl.learn.recipe import FinetuneRecipe
from cvlctl.learn.settings import resolve_settings
from cvlctl.play import envs
from cvlctl.play.envs import Act
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import EVALUATION_SEED, collect_episode, outcome
from cvlctl.score.render import to_rich
from cvlctl.score.tables import pairwise, score_table
from cvlctl.types import EpisodeResult


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
    found: dict[str, Any] = {"budget": budget, "runs": {}, "machine": common.machine()}
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


def compare(args: argparse.Namespace) -> None:
    """Learn, print the tables, keep everything."""
    found = learn(args)
    console = Console()
    console.print(to_rich(found["scores"], "greedy episodes"))
    if found["differences"]:
        console.print(to_rich(found["differences"], "cvlctl less d3rlpy"))
    common.keep(found, args.json)
