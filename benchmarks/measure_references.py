"""Measure the returns that normalised scores refer to, and write cvlctl/play/references.json.

For each Metaworld task: uniformly random actions (min; 50 episodes, each goal once, since luck decides much there) and
the scripted expert (max; 10 episodes), the first of the same stream. For locomotion: D4RL's constants, copied here.

    python benchmarks/measure_references.py [--workers 2]     # about four minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.play.envs import list_tasks, make, scripted_policy
from cvlctl.play.policies import RandomPolicy
from cvlctl.play.rollout import EVALUATION_SEED, collect_episode
from cvlctl.play.workers import share_out

RANDOM_EPISODES, SCRIPTED_EPISODES = 50, 10

# d4rl/infos.py, the same for v0 to v2 of its datasets
D4RL = {
    "gym/Hopper-v5": (-20.272305, 3234.3),
    "gym/Walker2d-v5": (1.629008, 4592.3),
    "gym/HalfCheetah-v5": (-280.178953, 12135.0),
    "gym/Ant-v5": (-325.6, 3879.7),
}
D4RL_SOURCE = (
    "D4RL (d4rl/infos.py): min a random policy, max an expert, measured with mujoco-py and its environments; "
    "a convention with the v5 environments, whose returns differ"
)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Mean return and success rate of both policies on one task."""
    task = request["task"]
    env, expert = make(task, EVALUATION_SEED), scripted_policy(task)
    found: dict[str, Any] = {}
    for key, name, num_episodes in (("min", "random", RANDOM_EPISODES), ("max", "scripted", SCRIPTED_EPISODES)):
        played = [
            collect_episode(env, RandomPolicy(env.spec, EVALUATION_SEED, k) if name == "random" else expert, k)
            for k in range(num_episodes)
        ]
        returns = [float(np.sum(e.rewards, dtype=np.float64)) for e in played if e.rewards is not None]
        found[key] = round(float(np.mean(returns)), 3)
        found[f"{name}_success"] = float(np.mean([bool(np.any(e.successes)) for e in played]))
    versions = env.versions()
    env.close()
    return {"row": found, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "cvlctl" / "play" / "references.json")
    options = parser.parse_args()

    names = [task for task in list_tasks() if task.startswith("metaworld/")]
    requests = [{"task": task} for task in names]
    much = f"{RANDOM_EPISODES} episodes of random actions (min), {SCRIPTED_EPISODES} of the scripted expert (max)"
    source = f"measured: {much}"
    tasks: dict[str, Any] = {}
    versions: dict[str, str] = {}
    with closing(share_out("measure_references:measure", requests, options.workers)) as answers:
        for index, answer in answers:
            tasks[names[index]] = answer["row"] | {"source": source}
            versions = answer["versions"]
            print(names[index], answer["row"], file=sys.stderr, flush=True)
    tasks = {name: tasks[name] for name in names}
    tasks |= {name: {"min": low, "max": high, "source": D4RL_SOURCE} for name, (low, high) in D4RL.items()}
    written = {
        "command": "python benchmarks/measure_references.py",
        "score": "100 * (return - min) / (max - min)",
        "environment_seed": EVALUATION_SEED,
        "versions": versions,
        "tasks": tasks,
    }
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
