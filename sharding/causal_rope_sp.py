"""Causal-RoPE SP: attention over tokens sharded across devices, positions known locally.

Every device holds the same slice of every frame: tokens offset .. offset + rows of each frame's S. A token's rotary
position is (global frame, row, column); the frame enters through the block's factors, row and column follow from the
offset. So each device builds the factors of its own rows, once per block, and rotates its own queries and keys before
anything travels. History never moves: what travels is a block's keys and values (`gather`), or its queries and
outputs (everything else).

The functions here are bodies of a `shard_map`. Shapes in them are one device's: rows m of each frame, all N heads.

Source: arXiv:2603.06664 for the idea; Ulysses (arXiv:2309.14509) for trading tokens for heads; ring attention
(arXiv:2310.01889) and flash-decoding for merging partial attentions by log-sum-exp.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jax_causal import rope
from jax_causal.attention import attention, attention_with_lse, merge
from jax_causal.cache import CacheLayout, KVCache
from sharding.mesh import HEADS, SEQ, TOKENS, rows_of_share


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the S tokens of a frame are dealt over `seq` x `heads` devices.

    Where S does not divide into them, the last shares are short or empty; they are padded to `rows`, and padding
    never becomes a key. `short_last` is that of `rows_of_share`.
    """

    tokens: int
    seq: int
    heads: int
    short_last: bool = False

    @property
    def rows(self) -> int:
        """m: rows of each frame on one device."""
        return rows_of_share(self.tokens, self.seq * self.heads, short_last=self.short_last)

    @property
    def part(self) -> int:
        """M: rows of each frame in one entry of `seq`, over all of its `heads` devices."""
        return self.rows * self.heads

    @property
    def padded(self) -> int:
        """Rows of a frame over all devices, padding included."""
        return self.part * self.seq

    def valid(self) -> jax.Array | int:
        """Tokens of each frame that this device's entry of `seq` really holds, at most M; inside `shard_map`."""
        if self.padded == self.tokens:
            return self.part
        return jnp.clip(self.tokens - lax.axis_index(SEQ) * self.part, 0, self.part)

    # The two ways that anything travels; inside `shard_map`.

    def all_gather(self, x, axis: int):
        """What all entries of `seq` hold, joined along `axis`."""
        return lax.all_gather(x, SEQ, axis=axis, tiled=True)

    def all_to_all(self, x, over: str, split: int, concat: int):
        """Cuts `x` along `split`, a piece for each device of the axis `over`, and joins what arrives along `concat`."""
        return lax.all_to_all(x, over, split_axis=split, concat_axis=concat, tiled=True)


