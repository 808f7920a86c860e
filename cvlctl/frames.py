"""Frames as pictures: a contact sheet (.png), a .gif or a .mp4, by the file's ending; and pictures as frames.

Pillow reads and writes them, and only as what we say they are; .mp4 needs PyAV.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from cvlctl import files
from cvlctl.errors import CvlctlError

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".gif", ".mp4")
SHOWN, ACROSS, GAP = 24, 6, 4  # frames of a sheet, and of a row of it; pixels between them
MOST = 2**28  # bytes of a picture
LEAST = 128  # pixels of the shorter side: smaller frames are enlarged by a whole factor


def write_frames(path: Path, frames: Sequence[np.ndarray], *, fps: float = 20.0, force: bool = False) -> str:
    """Write frames as what the file's ending says. Returns "written", or "finished already", as `files.write_result`.

    Args:
        frames: (T, H, W, C) uint8, or whatever has a length and gives (H, W, C) by number; C is 1, 3, or 4 with an
            alpha that is left out.
        fps: frames a second of a .gif or .mp4.

    Raises:
        CvlctlError: another ending, no frames or none that can be shown, PyAV is missing, a file is there (and no
            `force`), or the disk refuses.
    """
    check_ending(path)
    if not len(frames):
        raise CvlctlError(f"{path}: there are no frames to show")
    data = io.BytesIO()
    if path.suffix == ".png":
        _image(sheet(frames)).save(data, format="PNG")
    elif path.suffix == ".gif":
        first, *rest = range(len(frames))
        others = (_image(enlarged(frames[i])) for i in rest)
        duration = max(20, 10 * round(100 / fps))  # whole hundredths of a second; viewers slow down what is shorter
        first_image = _image(enlarged(frames[first]))
        first_image.save(data, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
    else:
        write_mp4(data, (_even(enlarged(frames[i])) for i in range(len(frames))), fps)
    return files.write_result(path, data.getbuffer(), force=force)


def check_ending(path: Path) -> None:
    """Raise a CvlctlError unless the file's ending is one that frames are written as."""
    if path.suffix not in ENDINGS:
        raise CvlctlError(f"{path}: frames are not written as {path.suffix or 'a file without ending'}",
                          "end it in .png (a contact sheet), .gif or .mp4")  # fmt: skip


def sheet(frames: Sequence[np.ndarray], count: int = SHOWN, across: int = ACROSS) -> np.ndarray:
    """(H, W, 3) uint8: at most `count` of the frames, evenly spread, the first and the last among them, row by row."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)).tolist()
    shown = [enlarged(frames[i]) for i in chosen]
    height, width = shown[0].shape[:2]
    lines, columns = -(-len(shown) // across), min(across, len(shown))
    found = np.full((lines * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, frame in enumerate(shown):
        top, left = i // across * (height + GAP), i % across * (width + GAP)
        found[top : top + height, left : left + width] = frame
    return found


def beside(frames: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8: frames of several cameras side by side, the lower ones on black."""
    shown = [_rgb(frame) for frame in frames]
    height = max(len(frame) for frame in shown)
    return np.concatenate([np.pad(frame, ((0, height - len(frame)), (0, 0), (0, 0))) for frame in shown], axis=1)


def enlarged(frame: np.ndarray) -> np.ndarray:
    """(k H, k W, 3) of a frame (H, W, C): what is small is made large enough to be looked at."""
    frame = _rgb(frame)
    factor = max(1, LEAST // min(frame.shape[:2]))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def png(frame: np.ndarray) -> bytes:
    """One frame (H, W, C), or a sheet, as a PNG."""
    data = io.BytesIO()
    _image(_rgb(frame)).save(data, format="PNG")
    return data.getvalue()


def opened_image(source: Path | bytes, where: str, formats: Sequence[str] = ("PNG", "JPEG")) -> Image:
    """A picture whose header was read, and nothing else. As nothing but `formats` it is opened, whatever it claims to
    be: an EPS is a program, and is run.

    Raises:
        CvlctlError: it is none of them, or larger than any photograph.
    """
    from PIL import Image, UnidentifiedImageError

    kinds = " or ".join(formats)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # said below
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=list(formats))
    except UnidentifiedImageError as error:
        raise CvlctlError(f"{where}: is no {kinds}", f"frames are read as {kinds}, and as nothing else") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CvlctlError(f"{where}: cannot be read: {error}", "give another copy of it") from error
    if image.width * image.height * 4 > MOST:
        raise CvlctlError(f"{where}: an image of {image.width} x {image.height} is too large to be true")
    return image


