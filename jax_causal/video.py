"""Video files in and out: mp4, gif, numpy, png.

A file appears under its name only when it is complete: it is written to a hidden temporary file beside it,
which is then renamed. Whatever ends the process early leaves no half video.

mp4 is encoded in this process (PyAV): forking an ffmpeg from a process that runs JAX can deadlock.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import io
import itertools
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import av
import imageio.v3 as iio
import numpy as np
from av.video.reformatter import Colorspace
from einops import rearrange
from PIL import Image, ImageOps


@dataclasses.dataclass(eq=False)
class Video:
    """A finished video.

    Attributes:
      frames: uint8 [T, H, W, 3]; None on the processes of a multi-host run that do not hold them.
      fps: frames per second.
      timings: seconds by phase of the run that made it, where measured.
    """

    frames: np.ndarray | None = dataclasses.field(repr=False)
    fps: int
    timings: dict | None = dataclasses.field(default=None, repr=False)

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Writes the video in the format that the name asks for; without frames, nothing. Returns the path.

        `.mp4` (H.264) and `.gif` play; `.npy` and `.npz` (arrays `frames` and `fps`) keep every bit; `.png`
        is a contact sheet; a numbered name like `frames/%05d.png` gives one file per frame.

        Raises:
          ValueError: unknown suffix, or an odd height or width for mp4.
          FileExistsError: the file exists and `overwrite` is not set.
          OSError: the folder is missing or cannot be written to, or the disk is full.
        """
        if self.frames is None:
            return Path(path)  # unchecked: the process that has the frames may have written it already
        path = check_output(path, overwrite=overwrite)
        if path.suffix in _ENCODERS:
            with VideoWriter(path, self.fps, overwrite=overwrite) as writer:
                writer.write(self.frames)
        elif _NUMBERED.fullmatch(path.name):
            for i, frame in enumerate(self.frames):
                write_png(path.with_name(path.name % i), frame)
        else:
            with _atomic_write(path) as file:
                _WHOLE[path.suffix](file, self)
        return path

    def _repr_html_(self) -> str:
        if self.frames is None:
            return "This process holds no frames."
        file = io.BytesIO()
        with _mp4(file, self.fps, *self.frames.shape[1:3]) as encode:
            for frame in self.frames:
                encode(frame)
        data = base64.b64encode(file.getvalue()).decode()
        return f'<video autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'


