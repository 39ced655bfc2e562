"""How `attention_hopper` deals queries and keys to the processors of a card.

A tile is 128 queries of one head. Two blocks of threads on neighbouring processors, a cluster, walk in step over the
keys of two tiles, a pair: of one head, or where a head has an odd number of tiles the last ones of two heads, which
have no keys in common. As many clusters as the card has room for each take one pair after another.

4680 queries of 12 heads are 222 pairs, 3.4 for each of 66 clusters. So that all end at once, the pairs of the last
tiles of every head are laid in a row, keys behind keys, and a cluster gets the stretch of it that makes its share even:
the rest of a pair that others have begun, or the beginning of one, or both (stream-K, arXiv:2301.03598). What several
find for the same queries is merged.

Queries can be `short`, which is known only when the kernel runs: the last tile of every head has none. One tile of a
head fewer is then shared, and shares are even without it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 128  # queries of a block
CLUSTER = 2  # blocks
PARTS = 1024  # of the keys of a shared pair, in which stretches are counted
# In keys that a block could walk over meanwhile (11.7 ns each on an H200): what a tile costs beside its keys, what a
# merge costs, and what it costs for every run of every tile.
TILE_COST, MERGE_COST, RUN_COST = 300, 450, 3
MOST = 8  # clusters for each pair that there is: more find too little to do
# Of the cheapest plan's cost, for one that serves short queries too: devices that have all their queries set the pace.
MOST_FOR_SHORT = 1.02


class Place(NamedTuple):
    """What a block does: bool and int32 scalars, or arrays of them.

    Attributes:
      shared: whether its tile is walked by other blocks too.
      tile: among the shared tiles of the head, or among the others.
      head: of those of all samples.
      together: whether the other block of the cluster walks over the same keys.
      run: where to put what is found for a shared tile; no two blocks of one tile have the same.
      begin, end: the part of the keys, of `PARTS`.
    """

    shared: jax.Array
    tile: jax.Array
    head: jax.Array
    together: jax.Array
    run: jax.Array
    begin: jax.Array
    end: jax.Array


class Plan(NamedTuple):
    """In each of `heads` (all samples' together), the last `shared` of `tiles` are walked by several of `clusters`, the
    others by one. `may_be_short`: it serves short queries too."""

    tiles: int
    heads: int
    shared: int
    clusters: int
    may_be_short: bool = False

    @classmethod
    def cheapest(
        cls, queries: int, heads: int, keys: int, processors: int, *, may_be_short: bool = False
    ) -> Plan:
        """The plan that ends first, for `queries` of `heads` over `keys`; where these `may_be_short`, one for that too
        unless it ends later."""
        tiles = -(-queries // TILE)
        room = max(processors // CLUSTER, 1)
        alone = cls(tiles, heads, 0, min(room, _pairs(tiles, heads)))
        room = min(room, MOST * _pairs(tiles, heads))
        plans = [cls(tiles, heads, shared, room) for shared in range(1, tiles + 1)]
        plans = [plan for plan in plans if plan._is_even()]
        best = min([alone, *plans], key=lambda plan: plan._cost(keys))
        if may_be_short:
            for_short = [plan._replace(may_be_short=True) for plan in plans if plan._is_even(short=True)]
            as_good = [plan for plan in for_short if plan._cost(keys) <= MOST_FOR_SHORT * best._cost(keys)]
            best = min(as_good, key=lambda plan: plan._cost(keys), default=best)
        return best

    def _is_even(self, *, short: bool = False) -> bool:
        """Whether no cluster has more whole pairs than its share."""
        return -(-self.whole_pairs // self.clusters) <= self._share(short=short)

    def _share(self, *, short: bool = False) -> float:
        """Pairs for each cluster."""
        return (self.whole_pairs + self._shared_pairs(short)) / self.clusters

    def _cost(self, keys: int) -> float:
        rounds = -(-self.whole_pairs // self.clusters)
        cost = rounds * (keys + TILE_COST)
        if self.shared:
            share = self._share() - rounds
            cost += share * keys + (share // 1 + 2) * TILE_COST
            cost += MERGE_COST + self.runs * self.shared * self.heads * RUN_COST
        return cost

    @property
    def whole(self) -> int:
        """Tiles of a head that one block walks."""
        return self.tiles - self.shared

    @property
    def whole_pairs(self) -> int:
        return _pairs(self.whole, self.heads)

    @property
    def shared_pairs(self) -> int:
        return self._shared_pairs(short=False)

    def _shared_pairs(self, short: bool) -> int:
        return _pairs(self.shared - short, self.heads)

    def borders(self, *, short: bool = False) -> np.ndarray:
        """Where each cluster's stretch of the shared pairs begins, and where the last one ends, int32 [clusters + 1]:
        `PARTS` to a pair."""
        if not self.shared:
            return np.zeros(self.clusters + 1, np.int32)
        wholes = -(-(self.whole_pairs - np.arange(self.clusters)) // self.clusters)
        ends = np.cumsum(self._share(short=short) - wholes)
        return np.rint(np.concatenate([[0], ends]) * PARTS).astype(np.int32)

    def _walkers(self, *, short: bool = False) -> list[range]:
        """The clusters that walk each shared pair."""
        borders = self.borders(short=short)
        begins, ends = borders[:-1], borders[1:]
        pairs = PARTS * np.arange(self._shared_pairs(short))
        return [range(int((ends <= pair).sum()), int((begins < pair + PARTS).sum())) for pair in pairs]

    @property
    def runs(self) -> int:
        """The most clusters that walk one shared pair."""
        walkers = self._walkers() + (self._walkers(short=True) if self.may_be_short else [])
        return max(map(len, walkers), default=1)

    def is_run(self, *, short: bool = False) -> np.ndarray:
        """Which runs of shared tiles there are, bool [runs, heads, shared]; the others are undefined."""
        found = np.zeros((self.runs, self.heads, self.shared), bool)
        tiles = self.shared - short
        pairs_of_head = tiles // CLUSTER
        for pair, clusters in enumerate(self._walkers(short=short)):
            first, head = divmod(pair, self.heads)
            at = np.s_[head, first * CLUSTER : (first + 1) * CLUSTER]
            if first == pairs_of_head:
                at = np.s_[head * CLUSTER : (head + 1) * CLUSTER, tiles - 1]
            for cluster in clusters:
                found[cluster % self.runs][at] = True
        return found

    # In a kernel: arguments are int32 scalars, or arrays of them.

    def count(self, cluster, begin, end):
        """How many pairs a cluster walks, whose stretch is from `begin` to `end` of `borders`."""
        first, behind = self._stretch(begin, end)
        return self._wholes(cluster) + behind - first

    def place(self, cluster, side, index, begin, end, short=0) -> Place:
        """Of block `side` of a cluster, for the pair that is the `index`th it walks; `short` is 0 or 1.

        So that keys are read from the L2 cache, whole pairs of one head are neighbours, and walked at once. Of shared
        pairs, which begin at different keys, those of all heads are neighbours: between two pairs of one head lies
        then a number of clusters that is whole or nearly so, and these two walk over the same keys at once.
        """
        wholes = self._wholes(cluster)
        shared = index >= wholes
        pair = jnp.where(
            shared, self._stretch(begin, end)[0] + index - wholes, index * self.clusters + cluster
        )
        tiles = jnp.where(shared, self.shared - short, self.whole)
        of_head = lax.div(tiles, CLUSTER)
        together = pair < self.heads * of_head
        row = jnp.where(shared, self.heads, jnp.maximum(of_head, 1))
        quotient, rest = lax.div(pair, row), lax.rem(pair, row)
        head, of_tile = jnp.where(shared, rest, quotient), jnp.where(shared, quotient, rest)
        # With an odd number of heads the last two blocks do the same.
        last_head = jnp.minimum((pair - self.heads * of_head) * CLUSTER + side, self.heads - 1)
        first = jnp.where(shared, pair * PARTS, 0)
        return Place(
            shared,
            tile=jnp.where(together, of_tile * CLUSTER + side, tiles - 1),
            head=jnp.where(together, head, last_head),
            together=together,
            run=lax.rem(cluster, self.runs),
            begin=jnp.where(shared, jnp.maximum(begin - first, 0), 0),
            end=jnp.where(shared, jnp.minimum(end - first, PARTS), PARTS),
        )

    def _wholes(self, cluster):
        return lax.div(self.whole_pairs - cluster + (self.clusters - 1), self.clusters)

    def _stretch(self, begin, end):
        """The first shared pair of a stretch, and the first behind it."""
        first = lax.div(begin, PARTS)
        behind = lax.div(end + (PARTS - 1), PARTS)
        return first, jnp.where(end > begin, behind, first)

    def span(self, place: Place, key_tiles):
        """The first of `key_tiles` that a block walks over, and the first behind them."""
        return lax.div(place.begin * key_tiles, PARTS), lax.div(place.end * key_tiles, PARTS)


def _pairs(tiles: int, heads: int) -> int:
    """Of so many tiles of every head."""
    return heads * (tiles // CLUSTER) + tiles % CLUSTER * -(-heads // CLUSTER)
