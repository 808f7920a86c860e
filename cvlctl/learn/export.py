"""`cvlctl export`: a policy as one file that needs nothing of cvlctl: ONNX, a program of torch, or plain arrays.

All hold the same function, in float32: the greedy action of observations (N, O) for any N,

    x = clip((observation - mean) / std, -10, 10)
    x = max(x W_i + b_i, 0)                 for every layer but the last
    action = centre + scale * tanh(x W + b)  (N, A), within the action bounds

and say of themselves what they are (`cvlctl`, JSON). Of a policy that sees frames the observation is made inside, of
the vector and of what its encoders make of each camera's stack (N, S, H, W, C) uint8, the latest frame last.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.checkpoints import Saved, checkpoint_file, read
from cvlctl.data.shown import Sight
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.files import write_result
from cvlctl.learn.policy_files import FORMATS, Answer, arrays_of
from cvlctl.play.policies import NumpyPolicy, Policy, in_units, policy_of
from cvlctl.play.sights import VECTOR, SeeingPolicy, Seen, part
from cvlctl.progress import say
from cvlctl.runs import called, read_run
from cvlctl.units import Bounds
from cvlctl.version import __version__

CHECKED, CHECKED_FRAMES = 1_000, 100  # observations on which a file must answer as the policy does
TOLERANCE = 1e-5  # of half an action's range: sums of another order


def export(
    run: Path,
    out: Path,
    format: str,
    *,
    seed: int = 0,
    checkpoint: str = "last",
    units: str = "physical",
    action_bounds: Bounds | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the policy of one seed of a run as a file, after checking that it answers as `load_policy` does.

    Args:
        run: a run directory, or a checkpoint file.
        format: one of FORMATS.
        units: of the actions: "physical", within the action bounds of the data, or "normalised", in [-1, 1].

    Raises:
        CvlctlError: as `load_policy` does; `out` exists; a package is not installed; or the file answers otherwise.
    """
    write, load, packages = FORMATS[format]
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise CvlctlError(f"--format {format} needs {' and '.join(missing)}", f"pip install 'cvlctl[{format}]'")
    found = read(checkpoint_file(run, int(checkpoint) if checkpoint.isdigit() else checkpoint))
    policy = policy_of(found, seed)
    if isinstance(policy, SeeingPolicy) and policy.needs_goal:
        what = f"{run}: its policy is shown a goal as frames, for which an exported file has no place"
        raise CvlctlError(what, "load_policy takes one beside what is seen: policy(shown, goal=...)")
    if units == "physical":
        policy = in_units(policy, action_bounds, str(run))
    observations, checked_on = _observations(found, policy)
    about = _about(run, found, policy, seed, units, checked_on)
    data = write(arrays_of(policy), about)
    difference = _difference(policy, load(data), observations)
    if not difference <= TOLERANCE:
        what = (
            f"{out}: the {format} file answers otherwise than the policy, by {difference:.2g} of half an action's range"
        )
        raise CvlctlError(what, "nothing was written; another version of its library may help")
    status = write_result(out, data, force=force).replace("written", "exported")
    return {"status": status, "out": str(out), "format": format, "largest_difference": difference, **about}


def _about(run: Path, found: Saved, policy: Policy, seed: int, units: str, checked_on: str) -> dict[str, Any]:
    """What a file says of itself, as JSON has it."""
    header = found.metadata
    size = len(policy.mean) if isinstance(policy, NumpyPolicy) else policy.spec.observation_shape[0]
    about: dict[str, Any] = {
        "cvlctl": __version__, "task": header.get("task"), "algorithm": header.get("algorithm"), "seed": seed,
        "step": header.get("step"), "observation_size": size, "action_size": policy.spec.action_dim,
        "units": units, **policy.units.attributes(), "checkpoint_sha256": found.sha256, "checked_on": checked_on,
    }  # fmt: skip
    if isinstance(policy, SeeingPolicy):
        about |= {"inputs": {name: list(size) for name, size in policy.inputs.items()}}
        about["encoder"] = policy.observe.encoder
    elif (goals := policy.goals) is not None:
        about["goal_columns"] = list(goals.goal)  # of a state
        width = policy.spec.observation_shape[0]
        about["command_columns"] = list(goals.command) or list(range(width, size))  # of the input
    if run.is_dir():
        record = read_run(run)
        about |= {"algorithm": called(record["recipe"]) or about["algorithm"], "data": record["inputs"]}
    return about


def _observations(found: Saved, policy: Policy) -> tuple[Seen, str]:
    """Observations of the run's first store; draws where it is gone, or the policy sees a goal beside."""
    seeing, recipe = isinstance(policy, SeeingPolicy), found.metadata.get("recipe")
    count, what = (CHECKED_FRAMES, "frames") if seeing else (CHECKED, "observations")
    try:
        assert isinstance(recipe, Mapping)
        store = open_store(Path(recipe["stores"][0]["path"]))
        observe = policy.observe if isinstance(policy, SeeingPolicy) else None
        seen = Sight(store, observe).at(np.arange(min(count, store.num_rows)))
        if _fits(seen, policy):
            return seen, f"{min(count, store.num_rows)} {what} of {store.path}"
    except (CvlctlError, LookupError, TypeError, AssertionError) as error:
        say(f"checking on random {what}, since the run's own cannot be read: {getattr(error, 'what', error)}")
    return _drawn(policy, count), f"{count} random {what}"


def _fits(seen: Seen, policy: Policy) -> bool:
    if isinstance(policy, SeeingPolicy):
        return isinstance(seen, Mapping) and {name: of.shape[1:] for name, of in seen.items()} == policy.inputs
    return not isinstance(seen, Mapping) and seen.shape[1:] == policy.mean.shape


def _drawn(policy: Policy, count: int) -> Seen:
    rng = np.random.default_rng(0)
    if isinstance(policy, SeeingPolicy):
        sizes = {name: (count, *size) for name, size in policy.inputs.items()}
        return {
            name: rng.standard_normal(size, dtype=np.float32)
            if name == VECTOR
            else rng.integers(0, 256, size, np.uint8)
            for name, size in sizes.items()
        }
    spread = np.where(policy.varies, policy.std, np.float32(1))
    drawn = policy.mean + 2 * spread * rng.standard_normal((count, len(policy.mean)), dtype=np.float32)
    return drawn.astype(np.float32)


def _difference(policy: Any, answer: Answer, observations: Seen) -> float:
    """The largest, in half an action's range; of all rows together and of one alone."""
    half = (policy.head if isinstance(policy, SeeingPolicy) else policy).scale[1]
    pairs = [(policy(rows), answer(rows)) for rows in (observations, part(observations, slice(1)))]
    if any(wanted.shape != found.shape for wanted, found in pairs):
        return float("inf")
    return max(float((np.abs(wanted - found) / half).max()) for wanted, found in pairs)
