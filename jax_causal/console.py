"""What the command line shows, on standard error: calm on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

if TYPE_CHECKING:  # it imports jax
    from jax_causal.timings import Timings

_console = Console(
    stderr=True, highlight=False, markup=False, emoji=False, theme=Theme({"progress.elapsed": "dim"})
)

# Without a terminal, one line of progress in so many seconds.
_PLAIN_INTERVAL_S = 10
# On one, training shows its metrics again after so many seconds.
_LIVE_INTERVAL_S = 0.2
# Longer tables leave the middle out.
_MAX_ROWS = 12


def error(message: str) -> None:
    """One line that starts with "error:"."""
    _print(("error: ", "bold red"), message)


def warn(message: str) -> None:
    """One line that starts with "warning:"."""
    _print(("warning: ", "yellow"), message)


def note(message: str) -> None:
    """One plain line."""
    _print(message)


def report(*parts: RenderableType) -> None:
    """Whatever rich can show, one below the other, on standard output: for commands whose result is text."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120
    console.print(*parts, sep="\n")


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows what the library warns about with `warn`, without file names and source lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: warn(str(message))
        yield


class Display:
    """The course of `generate` or `train`. With `quiet` it shows nothing."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet

    def print(self, *parts: str | tuple[str, str]) -> None:
        """One line of texts, or of (text, style)."""
        if not self.quiet:
            _print(*parts)

    def header(self, name: str, *facts: str) -> None:
        """The model, then facts about the run."""
        self.print((name, "bold"), *[(f" · {fact}", "") for fact in facts])

    def memory(self, parts: dict[str, int], available: int | None) -> None:
        """Bytes in all and of the device, then by part."""
        of = f" of {nbytes(available)}" if available else ""
        self.print(f"memory {nbytes(sum(parts.values()))}{of}")
        self.print(("  " + " · ".join(f"{name} {nbytes(size)}" for name, size in parts.items()), "dim"))

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """While something without a measure goes on."""
        if self.quiet:
            yield
        elif _console.is_terminal:
            with _console.status(Text(what, "dim"), spinner_style="dim"):
                yield
        else:
            self.print(what)
            yield

    @contextlib.contextmanager
    def progress(
        self, timings: Timings, frames: int, blocks: int, *, label: str = ""
    ) -> Iterator[Callable[[], None]]:
        """A bar over the frames of one video; gives a function to call after every chunk."""

        def block():
            return f"{label}block {max(len(timings.blocks), 1)}/{blocks}"

        if self.quiet:
            yield lambda: None
        elif _console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(32, style="bright_black", complete_style="cyan", finished_style="cyan"),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=_console, transient=True) as bar:
                task = bar.add_task(block(), total=frames, rate="waiting for the first frame")
                yield lambda: bar.update(
                    task, description=block(), completed=timings.frames, rate=_rate(timings, frames)
                )
        else:
            yield self._plain_progress(lambda: f"{block()}  {_rate(timings, frames)}")

    def _plain_progress(self, line: Callable[[], str]) -> Callable[[], None]:
        shown = time.monotonic()

        def update():
            nonlocal shown
            if time.monotonic() - shown > _PLAIN_INTERVAL_S:
                shown = time.monotonic()
                self.print(line())

        return update

    def table(self, timings: Timings) -> None:
        """Seconds by block and phase."""
        if self.quiet:
            return
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("")
        for name in ("denoise", "context", "decode", "total"):
            table.add_column(name, justify="right", min_width=8)
        if timings.compile_s >= 0.005:
            when = "compile" if timings.compile_within_s else "warm-up"
            table.add_row(when, "", "", "", _seconds(timings.compile_s), style="dim")
        for name in ("text", "encode"):
            if seconds := getattr(timings, f"{name}_s"):
                table.add_row(name, "", "", "", _seconds(seconds))
        rows = [
            (
                f"block {i}",
                *(_seconds(block.get(p)) for p in ("denoise", "context", "decode")),
                sum(block.values()),
            )
            for i, block in enumerate(timings.blocks, 1)
        ]
        if len(rows) > _MAX_ROWS:
            half = _MAX_ROWS // 2
            rows = [*rows[:half], ("...", "", "", "", None), *rows[-half:]]
        for *cells, total in rows:
            table.add_row(*cells, _seconds(total))
        sums = [sum(timings.phase(p)) for p in ("denoise", "context", "decode")]
        table.add_row("all", *map(_seconds, sums), _seconds(timings.total_s), style="bold")
        _console.print("", table, "", sep="\n")

    @contextlib.contextmanager
    def training(
        self, stage: str, first: int, total: int
    ) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """A live table of one training run; gives a function to call with the updates done and their metrics."""
        rate, shown = _Rate(first), time.monotonic()

        def line(step, metrics):
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            return f"{stage} {step}/{total}  {values}  {rate.text(step, total)}"

        def plain(step, metrics):
            nonlocal shown
            rate.add(step)
            if time.monotonic() - shown > _PLAIN_INTERVAL_S or step == total:
                shown = time.monotonic()
                self.print(line(step, metrics))

        if self.quiet:
            yield lambda step, metrics: None
        elif not _console.is_terminal:
            yield plain
        else:
            with Live(console=_console, auto_refresh=False, transient=True) as live:

                def update(step, metrics):
                    nonlocal shown
                    rate.add(step)
                    if time.monotonic() - shown > _LIVE_INTERVAL_S or step == total:
                        shown = time.monotonic()
                        live.update(_training_table(stage, step, total, metrics, rate), refresh=True)

                yield update

    def finished(self, path, timings: Timings, fps: int, *, brief: bool = False) -> None:
        """What was written, and how fast: prompt to file first."""
        made = f"{timings.frames} frames, {timings.frames / fps:.1f} s of video, in {timings.total_s:.1f} s"
        self.print((str(path), "bold green"), f"  {made}: {timings.frames / timings.total_s:.1f} fps")
        if brief:
            return
        details = [f"first frame after {timings.first_frame_s:.2f} s"]
        if timings.compile_within_s > 0.01 * timings.total_s:
            details.append(f"{timings.fps:.1f} fps without compiling")
        dit_s = sum(timings.phase("denoise")) + sum(timings.phase("context"))
        details.append(f"{timings.frames / dit_s:.1f} fps DiT alone")
        self.print(("  " + " · ".join(details), "dim"))


class _Rate:
    """Updates per second over the last while, and the time that is left."""

    def __init__(self, first: int):
        self._seen = deque([(time.monotonic(), first)], maxlen=200)

    def add(self, step: int) -> None:
        self._seen.append((time.monotonic(), step))

    def text(self, step: int, total: int) -> str:
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        if now <= began or last <= first:
            return ""
        rate = (last - first) / (now - began)
        left = round((total - step) / rate)
        return f"{rate:.3g} updates/s  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"


def _training_table(stage, step, total, metrics, rate) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_row(stage, f"{step}/{total}", style="bold")
    table.add_row("", ProgressBar(total, step, 32, style="bright_black", complete_style="cyan"))
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    table.add_row("", rate.text(step, total), style="dim")
    return table


def nbytes(size: int) -> str:
    """Decimal kilobytes, megabytes or gigabytes."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def _rate(timings: Timings, frames: int) -> str:
    return f"{timings.frames}/{frames} frames  {timings.fps:.1f} fps  first {timings.first_frame_s:.2f} s"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _print(*parts) -> None:
    # Only a terminal has a width to wrap at.
    _console.print(Text.assemble(*parts), soft_wrap=not _console.is_terminal)
