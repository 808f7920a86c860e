"""How long a policy takes for one observation, by each way out of cvlctl: median and 99th percentile.

    python benchmarks/latency.py [--observation 39] [--action 4] [--hidden 256 256] [--calls 5000]
    python benchmarks/latency.py --encoder small --calls 500        # three stacked frames of 64x64 instead of numbers

One thread each. `--format onnx` is left out where its extra is not installed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from cvlctl.learn.policy_files import FORMATS, arrays_of, cameras_of
from cvlctl.play.policies import NumpyPolicy, Policy
from cvlctl.play.sights import SeeingPolicy, Seen
from cvlctl.types import Observe, Spec

FRAME, STACK, FEATURES = (64, 64, 3), 3, 64


def policy_of(observation: int, action: int, hidden: Sequence[int]) -> NumpyPolicy:
    """One with random weights: how long it takes does not depend on them."""
    rng, sizes = np.random.default_rng(0), [observation, *hidden, 2 * action]
    layers = [(rng.standard_normal(pair) / np.sqrt(pair[0]), np.zeros(pair[1])) for pair in pairwise(sizes)]
    spec = Spec((observation,), action, horizon=1_000)
    seen = np.array([[-1.0] * observation, [1.0] * observation], np.float32)
    return NumpyPolicy(layers, np.zeros(observation), np.ones(observation), spec, data_range=seen)


def seeing_policy_of(encoder: str, action: int, hidden: Sequence[int]) -> SeeingPolicy:
    """One that sees a camera, with random weights."""
    from cvlctl.play.convolutions import shapes

    rng, arrays = np.random.default_rng(0), {}
    for j, shape in enumerate(shapes(encoder, FRAME, STACK, FEATURES)):
        out = shape[0] if len(shape) == 4 else shape[1]
        arrays[f"actor.camera0.{encoder}.{j}.weight"] = rng.normal(0, 0.1, shape).astype(np.float32)
        arrays[f"actor.camera0.{encoder}.{j}.bias"] = np.zeros(out, np.float32)
    observe = Observe(cameras=("front",), stack=STACK, encoder=encoder, features=FEATURES)  # type: ignore[arg-type]
    head, spec = policy_of(FEATURES, action, hidden), Spec((0,), action, 1_000, cameras={"front": FRAME})
    return SeeingPolicy(arrays, head, spec, observe)


def measured(answer: Callable[[Seen], np.ndarray], observation: Seen, calls: int) -> tuple[float, float]:
    """Median and 99th percentile in microseconds, after a tenth as many calls to warm up."""
    taken = []
    for _ in range(calls // 10 + calls):
        begin = time.perf_counter()
        answer(observation)
        taken.append(time.perf_counter() - begin)
    median, late = np.percentile(np.array(taken[calls // 10 :]) * 1e6, [50, 99])
    return float(median), float(late)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Print the table; median and 99th percentile (microseconds) by way."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--observation", type=int, default=39)
    options.add_argument("--action", type=int, default=4)
    options.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    options.add_argument("--encoder", choices=("small", "drq", "impala"))
    options.add_argument("--calls", type=int, default=5_000)
    args = options.parse_args(arguments)
    about: dict[str, Any] = {"observation_size": args.observation, "action_size": args.action}
    rng, policy = np.random.default_rng(1), policy_of(args.observation, args.action, args.hidden)
    observation: Seen = rng.standard_normal((1, args.observation)).astype(np.float32)
    ways: dict[str, Callable[[Any], np.ndarray]] = {"load_policy (numpy)": policy, "its outside()": policy.outside}
    own: Policy = policy
    if args.encoder:
        own = seeing_policy_of(args.encoder, args.action, args.hidden)
        about |= {"inputs": own.inputs, "encoder": args.encoder}
        observation = {"front": rng.integers(0, 256, (1, STACK, *FRAME), np.uint8)}
        ways = {"load_policy (torch)": own}
    for name, (write, load, packages) in FORMATS.items():
        if all(find_spec(package) for package in packages) and not (name == "npz" and cameras_of(about)):
            ways[name] = load(write(arrays_of(own), about))
    sees = f"{args.encoder} of {STACK} frames" if args.encoder else f"{args.observation} numbers"
    print(f"{sees} in, {args.hidden} hidden units, {args.action} out; {args.calls} calls")
    found = {}
    for name, answer in ways.items():
        found[name] = measured(answer, observation, args.calls)
        print(f"{name:20} median {found[name][0]:7.0f} us, 99th percentile {found[name][1]:7.0f} us")
    return found


if __name__ == "__main__":
    main()
