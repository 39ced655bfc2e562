"""The account of a run's time: phases into blocks, compilation apart."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


TRACE, COMPILE = "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"


def test_the_compile_clock_counts_nested_functions_once():
    """JAX reports when something ends: first what was traced inside another, then the other."""
    with CompileClock() as clock:
        record = jax.monitoring.record_event_duration_secs
        record(TRACE, 2.0)
        record("/jax/checkpoint/write_duration", 7.0)  # of no interest
        now = time.perf_counter()
        assert clock.since(now - 10) == pytest.approx(2.0, abs=0.1)
        record(TRACE, 3.0)
        record(COMPILE, 0.0)
    assert clock.since(now - 10) == pytest.approx(3.0, abs=0.1)
    assert clock.since(now - 1) == pytest.approx(1.0, abs=0.1)
    record(COMPILE, 5.0)
    assert clock.since(now - 10) == pytest.approx(3.0, abs=0.1)  # it listens no more


def test_the_compile_clock_hears_jax():
    function = jax.jit(lambda x: jnp.sin(x) * 3)
    x = np.ones(7, np.float32)
    with CompileClock() as clock:
        start = time.perf_counter()
        function(x).block_until_ready()
        assert 0 < clock.since(start) < time.perf_counter() - start
        middle = time.perf_counter()
        function(x).block_until_ready()
        assert clock.since(middle) == 0
