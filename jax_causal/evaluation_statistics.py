"""95 % intervals of shares and of their differences, for outcomes that come in groups: seeds of one prompt.

Outcomes are arrays [prompts, seeds] of 0 and 1. Seeds of one prompt tend to be right together, so the prompts count
as the sample, not the clips: intervals take the number of independent outcomes that would vary as much.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Z = 1.959964  # two-sided 95 %


class Estimate(NamedTuple):
    """A share or a difference of shares, and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a share; `count` > 0, neither needs to be whole."""
    share = successes / count
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def effective_count(outcomes: np.ndarray) -> float:
    """Independent outcomes that would vary as much as `outcomes` [prompts, seeds]: between prompts and clips, and no
    more than prompts where how these vary cannot be told."""
    prompts, clips = len(outcomes), outcomes.size
    share, means = outcomes.mean(), outcomes.mean(axis=1)
    if prompts in (1, clips) or not 0 < share < 1:
        return float(prompts)
    variance = np.square(means - share).sum() / (prompts * (prompts - 1))
    return float(np.clip(share * (1 - share) / max(variance, 1e-12), prompts, clips))


def share(outcomes: np.ndarray) -> Estimate:
    """The share of successes in `outcomes` [prompts, seeds], with Wilson's interval."""
    value, count = float(np.mean(outcomes)), effective_count(np.asarray(outcomes, float))
    return Estimate(value, *wilson(value * count, count))


def paired_difference(outcomes: np.ndarray, reference: np.ndarray) -> Estimate:
    """Share of `outcomes` minus that of `reference`, of the same prompts and seeds, both [prompts, seeds].

    The interval is Wald's on the differences by prompt after half a success and half a failure more for either side
    (Agresti and Min 2005): without it, no disagreement at all would pass for certainty.
    """
    differences = (np.asarray(outcomes, float) - reference).mean(axis=1)
    count = len(differences) + 2
    middle = differences.sum() / count
    variance = (np.square(differences).sum() + 1) / count - middle**2
    half = Z * np.sqrt(variance / count)
    low, high = np.clip([middle - half, middle + half], -1, 1)
    return Estimate(float(differences.mean()), float(low), float(high))


def difference(outcomes: np.ndarray, reference: np.ndarray) -> Estimate:
    """Share of `outcomes` minus that of `reference`, of different prompts: Newcombe's interval (1998)."""
    a, b = share(outcomes), share(reference)
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    high = value + np.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, float(low), float(high))
