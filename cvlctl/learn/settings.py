"""How a run computes: device, threads, precision, compilation; decided once, kept in its checkpoints."""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cvlctl.errors import CvlctlError
from cvlctl.learn.speed import measured
from cvlctl.machine import num_cpus
from cvlctl.rates import Rate
from cvlctl.recipes.estimates import FASTEST, SLOWEST, Update, compiling_pays

MEDIUM_UPDATE = Update(2e9, 300)  # where nobody says what an update is


@dataclass(frozen=True)
class Settings:
    """How a run computes. Fixed when it first starts, written into its checkpoints, used again on resume."""

    device: str
    threads: int
    precision: str  # "float32", the library's default; "medium": oneDNN on a CPU, TF32 on a GPU; "bf16": the layers
    compile: bool
    window_rows: int = 0  # of stores that do not fit in memory; 0: they do
    gpu: str = ""  # which one: random numbers there, and the order of sums, depend on its multiprocessors

    def as_dict(self) -> dict[str, Any]:
        """`gpu` is left out where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "gpu" or value}


def have_compiler() -> bool:
    """inductor's CPU back-end needs a C++ compiler and Python's headers; stock Debian has neither."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and _have_headers()


def triton_lacks(device: str) -> str:
    """What Triton, which compiles for GPUs, does not find here, as "no ..."; "" where it can work."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "no GPU of compute capability 7.0 or above"
    try:
        import triton  # noqa: F401
    except (ImportError, OSError):
        return "no package triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler"
    return "" if _have_headers() else "no headers of Python"


def _have_headers() -> bool:
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def gpu_of(device: str) -> str:
    """Which GPU a device is, and how many multiprocessors it has; "" for a CPU."""
    if not device.startswith("cuda"):
        return ""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.multi_processor_count} multiprocessors"


def resolve_settings(
    *,
    device: str,
    threads: int | str,
    precision: str,
    compile: str,
    steps: int,
    update: Update = MEDIUM_UPDATE,
    say: Callable[[str], None],
) -> Settings:
    """Decide what "auto" means on this machine for a run of `steps` updates, and say so where a user could wonder.

    Where the decision to compile is near, this machine's rate is measured, once for all runs.

    Raises:
        CvlctlError: where a GPU or a compiler is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    where = ("cuda" if cuda else "cpu") if device == "auto" else device
    if lacking := lack_of(where, compile == "true"):
        raise CvlctlError(*lacking)
    num_threads = num_cpus() if threads == "auto" else int(threads)
    whole_step = compile == "true"
    if compile == "auto":
        whole_step = where != "cpu" or _compiling_pays(steps, update, num_threads)
    if whole_step and where == "cpu" and not have_compiler():
        say("no C++ compiler with Python's headers found: training runs eager, about 1.5x slower")
        whole_step = False
    if whole_step and where != "cpu" and (lacks := triton_lacks(where)):
        say(f"Triton, which compiles for GPUs, finds {lacks}: training runs eager, several times slower")
        whole_step = False
    if precision == "auto":
        precision = "medium" if _medium_is_float32(where) else "float32"
    if precision == "bf16" and where == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        say("precision: bf16, but this CPU has no such instructions: float32 is faster here")
    return Settings(where, num_threads, precision, whole_step, gpu=gpu_of(where))


def _compiling_pays(steps: int, update: Update, threads: int) -> bool:
    pays = compiling_pays(steps, update, FASTEST)
    if pays == compiling_pays(steps, update, SLOWEST):
        return pays
    return compiling_pays(steps, update, measured_rate().by(threads))


def measured_rate() -> Rate:
    """How fast this machine trains, by one thread: what is kept, else measured in less than a second, and kept."""
    return measured("medium" if _medium_is_float32("cpu") else "highest")


def saved_settings(path: Path, metadata: dict[str, Any]) -> Settings:
    """The settings with which the run of the checkpoint at `path` began.

    Raises:
        CvlctlError: they are garbled, or this machine cannot compute like that.
    """
    try:
        settings = Settings(**metadata["settings"])
        kinds = {"device": str, "threads": int, "precision": str, "compile": bool, "window_rows": int, "gpu": str}
        if any(type(getattr(settings, name)) is not kind for name, kind in kinds.items()) or settings.threads < 1:
            raise TypeError(str(settings)[:200])
    except (KeyError, TypeError) as error:
        what = f"{path}: its settings are missing or garbled: {error}"
        raise CvlctlError(what, "the file is damaged: --force starts the run over") from error
    if lacking := lack_of(settings.device, settings.compile):
        raise CvlctlError(
            f"the run began with {lacking[0]} here", "resume it where it began, or --force starts it over"
        )
    if settings.gpu and (here := gpu_of(settings.device)) != settings.gpu:
        raise CvlctlError(
            f"the run began on {settings.gpu}, and {settings.device} is {here} here: another computes other bits",
            "resume it where it began, or --force starts it over",
        )
    return settings


def lack_of(device: str, compile: bool) -> tuple[str, str] | None:
    """What of this the machine does not have, and what to do about it."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return f"device: {device}, but PyTorch sees no GPU", "use device: auto or cpu"
        if int(device.partition(":")[2] or 0) >= (count := torch.cuda.device_count()):
            return (
                f"device: {device}, but PyTorch sees {count} GPU{'s' * (count > 1)}, from cuda:0 on",
                "use device: auto",
            )
        if compile and (lacks := triton_lacks(device)):
            hint = "pip install triton, apt-get install gcc python3-dev, or use compile: auto"
            return f"compile: true, but Triton, which compiles for GPUs, finds {lacks}", hint
    elif compile and not have_compiler():
        hint = "apt-get install g++ python3-dev, or use compile: auto"
        return "compile: true, but there is no C++ compiler with Python's headers", hint
    return None


@cache
def _medium_is_float32(device: str) -> bool:
    """Whether matmul precision "medium" is still true float32 here. It is on CPUs without AMX, where it merely picks
    oneDNN, up to twice as fast as MKL on AMD. With AMX or on a GPU the same word means bf16 or TF32."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 256, 256, generator=g), torch.randn(1, 256, 256, generator=g)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    fast = (a.to(device) @ b.to(device)).double().cpu()
    torch.set_float32_matmul_precision(before)
    return bool((fast - exact).norm() / exact.norm() < 1e-6)


def configure(settings: Settings) -> None:
    """Apply the settings to this process."""
    torch.set_num_threads(settings.threads)
    if ":" in settings.device:
        torch.cuda.set_device(settings.device)  # where graphs are captured
    medium = settings.precision == "medium" or (settings.precision == "bf16" and _medium_is_float32(settings.device))
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    torch.backends.cudnn.allow_tf32 = settings.precision != "float32"  # in convolutions, as in matrix products
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # products of bfloat16 add up in float32
    flush_denormals()
    _keep_freed_memory()
    if settings.compile:
        torch.compiler.reset()  # an experiment's runs share a process, and torch compiles one function 8 times at most


def flush_denormals() -> None:
    """Compute with 0 for numbers below 1.2e-38, in this thread and in those that start later.

    Adam's moments of dead units fall that low and stay there, and each costs an Intel processor a hundred cycles or
    more: more than half of a run. Threads take the flag from the one that starts them, so OpenMP's, which may have
    been started already, are ended here and begin anew. Runtimes before OpenMP 5 cannot: there, the first call counts.
    """
    torch.set_flush_denormal(True)
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        hard = 2  # of omp.h
        pause(hard)


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed. Else temporaries of some MB are mapped and faulted in, page by page, at each
    operation of each step: a third of an eager step at batch 1024. Other C libraries have no mallopt, or ignore it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
