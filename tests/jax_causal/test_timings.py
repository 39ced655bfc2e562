"""The account of a run's time: phases into blocks, compilation apart."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal.timings import CompileClock, Timings


class FakeClock:
    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def since(self, start):
        return self.seconds


def fed(phases, frames=0, clock=None):
    timings = Timings(clock or FakeClock())
    for phase, seconds in phases:
        timings.report(phase, seconds)
    if frames:
        timings.add(frames)
    return timings


def test_phases_are_sorted_into_blocks():
    """One given block, then two made ones; the first block is decoded in two pieces."""
    given = [("text", 1), ("encode", 2), ("decode", 3), ("decode", 4), ("context", 5)]
    made = [("denoise", 6), ("decode", 7), ("context", 8), ("denoise", 9), ("decode", 10)]
    timings = fed([*given, *made])
    assert (timings.text_s, timings.encode_s) == (1, 2)
    assert timings.blocks == [
        {"decode": 7, "context": 5},
        {"denoise": 6, "decode": 7, "context": 8},
        {"denoise": 9, "decode": 10},
    ]
    assert timings.phase("denoise") == [6, 9]
    # Two given blocks in a row.
    blocks = fed([("decode", 1), ("decode", 1), ("context", 1), ("decode", 2), ("context", 2)]).blocks
    assert blocks == [{"decode": 2, "context": 1}, {"decode": 2, "context": 2}]


def test_phases_do_not_contain_compilation():
    timings = fed([("denoise", 10.0)], clock=FakeClock(4.0))
    assert timings.phase("denoise") == [6.0]


def test_the_compile_clock_counts_nested_functions_once():
    @jax.jit
    def inner(x):
        return jnp.sin(x) * 3

    @jax.jit
    def outer(x):
        return inner(inner(x) + 1)

    x = np.ones(7, np.float32)
    with CompileClock() as clock:
        start = time.perf_counter()
        outer(x).block_until_ready()
        elapsed, compiled = time.perf_counter() - start, clock.since(start)
        assert 0 < compiled <= elapsed
        between = time.perf_counter()
        outer(x).block_until_ready()
        assert clock.since(between) == 0
        assert clock.since(start) == compiled
    jax.jit(lambda x: x - 7)(x)
    assert clock.since(start) == compiled  # it listens no more
