"""`cvlctl export`: a policy as one file that needs nothing of cvlctl: ONNX, a program of torch, or plain arrays.

All hold the same function, in float32: the greedy action of observations (N, O) for any N,

    x = clip((observation - mean) / std, -10, 10)
    x = max(x W_i + b_i, 0)                 for every layer but the last
    action = centre + scale * tanh(x W + b)  (N, A), within the action bounds

and say of themselves what they are (`cvlctl`, JSON).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.checkpoints import Saved, checkpoint_file, read
from cvlctl.data.store import Column, open_store
from cvlctl.errors import CvlctlError
from cvlctl.files import write_result
from cvlctl.play.policies import NumpyPolicy, head_in_units, vector_policy_of
from cvlctl.progress import say
from cvlctl.runs import called, read_run
from cvlctl.units import Bounds
from cvlctl.version import __version__

CHECKED = 1_000  # observations on which a file must answer as the policy does
TOLERANCE = 1e-5  # of half an action's range: sums of another order
Arrays = dict[str, np.ndarray]
Answer = Callable[[np.ndarray], np.ndarray]


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
    policy: NumpyPolicy = vector_policy_of(found, seed)
    if units == "physical":
        policy = head_in_units(policy, action_bounds, str(run))
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


def arrays_of(policy: NumpyPolicy) -> Arrays:
    """mean, std (O,), weight_i (in, out), bias_i (out,), centre, scale (A,): what the module's head says."""
    size, last = policy.spec.action_dim, len(policy.layers) - 1
    arrays = {"mean": policy.mean, "std": policy.std}
    for i, (weight, bias) in enumerate(policy.layers):
        kept = slice(size if i == last else None)  # the last layer's other half is for sampled actions
        arrays |= {f"weight_{i}": weight[:, kept], f"bias_{i}": bias[kept]}
    centre, half = policy.scale
    return arrays | {"centre": centre, "scale": half}


def _about(run: Path, found: Saved, policy: NumpyPolicy, seed: int, units: str, checked_on: str) -> dict[str, Any]:
    """What a file says of itself, as JSON has it."""
    header, goals = found.metadata, policy.goals
    about: dict[str, Any] = {
        "cvlctl": __version__, "task": header.get("task"), "algorithm": header.get("algorithm"), "seed": seed,
        "step": header.get("step"), "observation_size": len(policy.mean), "action_size": policy.spec.action_dim,
        "units": units, **policy.units.attributes(), "checkpoint_sha256": found.sha256, "checked_on": checked_on,
    }  # fmt: skip
    if goals is not None:
        about["goal_columns"] = list(goals.goal)  # of a state
        width = policy.spec.observation_shape[0]
        about["command_columns"] = list(goals.command) or list(range(width, len(policy.mean)))  # of the input
    if run.is_dir():
        record = read_run(run)
        about |= {"algorithm": called(record["recipe"]) or about["algorithm"], "data": record["inputs"]}
    return about


def _observations(found: Saved, policy: NumpyPolicy) -> tuple[np.ndarray, str]:
    """Observations (n, O) of the run's first store; draws where it is gone, or the policy sees a goal beside."""
    width, recipe = len(policy.mean), found.metadata.get("recipe")
    try:
        assert isinstance(recipe, Mapping)
        store = open_store(Path(recipe["stores"][0]["path"]))
        rows = Column(store, "data/observation").rows(0, min(CHECKED, store.num_rows))
        if rows.shape[1:] == (width,):
            return np.asarray(rows, np.float32), f"{len(rows)} observations of {store.path}"
    except (CvlctlError, LookupError, TypeError, AssertionError) as error:
        say(f"checking on random observations, since the run's own cannot be read: {getattr(error, 'what', error)}")
    spread = np.where(policy.varies, policy.std, np.float32(1))
    drawn = policy.mean + 2 * spread * np.random.default_rng(0).standard_normal((CHECKED, width), dtype=np.float32)
    return drawn.astype(np.float32), f"{CHECKED} random observations"


