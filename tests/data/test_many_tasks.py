"""Stores of very many tasks: what is done for each name does not grow with the number of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cvlctl.data import look
from cvlctl.data.store import open_store
from cvlctl.data.writer import StoreWriter
from cvlctl.types import Episode

COUNT = 1000


class Name(str):
    """A name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Name.compared += 1
        return str.__eq__(self, other)


@pytest.mark.usefixtures("no_fsync")
def test_names_of_tasks_are_compared_a_few_times_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, actions = np.zeros((2, 1)), np.zeros((1, 1))
    Name.compared = 0
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        for i in range(COUNT):
            writer.append(Episode(rows, actions, task=Name(f"task-{i % (COUNT - 10)}")))
            if i == 500:
                writer.flush()
        assert Name.compared < 10 * COUNT
        store = writer.finish()
    names = [f"task-{i}" for i in range(COUNT - 10)]
    assert store.task_names == names and open_store(store.path).episode_tasks() == names + names[:10]
    console = Console(width=200)
    look.render_info(look.info(store.path), console)
    text = capsys.readouterr().out
    assert "task-48 and 941 more" in text and len(text) < 5000
