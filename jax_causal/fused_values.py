"""Where kernels for NVIDIA Hopper write a block's keys and values in the cache; and the write of values by themselves.

Between two devices values travel by a copy engine, while queries and keys are still multiplied. `write_values`, in
Pallas (Mosaic GPU), then takes what has come, and this device's own, to their places, beside the kernel that sends
keys (`fused_rotation`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_causal import hopper_rows, peer_memory
from jax_causal.hopper_rows import HEADS, TOKENS
from jax_causal.peer_memory import Peers


def write_values(v, received, values, slots, me, *, peers: Peers):
    """Values of this device and of its one peer written to the cache.

    Args:
      v, received: [B, F, m, N, D] bfloat16, of this device and of the peer.
      values: one layer of the cache, [B, 1, K, N, D]. Donate it, or let the caller's `jax.jit`: it is written in place,
        and copied before where it is still needed.
      slots: int32 [F], the slot of S keys that each frame goes to.
      me: int32 [1], 0 or 1: which device this is.
      peers: the two; they must `suit` m.

    Returns:
      Values of the cache.
    """
    return _write(peers, v.shape, v, received, values, slots, me)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _write(peers, shape, v, received, values, slots, me):
    return _write_kernel(peers, v, received, values, slots, me)


def _write_bwd(peers, shape, numbers, cotangent):
    """What all three held does not matter: the plain form moves it, and no more."""
    zeros = [jnp.zeros(x, cotangent.dtype) for x in (shape, shape, cotangent.shape)]
    _, pullback = jax.vjp(lambda *x: plain_write_values(peers, *x, *numbers), *zeros)
    return *pullback(cotangent), None, None


_write.defvjp(lambda peers, shape, *x: (_write(peers, shape, *x), x[3:]), _write_bwd)


def plain_write_values(peers, v, received, values, slots, me):
    """`write_values` without a kernel."""
    first = me[0] == 0
    whole = jnp.concatenate([jnp.where(first, v, received), jnp.where(first, received, v)], axis=2)
    return plain_write(whole[:, :, : peers.tokens], values, slots)


def plain_write(x, cache, slots):
    """Keys or values x [B, F, S, N, D] written to a layer of the cache [B, 1, K, N, D]."""
    for f in range(x.shape[1]):
        cache = lax.dynamic_update_slice(cache, x[:, None, f], (0, 0, slots[f] * x.shape[2], 0, 0))
    return cache


def _write_kernel(peers, v, received, values, slots, me):
    B, F, m, N, D = v.shape
    tiles = hopper_rows.tiles(m)
    ref = jax.new_ref(values[:, 0])

    def kernel(v_ref, received_ref, slots_ref, me_ref, values_ref):
        number = lax.axis_index("kernel_block")  # axes of the mesh are seen inside too: none has this name
        index, rest = lax.div(number, 2 * tiles), lax.rem(number, 2 * tiles)
        tokens, which = hopper_rows.tile(lax.div(rest, 2), m), lax.rem(rest, 2)
        places = Places(peers, m, lax.div(index, F), slots_ref[lax.rem(index, F)], tokens, None)
        for i, (source, share) in enumerate([(v_ref, me_ref[0]), (received_ref, 1 - me_ref[0])]):

            @pl.when(which == i)
            def _copy(source=source, share=share):
                places.here(values_ref, hopper_rows.load(source.at[index, tokens], HEADS), share)

    rows = [x.reshape(B * F, m, N, D) for x in (v, received)]
    hopper_rows.launch(kernel, [], {"kernel_block": B * F * 2 * tiles}, "write_values")(*rows, slots, me, ref)
    return jax.freeze(ref)[:, None]


class There:
    """A layer of the cache on all devices, in the kernel; see `peer_memory.Reach`."""

    def __init__(self, peers: Peers, layer, me, addresses, keys, values, counts):
        layer, self.me = layer[0], me[0]
        layers = counts.shape[0]
        self.count, self.addresses, self.peers = counts.at[layer], addresses, peers
        arrays = (keys, layer), (values, layers + layer), (counts, addresses.shape[1] - 1)
        self.arrays = [(ref, number) for ref, number in arrays if ref is not None]

    def send(self, x, outbox, ref, here):
        """Begins to write x to `here` in `ref`, one of the arrays, of all devices."""
        peer_memory.send(x, outbox, ref.at[here], *self._addresses(ref))

    def count_one(self):
        """On every peer."""
        own, others = self._addresses(self.arrays[-1][0])
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


class Places:
    """Where x, `tokens` of a device's m of a slot, belongs in caches that hold the tokens of all devices. No peer is
    still reading there."""

    def __init__(self, peers: Peers | None, m: int, batch, slot, tokens, there: There | None):
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
