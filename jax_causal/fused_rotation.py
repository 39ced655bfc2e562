"""Norms of queries and keys, their rotation, and the write of keys and values to the cache as one kernel for NVIDIA
Hopper, in Pallas (Mosaic GPU).

Where several devices share the tokens of every frame and each holds the whole cache, the kernel writes a device's keys
and values to the caches of all: they travel by the stores that put them in their place. Nothing is packed, and nothing
is copied after it has arrived. Values can also travel before, while queries and keys are still multiplied; the kernel
then takes what has arrived to its place, while the keys' stores wait for the link. Every device counts what comes from
the others, and its kernel ends when that is all. See `peer_memory` for where it writes, and from when it may.

Arithmetic is fp32 from the load to the store, and what is stored is rounded once. The gradient is that of the plain
form.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_causal import hopper_rows, peer_memory, rope
from jax_causal.hopper_rows import HEADS, TOKENS
from jax_causal.peer_memory import Peers, Reach

# Tiles that a block of threads sends: at half of 832 x 480 that is fewer blocks than an H200 has processors.
GROUP = 8
# What a block of threads is about; the last are values that another device has sent ahead.
QUERY, KEY, VALUE, RECEIVED = range(4)


def rotate_into_cache(
    qk,
    v,
    scales,
    table,
    keys,
    values,
    slots,
    *,
    eps: float,
    peers: Peers | None = None,
    received=None,
    reach: Reach | None = None,
    layer=0,
):
    """Queries and keys normalised over all heads jointly and rotated, these and the values written to the cache.

    Args:
      qk: [B, F, m, 2, N, D] bfloat16, products of the projections of queries and keys; see `hopper_rows.suits`.
      v: [B, F, m, N, D], values.
      scales: of the two norms, [E] each.
      table: rotary factors [2, F, m, D/2].
      keys, values: one layer of the cache, [B, 1, K, N, D]. Donate them, or let the caller's `jax.jit`: they are
        written in place, and copied before where they are still needed.
      slots: int32 [F], the slot of S keys that each frame goes to.
      eps: of the norms.
      peers: who writes to the cache beside this device, and whose caches it writes to; they must `suit` m. Without, S
        is m.
      received: `v` of the peer, where there is one and its values have travelled already. Without, they travel by the
        kernel.
      reach: where peers are written to: from `peer_memory.reach`, or from the layer before.
      layer: the number of this one there, int32 [].

    Returns:
      Rotated queries [B, m, F, N, D], whose padding comes last, keys and values of the cache, and `reach` for the next
      layer.
    """
    products, factors = (qk, v, received), _factors(table)
    if not (peers and peers.travels):
        return *_rotate(eps, peers, products, scales, factors, (keys, values), (slots,)), reach
    # Two arrays: one is a constant, and the other the same for all layers.
    where = jnp.full(1, layer, jnp.int32), lax.axis_index(peers.axis)[None]
    numbers = slots, *where, reach.addresses
    *results, counts = _rotate(eps, peers, products, scales, factors, (keys, values, reach.counts), numbers)
    return *results, reach._replace(counts=counts)


def _factors(table):
    """Rotary factors as the kernel takes them, [2, F, m, D]: what an entry is multiplied by, and what the other one of
    its pair. All layers ask for the same, which XLA computes once."""
    cos, sin = table
    both = jnp.stack([jnp.stack([cos, cos], axis=-1), jnp.stack([-sin, sin], axis=-1)])
    return both.reshape(*table.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(eps, peers, products, scales, factors, written, numbers):
    return _rotate_kernel(eps, peers, products, scales, factors, written, numbers)


def _rotate_fwd(eps, peers, products, scales, factors, written, numbers):
    results = _rotate(eps, peers, products, scales, factors, written, numbers)
    return results, (products, scales, factors, numbers)


def _rotate_bwd(eps, peers, inputs, cotangents):
    """What the cache held before does not matter, only where it is replaced: it need not be kept."""
    products, scales, factors, numbers = inputs
    caches = [jnp.zeros_like(x) for x in cotangents[1:3]]
    plain = functools.partial(plain_rotate, eps, peers, slots=numbers[0])
    _, pullback = jax.vjp(plain, products, scales, factors, *caches)
    *of, keys, values = pullback(tuple(cotangents[:3]))
    return *of, (keys, values, *[None] * len(cotangents[3:])), None


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


def plain_rotate(eps, peers, products, scales, factors, keys, values, slots):
    """`rotate_into_cache` without a kernel and counts; values are gathered, whatever has been received."""
    qk, v, _ = products
    F = qk.shape[1]
    q, k = normalise(qk, scales, eps)
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
    return q.swapaxes(1, 2), keys, values


def normalise(qk, scales, eps: float):
    """Queries and keys of qk [..., 2, N, D] normalised over all heads jointly, to be rotated."""
    inverse = lax.rsqrt(jnp.mean(jnp.square(qk.astype(jnp.float32)), (-2, -1), keepdims=True) + eps)
    # As in `transformer_layers.Attention`: so that one kernel norms and rotates.
    inverse = lax.optimization_barrier(jnp.unstack(inverse, axis=-3))
    return [
        (x.astype(jnp.float32) * i).astype(x.dtype) * scale.reshape(x.shape[-2:])
        for x, i, scale in zip(jnp.unstack(qk, axis=-3), inverse, scales, strict=True)
    ]


# Compiled by itself, so that the layers of a model share their kernel.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _rotate_kernel(eps, peers, products, scales, factors, written, numbers):
    qk, v, received = products
    B, F, m, N, D = v.shape
    travels, ahead = peers is not None and peers.travels, received is not None
    refs = [jax.new_ref(x) for x in (written[0][:, 0], written[1][:, 0], *written[2:])]
    # What stays on this device, a tile for each block of threads; before them what travels, several tiles for each, so
    # that one is on its way while the next is made, and few blocks hold processors that wait for the link.
    tiles = hopper_rows.tiles(m)
    stays, leaves = [QUERY, KEY, VALUE], []
    if travels:
        stays, leaves = ([QUERY, VALUE, RECEIVED], [KEY]) if ahead else ([QUERY], [KEY, VALUE])
    groups = -(-tiles // GROUP)
    senders = B * F * groups * len(leaves)
    blocks = senders + B * F * tiles * len(stays)

    def kernel(qk_ref, v_ref, *rest):
        received_ref, rest = (rest[0], rest[1:]) if ahead else (None, rest)
        q_scale_ref, k_scale_ref, factors_ref, slots_ref, *rest = rest
        there_refs, rest = (rest[:3], rest[3:]) if travels else ((), rest)
        keys_ref, values_ref, *counts_ref, q_ref = rest
        there = _There(peers, *there_refs, keys_ref, values_ref, *counts_ref) if travels else None
        block = lax.axis_index("kernel_block")  # axes of the mesh are seen inside too: none has this name

        def place(index, tokens):
            return _Places(peers, m, lax.div(index, F), slots_ref[lax.rem(index, F)], tokens, there)

        def rotated(index, tokens, part):
            x = hopper_rows.load32(qk_ref.at[index, tokens, part], HEADS)
            inverse = lax.rsqrt(jnp.sum(jnp.sum(x * x, axis=2), axis=1) / (N * D) + eps)
            q_scale, k_scale = (
                hopper_rows.load32(ref, HEADS.reduce(0)) for ref in (q_scale_ref, k_scale_ref)
            )
            of_k = jnp.asarray(part, jnp.float32)  # QUERY or KEY; no number chooses between arrays here
            scale = q_scale * (1 - of_k) + k_scale * of_k
            x = x * hopper_rows.spread(inverse, x, 0) * hopper_rows.spread(scale, x, 1, 2)
            cos, sin = (
                hopper_rows.load32(factors_ref.at[i, lax.rem(index, F), tokens], HEADS.reduce(1))
                for i in range(2)
            )
            turned = hopper_rows.swap_pairs(x) * hopper_rows.spread(sin, x, 0, 2)
            return (x * hopper_rows.spread(cos, x, 0, 2) + turned).astype(v.dtype)

        def stay():
            number = block - senders
            index, rest = lax.div(number, tiles * len(stays)), lax.rem(number, tiles * len(stays))
            tokens = hopper_rows.tile(lax.div(rest, len(stays)), m)
            which = lax.rem(rest, len(stays))  # of `stays`

            @pl.when(which < 1 + (KEY in stays))
            def _rotate():
                x = rotated(index, tokens, which)

                @pl.when(which == QUERY)
                def _query():
                    q_ref[lax.div(index, F), tokens, lax.rem(index, F)] = x

                if KEY in stays:

                    @pl.when(which == KEY)
                    def _key():
                        place(index, tokens).at_home(keys_ref, x)

            if VALUE in stays:

                @pl.when(which == stays.index(VALUE))
                def _value():
                    x = hopper_rows.load(v_ref.at[index, tokens], HEADS)
                    place(index, tokens).at_home(values_ref, x)

            if RECEIVED in stays:

                @pl.when(which == stays.index(RECEIVED))
                def _received():
                    x = hopper_rows.load(received_ref.at[index, tokens], HEADS)
                    place(index, tokens).here(values_ref, x, 1 - there.me)

        def leave(outbox):
            which, number = lax.rem(block, len(leaves)), lax.div(block, len(leaves))  # of `leaves`
            index, first = lax.div(number, groups), lax.rem(number, groups) * GROUP

            @pl.loop(0, jnp.minimum(tiles - first, GROUP))
            def _tile(i):
                tokens = hopper_rows.tile(first + i, m)
                to_all = functools.partial(place(index, tokens).everywhere, outbox.at[i])
                pl.when(which == leaves.index(KEY))(lambda: to_all(keys_ref, rotated(index, tokens, KEY)))
                if VALUE in leaves:
                    pl.when(which == leaves.index(VALUE))(
                        lambda: to_all(values_ref, hopper_rows.load(v_ref.at[index, tokens], HEADS))
                    )

            peer_memory.wait_for_sent()
            there.count_one()

        pl.when(block >= senders)(stay)
        if travels:
            pl.when(block < senders)(lambda: peer_memory.with_outbox(leave, (GROUP, TOKENS, N, D), v.dtype))

            # The kernel ends when all that the others write to this device's cache is there.
            @pl.when(block == blocks - 1)
            def _wait():
                there.check()
                peer_memory.wait_for_count(there.count, senders * (peers.count - 1))

    q = hopper_rows.launch(
        kernel,
        jax.ShapeDtypeStruct((B, m, F, N, D), v.dtype),
        {"kernel_block": blocks},
        "rotate_into_caches" if peers and peers.count > 1 else "rotate_into_cache",
    )(
        qk.reshape(B * F, m, 2, N, D),
        *(x.reshape(B * F, m, N, D) for x in (v, received) if x is not None),
        *(x.reshape(N, D) for x in scales),
        factors,
        *numbers,
        *refs,
    )
    keys, values, *counts = (jax.freeze(ref) for ref in refs)
    return q, keys[:, None], values[:, None], *counts


class _There:
    """A layer of the cache on all devices, in the kernel; see `peer_memory.Reach`."""

    def __init__(self, peers: Peers, layer, me, addresses, keys, values, counts):
        layer, self.me = layer[0], me[0]
        layers = counts.shape[0]
        self.count, self.addresses, self.peers = counts.at[layer], addresses, peers
        self.arrays = ((keys, layer), (values, layers + layer), (counts, 2 * layers))

    def send(self, x, outbox, ref, here):
        """Begins to write x to `here` in `ref`, one of the arrays, of all devices."""
        peer_memory.send(x, outbox, ref.at[here], *self._addresses(ref))

    def count_one(self):
        """On every peer."""
        own, others = self._addresses(self.arrays[2][0])
        for other in others:
            peer_memory.count_one(self.count, own, other)

    def check(self):
        """That this device's arrays are where peers write to."""
        for ref, _ in self.arrays:
            peer_memory.expect_at(ref, self._addresses(ref)[0])

    def _addresses(self, ref):
        """Of this array on this device, and on every peer."""
        (number,) = (number for array, number in self.arrays if array is ref)
        return self.addresses.at[0, number], [
            self.addresses.at[i, number] for i in range(1, self.peers.count)
        ]