def _difference(policy: NumpyPolicy, answer: Answer, observations: np.ndarray) -> float:
    """The largest, in half an action's range; of all rows together and of one alone."""
    half = policy.scale[1]
    pairs = [(policy(rows), answer(rows)) for rows in (observations, observations[:1])]
    if any(wanted.shape != found.shape for wanted, found in pairs):
        return float("inf")
    return max(float((np.abs(wanted - found) / half).max()) for wanted, found in pairs)


def run_arrays(arrays: Mapping[str, np.ndarray], observation: np.ndarray) -> np.ndarray:
    """The policy of an npz file, by numpy: the equation at the head of this module."""
    x = np.clip((observation - arrays["mean"]) / arrays["std"], -10, 10)
    last = sum(name.startswith("weight_") for name in arrays) - 1
    for i in range(last):
        x = np.maximum(x @ arrays[f"weight_{i}"] + arrays[f"bias_{i}"], 0)
    return arrays["centre"] + arrays["scale"] * np.tanh(x @ arrays[f"weight_{last}"] + arrays[f"bias_{last}"])


def _npz(arrays: Arrays, about: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays, cvlctl=np.array(json.dumps(about)))  # type: ignore[arg-type]
    return file.getvalue()


def _load_npz(data: bytes) -> Answer:
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files if name != "cvlctl"}
    return lambda observation: run_arrays(arrays, observation)


def _onnx(arrays: Arrays, about: dict[str, Any]) -> bytes:
    from onnx import TensorProto, checker, helper, numpy_helper

    low, high = np.float32(-10), np.float32(10)
    weights = [
        numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in {**arrays, "low": low, "high": high}.items()
    ]
    last = sum(name.startswith("weight_") for name in arrays) - 1
    nodes = [
        helper.make_node("Sub", ["observation", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["scaled"]),
        helper.make_node("Clip", ["scaled", "low", "high"], ["x_0"]),
    ]
    for i in range(last + 1):
        nodes.append(helper.make_node("Gemm", [f"x_{i}", f"weight_{i}", f"bias_{i}"], [f"y_{i}"]))
        nodes.append(helper.make_node("Tanh" if i == last else "Relu", [f"y_{i}"], [f"x_{i + 1}"]))
    nodes.append(helper.make_node("Mul", [f"x_{last + 1}", "scale"], ["wide"]))
    nodes.append(helper.make_node("Add", ["wide", "centre"], ["action"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
        for name, size in (("observation", about["observation_size"]), ("action", about["action_size"]))
    ]
    graph = helper.make_graph(nodes, "policy", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]  # and its IR: old enough for runtimes on robots
    model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="cvlctl")
    helper.set_model_props(
        model, {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    )
    checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _load_onnx(data: bytes) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda observation: session.run(["action"], {"observation": observation})[0]


def _torch(arrays: Arrays, about: dict[str, Any]) -> bytes:
    import torch

    class Policy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, array in arrays.items():
                self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)))

        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            own = dict(self.named_buffers())
            x = ((observation - own["mean"]) / own["std"]).clamp(-10, 10)
            last = sum(name.startswith("weight_") for name in own) - 1
            for i in range(last):
                x = torch.relu(x @ own[f"weight_{i}"] + own[f"bias_{i}"])
            return own["centre"] + own["scale"] * torch.tanh(x @ own[f"weight_{last}"] + own[f"bias_{last}"])

    example, file = torch.zeros(2, about["observation_size"]), io.BytesIO()
    program = torch.export.export(Policy(), (example,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    torch.export.save(program, file, extra_files={"cvlctl.json": json.dumps(about)})
    return file.getvalue()


def _load_torch(data: bytes) -> Answer:
    import torch

    module = torch.export.load(io.BytesIO(data)).module()
    return lambda observation: module(torch.from_numpy(observation)).numpy()


FORMATS: dict[str, tuple[Callable[[Arrays, dict[str, Any]], bytes], Callable[[bytes], Answer], tuple[str, ...]]] = {
    "onnx": (_onnx, _load_onnx, ("onnx", "onnxruntime")),
    "torch": (_torch, _load_torch, ("torch",)),
    "npz": (_npz, _load_npz, ()),
}
