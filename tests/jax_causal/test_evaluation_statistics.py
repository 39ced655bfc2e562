"""Intervals against published values, and how often they cover the truth."""

import numpy as np
import pytest

from jax_causal import evaluation_statistics as statistics


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe 1998, "Interval estimation for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(successes, count, low, high):
    assert statistics.wilson(successes, count) == pytest.approx((low, high), abs=5e-5)
    assert statistics.wilson(count - successes, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_independent_differences_as_published():
    """Newcombe 1998, "Interval estimation for the difference", table II, method 10."""
    for (a, m), (b, n), low, high in [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ]:
        groups = (np.arange(size)[:, None] < hits for hits, size in ((a, m), (b, n)))
        found = statistics.difference(*groups)
        assert found.value == pytest.approx(a / m - b / n)
        assert found[1:] == pytest.approx((low, high), abs=1e-4)


def test_paired_difference_by_hand():
    """20 prompts: 3 that only the first gets right, 1 that only the second does."""
    first, second = np.zeros((20, 1)), np.zeros((20, 1))
    first[:3], second[3] = 1, 1
    # With half a count more in each of the four cells, of 22: (3.5 - 1.5) / 22 and its Wald interval.
    middle, half = 2 / 22, 1.959964 * np.sqrt((5 - 2**2 / 22) / 22**2)
    assert statistics.paired_difference(first, second) == pytest.approx((0.1, middle - half, middle + half))


def test_agreement_is_not_certainty():
    right = np.ones((32, 1))
    same = statistics.paired_difference(right, right)
    assert same.value == 0
    assert -0.1 < same.low < -0.02
    assert 0.02 < same.high < 0.1
    assert statistics.share(right).low == pytest.approx(statistics.wilson(32, 32)[0])


def test_seeds_of_a_prompt_count_by_how_much_they_differ():
    rng = np.random.default_rng(0)
    same = np.repeat(rng.random((40, 1)) < 0.7, 8, axis=1)
    assert statistics.effective_count(same) == pytest.approx(40, rel=0.05)
    assert statistics.effective_count(rng.random((40, 8)) < 0.7) > 200
    assert statistics.effective_count(np.ones((40, 8))) == 40
    assert statistics.effective_count(np.asarray([[1, 0, 1, 1]])) == 1  # one prompt says nothing of others
    assert statistics.effective_count(rng.random((40, 1)) < 0.7) == 40


@pytest.mark.parametrize("kind", ["share", "paired", "apart"])
def test_intervals_hold_what_they_promise(kind):
    """Of 95 % intervals about 95 in 100 hold the truth, with prompts that are easy or hard for all seeds."""
    rng = np.random.default_rng(1)
    held, trials = 0, 2000
    for _ in range(trials):
        easy = rng.beta(4, 1, (48, 1))
        a = rng.random((48, 4)) < easy
        if kind == "share":
            truth, found = 0.8, statistics.share(a)
        elif kind == "paired":
            truth, found = -0.08, statistics.paired_difference(rng.random((48, 4)) < 0.9 * easy, a)
        else:
            truth, found = 0.0, statistics.difference(rng.random((48, 4)) < rng.beta(4, 1, (48, 1)), a)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / trials <= 0.985
