"""Norms of queries and keys, their rotation, and the write of keys and values to the cache as one kernel for NVIDIA
Hopper, in Pallas (Mosaic GPU).

Arithmetic is fp32 from the load to the store, and what is stored is rounded once. The gradient is that of the plain
form.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_causal import hopper_rows, rope
from jax_causal.attention_peers import Peers
from jax_causal.hopper_rows import HEADS, TOKENS


def rotate_into_cache(qkv, scales, table, keys, values, slots, *, eps: float, peers: Peers | None = None):
    """Queries and keys normalised over all heads jointly and rotated, these and the values written to the cache.

    Args:
      qkv: [B, F, m, 3, N, D] bfloat16, products of the three projections; see `hopper_rows.suits`.
      scales: of the two norms, [E] each.
      table: rotary factors [2, F, m, D/2].
      keys, values: one layer of the cache, [B, 1, K, N, D]. Donate them, or let the caller's `jax.jit`: they are
        written in place, and copied before where they are still needed.
      slots: int32 [F], the slot of S keys that each frame goes to.
      eps: of the norms.
      peers: devices that share the tokens of every frame, which must `suit` m: this one's rows are written to their
        place among the S of a frame, and to the places of all where the others are not there. Without, S is m.

    Returns:
      Rotated queries [B, F, m, N, D], keys and values of the cache.
    """
    return _rotate(eps, peers, qkv, scales, _factors(table), keys, values, slots)


def _factors(table):
    """Rotary factors as the kernel takes them, [2, F, m, D]: what an entry is multiplied by, and what the other one of
    its pair. All layers ask for the same, which XLA computes once."""
    cos, sin = table
    both = jnp.stack([jnp.stack([cos, cos], axis=-1), jnp.stack([-sin, sin], axis=-1)])
    return both.reshape(*table.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(eps, peers, qkv, scales, factors, keys, values, slots):
    return _rotate_kernel(eps, peers, qkv, scales, factors, keys, values, slots)


def _rotate_fwd(eps, peers, qkv, scales, factors, keys, values, slots):
    results = _rotate(eps, peers, qkv, scales, factors, keys, values, slots)
    return results, (qkv, scales, factors, slots)


def _rotate_bwd(eps, peers, inputs, cotangents):
    """What the cache held before does not matter, only where it is replaced: it need not be kept."""
    qkv, scales, factors, slots = inputs
    caches = [jnp.zeros_like(x) for x in cotangents[1:]]
    plain = functools.partial(plain_rotate, eps, peers, slots=slots)
    _, pullback = jax.vjp(plain, qkv, scales, factors, *caches)
    return *pullback(cotangents), None


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


def plain_rotate(eps, peers, qkv, scales, factors, keys, values, slots):
    """`rotate_into_cache` without a kernel."""
    q, k, v = normalise(qkv, scales, eps)
    table = jnp.stack([factors[0, ..., ::2], factors[1, ..., 1::2]])
    q, k = rope.rotate(q, table), rope.rotate(k, table)
    keys, values = (_written(x, new, slots, peers) for x, new in ((keys, k), (values, v)))
    return q, keys, values


def _written(cache, rows, slots, peers):
    """`cache` [B, 1, K, N, D] with `rows` [B, F, m, N, D] in the slots, those that are no padding."""
    m = rows.shape[2]
    tokens, shares = (peers.tokens, _shares(peers)) if peers else (m, [0])
    for share in shares:
        exists = (share * m + jnp.arange(m) < tokens)[:, None, None]
        cache = jnp.pad(cache, ((0, 0), (0, 0), (0, m), (0, 0), (0, 0)))  # padding may lie behind the end
        for f in range(rows.shape[1]):
            start = slots[f] * tokens + share * m
            old = lax.dynamic_slice_in_dim(cache, start, m, axis=2)
            cache = lax.dynamic_update_slice_in_dim(
                cache, jnp.where(exists, rows[:, None, f], old), start, axis=2
            )
        cache = cache[:, :, :-m]
    return cache


def _shares(peers: Peers) -> list:
    """Whose places in the cache a device writes to."""
    return list(range(peers.count)) if peers.axis is None else [lax.axis_index(peers.axis)]


def normalise(qkv, scales, eps: float):
    """Queries and keys of qkv [..., 3, N, D] normalised over all heads jointly, to be rotated, and the values."""
    products = qkv[..., :2, :, :].astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(products), (-2, -1), keepdims=True) + eps)
    # As in `transformer_layers.Attention`: so that one kernel norms and rotates.
    inverse = lax.optimization_barrier(jnp.unstack(inverse, axis=-3))
    *both, v = jnp.unstack(qkv, axis=-3)
    q, k = (
        (x.astype(jnp.float32) * i).astype(x.dtype) * scale.reshape(x.shape[-2:])
        for x, i, scale in zip(both, inverse, scales, strict=True)
    )
    return q, k, v


# Compiled by itself, so that the layers of a model share their kernel.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _rotate_kernel(eps, peers, qkv, scales, factors, keys, values, slots):
    B, F, m, _, N, D = qkv.shape
    keys_ref, values_ref = (jax.new_ref(x[:, 0]) for x in (keys, values))
    grid = {"frame": B * F, "tile": hopper_rows.tiles(m), "part": 3}

    def kernel(qkv_ref, q_scale_ref, k_scale_ref, factors_ref, slots_ref, keys_ref, values_ref, q_ref):
        index, tile, part = (lax.axis_index(name) for name in grid)
        batch, frame = lax.div(index, F), lax.rem(index, F)
        tokens = hopper_rows.tile(tile, m)
        own = qkv_ref.at[index, tokens, part]

        def place(ref, x):
            whole, shares = (peers.tokens, _shares(peers)) if peers else (m, [0])

            def write(first):
                ref[batch, pl.ds(slots_ref[frame] * whole + first, TOKENS)] = x

            for share in shares:
                first = share * m + tokens.start
                pl.when(first < whole)(functools.partial(write, first))  # padding has no place

        @pl.when(part < 2)
        def _rotate():
            x = hopper_rows.load32(own, HEADS)
            inverse = lax.rsqrt(jnp.sum(jnp.sum(x * x, axis=2), axis=1) / (N * D) + eps)
            q_scale, k_scale = (
                hopper_rows.load32(ref, HEADS.reduce(0)) for ref in (q_scale_ref, k_scale_ref)
            )
            of_k = part.astype(jnp.float32)  # 0 or 1; no number chooses between arrays here
            scale = q_scale * (1 - of_k) + k_scale * of_k
            x = x * hopper_rows.spread(inverse, x, 0) * hopper_rows.spread(scale, x, 1, 2)
            cos, sin = (
                hopper_rows.load32(factors_ref.at[i, frame, tokens], HEADS.reduce(1)) for i in range(2)
            )
            turned = hopper_rows.swap_pairs(x) * hopper_rows.spread(sin, x, 0, 2)
            x = (x * hopper_rows.spread(cos, x, 0, 2) + turned).astype(qkv.dtype)

            @pl.when(part == 0)
            def _query():
                q_ref[index, tokens] = x

            @pl.when(part == 1)
            def _key():
                place(keys_ref, x)

        @pl.when(part == 2)
        def _value():
            place(values_ref, hopper_rows.load(own, HEADS))

    out_type = jax.ShapeDtypeStruct((B * F, m, N, D), qkv.dtype)
    q = hopper_rows.launch(kernel, out_type, grid, "rotate_into_cache")(
        qkv.reshape(B * F, m, 3, N, D),
        *(x.reshape(N, D) for x in scales),
        factors,
        slots,
        keys_ref,
        values_ref,
    )
    return q.reshape(B, F, m, N, D), *(jax.freeze(ref)[:, None] for ref in (keys_ref, values_ref))
