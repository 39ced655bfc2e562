"""What the command line shows, on a terminal and without one."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from jax_causal import console
from tests.jax_causal.test_timings import fed


def _on_terminal(width, show):
    """Text that `show` leaves on a terminal, control codes removed, and the same with them."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=width, highlight=False, markup=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "_console", terminal)
        show()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()), screen.getvalue()


def test_on_a_terminal_progress_is_a_bar_that_goes_away():
    def show():
        timings = fed([("denoise", 1.0), ("decode", 1.0)])
        with console.Display().progress(timings, 13, 2, label="0001.mp4  ") as update:
            timings.add(5)
            update()

    text, codes = _on_terminal(80, show)
    assert "0001.mp4  block 1/2 ━" in text
    assert "waiting for the first frame" in text
    assert re.search(r"━ 5/13 frames  [\d.]+ fps  first [\d.]+ s", text)
    assert max(len(line.rstrip()) for line in re.split("[\r\n]", text)) <= 80
    assert codes.endswith("\x1b[2K")  # the line is erased


def test_on_a_terminal_training_is_a_table_that_goes_away():
    def show():
        with console.Display().training("vae", 0, 200) as update:
            for step in range(1, 201):
                update(step, {"loss": 1 / step, "[b]norm": 2.0})

    text, codes = _on_terminal(80, show)
    assert "vae" in text
    assert "200/200" in text
    assert re.search(r"loss +0\.005 ", text)
    assert re.search(r"\[b\]norm +2 ", text)
    assert re.search(r"updates/s  0:00:00 left", text)
    assert max(len(line.rstrip()) for line in re.split("[\r\n]", text)) <= 80
    assert codes.endswith("\x1b[2K")  # the table is erased


def test_without_a_terminal_training_is_a_line_now_and_then(capsys):
    clock = iter(np.arange(0, 1000, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        with console.Display().training("vae", 100, 300) as update:
            for step in range(101, 301):
                update(step, {"loss": 2.5})
        with console.Display(quiet=True).training("vae", 0, 1) as update:
            update(1, {"loss": 2.5})
    lines = capsys.readouterr().err.splitlines()
    assert 5 < len(lines) < 40
    assert re.fullmatch(r"vae 1\d\d/300  loss 2\.5  [\d.]+ updates/s  0:0\d:\d\d left", lines[0])
    assert lines[-1].startswith("vae 300/300  loss 2.5")


def test_brackets_and_colons_in_names_are_only_text():
    def show():
        console.warn("[red]a[/red] :smile: [b")
        with console.Display().progress(fed([]), 13, 2, label="[b]x.mp4 "):
            pass

    text, _ = _on_terminal(80, show)
    assert "warning: [red]a[/red] :smile: [b\n" in text
    assert "[b]x.mp4 block 1/2" in text


def test_without_a_terminal_progress_is_rare(capsys):
    display, timings = console.Display(), fed([("denoise", 1), ("decode", 1)], frames=5)
    with display.progress(timings, 13, 2) as update:
        for _ in range(100):
            update()
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 1000, 4))
    time_ = SimpleNamespace(monotonic=lambda: next(clock))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "time", time_)
        with display.progress(timings, 13, 2, label="0001.mp4  ") as update:
            for _ in range(10):
                update()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("0001.mp4  block 1/2  5/13 frames") for line in lines)


def test_long_tables_leave_the_middle_out(capsys):
    console.Display().table(fed([("denoise", 1), ("decode", 1)] * 50))
    shown = capsys.readouterr().err
    assert "block 1 " in shown
    assert "block 50" in shown
    assert "..." in shown
    assert len(shown.splitlines()) < 20


def test_the_table_is_the_account(capsys):
    timings = fed(
        [("text", 0.5), ("denoise", 1), ("decode", 2), ("context", 3), ("denoise", 4), ("decode", 5)]
    )
    timings.total_s, timings.compile_s, timings.compile_within_s = 20.0, 4.5, 4.5
    console.Display().table(timings)
    rows = [line.split() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert rows == [
        ["denoise", "context", "decode", "total"],
        ["compile", "4.50", "s"],
        ["text", "0.50", "s"],
        ["block", "1", "1.00", "s", "3.00", "s", "2.00", "s", "6.00", "s"],
        ["block", "2", "4.00", "s", "5.00", "s", "9.00", "s"],
        ["all", "5.00", "s", "3.00", "s", "7.00", "s", "20.00", "s"],
    ]


def test_sizes_are_readable():
    assert [console.nbytes(size) for size in (400_000, 9_000_000, 38_400_000, 2_838_000_000)] == [
        "0.4 MB",
        "9.0 MB",
        "38 MB",
        "2.8 GB",
    ]
