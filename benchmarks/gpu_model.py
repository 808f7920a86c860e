"""What an update asks of a GPU, counted without one: operations, kernels, bytes, products; and the least time it takes.

    python benchmarks/gpu_model.py [--no-kernels] [--json gpu_model.json]

Five seeds of each method, batch 256 and 1024, networks as in `together.py`. An eager update launches a kernel an
operation (views launch none) and each reads its arguments and writes its result. Kernels are what PyTorch's compiler
has left of an update after fusing for a CPU, matrix products included: for a GPU it fuses by much the same rules. Least
bytes: matrix products read their arguments and write their results, and weights and moments are read and written once;
no fusion does with less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import common
import torch
from common import SPEC
from together import LONG, METHODS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cvlctl.data import samplers
from cvlctl.data.samplers import batches
from cvlctl.learn.programs import programs_of
from cvlctl.learn.settings import Settings

Product = tuple[int, int, int, int]  # (batches, m, k) @ (batches, k, n)
SEEDS, BATCHES = 5, (256, 1024)
# of an H200, by its datasheet; a kernel in a graph takes about 2 microseconds however little it does, and an operation
# in eager about 8 of the CPU that launches it: assumptions until they are measured
FLOPS, BYTES, KERNEL, OPERATION = 67e12, 4.8e12, 2e-6, 8e-6


class Counts(NamedTuple):
    """Of an update of all seeds."""

    operations: float  # that launch something in eager
    bytes: float  # that these read and write
    products: list[Product]  # of one that updates the actor too
    flops: float  # of the products
    product_bytes: float  # that the products alone read and write
    state_bytes: int  # of weights, targets and moments

    @property
    def least_bytes(self) -> float:
        return self.product_bytes + 2 * self.state_bytes


def flops_of(products: Sequence[Product]) -> int:
    return sum(2 * batch * m * k * n for batch, m, k, n in products)


class Counting(TorchDispatchMode):
    """Notes every operation that is more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes, self.product_bytes = 0, 0, 0
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace != "aten":
            return result
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        moved = sum(x.numel() * x.element_size() for x in tensors)
        self.operations += 1
        self.bytes += moved
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = (x for x in args[-2:])
            (m, k), n = a.shape[-2:], b.shape[-1]
            self.products.append((a.shape[0] if a.dim() == 3 else 1, m, k, n))
            self.product_bytes += moved
        return result


def first(module: Any, config: Any, seeds: Sequence[int], batch_size: int) -> tuple[Any, Any, Any]:
    """State, batch and noise of a learner's first update."""
    data = common.synthetic(2_000)
    draws = module.draws(config, SPEC, batch_size)
    _, (indices, noise) = next(batches(data, draws, seeds, 0, 2**40))
    return module.init(config, SPEC, seeds, data), samplers.gather(data, indices, draws), noise


def counted(module: Any, config: Any, seeds: Sequence[int], batch_size: int) -> Counts:
    """Counts of an update, on average over those with and without the actor. Nothing is computed."""
    arguments = first(module, config, seeds, batch_size)
    programs = programs_of(module, config, Settings("cpu", 1, "float32", False))
    counts = []
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for program in programs:
            state, batch, noise = tree_map_only(torch.Tensor, fake.from_tensor, arguments)
            with Counting() as counting:
                program(state, batch, noise)
            counts.append(counting)
    num = len(programs)
    return Counts(
        sum(one.operations for one in counts) / num, sum(one.bytes for one in counts) / num, counts[0].products,
        sum(flops_of(one.products) for one in counts) / num, sum(one.product_bytes for one in counts) / num,
        sum(x.numel() * x.element_size() for x in arguments[0].values()),
    )  # fmt: skip


def kernels(module: Any, config: Any, seeds: Sequence[int], batch_size: int) -> float:
    """Kernels of a compiled update: what PyTorch's compiler has left after fusing, products included; the average."""
    from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler

    arguments = first(module, config, seeds, batch_size)
    programs = programs_of(module, config, Settings("cpu", 1, "float32", True))
    found: list[int] = []
    codegen = Scheduler.codegen

    def count(self: Scheduler) -> None:
        found.append(sum(not isinstance(node, NopKernelSchedulerNode) for node in self.nodes))
        codegen(self)

    total = 0
    Scheduler.codegen = count  # type: ignore[method-assign]
    try:
        with torch._inductor.config.patch(fx_graph_cache=False):
            for program in dict.fromkeys(programs):
                torch.compiler.reset()
                found.clear()
                program(*arguments)
                total += sum(found) * programs.count(program)
    finally:
        Scheduler.codegen = codegen  # type: ignore[method-assign]
    return total / len(programs)


def least_microseconds(count: Counts, launches: float | None) -> list[float | str]:
    """Of an update: by launches, bytes and products, all on end, since kernels follow each other."""
    launched = "" if launches is None else launches * KERNEL * 1e6
    parts = [count.least_bytes / BYTES * 1e6, count.flops / FLOPS * 1e6]
    return [launched if launched == "" else round(float(launched)), *(round(part, 1) for part in parts)]


def benchmark(args: Any) -> dict[str, Any]:
    """Both tables: what is counted, and what follows of it."""
    counts, limits = [], []
    for name in args.methods:
        module, config = METHODS[name]
        for batch in BATCHES:
            seeds = range(SEEDS)
            count = counted(module, config, seeds, batch)
            launches = kernels(module, config, seeds, batch) if args.kernels and batch == BATCHES[0] else None
            counts.append(
                [
                    name,
                    batch,
                    round(count.operations),
                    "" if launches is None else round(launches),
                    round(count.bytes / 1e6),
                    round(count.least_bytes / 1e6, 1),
                    round(count.flops / 1e9, 2),
                ]
            )
            if launches is not None:
                times = least_microseconds(count, launches)
                total = sum(float(time) for time in times)
                eager = count.operations * OPERATION * 1e6
                limits.append([name, *times, round(total), round(eager), round(LONG * total / 6e7, 1)])
    curves = [{
        "title": f"What an update of {SEEDS} seeds asks of a GPU",
        "columns": ["method", "batch", "operations", "kernels", "MB, eager", "MB, least", "GFLOP"], "rows": counts,
        "note": "Counted on a CPU. Kernels: what is left of the compiled update after PyTorch's compiler has fused it.",
    }]  # fmt: skip
    if limits:
        curves.append({
            "title": f"Limits of an update of {SEEDS} seeds, batch {BATCHES[0]}, by the model, not measured",
            "columns": ["method", "launches, us", "bytes, us", "products, us", "graph, us", "eager, us", "minutes"],
            "rows": limits,
            "note": f"{KERNEL * 1e6:g} us a kernel in a graph, {OPERATION * 1e6:g} us an operation in eager "
            f"(assumptions), {BYTES / 1e12:g} TB/s, {FLOPS / 1e12:g} TFLOP/s in float32 (an H200's datasheet). Graph: "
            f"the sum; minutes: of {LONG:,} updates at it.",
        })  # fmt: skip
    return {"comparisons": [], "curves": curves}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None)
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options.add_argument("--no-kernels", action="store_false", dest="kernels", help="compile nothing: seconds")
    common.main(options, benchmark, arguments)


if __name__ == "__main__":
    main()
