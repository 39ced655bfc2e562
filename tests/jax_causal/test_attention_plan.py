"""How the Hopper kernel's work is dealt to processors: all of it is done, once, by blocks that can keep in step."""

import itertools

import numpy as np
import pytest

from jax_causal.attention_plan import PARTS, Place, Plan

PROCESSORS = 132
SIZES = [(4680, 12, 32760), (4680, 12, 512), (9360, 12, 32760), (585, 12, 32760), (2352, 12, 32760), (2340, 3, 18720),
         (4680, 5, 32760), (4680, 40, 32760), (128, 1, 32760), (1, 1, 8)]  # fmt: skip


def walks(plan, key_tiles):
    """For both blocks of every cluster, the places and spans of keys that it walks over, in turn."""
    borders, found = plan.borders(), []
    for cluster in range(plan.clusters):
        stretch = borders[cluster], borders[cluster + 1]
        count = int(plan.count(np.int32(cluster), *stretch))
        index, side = (x.astype(np.int32) for x in np.mgrid[:count, :2])
        place = Place(*(np.asarray(x) for x in plan.place(np.int32(cluster), side, index, *stretch)))
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
    assert Plan.cheapest(300, 2, 512, 1) == (3, 2, 0, 1)


PLANS = [Plan(tiles, heads, shared, clusters)
         for tiles in (1, 3, 8) for heads in (1, 3, 12) for clusters in (1, 4, 66)
         for shared in sorted({0, 1, 2, tiles - 1, tiles}) if shared <= tiles]  # fmt: skip
PLANS = [plan for plan in PLANS if plan.shared == 0 or plan._is_even()]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(map(str, plan)))
def test_every_tile_is_walked_once_over_all_keys(plan):
    expected = {(False, *of) for of in itertools.product(range(plan.whole), range(plan.heads))}
    expected |= {(True, *of) for of in itertools.product(range(plan.shared), range(plan.heads))}
    for key_tiles in (0, 4, 37):
        walked = {}
        for walk in walks(plan, key_tiles):
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
        for (shared, _, _), runs in walked.items():
            seen = [key for _, span in runs for key in range(*span)]
            assert sorted(seen) == list(range(key_tiles))
            numbers = [run for run, _ in runs]
            assert len(set(numbers)) == len(numbers)
            assert max(numbers) < plan.runs
            assert shared or len(runs) == 1


@pytest.mark.parametrize(
    "plan", [plan for plan in PLANS if plan.shared], ids=lambda plan: "-".join(map(str, plan))
)
def test_who_has_the_end_of_the_keys_takes_what_others_have_found(plan):
    """Nobody waits for a later cluster, nor for anything that its cluster does behind a wait: so all come to an end, in
    whatever order a card begins them."""
    openers, left, taken = plan.openers(), {}, []
    for cluster, walk in enumerate(walks(plan, 8)):
        waited = False
        for places in walk:
            for side, (place, _) in enumerate(places):
                tile = int(place.tile), int(place.head), side
                if place.end < PARTS:
                    assert place.shared
                    assert not waited
                    assert (cluster, side) not in left  # its place says whose it is
                    left[cluster, side] = tile, int(place.run)
                elif place.begin > 0:
                    assert openers[cluster] < cluster
                    waited = True
                    taken += [
                        (other, side, tile, other % plan.runs) for other in range(openers[cluster], cluster)
                    ]
    assert sorted(taken) == sorted((cluster, side, *found) for (cluster, side), found in left.items())


def test_shares_are_even():
    plan = Plan.cheapest(4680, 12, 32760, PROCESSORS)
    borders = plan.borders()
    assert borders[-1] == PARTS * plan.shared_pairs
    share = (plan.whole_pairs + plan.shared_pairs) / plan.clusters - 3
    assert abs(np.diff(borders) - share * PARTS).max() <= 1
