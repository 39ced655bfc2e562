"""How the Hopper kernel's work is dealt to processors: all of it is done, once, by blocks that can keep in step."""

import itertools

import numpy as np
import pytest

from jax_causal.attention_plan import PARTS, Place, Plan

PROCESSORS = 132
SIZES = [(4680, 12, 32760), (4680, 12, 512), (9360, 12, 32760), (585, 12, 32760), (2352, 12, 32760), (2340, 3, 18720),
         (4680, 5, 32760), (4680, 40, 32760), (128, 1, 32760), (1, 1, 8)]  # fmt: skip


def walks(plan, key_tiles, short=False):
    """For both blocks of every cluster, the places and spans of keys that it walks over, in turn."""
    borders, found = plan.borders(short=short), []
    for cluster in range(plan.clusters):
        stretch = borders[cluster], borders[cluster + 1]
        count = int(plan.count(np.int32(cluster), *stretch))
        index, side = (x.astype(np.int32) for x in np.mgrid[:count, :2])
        place = Place(
            *(np.asarray(x) for x in plan.place(np.int32(cluster), side, index, *stretch, np.int32(short)))
        )
        span = np.broadcast_arrays(*plan.span(place, np.int32(key_tiles)), side)[:2]
        place = Place(*np.broadcast_arrays(*place, side)[:-1])
        found.append([[(Place(*(x[i, s] for x in place)), (span[0][i, s], span[1][i, s])) for s in (0, 1)]
                      for i in range(count)])  # fmt: skip
    return found


@pytest.mark.parametrize(("queries", "heads", "keys"), SIZES)
def test_plan_fills_the_card(queries, heads, keys):
    plan = Plan.cheapest(queries, heads, keys, PROCESSORS)
    assert plan.tiles * 128 >= queries > (plan.tiles - 1) * 128
    assert plan.heads == heads
    assert 0 <= plan.shared <= plan.tiles
    assert 1 <= plan.clusters <= PROCESSORS // 2
    key_tiles = -(-keys // 128)
    busy = [sum(stop - start for (_, (start, stop)), _ in walk) for walk in walks(plan, key_tiles)]
    assert max(busy) <= -(-heads * plan.tiles // PROCESSORS) * key_tiles
    if keys >= 18720 and heads * queries >= 12 * 585:
        assert max(busy) - min(busy) <= 2  # steps, rounded at both ends
        assert heads * plan.tiles * key_tiles > 0.97 * max(busy) * PROCESSORS  # the best possible is 1
    assert plan.runs <= 9


def test_plan_of_a_card_with_a_single_processor():
    assert Plan.cheapest(300, 2, 512, 1) == Plan(3, 2, 0, 1)


PLANS = [Plan(tiles, heads, shared, clusters)
         for tiles in (1, 3, 8) for heads in (1, 3, 12) for clusters in (1, 4, 66)
         for shared in sorted({0, 1, 2, tiles - 1, tiles}) if shared <= tiles]  # fmt: skip
PLANS = [plan for plan in PLANS if plan.shared == 0 or plan._is_even()]


CASES = [(plan, False) for plan in PLANS]
CASES += [(plan._replace(may_be_short=True), short) for plan in PLANS for short in (False, True)
          if plan.shared and plan.heads > 1 < plan.clusters and plan._is_even(short=True)]  # fmt: skip


@pytest.mark.parametrize(("plan", "short"), CASES, ids=lambda x: "-".join(map(str, np.ravel(x))))
def test_every_tile_is_walked_once_over_all_keys(plan, short):
    expected = {(False, *of) for of in itertools.product(range(plan.whole), range(plan.heads))}
    expected |= {(True, *of) for of in itertools.product(range(plan.shared - short), range(plan.heads))}
    is_run = plan.is_run(short=short)
    assert is_run.shape == (plan.runs, plan.heads, plan.shared)
    assert not is_run[:, :, plan.shared - short :].any()
    for key_tiles in (0, 4, 37):
        walked = {}
        for walk in walks(plan, key_tiles, short):
            for (left, span), (right, right_span) in walk:
                # Both blocks of a cluster take as many steps, for each waits for the other's.
                assert (left.shared, left.run, left.together, span) == (
                    right.shared,
                    right.run,
                    right.together,
                    right_span,
                )
                if left.together:
                    assert (left.head, left.tile + 1) == (right.head, right.tile)
                for block in {left, right}:  # two may do the same, where nothing else is left to do
                    at = (bool(block.shared), int(block.tile), int(block.head))
                    walked.setdefault(at, []).append((int(block.run), span))
        assert set(walked) == expected
        for (shared, tile, head), runs in walked.items():
            seen = [key for _, span in runs for key in range(*span)]
            assert sorted(seen) == list(range(key_tiles))
            numbers = [run for run, _ in runs]
            assert len(set(numbers)) == len(numbers)
            if shared:
                assert sorted(numbers) == np.flatnonzero(is_run[:, head, tile]).tolist()
            else:
                assert len(runs) == 1


def test_shares_are_even():
    plan = Plan.cheapest(4680, 12, 32760, PROCESSORS)
    assert not plan.may_be_short
    borders = plan.borders()
    assert borders[-1] == PARTS * plan.shared_pairs
    share = (plan.whole_pairs + plan.shared_pairs) / plan.clusters - 3
    assert abs(np.diff(borders) - share * PARTS).max() <= 1


def test_a_device_with_a_tile_fewer_has_less_to_do():
    """19 and 18 tiles of 12 heads, on the first and the last of two devices, and no more for the first than before."""
    plan = Plan.cheapest(2376, 12, 32760, PROCESSORS, may_be_short=True)
    assert plan == Plan.cheapest(2376, 12, 32760, PROCESSORS)._replace(may_be_short=True)
    for short, tiles in ((False, 19), (True, 18)):
        busy = [sum(stop - start for (_, (start, stop)), _ in walk) for walk in walks(plan, 256, short)]
        assert max(busy) - min(busy) <= 2
        assert sum(busy) * 2 == tiles * 12 * 256


def test_plan_does_not_wait_for_short_queries():
    """10 tiles of 12 heads are 60 pairs, which 60 clusters walk at once; to share any costs more over few keys."""
    assert Plan.cheapest(1176, 12, 4680, PROCESSORS, may_be_short=True) == Plan(10, 12, 0, 60)
