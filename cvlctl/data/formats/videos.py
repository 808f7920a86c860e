"""MP4 videos as frames by their times, one after the other: memory holds one frame, whatever the length of a video."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats.sources import MAX_ROW_BYTES, reading, regular
from cvlctl.errors import CvlctlError

CODECS = ("h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4")
SLACK = 0.1  # of the time between two frames, by which one may be off


class Videos:
    """Frames of videos, asked for by file and time; those of a file in ascending order are each decoded once.

    Args:
        size: height and width that all videos are to have.
        fps: frames a second.
    """

    def __init__(self, size: tuple[int, int], fps: float) -> None:
        self._size, self._slack, self._fps = size, SLACK / fps, fps
        self._file, self._at = Path(), 0.0
        self._frames: Iterator[tuple[float, Any]] = iter(())

    def frame(self, file: Path, time: float, where: str) -> np.ndarray:
        """(H, W, 3) uint8: the frame at `time` seconds.

        Raises:
            CvlctlError: no such file, it is no video or damaged, of another size, or has no frame of that time; `where`
                is what the frame belongs to.
        """
        if file != self._file or time < self._at:
            self._file, self._frames = file, self._decoded(file, time)
        self._at = time + self._slack
        for at, frame in self._frames:
            if at >= time - self._slack:
                if at > time + self._slack:
                    self._file = Path()  # the next frame that is asked for may be this one
                    raise CvlctlError(f"{file}: has no frame at {time:.4f} s, which is that of {where}",
                                      f"frames are to come every {1 / self._fps:.4f} s")  # fmt: skip
                with reading(f"{file}: the frame at {at:.4f} s"):
                    return np.asarray(frame.to_ndarray(format="rgb24"))
        raise CvlctlError(f"{file}: ends before {time:.4f} s, the time of {where}",
                          "the video has fewer frames than there are rows: fetch or write it again")  # fmt: skip

    def count(self, file: Path) -> int:
        """How many frames the file says it has; 0 where it does not."""
        with self._opened(file) as (_, stream):
            return int(stream.frames)

    def close(self) -> None:
        """Let go of the file that is open."""
        self._file, self._frames = Path(), iter(())

    def _decoded(self, file: Path, time: float) -> Iterator[tuple[float, Any]]:
        with self._opened(file) as (container, stream):
            if time > 1.0:
                with reading(str(file)):
                    container.seek(int((time - self._slack) / stream.time_base), stream=stream)
            frames = container.decode(stream)
            while True:
                with reading(f"{file}: after {self._at:.4f} s"):
                    frame = next(frames, None)
                if frame is None:
                    return
                if frame.time is None or (frame.height, frame.width) != self._size:
                    what = f"{file}: a frame is {frame.height} x {frame.width}, not {self._size[0]} x {self._size[1]}"
                    raise CvlctlError(what, "all frames of a camera are of one size")
                yield frame.time, frame

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[tuple[Any, Any]]:
        av = pyav(file)
        regular(file, "an MP4 video")
        if not file.is_file():
            raise CvlctlError(f"{file} is missing", "fetch the dataset's videos as well")
        hint = "expected an MP4 video, whole: it may be cut short, or of another kind"
        with reading(str(file), hint):
            container = av.open(str(file), "r", format="mp4")  # what it is said to be, and nothing else
        with container:
            with reading(str(file), hint):
                if not container.streams.video:
                    raise CvlctlError(f"{file}: has no video in it", hint)
                stream = container.streams.video[0]
                codec, size = stream.codec_context.name, (stream.height, stream.width)
            if codec not in CODECS:
                raise CvlctlError(f"{file}: is coded as {codec}", f"these are read: {', '.join(CODECS)}")
            if size[0] * size[1] * 4 > MAX_ROW_BYTES or size != self._size:
                expected = f"{self._size[0]} x {self._size[1]}"
                raise CvlctlError(f"{file}: is {size[0]} x {size[1]}; expected {expected}", "as meta/info.json says")
            yield container, stream


def pyav(path: Path) -> Any:
    """PyAV, with libraries that say nothing by themselves."""
    try:
        import av
        import av.logging
    except ImportError as error:
        raise CvlctlError(f"{path}: videos are read by PyAV, which is not here",
                          "pip install 'cvlctl[lerobot]'") from error  # fmt: skip
    av.logging.set_level(av.logging.PANIC)
    return av
