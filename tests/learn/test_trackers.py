"""Trackers beside metrics.jsonl: what they get, what they may not do. Real ones are tried where they are installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from toy_runs import run, state_of

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.runs import read_metrics

SEEDS = ("seeds=[0,3]", "steps=30")


class Fake(ModuleType):
    """A wandb that remembers."""

    def __init__(self, breaks_at: int | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.inits: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.breaks_at = breaks_at

    def init(self, **about: object) -> SimpleNamespace:
        self.inits.append(about)
        return SimpleNamespace(log=self._log, finish=lambda: None)

    def _log(self, values: dict, step: int) -> None:
        if step == self.breaks_at:
            raise ConnectionError("no route")
        self.logged.append((step, values))


def test_a_tracker_gets_what_the_file_gets(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[wandb]")
    lines = read_metrics(tmp_path / "bc")
    assert [step for step, _ in fake.logged] == [line["step"] for line in lines] == [10, 20, 30]
    for (_, values), line in zip(fake.logged, lines, strict=True):
        assert values["actor/bc"] == pytest.approx(sum(line["actor/bc"]) / 2)
        assert [values["actor/bc/seed 0"], values["actor/bc/seed 3"]] == line["actor/bc"]
    assert fake.inits[0]["config"]["steps"] == 30


def test_a_run_that_goes_on_is_the_same_there_and_one_started_over_is_not(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, save = Fake(), checkpoints.save
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        save(path, state, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[wandb]", "checkpoint_seconds=1e-9")
    monkeypatch.setattr(checkpoints, "save", save)
    run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[wandb]", "checkpoint_seconds=1e-9")
    run("bc", store, tmp_path / "other", *SEEDS, "loggers=[wandb]")
    first, second, other = (about["id"] for about in fake.inits)
    assert first == second != other


def test_one_that_fails_on_the_way_stops_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(breaks_at=20)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[wandb]")
    assert [step for step, _ in fake.logged] == [10] and len(read_metrics(tmp_path / "bc")) == 3
    assert capsys.readouterr().err.count("wandb failed, and is left out from here on: no route") == 1
    run("bc", store, tmp_path / "without", *SEEDS)
    assert all((state_of(tmp_path / "bc")[k] == v).all() for k, v in state_of(tmp_path / "without").items())


def test_one_that_is_missing_is_said_before_anything_is_touched(store: Path, tmp_path: Path) -> None:
    for name in ("wandb", "trackio", "tensorboard"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(CvlctlError, match=f"loggers: {name} is not installed"):
                run("bc", store, tmp_path / name, *SEEDS, f"loggers=[{name}]")
            assert not (tmp_path / name).exists()


def test_one_that_does_not_start(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    fake.init = lambda **_: (_ for _ in ()).throw(RuntimeError("no API key"))  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(CvlctlError, match="loggers: wandb does not start: no API key") as caught:
        run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[wandb]")
    assert "WANDB_MODE=offline" in str(caught.value.hint)


def test_other_trackers_do_not_make_another_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Fake())
    run("bc", store, tmp_path / "bc", *SEEDS)
    assert run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[wandb]")["status"] == "finished already"


def test_tensorboard_reads_it_back(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[tensorboard]")
    (folder,) = (tmp_path / "bc" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    wanted = [(line["step"], line["actor/bc"][1]) for line in read_metrics(tmp_path / "bc")]
    found = [(event.step, event.value) for event in events.Scalars("actor/bc/seed 3")]
    assert [step for step, _ in found] == [10, 20, 30]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted])


def test_wandb_offline(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[wandb]")
    (file,) = (tmp_path / "bc" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0


def test_trackio_on_this_disk(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads as it is imported
    pytest.importorskip("trackio")
    run("bc", store, tmp_path / "bc", *SEEDS, "loggers=[trackio]")
    assert any(file.suffix == ".db" for file in (tmp_path / "trackio").rglob("*"))
