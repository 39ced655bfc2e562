"""Where the time of a run went, with compilation kept apart from computation."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.monitoring

# Called with a phase ("text", "encode", "denoise", "context", "decode") and the seconds it took.
Report = Callable[[str, float], None]


class Phases:
    """Times phases if somebody listens; otherwise nothing waits for the device.

    timed = Phases(report)
    timed("text", what_the_phase_computes)  # since it was made, the phase before ended, or `start`
    """

    def __init__(self, report: Report | None):
        self.report = report
        self.start()

    def start(self):
        self.began = time.perf_counter()

    def __call__(self, phase, result):
        if self.report:
            jax.block_until_ready(result)
            self.report(phase, time.perf_counter() - self.began)
            self.start()


class CompileClock:
    """Adds up the time that JAX spends tracing, lowering and compiling (or fetching what it compiled before).

    with CompileClock() as clock:
        ...
        clock.since(start)
    """

    def __enter__(self) -> CompileClock:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._record)
        return self

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._record)

    def _record(self, event: str, duration: float, **_):
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.perf_counter()
        # A function traced inside another reports first, and lies inside the other's span.
        while self._spans and self._spans[-1][0] >= end - duration:
            self._spans.pop()
        self._spans.append((end - duration, end))

    def since(self, start: float) -> float:
        """Seconds of compilation after `start`, a time of `time.perf_counter`."""
        return sum(end - max(begin, start) for begin, end in self._spans if end > start)


class Timings:
    """One run of `Pipeline.stream`, from the call until the last frame is written. Starts when made.

    Give `report` to the stream, `add` every chunk's number of frames, and call `finish`.

    Attributes:
      text_s, encode_s: seconds for the prompt, and for given frames.
      blocks: for each block seconds by phase, "denoise", "context" and "decode"; given blocks are not denoised, and
        the last one needs no context.
      first_frame_s: from the start until the first frame is on the host; None until then.
      frames: handed over so far.
      total_s: from the start to `finish`.
      compile_s: seconds of compilation since the start, or since `compile_from`.
      compile_within_s: what of it fell after the start. First frame and total contain it; phases do not.
    """

    def __init__(self, clock: CompileClock, *, compile_from: float | None = None):
        self.text_s = self.encode_s = 0.0
        self.blocks: list[dict[str, float]] = []
        self.first_frame_s: float | None = None
        self.frames = 0
        self.total_s = self.compile_s = self.compile_within_s = 0.0
        self._clock = clock
        self._start = time.perf_counter()
        self._compile_from = self._start if compile_from is None else compile_from

    def report(self, phase: str, seconds: float) -> None:
        """Takes what `Pipeline.stream` reports."""
        seconds -= self._clock.since(time.perf_counter() - seconds)
        if phase in ("text", "encode"):
            setattr(self, f"{phase}_s", seconds)
            return
        if phase == "denoise" or not self.blocks or (phase == "decode" and "context" in self.blocks[-1]):
            self.blocks.append({})
        # The first block is decoded in two pieces.
        self.blocks[-1][phase] = self.blocks[-1].get(phase, 0.0) + seconds

    def add(self, frames: int) -> None:
        """Counts a chunk of frames."""
        self.first_frame_s = self.first_frame_s or self.elapsed
        self.frames += frames

    def finish(self) -> None:
        """The last frame is written."""
        self.total_s, self.compile_s = self.elapsed, self._clock.since(self._compile_from)
        self.compile_within_s = self._clock.since(self._start)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def fps(self) -> float:
        """Frames per second so far or, once finished, overall; time spent compiling does not count."""
        if self.total_s:
            return self.frames / (self.total_s - self.compile_within_s)
        return self.frames / (self.elapsed - self._clock.since(self._start))

    def phase(self, name: str) -> list[float]:
        """Seconds of one phase, for every block that has it."""
        return [block[name] for block in self.blocks if name in block]

    def to_json(self) -> dict[str, float | list[float]]:
        """The flat record, in seconds; here `fps` is frames by `total_s`, compilation included."""
        record = {
            "first_frame_s": self.first_frame_s,
            "text_s": self.text_s,
            "denoise_s": self.phase("denoise"),
            "context_s": self.phase("context"),
            "decode_s": self.phase("decode"),
            "compile_s": self.compile_s,
            "total_s": self.total_s,
            "frames": self.frames,
            "fps": self.frames / self.total_s,
        }
        if self.encode_s:
            record["encode_s"] = self.encode_s
        return {key: _rounded(value) for key, value in record.items()}


def _rounded(value):
    return [round(v, 5) for v in value] if isinstance(value, list) else round(value, 5)
