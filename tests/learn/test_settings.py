"""How a run computes: the decisions of `auto`, and machines that cannot go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import run

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.learn import settings as settings_module
from cvlctl.learn.settings import Settings, resolve_settings


def test_auto_decides_by_length_and_by_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def resolve(**change: Any) -> Settings:
        asked = {"device": "cpu", "threads": 1, "precision": "auto", "compile": "auto", "steps": 10**6, **change}
        return resolve_settings(**asked, say=said.append)

    monkeypatch.setattr(settings_module, "have_compiler", lambda: True)
    assert resolve().compile
    assert not resolve(steps=100).compile
    monkeypatch.setattr(settings_module, "have_compiler", lambda: False)
    assert not said
    assert not resolve().compile
    assert len(said) == 1 and "eager" in said[0]
    with pytest.raises(CvlctlError, match="compiler"):
        resolve(compile="true")
    if not torch.cuda.is_available():
        with pytest.raises(CvlctlError, match="no GPU"):
            resolve(device="cuda")


def test_a_machine_that_cannot_go_on_says_so(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"threads": 1, "precision": "float32", "compile": "false", "steps": 1, "say": print}
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 2)
        patched.setattr(settings_module, "gpu_of", lambda device: "a GPU")
        assert resolve_settings(device="cuda:1", **asked).device == "cuda:1"
        with pytest.raises(CvlctlError, match="device: cuda:2, but PyTorch sees 2 GPUs, from cuda:0 on"):
            resolve_settings(device="cuda:2", **asked)
    run("bc", store, tmp_path / "run", "steps=1")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace("finished", "started"))
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    state, metadata = checkpoints.load(last)
    monkeypatch.setattr(settings_module, "have_compiler", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for change, what in (({"device": "cuda"}, "sees no GPU"), ({"compile": True}, "no C.. compiler")):
        checkpoints.save(last, state, metadata | {"settings": metadata["settings"] | change})
        with pytest.raises(CvlctlError, match=f"the run began with .*{what}.* here\n.*--force"):
            run("bc", store, tmp_path / "run", "steps=1")