def decoded(data: bytes, where: str, formats: Sequence[str] = ("PNG", "JPEG")) -> np.ndarray:
    """(H, W, C) uint8 of a picture, C as the file has it; of pictures in colours of a palette 3.

    Raises:
        CvlctlError: as `opened_image`, or it is damaged.
    """
    with opened_image(data, where, formats) as image, _sound(where):
        plain = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
        found = np.asarray(plain, np.uint8)
    return found[..., None] if found.ndim == 2 else found


def fitted(image: Image, size: tuple[int, int, int], fit: str = "crop") -> np.ndarray:
    """(H, W, C) uint8 of a picture, upright, in a camera's size.

    Args:
        fit: "crop": scaled until both sides are long enough, and the middle of it taken; "stretch": scaled to the size,
            whatever that does to its shape.
    """
    from PIL import Image, ImageOps

    height, width, channels = size
    if channels not in (1, 3, 4):
        raise CvlctlError(f"photographs have 1, 3 or 4 channels, a camera here has {channels}")
    with _sound(str(getattr(image, "filename", "a picture"))):
        upright = ImageOps.exif_transpose(image).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
        if fit == "stretch":
            made = upright.resize((width, height), Image.Resampling.BILINEAR)
        else:
            made = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(made, np.uint8).reshape(size)


@contextlib.contextmanager
def _sound(where: str) -> Iterator[None]:
    """What is wrong with a picture's data is said as a CvlctlError."""
    try:
        yield
    except (OSError, ValueError, SyntaxError) as error:  # truncated, or not what its header says
        raise CvlctlError(f"{where}: is damaged: {error}", "give another copy of it") from error


class Mp4:
    """Encodes frames (H, W, 3) uint8, all of one size, as H.264: into a path, or a file that can be sought in.

    The bytes depend on the frames, their rate, the options and the version of the encoder alone.

    Args:
        options: of the encoder x264.

    Raises:
        CvlctlError: PyAV is missing.
    """

    def __init__(self, target: IO[bytes] | str, fps: float, options: Mapping[str, str]) -> None:
        try:
            import av
        except ImportError as error:
            hint = "pip install 'cvlctl[video]', or end the file in .gif or .png"
            raise CvlctlError("videos need PyAV", hint) from error
        self._frame = av.VideoFrame.from_ndarray
        self._container = av.open(target, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
        self._stream.options = dict(options)
        self._stream.height = self._stream.width = 0

    def add(self, frame: np.ndarray) -> None:
        """The next one."""
        if not self._stream.height:
            height, width = frame.shape[:2]
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        self._container.mux(self._stream.encode(self._frame(np.ascontiguousarray(frame), format="rgb24")))

    def close(self) -> None:
        """Write what the encoder still holds, and the file's end."""
        if self._stream.height:
            self._container.mux(self._stream.encode())
        self._container.close()


def write_mp4(target: IO[bytes], frames: Iterator[np.ndarray], fps: float) -> None:
    """Encode frames (H, W, 3) uint8 of even height and width, to be looked at; as `Mp4` does."""
    video = Mp4(target, fps, {"crf": "18", "threads": "1"})
    for frame in frames:
        video.add(frame)
    video.close()


def _rgb(frame: np.ndarray) -> np.ndarray:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] not in (1, 3, 4):
        what = f"frames of {frame.dtype} {frame.shape} cannot be shown"
        raise CvlctlError(what, "these can: (height, width, 1, 3 or 4) uint8")
    return np.broadcast_to(frame, (*frame.shape[:2], 3)) if frame.shape[2] == 1 else frame[..., :3]


def _even(frame: np.ndarray) -> np.ndarray:
    """What H.264 takes: a line is repeated where their number is odd."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _image(frame: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(frame))
