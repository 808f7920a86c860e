"""Metrics shown elsewhere too: TensorBoard, Weights & Biases, Trackio.

metrics.jsonl is what counts, and is always written; a tracker gets the same lines as they are logged: the mean over
seeds under the metric's name, and each seed's value under `<metric>/seed <seed>`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cvlctl.errors import CvlctlError
from cvlctl.progress import say

Values = Mapping[str, Sequence[float]]
Tell = Callable[[int, Values], None]
Log = Callable[[int, dict[str, float]], None]


def check_installed(names: Sequence[str]) -> None:
    """Raise a CvlctlError where one of the trackers is not there: before anything is touched."""
    for name in names:
        if find_spec(name) is None:
            raise CvlctlError(f"loggers: {name} is not installed", f"pip install 'cvlctl[{name}]', or leave it out")


@contextmanager
def tracking(
    names: Sequence[str], out: Path, seeds: Sequence[int], recipe: Mapping[str, Any], start: int
) -> Iterator[Tell]:
    """A function (step, values of each seed) that tells the trackers `names`, until the context ends.

    Args:
        out: the run's directory: where TensorBoard's files are, and the others' name for it.
        start: the step that the run goes on from; 0 for a fresh one.

    Raises:
        CvlctlError: a tracker does not start. One that fails later is left out, and said.
    """
    with ExitStack() as stack:
        logs = {name: _opened(name, out, recipe, start, stack) for name in names}

        def tell(step: int, values: Values) -> None:
            flat = _flat(values, seeds)
            for name, log in list(logs.items()):
                try:
                    log(step, flat)
                except Exception as error:  # a tracker's own trouble, of any kind, is no reason to stop training
                    del logs[name]
                    say(f"{out}: {name} failed, and is left out from here on: {error}; metrics.jsonl has all")

        yield tell


def _flat(values: Values, seeds: Sequence[int]) -> dict[str, float]:
    flat = {}
    for name, each in values.items():
        flat[name] = sum(each) / len(each)
        if len(each) > 1:
            flat |= {f"{name}/seed {seed}": value for seed, value in zip(seeds, each, strict=True)}
    return flat


def _opened(name: str, out: Path, recipe: Mapping[str, Any], start: int, stack: ExitStack) -> Log:
    try:
        return _OPEN[name](out, recipe, start, stack)
    except Exception as error:
        offline = f"; {name.upper()}_MODE=offline writes to this disk alone" if name == "wandb" else ""
        raise CvlctlError(f"loggers: {name} does not start: {error}", f"mend that, or leave it out{offline}") from error


def _identity(out: Path) -> str:
    """The same for a run that goes on, another for one that is started over."""
    begun = (out / "recipe.yaml").stat().st_mtime_ns
    return hashlib.sha256(f"{os.path.realpath(out)} {begun}".encode()).hexdigest()[:16]


def _tensorboard(out: Path, recipe: Mapping[str, Any], start: int, stack: ExitStack) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    # what an earlier process logged from there on is about to be logged again
    writer = SummaryWriter(str(out / "tensorboard" / _identity(out)), purge_step=start + 1)
    stack.callback(_quietly, writer.close)

    def log(step: int, flat: dict[str, float]) -> None:
        for name, value in flat.items():
            writer.add_scalar(name, value, step)

    return log


def _wandb(out: Path, recipe: Mapping[str, Any], start: int, stack: ExitStack) -> Log:
    import wandb

    run = wandb.init(
        project="cvlctl", name=str(out), id=_identity(out), resume="allow", dir=str(out), config=dict(recipe)
    )
    stack.callback(_quietly, run.finish)
    return lambda step, flat: run.log(flat, step=step)


def _trackio(out: Path, recipe: Mapping[str, Any], start: int, stack: ExitStack) -> Log:
    import trackio

    name = f"{out.name} {_identity(out)}"
    run = trackio.init(project="cvlctl", name=name, resume="allow", config=dict(recipe), embed=False)
    stack.callback(_quietly, run.finish)
    return lambda step, flat: run.log(flat, step=step)


def _quietly(finish: Callable[[], object]) -> None:
    """What goes wrong as a tracker ends is no reason to call a training failed."""
    with suppress(Exception):
        finish()


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
