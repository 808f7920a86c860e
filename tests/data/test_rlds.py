"""RLDS datasets: records, wire format, episodes by hand, and what is amiss."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_datasets import encoded, message, rlds_folder, rlds_steps, tensor, varint, write_records

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data.formats import rlds, tfrecord
from cvlctl.data.store import open_store
from cvlctl.data.units import units_of
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_the_checksum_of_what_is_known() -> None:
    """CRC-32C of "123456789" is 0xE3069283; rotated by 15 bits and offset, as TFRecord has it."""
    assert tfrecord.masked(b"123456789") == bytes.fromhex("e5b08ac7")


def test_numbers_of_the_wire_format() -> None:
    values = [0, 1, 127, 128, 300, -1, 2**31, 2**63 - 1, -(2**63)]
    packed = message(3, message(1, b"".join(varint(value) for value in values)))
    single = message(3, b"".join(varint(1 << 3) + varint(value) for value in values))
    floats = message(2, b"".join(varint(1 << 3 | 5) + struct.pack("<f", value) for value in (1.5, -2.0)))
    entries = {"packed": packed, "single": single, "floats": floats, "none": message(3, b""), "text": message(1, b"")}
    record = message(1, b"".join(message(1, message(1, k.encode()) + message(2, v)) for k, v in entries.items()))
    found = tfrecord.example(record, entries, "x")
    assert found["packed"].tolist() == found["single"].tolist() == values  # type: ignore[union-attr]
    assert found["floats"].tolist() == [1.5, -2.0]  # type: ignore[union-attr]
    assert (len(found["none"]), found["text"]) == (0, [])
    assert tfrecord.example(record, ["floats"], "x").keys() == {"floats"}


def test_episodes_and_what_is_left_out(tmp_path: Path) -> None:
    store = formats.import_store("rlds", rlds_folder(tmp_path / "toy_set" / "1.0.0").parent, tmp_path / "a.zarr")
    assert (store.task, store.episode_tasks()) == ("toy_set", ["pick 4", "pick 3", "pick 5"])
    found = list(store.episodes())
    assert [(len(e), e.terminated) for e in found] == [(3, True), (2, False), (4, True)]
    assert found[0].observations.tolist() == [[100, 0, 0], [101, 1, -1], [102, 2, -2], [103, 3, -3]]
    np.testing.assert_array_equal(found[0].actions, np.float32([[0], [0.01], [0.02]]))
    assert found[2].rewards is not None and found[2].rewards.tolist() == [0, 1, 2, 3]
    assert store.collected_at().tolist() == [0, 3, 5]
    assert list(units_of(store).observation_columns) == ["goal", "state[0]", "state[1]"]
    assert list(units_of(store).dropped_columns) == ["image"]
    assert list(units_of(store).remarks) == ["images are not imported: observation/image (--camera NAME takes them)"]
    assert store.provenance["source"]["files"] == 2


def test_a_last_step_that_means_something(tmp_path: Path) -> None:
    """As Open X's datasets have it: the reward comes with the last step alone."""
    last = np.arange(4) == 3
    episodes = [rlds_steps(4, reward=last * 1.0, is_terminal=last & ended) for ended in (True, False)]
    found = list(rlds.read(rlds_folder(tmp_path, episodes), observation_keys=["state"]))
    assert [(len(e), e.terminated) for e in found] == [(4, True), (3, False)]
    assert found[0].rewards is not None and found[0].rewards.tolist() == [0, 0, 0, 1]
    assert found[0].observations[:, 0].tolist() == [0, 1, 2, 3, 3]


def test_actions_in_several_parts_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"action/world": tensor(2), "action/grip": tensor(), "action/stop": tensor(dtype="int32")}
    node: dict[str, Any] = {"featuresDict": {"features": {k.removeprefix("action/"): v for k, v in parts.items()}}}
    rows = np.arange(8, dtype=np.float32).reshape(4, 2) / 10
    more = {"action": None, "action/world": rows, "action/grip": -rows[:, 0], "action/stop": np.zeros(4, int),
            "is_terminal": None}  # fmt: skip
    folder = rlds_folder(tmp_path / "a", [rlds_steps(4, **more)], action=node)
    (found,) = rlds.read(folder)
    np.testing.assert_array_equal(found.actions, np.stack([-rows[:3, 0], rows[:3, 0], rows[:3, 1]], axis=1))
    (found,) = rlds.read(folder, keys={"actions": "world,grip", "rewards": "is_first"})
    np.testing.assert_array_equal(found.actions, np.stack([rows[:3, 0], rows[:3, 1], -rows[:3, 0]], axis=1))
    assert found.rewards is not None and found.rewards.tolist() == [1, 0, 0]
    for keys, told in (
        ({"actions": "wrld"}, "no wrld"), ({"actions": "stop"}, "discrete"), ({"rewards": "r"}, "--key rewards=r"),
        ({"observations": "x"}, "--key observations=x: no array"),
    ):  # fmt: skip
        with pytest.raises(CvlctlError, match=told):
            list(rlds.read(folder, keys=keys))


