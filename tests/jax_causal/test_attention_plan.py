"""How the Hopper kernel's work is dealt to processors: all of it is done, once, by blocks that can keep in step."""

import itertools

import numpy as np
import pytest

from jax_causal.attention_plan import BLOCK_COST, Place, Plan

PROCESSORS = 132
SIZES = [(4680, 12, 32760), (4680, 12, 512), (9360, 12, 32760), (585, 12, 32760), (2340, 3, 18720), (4680, 5, 32760),
         (128, 1, 32760), (1, 1, 8)]  # fmt: skip


@pytest.mark.parametrize(("queries", "heads", "keys"), SIZES)
def test_plan_fills_the_card(queries, heads, keys):
    plan = Plan.cheapest(queries, heads, keys, PROCESSORS)
    assert plan.tiles * 128 >= queries > (plan.tiles - 1) * 128
    assert 0 <= plan.shared <= plan.tiles
    assert (plan.shared > 0) == (plan.runs > 1)
    # Clusters go to whichever pair of processors is free, whole tiles first.
    whole, shared = plan.clusters(heads)
    busy = np.zeros(PROCESSORS // 2)
    for work in [keys] * whole + [keys / plan.runs] * shared:
        busy[busy.argmin()] += work + BLOCK_COST
    alone = np.ceil(heads * plan.tiles / PROCESSORS) * (keys + BLOCK_COST)
    assert busy.max() <= alone
    if keys == 32760 and heads * queries >= 12 * 585:
        assert heads * plan.tiles * keys > 0.85 * busy.max() * PROCESSORS  # the best possible is 1


def test_plan_of_a_card_with_a_single_processor():
    assert Plan.cheapest(300, 2, 512, 1) == (3, 0, 1)


PLANS = [Plan(tiles, shared, runs if shared else 1)
         for tiles in (1, 2, 3, 8, 37) for shared in {0, 1, 2, tiles - 1, tiles} for runs in (2, 5)
         if 0 <= shared <= tiles]  # fmt: skip


@pytest.mark.parametrize("heads", [1, 2, 3, 12])
@pytest.mark.parametrize("plan", sorted(set(PLANS)), ids=lambda plan: "-".join(map(str, plan)))
def test_every_tile_is_walked_once_over_all_keys(plan, heads):
    clusters = sum(plan.clusters(heads))
    cluster, side = (x.astype(np.int32) for x in np.mgrid[:clusters, :2])
    place = Place(*(np.asarray(x) for x in plan.place(cluster, side, heads)))
    walked = {}
    for row in range(clusters):
        left, right = (Place(*(x[row, column] for x in place)) for column in (0, 1))
        # Both blocks of a cluster take as many steps, for each waits for the other's.
        assert (left.shared, left.run, left.together) == (right.shared, right.run, right.together)
        if left.together:
            assert (left.head, left.tile + 1) == (right.head, right.tile)
        for block in {left, right}:  # two may do the same, where nothing else is left to do
            walked.setdefault((bool(block.shared), int(block.tile), int(block.head)), []).append(block)
    expected = {(False, *of) for of in itertools.product(range(plan.tiles - plan.shared), range(heads))}
    expected |= {(True, *of) for of in itertools.product(range(plan.shared), range(heads))}
    assert set(walked) == expected
    for key_tiles in (0, 1, 4, 37, 256):
        start, stop = map(np.asarray, plan.span(place, np.int32(key_tiles)))
        span = {Place(*(x[at] for x in place)): (start[at], stop[at]) for at in np.ndindex(start.shape)}
        for (shared, *_), blocks in walked.items():
            seen = [tile for block in blocks for tile in range(*span[block])]
            assert sorted(seen) == list(range(key_tiles))
            assert len(blocks) == (plan.runs if shared else 1)
            lengths = [stop - start for start, stop in map(span.get, blocks)]
            assert max(lengths) - min(lengths) <= 1