def local_table(frames, shares: Shares, height: int, width: int, head_dim: int):
    """Rotary factors [2, F, m, D/2] of this device's rows, from those of the frame axis [2, F, pairs].

    Depends on nothing but its arguments and the device's place in the mesh.
    """
    with jax.named_scope("rope_table"):
        offset = lax.axis_index(TOKENS) * shares.rows
        # Padding repeats the last token.
        index = jnp.minimum(offset + jnp.arange(shares.rows), shares.tokens - 1)
        rows, columns = rope.axis_factors(height, width, head_dim)
        spatial = [jnp.take(rows, index // width, axis=1), jnp.take(columns, index % width, axis=1)]
        return rope.tables(frames, jnp.concatenate(spatial, axis=-1))


# Attention of a block against the cache. Each takes q, k, v [B, F, m, N, D] before rotation and returns the output
# [B, F, m, N, D] and the cache with the block in it.


def attend_gathered(
    q, k, v, table, cache: KVCache, layer, slots, held, *, layout: CacheLayout, shares, backend, overlap
):
    """One all-gather of the block's keys and values, packed; the cache is whole on every device.

    With `overlap`, and without a ring, the past is attended to while the block travels.
    """
    k = rope.rotate(k, table)
    block = _gather(jnp.stack([k, v]), shares)[:, :, :, : shares.tokens]
    q = rope.rotate(q, table)
    if layout.ring or not overlap:
        cache = cache.write(layout, layer, slots, *block)
        return attend_held(q, *cache.read(layer), layout.part_length(held), backend), cache
    # Without a ring the past is the prefix before the block.
    past = attention_with_lse(
        _flat(q), *cache.read(layer), length=layout.part_length(slots[0]), backend=backend
    )
    own = attention_with_lse(_flat(q), *map(_flat, block), backend=backend)
    out, _ = merge(*zip(past, own, strict=True))
    # The past must be read before the block is written. XLA orders the two by data alone: as long as the write does
    # not depend on the read, it copies the whole cache to keep them apart.
    cache = cache.write(layout, layer, _after(slots, past[0]), *block)
    return out.astype(q.dtype).reshape(q.shape), cache


def attend_traded(
    q, k, v, table, cache: KVCache, layer, slots, held, *, layout: CacheLayout, shares, backend
):
    """Tokens are traded for heads over `heads`; over `seq`, queries travel to the keys and outputs back.

    The cache holds N / heads heads of this part's tokens. With seq = 1 this is Ulysses, with heads = 1 the ring.
    """
    q, k = rope.rotate(q, table), rope.rotate(k, table)
    q, k, v = _tokens_for_heads(jnp.stack([q, k, v]), shares)
    if shares.seq == 1:
        k, v = k[:, :, : shares.tokens], v[:, :, : shares.tokens]
        cache = cache.write(layout, layer, slots, k, v)
        out = attend_held(q, *cache.read(layer), layout.part_length(held), backend)
        return _heads_for_tokens(out, shares), cache
    valid = shares.valid()
    cache = _write_share(cache, layout, layer, slots, k, v, valid)
    queries = _gather(q, shares)  # [B, F, seq * M, N / heads, D]
    out, lse = attention_with_lse(_flat(queries), *cache.read(layer), length=held * valid, backend=backend)
    out = _merge_shares(out.reshape(queries.shape), lse.swapaxes(1, 2).reshape(queries.shape[:-1]), shares)
    return _heads_for_tokens(out.astype(q.dtype), shares), cache


def attend_held(q, keys, values, length, backend, queries=None):
    """Attention like q, [B, F, m, N, D] or [B, m, F, N, D], to the first `length` keys of a cache that holds all there
    are for these queries; `queries` is that of `attention`."""
    out = attention(_flat(q), keys, values, length=length, queries=queries, backend=backend)
    return out.reshape(q.shape)


def attend_whole(q, k, v, table, *, frame_mask, shares: Shares, backend):
    """Attention without a cache (training, bidirectional models): keys and values are gathered over `seq`."""
    q, k = rope.rotate(q, table), rope.rotate(k, table)
    q, k, v = _tokens_for_heads(jnp.stack([q, k, v]), shares)
    k, v = _gather(jnp.stack([k, v]), shares)[:, :, :, : shares.tokens]
    out = attention(_flat(q), _flat(k), _flat(v), mask=frame_mask, backend=backend)
    return _heads_for_tokens(out.reshape(q.shape), shares)


def _after(x, y):
    """`x`, once `y` is computed: a product with zero stays in the program, because `y` might be NaN."""
    return x + (0 * y[(0,) * y.ndim]).astype(x.dtype)


def _flat(x):
    """[B, F, S, N, D] -> [B, F * S, N, D]."""
    b, f, s, n, d = x.shape
    return x.reshape(b, f * s, n, d)


def _gather(x, shares: Shares):
    """[..., F, M, N, D] -> [..., F, seq * M, N, D]."""
    if shares.seq == 1:
        return x
    return shares.all_gather(x, x.ndim - 3)


def _tokens_for_heads(x, shares: Shares):
    """[..., F, m, N, D] -> [..., F, M, N / heads, D], one all-to-all for everything stacked."""
    if shares.heads == 1:
        return x
    return shares.all_to_all(x, HEADS, x.ndim - 2, x.ndim - 3)


def _heads_for_tokens(x, shares: Shares):
    """The inverse of `_tokens_for_heads`."""
    if shares.heads == 1:
        return x
    return shares.all_to_all(x, HEADS, x.ndim - 3, x.ndim - 2)


def _merge_shares(out, lse, shares: Shares):
    """Sends every part its queries' outputs, and merges what arrives from all parts.

    out [B, F, seq * M, N, D] and lse [B, F, seq * M, N], both fp32, over this part's keys; one all-to-all carries
    both. Returns [B, F, M, N, D] over all keys.
    """
    packed = jnp.concatenate([out, lse[..., None]], axis=-1)
    packed = shares.all_to_all(packed, SEQ, 2, 2)
    b, f, _, n, d = packed.shape
    packed = packed.reshape(b, f, shares.seq, shares.part, n, d)  # the third axis: which part it comes from
    packed = jnp.moveaxis(packed, 2, 0).reshape(shares.seq, b, f * shares.part, n, d)
    outs, lses = packed[..., :-1], packed[..., -1].swapaxes(2, 3)
    return merge(list(outs), list(lses))[0].reshape(b, f, shares.part, n, d - 1)


def _write_share(cache: KVCache, layout: CacheLayout, layer, slots, k, v, valid) -> KVCache:
    """Writes this part's tokens; frames of a short share lie `valid` apart, so that valid keys stay a prefix."""
    if isinstance(valid, int):
        return cache.write(layout, layer, slots, k, v)
    return cache.write_short(layout, layer, slots, k, v, valid)
