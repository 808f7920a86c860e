"""How a run computes on a GPU, decided where there is none: what Triton needs, which GPU it was, which kernels."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cvlctl.errors import CvlctlError
from cvlctl.learn import programs
from cvlctl.learn import settings as settings_module
from cvlctl.learn.settings import Settings, configure, resolve_settings, saved_settings

H200 = "NVIDIA H200, 132 multiprocessors"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A GPU for which Triton can compile."""
    found = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setenv("CC", "gcc")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    return found


def resolve(said: list[str], **change: Any) -> Settings:
    asked: dict[str, Any] = {"device": "auto", "threads": 1, "precision": "float32", "compile": "auto", "steps": 10**6}
    return resolve_settings(**asked | change, say=said.append)


def test_auto_compiles_on_a_gpu_where_triton_can_work(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert resolve(said) == Settings("cuda", 1, "float32", True, gpu=H200) and not said

    def without(lack: str) -> None:
        said.clear()
        assert resolve(said) == Settings("cuda", 1, "float32", False, gpu=H200)
        assert said == [f"Triton, which compiles for GPUs, finds {lack}: training runs eager, several times slower"]
        with pytest.raises(CvlctlError, match=f"compile: true, but Triton, .* finds {lack}"):
            resolve(said, compile="true")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
        without("no GPU of compute capability 7.0 or above")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "triton", None)
        without("no package triton")
    with monkeypatch.context() as patched:
        patched.delenv("CC")
        patched.setattr(settings_module.shutil, "which", lambda name: None)
        without("no C compiler")
    (tmp_path / "Python.h").unlink()
    without("no headers of Python")


def test_a_run_goes_on_upon_the_gpu_that_it_began_on(gpu: SimpleNamespace, tmp_path: Path) -> None:
    settings = resolve([])
    kept = settings.as_dict()
    assert saved_settings(tmp_path, {"settings": kept}) == settings
    gpu.multi_processor_count = 114
    with pytest.raises(CvlctlError, match=f"began on {H200}, and cuda is NVIDIA H200, 114 multiprocessors here"):
        saved_settings(tmp_path, {"settings": kept})
    earlier = {name: value for name, value in kept.items() if name != "gpu"}  # it was not kept
    assert saved_settings(tmp_path, {"settings": earlier}).gpu == ""
    assert "gpu" not in Settings("cpu", 1, "float32", False).as_dict()  # earlier versions read these
    with pytest.raises(CvlctlError, match="missing or garbled"):
        saved_settings(tmp_path, {"settings": kept | {"gpu": 7}})


def test_kernels_of_a_gpu_are_not_chosen_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run, with an empty cache of kernels, must come to the same ones; a CPU's are what they were."""
    torch.compile(lambda x: x, options=dict(programs.NO_TIMING))  # these options exist: others raise
    asked = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: asked.append(options) or step)
    for device in ("cuda", "cpu"):
        programs.whole_step(lambda state, batch, noise: (state, {}), Settings(device, 1, "float32", True))
    assert [options["options"] for options in asked] == [programs.NO_TIMING, None]
    assert programs.NO_TIMING["deterministic"]


def test_products_of_bfloat16_add_up_in_float32() -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    configure(Settings("cpu", 1, "bf16", False))
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