class VideoWriter:
    """Writes an mp4 or gif chunk by chunk.

        with VideoWriter("ball.mp4", fps=16) as writer:
            for frames in chunks:
                writer.write(frames)

    The file appears at a clean exit; an exception, Ctrl-C included, leaves none, as does a writer that got
    no frames. Whether there is a place to write to is checked at construction. An mp4 is encoded as frames
    come, a gif at the end.

    Raises:
      ValueError: the suffix is neither .mp4 nor .gif.
      OSError: as in `check_output`.
    """

    def __init__(self, path: str | os.PathLike, fps: int, *, overwrite: bool = False):
        # First of all: what `check_output` offers is more than can be written here.
        if Path(path).suffix not in _ENCODERS:
            raise ValueError(f"{path} cannot be written chunk by chunk: use {' or '.join(_ENCODERS)}")
        self.path = check_output(path, overwrite=overwrite)
        self.fps = fps
        self._stack = contextlib.ExitStack()
        self._encode = self._size = None

    def write(self, frames: np.ndarray) -> None:
        """Appends frames uint8 [t, H, W, 3]; t may be 0.

        Raises:
          ValueError: another dtype or rank, a size unlike the earlier frames', or odd sides for mp4.
          OSError: the disk is full.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames must be uint8 [t, H, W, 3], not {frames.dtype} {list(frames.shape)}")
        if not len(frames):
            return
        size = frames.shape[1:3]
        if self._encode is None:
            file = self._stack.enter_context(_atomic_write(self.path))
            self._encode = self._stack.enter_context(_ENCODERS[self.path.suffix](file, self.fps, *size))
            self._size = size
        if size != self._size:
            raise ValueError(f"frames are {list(size)}, but those before them are {list(self._size)}")
        for frame in frames:
            self._encode(frame)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)


def check_output(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """The path, if a video can be saved there: worth asking before the minutes of making one.

    Raises:
      ValueError: unknown suffix.
      FileExistsError: the file exists and `overwrite` is not set.
      FileNotFoundError, PermissionError: its folder is missing or cannot be written to.
    """
    path = Path(path)
    if path.suffix not in _ENCODERS | _WHOLE:
        known = ", ".join(_ENCODERS | _WHOLE)
        raise ValueError(f"{str(path)!r} names no known format: end it in one of {known}, or in %05d.png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: make it, or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {path.parent} cannot be written to: choose another")
    if not overwrite and (existing := _existing(path)):
        raise FileExistsError(
            f"{existing} exists: pass --overwrite (in Python overwrite=True), or choose another name"
        )
    return path


def _existing(path: Path) -> Path | None:
    """A file that saving to `path` would replace, if there is one."""
    if not _NUMBERED.fullmatch(path.name):
        return path if path.exists() else None
    numbered = re.compile(re.sub(r"%\d*d", r"\\d+", re.escape(path.name)))
    return next((other for other in sorted(path.parent.iterdir()) if numbered.fullmatch(other.name)), None)


@contextlib.contextmanager
def _atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file whose content becomes `path` on a clean exit and is deleted on any other."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = "the disk is full, nothing was kept: free some space or choose another folder"
        raise OSError(errno.ENOSPC, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


# Encoders take a file, frames per second and the size, and give a function that appends one frame [H, W, 3].
Encoder = Iterator[Callable[[np.ndarray], None]]


@contextlib.contextmanager
def _mp4(file: BinaryIO, fps: float, height: int, width: int) -> Encoder:
    if height % 2 or width % 2:
        raise ValueError(f"mp4 needs an even height and width, not {height} x {width}; gif and npy take any")
    container = av.open(file, "w", format="mp4")
    try:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), {"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # The conversion from RGB uses BT.601; players would otherwise assume BT.709 for large frames.
        stream.codec_context.colorspace = Colorspace.SMPTE170M
        yield lambda frame: container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # the frames that the encoder still holds back
    except BaseException:
        # Closing writes the index, and where writing has failed once it fails again, hiding the first error.
        with contextlib.suppress(OSError, av.FFmpegError):
            container.close()
        raise
    container.close()


@contextlib.contextmanager
def _gif(file: BinaryIO, fps: float, height: int, width: int) -> Encoder:
    images = []
    yield lambda frame: images.append(Image.fromarray(frame).quantize(256))
    # A gif counts time in whole hundredths of a second; rounding the frames' ends keeps the pace over a clip.
    ends = np.round(np.arange(len(images) + 1) * (100 / fps)).astype(int)
    durations = (10 * np.diff(ends)).tolist()
    images[0].save(file, "gif", save_all=True, append_images=images[1:], duration=durations, loop=0)


def contact_sheet(frames: np.ndarray, limit: int = 24, columns: int = 6) -> np.ndarray:
    """At most `limit` evenly spaced frames of uint8 [T, H, W, 3], first and last included, in reading order:
    uint8 [rows H, columns W, 3], black where the last row is not full."""
    picks = np.linspace(0, len(frames) - 1, min(limit, len(frames))).round().astype(int)
    columns = min(columns, len(picks))
    rows = math.ceil(len(picks) / columns)
    cells = np.zeros((rows * columns, *frames.shape[1:]), np.uint8)
    cells[: len(picks)] = frames[picks]
    return rearrange(cells, "(r c) h w rgb -> (r h) (c w) rgb", c=columns)


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as one png, whole or not at all."""
    with _atomic_write(path) as file:
        Image.fromarray(image).save(file, format="png")


_ENCODERS = {".mp4": _mp4, ".gif": _gif}
_WHOLE = {
    # Given a real file, numpy writes past Python and reports a full disk without saying so.
    ".npy": lambda file, video: np.save(SimpleNamespace(write=file.write), video.frames),
    ".npz": lambda file, video: np.savez(file, frames=video.frames, fps=video.fps),
    ".png": lambda file, video: Image.fromarray(contact_sheet(video.frames)).save(file, format="png"),
}
_NUMBERED = re.compile(r"[^%]*%\d*d[^%]*\.png")


def read_image(path: str | os.PathLike, height: int, width: int) -> np.ndarray:
    """An image file as uint8 [height, width, 3]: turned upright, resized without cropping (Lanczos).

    Raises:
      FileNotFoundError: no such file.
      ValueError: not an image that can be read.
    """
    _require_file(path)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    return np.array(upright.resize((width, height), Image.Resampling.LANCZOS))


def read_video(path: str | os.PathLike, num_frames: int | None = None) -> tuple[np.ndarray, float]:
    """The first `num_frames` frames of a video file (None: all).

    Returns:
      uint8 [T, H, W, 3], and frames per second.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a video that can be read, or one with fewer frames.
    """
    _require_file(path)
    try:
        with iio.imopen(path, "r", plugin="pyav") as file:
            fps = float(file.metadata()["fps"])
            frames = list(itertools.islice(file.iter(), num_frames))
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"{path} is not a readable video: {error}") from error
    if len(frames) < (num_frames or 1):
        raise ValueError(f"{path} has {len(frames)} frames, but {num_frames or 1} are needed")
    return np.stack(frames), fps


def _require_file(path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")


def to_model_range(frames: np.ndarray) -> np.ndarray:
    """uint8 pixels to float32 in [-1, 1], the range of the VAE."""
    return frames.astype(np.float32) / 127.5 - 1