def test_splits_files_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rlds_folder(tmp_path / "a")
    rlds_folder(folder, [rlds_steps(6)], "val")
    command = ["data", "import", "rlds", str(folder), "--out"]
    assert execute(app.app, [*command, str(tmp_path / "a.zarr")]) == 0
    assert open_store(tmp_path / "a.zarr").num_episodes == 3
    assert "of the splits val nothing is read: --split NAME reads one" in capsys.readouterr().err
    assert execute(app.app, [*command, str(tmp_path / "b.zarr"), "--split", "val"]) == 0
    assert open_store(tmp_path / "b.zarr").lengths().tolist() == [5]
    assert execute(app.app, [*command, str(tmp_path / "c.zarr"), "--split", "test"]) == 2
    one = str(folder / "toy_set-train.tfrecord-00001-of-00002")
    assert execute(app.app, ["data", "import", "rlds", one, "--out", str(tmp_path / "d.zarr")]) == 0
    assert open_store(tmp_path / "d.zarr").lengths().tolist() == [4]
    (folder / "toy_set-train.tfrecord-00001-of-00002").unlink()
    capsys.readouterr()
    assert execute(app.app, [*command, str(tmp_path / "e.zarr")]) == 2
    assert "of the 2 files of split train there are 1" in capsys.readouterr().err


SHARD = "toy_set-train.tfrecord-00000-of-00002"


def damaged(change: Callable[[bytearray], Any]) -> Callable[[Path], Any]:
    def work(folder: Path) -> None:
        content = bytearray((folder / SHARD).read_bytes())
        change(content)
        (folder / SHARD).write_bytes(content)

    return work


def record(content: bytes) -> Callable[[Path], Any]:
    """A sound record of an unsound Example."""
    return lambda folder: write_records(folder / SHARD, [content])


def long_length(content: bytearray) -> None:
    content[:8] = struct.pack("<Q", 2**62)
    content[8:12] = tfrecord.masked(bytes(content[:8]))


def features(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def work(folder: Path) -> None:
        found = json.loads((folder / "features.json").read_text())
        change(found["featuresDict"]["features"])
        (folder / "features.json").write_text(json.dumps(found))

    return work


def action(kind: int, content: bytes) -> Callable[[Path], Any]:
    """A record of one feature, whose list has these bytes."""
    return record(message(1, message(1, message(1, b"steps/action") + message(2, message(kind, content)))))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (damaged(lambda c: c.__setitem__(40, c[40] ^ 1)), "record 0: is not what its checksum says"),
    "a bit of the length": (damaged(lambda c: c.__setitem__(0, c[0] ^ 1)), "record 0: its length is not what"),
    "a length beyond the file": (damaged(long_length), "record 0: is to have 4,611,686,018,427,387,904 bytes"),
    "cut short": (damaged(lambda c: c.__delitem__(slice(-9, None))), "record 1: is to have"),
    "cut within a length": (damaged(lambda c: c.extend(b"\0" * 5)), "record 2: the file ends within it"),
    "a varint of 11 bytes": (record(b"\x0a" + b"\xff" * 10 + b"\x01"), "no tf.train.Example: a number of more than 64"),
    "a varint without end": (record(b"\x0a\xff"), "no tf.train.Example: it ends within a number"),
    "a size beyond the record": (record(b"\x0a\x7f"), "no tf.train.Example: 127 bytes are to come, and 0 are left"),
    "a group": (record(b"\x0b"), "no tf.train.Example: wire type 3"),
    "a name that is none": (record(message(1, message(1, message(1, b"\xff\xfe")))), "no tf.train.Example"),
    "packed varints of 11 bytes": (action(3, message(1, b"\xff" * 10 + b"\x01")), "a number of more than 64 bits"),
    "packed varints without end": (action(3, message(1, b"\x01\xff")), "no tf.train.Example: it ends within a number"),
    "half a float": (action(2, message(1, b"abc")), "no tf.train.Example: 3 bytes are no floats"),
    "a list of something else": (action(2, message(2, b"abcd")), "a list holds a field 2 of wire type 2"),
    "no action": (record(encoded(rlds_steps(4, action=None))), "record 0: no steps/action, which features.json"),
    "no whole rows": (record(encoded(rlds_steps(4, **{"observation/state": np.zeros(7)}))), "7 values, which"),
    "of other lengths": (record(encoded(rlds_steps(4, action=np.zeros((3, 1), np.float32)))), "action 3"),
    "text for numbers": (record(encoded(rlds_steps(4, action=[b"a"]))), "action: has text"),
    "huge actions": (record(encoded(rlds_steps(4, action=np.full((4, 1), 9, np.float32)))), "outside .-1, 1."),
    "NaN": (record(encoded(rlds_steps(4, reward=np.full(4, np.nan)))), "rewards hold NaN"),
    "an instruction that is no text": (
        record(encoded(rlds_steps(4, language_instruction=[b"\xff"] * 4))), "the instruction: cannot be read"
    ),
    "no features.json": (lambda f: (f / "features.json").unlink(), "features.json is missing"),
    "features.json cut short": (lambda f: (f / "features.json").write_text("{"), "features.json: cannot be read"),
    "no steps": (features(lambda f: f.pop("steps")), "it has no steps"),
    "no observation": (features(lambda f: f.update(steps={"sequence": {"feature": tensor(3)}})), "has no observation"),
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.tfrecord*")], "has no files NAME-SPLIT.tfrecord"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_amiss_is_one_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    change, told = BAD[case]
    folder = rlds_folder(tmp_path / "a")
    change(folder)
    with pytest.raises(CvlctlError, match=told) as caught:
        formats.import_store("rlds", folder, tmp_path / "x.zarr", task="toy")
    assert str(folder) in caught.value.what
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_reading_takes_memory_for_an_episode(tmp_path: Path) -> None:
    """Their images, too, are let go of: half a megabyte an episode."""
    made = [rlds_steps(50, **{"observation/image": [b"x" * 10_000] * 50}) for _ in range(20)]
    folder = rlds_folder(tmp_path, made)
    tracemalloc.start()
    kept = list(rlds.read(folder))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 20
    assert peak < 2e6
