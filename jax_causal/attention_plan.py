"""How `attention_hopper` deals queries and keys to the processors of a card.

One block of threads fills a processor. 4680 queries of 12 heads are 444 tiles, 3.4 rounds of the 132 processors of a
card, and in the last round half of these would be idle. So the last tiles of every head are walked by several blocks
each, a run of the keys for each.

Two blocks on neighbouring processors, a cluster, walk in step over the same run, for two tiles of one head. Where a
head has an odd number of tiles, its last one goes with that of the next head: such two have no keys in common.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE = 128  # queries of a block
CLUSTER = 2  # blocks
# Measured on an H200, in keys that a block could walk over meanwhile (11.7 ns each): what a block costs beside its
# keys, what a merge costs, and what it costs for each run.
BLOCK_COST, MERGE_COST, RUN_COST = 700, 450, 150


class Place(NamedTuple):
    """What one block does: bool and int32 scalars, or arrays of them.

    Attributes:
      shared: whether its tile is walked by other blocks too.
      tile: among the shared tiles of the head, or among the others.
      head: of those of all samples.
      run: of keys.
      together: whether the other block of the cluster walks over the same keys.
    """

    shared: jax.Array
    tile: jax.Array
    head: jax.Array
    run: jax.Array
    together: jax.Array


class Plan(NamedTuple):
    """In every head the last `shared` of `tiles` are walked by `runs` blocks each, the others by one."""

    tiles: int
    shared: int
    runs: int

    @classmethod
    def cheapest(cls, queries: int, heads: int, keys: int, processors: int) -> Plan:
        """The plan with the shortest rounds for `queries` of `heads` (all samples' together) over `keys`."""
        tiles = -(-queries // TILE)
        at_once = max(processors // CLUSTER, 1)

        def cost(plan):
            whole, shared = (-(-clusters // at_once) for clusters in plan.clusters(heads))
            rounds = whole * (keys + BLOCK_COST)
            if shared:
                rounds += shared * (keys / plan.runs + BLOCK_COST) + MERGE_COST + plan.runs * RUN_COST
            return rounds

        shares = (cls(tiles, *how) for how in itertools.product(range(1, tiles + 1), range(2, 9)))
        return min([cls(tiles, 0, 1), *shares], key=cost)

    @property
    def whole(self) -> int:
        """Tiles of a head that one block walks."""
        return self.tiles - self.shared

    def clusters(self, heads: int) -> tuple[int, int]:
        """Clusters that walk over whole tiles, and over shared ones."""
        return _clusters(self.whole, heads), self.runs * _clusters(self.shared, heads)

    def place(self, cluster, side, heads: int) -> Place:
        """Of block `side` of a cluster, int32 scalars or arrays. Whole tiles come first, and neighbours share their
        keys, so that these are read from the L2 cache."""
        first_shared, _ = self.clusters(heads)
        is_shared = cluster >= first_shared
        tiles = jnp.where(is_shared, self.shared, self.whole)
        pairs = lax.div(tiles, 2)  # in a head
        of_run = jnp.where(is_shared, _clusters(self.shared, heads), _clusters(self.whole, heads))
        index = jnp.where(is_shared, cluster - first_shared, cluster)
        run, index = lax.div(index, of_run), lax.rem(index, of_run)
        together = index < heads * pairs
        pair, own_head = lax.rem(index, jnp.maximum(pairs, 1)), lax.div(index, jnp.maximum(pairs, 1))
        # With an odd number of heads the last two blocks do the same.
        last_head = jnp.minimum((index - heads * pairs) * CLUSTER + side, heads - 1)
        tile = jnp.where(together, pair * CLUSTER + side, tiles - 1)
        return Place(is_shared, tile, jnp.where(together, own_head, last_head), run, together)

    def span(self, place: Place, key_tiles):
        """The first of `key_tiles` that a block walks over, and the first behind them."""
        runs = jnp.where(place.shared, self.runs, 1)
        return lax.div(place.run * key_tiles, runs), lax.div((place.run + 1) * key_tiles, runs)


def _clusters(tiles, heads):
    """For one run over so many tiles of every head."""
    return heads * (tiles // CLUSTER) + tiles % CLUSTER * -(-heads // CLUSTER)
