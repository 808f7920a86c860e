"""Policies as the bytes of a file: ONNX, a program of torch, or plain arrays. `export` says what they compute."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.play.policies import NumpyPolicy, Policy
from cvlctl.play.sights import VECTOR, SeeingPolicy, Seen

if TYPE_CHECKING:
    import torch
    from onnx import NodeProto, TensorProto, ValueInfoProto

Arrays = dict[str, np.ndarray]
About = Mapping[str, Any]  # what a file says of itself: of one that sees frames `inputs` and `encoder` too
Answer = Callable[[Seen], np.ndarray]


def arrays_of(policy: Policy) -> Arrays:
    """mean, std (O,), weight_i (in, out), bias_i (out,), centre, scale (A,): what the module's head says. Of a policy
    that sees frames O counts the features too, and camera0_weight_i, camera0_bias_i are its first camera's encoder."""
    if isinstance(policy, SeeingPolicy):
        assert isinstance(policy.head, NumpyPolicy)
        parts = {name: name.split(".") for name in policy.arrays}  # actor.camera0.small.2.weight
        encoders = {f"{x[1]}_{x[4]}_{x[3]}": policy.arrays[name] for name, x in parts.items()}
        return arrays_of(policy.head) | encoders
    size, last = policy.spec.action_dim, len(policy.layers) - 1
    arrays = {"mean": policy.mean, "std": policy.std}
    for i, (weight, bias) in enumerate(policy.layers):
        kept = slice(size if i == last else None)  # the last layer's other half is for sampled actions
        arrays |= {f"weight_{i}": weight[:, kept], f"bias_{i}": bias[kept]}
    centre, half = policy.scale
    return arrays | {"centre": centre, "scale": half}


def cameras_of(about: About) -> list[str]:
    """Those that a file is shown, in the order of its encoders; none of one that sees a vector alone."""
    return [name for name in about.get("inputs", {}) if name != VECTOR]


# --- plain arrays


def run_arrays(arrays: Mapping[str, np.ndarray], observation: np.ndarray) -> np.ndarray:
    """The policy of an npz file, by numpy: the equation at the head of `export`."""
    x = np.clip((observation - arrays["mean"]) / arrays["std"], -10, 10)
    last = sum(name.startswith("weight_") for name in arrays) - 1
    for i in range(last):
        x = np.maximum(x @ arrays[f"weight_{i}"] + arrays[f"bias_{i}"], 0)
    return arrays["centre"] + arrays["scale"] * np.tanh(x @ arrays[f"weight_{last}"] + arrays[f"bias_{last}"])


def _npz(arrays: Arrays, about: About) -> bytes:
    if cameras := cameras_of(about):
        what = f"the policy sees frames of {', '.join(cameras)}, and plain arrays do not say how these are encoded"
        raise CvlctlError(what, "--format onnx or torch: a runtime has the convolutions")
    file = io.BytesIO()
    np.savez(file, **arrays, cvlctl=np.array(json.dumps(about)))  # type: ignore[arg-type]
    return file.getvalue()


def _load_npz(data: bytes) -> Answer:
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files if name != "cvlctl"}
    return lambda observation: run_arrays(arrays, np.asarray(observation))


# --- ONNX


