"""Golden rollouts under every strategy and device count, to the single-device tolerances."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jax_causal.config import PRESETS
from sharding import SequenceParallel
from sharding.strategies import fitting
from tests import golden_data
from tests.golden_data import load
from tests.golden_rollout import ATOL, FRAME_TOKENS, ROLLOUTS, GoldenRollout
from tests.models import golden_transformer

pytestmark = [pytest.mark.golden, pytest.mark.sp]


@pytest.fixture(autouse=True)
def _forget_programs():
    """No two tests share a program, and all of them together are more than a process can hold."""
    yield
    jax.clear_caches()


COUNTS = {
    "gather": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "ring": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "auto": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "hybrid": (2, 4, 8),
    "ulysses": (1, 2),
}

# Every strategy, every device count, every rollout at least once; the rest runs under --full. The ring cache with a
# sink meets even, short and empty shares of a frame's tokens.
ALWAYS = {
    *(("rollout_local_sink", "ring", n) for n in (2, 4, 5, 8, 16)),
    *(("rollout_full", "gather", n) for n in (2, 3, 7, 8)),
    *(("rollout_local_nosink", "auto", n) for n in (6, 8)),
    ("rollout_local_sink", "gather", 4),
    ("rollout_full", "ring", 3),
    ("rollout_extension", "ring", 6),
    ("rollout_indep_first_i2v", "gather", 8),
    ("rollout_indep_first_t2v", "hybrid", 8),
    ("rollout_local_sink", "hybrid", 4),
    ("rollout_full", "hybrid", 2),
    ("rollout_extension", "ulysses", 2),
    ("rollout_local_sink", "ulysses", 2),
    ("rollout_full", "ulysses", 1),
    ("rollout_full", "ring", 1),
    ("rollout_full", "auto", 16),
}


def _cases():
    for name in ROLLOUTS:
        for strategy, counts in COUNTS.items():
            for count in counts:
                slow = () if (name, strategy, count) in ALWAYS else (pytest.mark.slow,)
                yield pytest.param(name, strategy, count, marks=slow, id=f"{name}-{strategy}-{count}")


@functools.cache
def _parallel(config, strategy, count, **kwargs):
    model = dataclasses.replace(PRESETS["tiny"], transformer=config)
    return SequenceParallel(count, strategy, **kwargs).for_model(model)


def _golden(name, strategy, count, unrolled=False, **kwargs):
    config, _ = golden_transformer(load(name))
    return GoldenRollout(name, parallel=_parallel(config, strategy, count, **kwargs), unrolled=unrolled)


@pytest.mark.parametrize(("name", "strategy", "count"), list(_cases()))
def test_rollout(name, strategy, count):
    if strategy != "auto" and strategy not in fitting(count, golden_transformer(load(name))[0].num_heads):
        with pytest.raises(ValueError, match=f"{strategy} (cannot share|needs a common divisor)"):
            _golden(name, strategy, count)  # another folder's head count: refused, not wrong
        return
    golden = _golden(name, strategy, count)
    assert golden.spec.parallel.num_devices == count
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)


@pytest.mark.parametrize("strategy", ["gather", "ring", "hybrid"])
def test_rollout_unrolled(strategy):
    heads = golden_transformer(load("rollout_local_sink"))[0].num_heads
    golden = _golden("rollout_local_sink", strategy, 2 * heads, unrolled=True)
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)


@pytest.mark.parametrize("parts", golden_data.divisors(FRAME_TOKENS)[:2])
def test_gather_with_split_keys(parts):
    golden = _golden("rollout_local_sink", "gather", 4, parts=parts)
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)


def test_gather_without_overlap():
    golden = _golden("rollout_full", "gather", 4, overlap=False)
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)