class _Places:
    """Where x, `tokens` of a device's m of a slot, belongs in caches that hold the tokens of all devices. No peer is
    still reading there."""

    def __init__(self, peers: Peers | None, m: int, batch, slot, tokens, there: _There | None):
        self.m, self.batch, self.tokens, self.there = m, batch, tokens, there
        self.count, self.whole = (peers.count, peers.tokens) if peers else (1, m)
        self.start = slot * self.whole

    def _at(self, share, write):
        """Calls `write` with the place of what is of the device with this number."""
        first = share * self.m + self.tokens.start
        here = self.batch, pl.ds(self.start + first, TOKENS)
        if self.count * self.m == self.whole:
            write(here)
        else:
            pl.when(first < self.whole)(lambda: write(here))  # padding has no place

    def here(self, ref, x, share):
        """Writes x of the device `share` to this device's cache `ref`."""
        self._at(share, lambda here: ref.__setitem__(here, x))

    def at_home(self, ref, x):
        """Writes this device's x to its own cache `ref`; to the places of all where these are not there."""
        if self.there:
            self.here(ref, x, self.there.me)
        else:
            for share in range(self.count):
                self.here(ref, x, share)

    def everywhere(self, outbox, ref, x):
        """Begins to write this device's x to its cache `ref` and to that of every peer."""
        self._at(self.there.me, lambda here: self.there.send(x, outbox, ref, here))