def _onnx(arrays: Arrays, about: About) -> bytes:
    from onnx import TensorProto, checker, helper, numpy_helper

    low, high = np.float32(-10), np.float32(10)
    weights = [
        numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in {**arrays, "low": low, "high": high}.items()
    ]
    begin = helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["N", about["observation_size"]])
    inputs: list[ValueInfoProto] = [begin]
    nodes: list[NodeProto] = []
    if cameras_of(about):
        inputs, nodes, more = _onnx_encoders(arrays, about)
        weights += more
    last = sum(name.startswith("weight_") for name in arrays) - 1
    nodes += [
        helper.make_node("Sub", ["observation", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["scaled"]),
        helper.make_node("Clip", ["scaled", "low", "high"], ["x_0"]),
    ]
    for i in range(last + 1):
        nodes.append(helper.make_node("Gemm", [f"x_{i}", f"weight_{i}", f"bias_{i}"], [f"y_{i}"]))
        nodes.append(helper.make_node("Tanh" if i == last else "Relu", [f"y_{i}"], [f"x_{i + 1}"]))
    nodes.append(helper.make_node("Mul", [f"x_{last + 1}", "scale"], ["wide"]))
    nodes.append(helper.make_node("Add", ["wide", "centre"], ["action"]))
    own = {one.name for one in weights} | {name for node in nodes for name in node.output}
    if taken := own & {one.name for one in inputs}:
        what = f"the camera {min(taken)} has the name of something else in the file"
        raise CvlctlError(what, "--format torch takes a camera of any name")
    end = helper.make_tensor_value_info("action", TensorProto.FLOAT, ["N", about["action_size"]])
    graph = helper.make_graph(nodes, "policy", inputs, [end], weights)
    opset = [helper.make_opsetid("", 17)]  # and its IR: old enough for runtimes on robots
    model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="cvlctl")
    helper.set_model_props(
        model, {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    )
    checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _onnx_encoders(arrays: Arrays, about: About) -> tuple[list[ValueInfoProto], list[NodeProto], list[TensorProto]]:
    """Inputs, nodes that make "observation" of them, and constants: `play.convolutions`, node by node."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[NodeProto] = []
    plain: Arrays = {"unit": np.array(1 / 255, np.float32), "middle": np.array(0.5, np.float32)}
    kinds = {name: TensorProto.FLOAT if name == VECTOR else TensorProto.UINT8 for name in about["inputs"]}
    inputs = [helper.make_tensor_value_info(n, kinds[n], ["N", *size]) for n, size in about["inputs"].items()]

    def add(kind: str, *of: str, **settings: Any) -> str:
        """A node more; the name of what it makes."""
        out = f"{kind.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(kind, of, [out], **settings))
        return out

    def features(i: int, camera: str) -> str:
        layers, (stack, height, width, channels) = count(), about["inputs"][camera]

        def conv(x: str, stride: int = 1, padding: int = 1) -> str:
            j, around = next(layers), [padding] * 4
            return add("Conv", x, f"camera{i}_weight_{j}", f"camera{i}_bias_{j}", strides=[stride] * 2, pads=around)

        plain[f"camera{i}_shape"] = np.array([0, stack * channels, height, width])
        x = add("Reshape", add("Transpose", camera, perm=[0, 1, 4, 2, 3]), f"camera{i}_shape")
        x = add("Sub", add("Mul", add("Cast", x, to=TensorProto.FLOAT), "unit"), "middle")
        if about["encoder"] == "impala":
            for _ in range(3):
                x = add("MaxPool", conv(x), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
                for _ in range(2):
                    inner = conv(add("Relu", x))
                    x = add("Add", x, conv(add("Relu", inner)))
            x = add("Relu", x)
        else:
            for stride, padding in [(2, 1)] * 4 if about["encoder"] == "small" else [(2, 0), (1, 0), (1, 0), (1, 0)]:
                x = add("Relu", conv(x, stride, padding))
        j = next(layers)
        x = add("Flatten", add("Transpose", x, perm=[0, 2, 3, 1]))
        x = add("Gemm", x, f"camera{i}_weight_{j}", f"camera{i}_bias_{j}")
        plain["ones"] = np.ones(len(arrays[f"camera{i}_bias_{j}"]), np.float32)
        return add("Tanh", add("LayerNormalization", x, "ones", epsilon=1e-5))

    seen = [VECTOR] if VECTOR in about["inputs"] else []
    seen += [features(i, camera) for i, camera in enumerate(cameras_of(about))]
    nodes.append(helper.make_node("Concat", seen, ["observation"], axis=1))
    return inputs, nodes, [numpy_helper.from_array(array, name) for name, array in plain.items()]


def _load_onnx(data: bytes) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda seen: session.run(["action"], {**seen} if isinstance(seen, Mapping) else {"observation": seen})[0]


# --- programs of torch


def _torch(arrays: Arrays, about: About) -> bytes:
    import torch

    class Program(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, array in arrays.items():
                self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)))

        def forward(self, observation: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
            own = dict(self.named_buffers())
            seen = _encoded(own, observation, about) if isinstance(observation, dict) else observation
            x = ((seen - own["mean"]) / own["std"]).clamp(-10, 10)
            last = sum(name.startswith("weight_") for name in own) - 1
            for i in range(last):
                x = torch.relu(x @ own[f"weight_{i}"] + own[f"bias_{i}"])
            return own["centre"] + own["scale"] * torch.tanh(x @ own[f"weight_{last}"] + own[f"bias_{last}"])

    rows: Any = {0: torch.export.Dim("N", min=1)}
    example: Any = torch.zeros(2, about["observation_size"])
    if cameras_of(about):
        example = {
            name: torch.zeros((2, *size), dtype=torch.float32 if name == VECTOR else torch.uint8)
            for name, size in about["inputs"].items()
        }
        rows = dict.fromkeys(example, rows)
    program, file = torch.export.export(Program(), (example,), dynamic_shapes=(rows,)), io.BytesIO()
    torch.export.save(program, file, extra_files={"cvlctl.json": json.dumps(about)})
    return file.getvalue()


def _encoded(own: Mapping[str, torch.Tensor], shown: Mapping[str, torch.Tensor], about: About) -> torch.Tensor:
    """(N, O): the vector where it is seen, and the features of each camera."""
    import torch

    from cvlctl.play import convolutions

    found = [shown[VECTOR]] if VECTOR in shown else []
    for i, camera in enumerate(cameras_of(about)):
        depth = sum(name.startswith(f"camera{i}_weight_") for name in own)
        layers = [(own[f"camera{i}_weight_{j}"], own[f"camera{i}_bias_{j}"]) for j in range(depth)]
        found.append(convolutions.encode(about["encoder"], layers, shown[camera]))
    return torch.cat(found, dim=1)


def _load_torch(data: bytes) -> Answer:
    import torch

    module = torch.export.load(io.BytesIO(data)).module()

    def answer(seen: Seen) -> np.ndarray:
        if isinstance(seen, Mapping):
            return module({name: torch.from_numpy(array) for name, array in seen.items()}).numpy()
        return module(torch.from_numpy(seen)).numpy()

    return answer


FORMATS: dict[str, tuple[Callable[[Arrays, About], bytes], Callable[[bytes], Answer], tuple[str, ...]]] = {
    "onnx": (_onnx, _load_onnx, ("onnx", "onnxruntime")),
    "torch": (_torch, _load_torch, ("torch",)),
    "npz": (_npz, _load_npz, ()),
}
