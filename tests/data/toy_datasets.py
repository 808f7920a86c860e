"""Toy datasets in the layouts of other projects that keep a folder: files as those projects write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
V21 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V30 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
LENGTHS = (3, 5, 4)


def frames(lengths: tuple[int, ...] = LENGTHS) -> Arrays:
    """Rows as LeRobot has them: the state counts rows, actions lie in [-4, 8] and [0, 1]."""
    count = sum(lengths)
    return {
        "observation.state": np.arange(count * 2.0).reshape(count, 2).astype(np.float32),
        "observation.velocity": -np.arange(count, dtype=np.float32)[:, None],
        "action": np.stack([np.linspace(-4, 8, count), np.linspace(0, 1, count)], axis=1).astype(np.float32),
        "timestamp": np.concatenate([np.arange(n) / 10 for n in lengths]).astype(np.float32),
        "frame_index": np.concatenate([np.arange(n) for n in lengths]),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(count),
        "task_index": np.repeat(np.arange(len(lengths)) % 2, lengths),
    }


def write_parquet(path: Path, arrays: Arrays, groups: int = 2**20) -> Path:
    """(N,) as numbers, (N, W) as lists of a fixed size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        if isinstance(values, np.ndarray) and values.ndim == 2 else pa.array(values)
        for name, values in arrays.items()
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=groups)
    return path


def lerobot_folder(folder: Path, version: str = "v2.1", changes: Arrays | None = None, **info: Any) -> Path:
    """A dataset of `frames`; v3.0 has its first two episodes in one file."""
    arrays = {k: v for k, v in (frames() | (changes or {})).items() if v is not None}
    actions = arrays["action"] if isinstance(arrays.get("action"), np.ndarray) else frames()["action"]
    (folder / "meta").mkdir(parents=True)
    stops = np.cumsum(LENGTHS).tolist()
    starts = [0, *stops[:-1]]
    files = list(zip(starts, stops, strict=True)) if version == "v2.1" else [(0, stops[1]), (stops[1], stops[2])]
    template = V21 if version == "v2.1" else V30
    for i, (start, stop) in enumerate(files):
        path = folder / template.format(episode_chunk=0, episode_index=i, chunk_index=0, file_index=i)
        write_parquet(path, {name: values[start:stop] for name, values in arrays.items()})
    features = {
        "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}},
        "observation.velocity": {"dtype": "float32", "shape": [1], "names": None},
        "observation.images.top": {"dtype": "video", "shape": [4, 4, 3], "names": ["height", "width", "channel"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["a", "b"]},
    }
    about = {"codebase_version": version, "robot_type": "so100", "fps": 10, "total_episodes": 3, "total_frames": 12,
             "chunks_size": 1000, "data_path": template, "features": features}  # fmt: skip
    (folder / "meta" / "info.json").write_text(json.dumps(about | info))
    tasks = [{"task_index": 0, "task": "push"}, {"task_index": 1, "task": "pull 机"}]
    if version == "v2.1":
        (folder / "meta" / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
        stats = [
            {"episode_index": i, "stats": {"action": {side: getattr(actions[a:b], side)(axis=0).tolist()
                                                      for side in ("min", "max")}}}
            for i, (a, b) in enumerate(zip(starts, stops, strict=True))
        ]  # fmt: skip
        (folder / "meta" / "episodes_stats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in stats))
    else:
        texts = {"task_index": np.arange(2), "__index_level_0__": [task["task"] for task in tasks]}
        write_parquet(folder / "meta" / "tasks.parquet", texts)
        sides = {side: getattr(actions, side)(axis=0).tolist() for side in ("min", "max")}
        (folder / "meta" / "stats.json").write_text(json.dumps({"action": sides}))
    return folder


# ----------------------------------------------------------------------------------------------------------------- RLDS


def varint(value: int) -> bytes:
    value, made = value % 2**64, b""
    while value > 127:
        made, value = made + bytes([value & 127 | 128]), value >> 7
    return made + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def encoded(features: Arrays) -> bytes:
    """A tf.train.Example: floats, whole numbers, or lists of bytes."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, list):
            feature = message(1, b"".join(message(1, one) for one in values))
        elif values.dtype.kind == "f":
            feature = message(2, message(1, values.astype("<f4").tobytes()))
        else:
            feature = message(3, message(1, b"".join(varint(int(one)) for one in values.ravel())))
        entries += message(1, message(1, name.encode()) + message(2, feature))
    return message(1, entries)


def write_records(path: Path, contents: list[bytes]) -> Path:
    import struct

    from google_crc32c import value

    def masked(part: bytes) -> bytes:
        crc = value(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)

    heads = [struct.pack("<Q", len(content)) for content in contents]
    path.write_bytes(b"".join(h + masked(h) + c + masked(c) for h, c in zip(heads, contents, strict=True)))
    return path


def rlds_steps(length: int, **changes: Any) -> Arrays:
    """An episode of so many steps, whose state counts them; the last one means nothing, as RLDS says."""
    last, rows = np.arange(length) == length - 1, np.arange(length, dtype=np.float32)
    steps = {
        "observation/state": np.stack([rows, -rows], axis=1), "observation/image": [b"\xff\xd8jpeg"] * length,
        "observation/goal": rows + 100, "action": np.where(last, 0, rows / 100)[:, None].astype(np.float32),
        "reward": np.where(last, 0, rows), "is_first": rows == 0, "is_last": last, "is_terminal": last & (length > 3),
        "language_instruction": [f"pick {length}".encode()] * length,
    }  # fmt: skip
    return {f"steps/{name}": values for name, values in (steps | changes).items() if values is not None}


def tensor(*shape: int, dtype: str = "float32") -> Arrays:
    return {"tensor": {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype, "encoding": "none"}}


def rlds_folder(folder: Path, episodes: list[Arrays] | None = None, split: str = "train", **step: Any) -> Path:
    """A dataset in two files; `step` changes what features.json says of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [encoded(one) for one in (episodes or [rlds_steps(n) for n in (4, 3, 5)])]
    for i, part in enumerate((contents[:2], contents[2:])):
        write_records(folder / f"toy_set-{split}.tfrecord-0000{i}-of-00002", part)
    observation = {"state": tensor(2), "image": {"image": {"encodingFormat": "jpeg"}}, "goal": tensor()}
    flag = tensor(dtype="bool")
    steps = {"observation": {"featuresDict": {"features": observation}}, "action": tensor(1), "reward": tensor(),
             "is_first": flag, "is_last": flag, "is_terminal": flag, "language_instruction": {"text": {}}}  # fmt: skip
    inner = {"featuresDict": {"features": {k: v for k, v in (steps | step).items() if v is not None}}}
    features = {"featuresDict": {"features": {"steps": {"sequence": {"feature": inner}}}}}
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text(json.dumps({"name": "toy_set", "fileFormat": "tfrecord"}))
    return folder


def zarr_folder(path: Path) -> Path:
    """A replay buffer of Diffusion Policy, written by zarr, whose chunks are worth packing."""
    import numcodecs
    import zarr

    rows = np.arange(90, dtype=np.float32)
    arrays = {"data/action": rows[:, None] / 90, "data/state": np.stack([rows, -rows], axis=1),
              "meta/episode_ends": np.array([40, 50, 90])}  # fmt: skip
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for name, values in arrays.items():
        chunks, packed = (min(60, len(values)), *values.shape[1:]), numcodecs.Blosc("zstd")
        made = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=packed)
        made[...] = values
    return path
