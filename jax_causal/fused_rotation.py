"""Norms of queries and keys, their rotation, and the write of keys and values to the cache as one kernel for NVIDIA
Hopper, in Pallas (Mosaic GPU).

Where several devices share the tokens of every frame and each holds the whole cache, the kernel writes a device's keys
and values to the caches of all: they travel by the stores that put them in their place. Nothing is packed, and nothing
is copied after it has arrived.

Arithmetic is fp32 from the load to the store, and what is stored is rounded once. The gradient is that of the plain
form.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import hopper_rows, rope
from jax_causal.hopper_rows import HEADS, TOKENS


class Peers(NamedTuple):
    """Devices that share the S tokens of every frame, m each and fewer at the end, and each hold the whole cache.

    Attributes:
      count: of the devices.
      tokens: S.
      axis: of the mesh, along which they lie; the kernel is inside its `shard_map`. None for devices that are not
        there: this one's rows are then written, in its own cache, to the places of all.
    """

    count: int
    tokens: int
    axis: str | None

    def suit(self, m: int) -> bool:
        """Whether no block of threads holds both tokens and padding."""
        return self.count * m == self.tokens or m % TOKENS == self.tokens % TOKENS == 0


def can_reach_peers() -> bool:
    """Whether a kernel can write to other devices of its process: jax calls it experimental, and this is the version
    that it was tried with."""
    return jax.__version_info__[:2] == (0, 11)


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
      peers: who writes to the cache beside this device, and whose caches it writes to; they must `suit` m. Without, S
        is m.

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
    F = qkv.shape[1]
    q, k, v = normalise(qkv, scales, eps)
    table = jnp.stack([factors[0, ..., ::2], factors[1, ..., 1::2]])
    q, k = rope.rotate(q, table), rope.rotate(k, table)
    if peers and peers.axis:
        k, v = (lax.all_gather(x, peers.axis, axis=2, tiled=True) for x in (k, v))
    elif peers:
        k, v = (jnp.concatenate([x] * peers.count, axis=2) for x in (k, v))
    if peers:
        k, v = k[:, :, : peers.tokens], v[:, :, : peers.tokens]
    for f in range(F):
        start = (0, 0, slots[f] * k.shape[2], 0, 0)
        keys = lax.dynamic_update_slice(keys, k[:, None, f], start)
        values = lax.dynamic_update_slice(values, v[:, None, f], start)
    return q, keys, values


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
    # Axes of the mesh are seen inside too: no name may be one of theirs.
    grid = {"kernel_frame": B * F, "kernel_tile": hopper_rows.tiles(m), "kernel_part": 3}

    def kernel(qkv_ref, q_scale_ref, k_scale_ref, factors_ref, slots_ref, keys_ref, values_ref, q_ref):
        index, tile, part = (lax.axis_index(name) for name in grid)
        batch, frame = lax.div(index, F), lax.rem(index, F)
        tokens = hopper_rows.tile(tile, m)
        own = qkv_ref.at[index, tokens, part]
        # Counts the pieces that others have written to this device's cache.
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR) if _travels(peers) else None
        place = _places(peers, m, arrived)

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
                place(keys_ref, batch, slots_ref[frame], tokens, x)

        @pl.when(part == 2)
        def _value():
            place(values_ref, batch, slots_ref[frame], tokens, hopper_rows.load(own, HEADS))

        if _travels(peers):
            last = [lax.axis_index(name) == size - 1 for name, size in grid.items()]

            # The kernel ends when all that the others write to this device's cache is there.
            @pl.when(last[0] & last[1] & (part == 0))
            def _wait():
                arrivals = 2 * grid["kernel_frame"] * grid["kernel_tile"] * (peers.count - 1)
                pl.semaphore_wait(arrived, arrivals, decrement=False)

    out_type = jax.ShapeDtypeStruct((B * F, m, N, D), qkv.dtype)
    q = hopper_rows.launch(
        kernel, out_type, grid, "rotate_into_caches" if peers and peers.count > 1 else "rotate_into_cache"
    )(
        qkv.reshape(B * F, m, 3, N, D),
        *(x.reshape(N, D) for x in scales),
        factors,
        slots,
        keys_ref,
        values_ref,
    )
    return q.reshape(B, F, m, N, D), *(jax.freeze(ref)[:, None] for ref in (keys_ref, values_ref))


def _travels(peers: Peers | None) -> bool:
    return peers is not None and peers.axis is not None and peers.count > 1


def _places(peers: Peers | None, m: int, arrived):
    """A function that writes x, `tokens` of this device's m in a slot, where they belong: to the cache `ref` and to
    that of every peer. No peer is still reading there: devices wait for each other before such a kernel begins."""
    count, whole = (peers.count, peers.tokens) if peers else (1, m)

    def place(ref, batch, slot, tokens, x):
        def at(share, write):
            first = share * m + tokens.start
            here = batch, pl.ds(slot * whole + first, TOKENS)
            if count * m == whole:
                write(here)
            else:
                pl.when(first < whole)(lambda: write(here))  # padding has no place

        if not _travels(peers):
            for share in range(count):
                at(share, lambda here: ref.__setitem__(here, x))
            return
        me = lax.axis_index(peers.axis)
        others = [{peers.axis: lax.rem(me + step, count)} for step in range(1, count)]

        def everywhere(here):
            for other in others:
                plgpu.remote_ref(ref, other)[here] = x
            ref[here] = x

        at(me, everywhere)
        for other in others:
            pl.semaphore_signal(arrived, device_id=other)

    return place
