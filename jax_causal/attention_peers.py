"""Attention over a cache whose newest keys and values other devices send, for NVIDIA Hopper in Pallas (Mosaic GPU).

Devices share the tokens of every frame, and each holds the whole cache. Every device has written the keys and values
of its own tokens to its own cache. Then one kernel (`attention_hopper`) sends them and attends: its first blocks of
threads copy the rows into the caches of all peers, by stores over the link; all others attend to the past meanwhile,
and wait for what the peers send when they come to it. So what travels is hidden behind the past, is never packed, and
is never copied after it has arrived.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import attention_hopper, hopper_rows
from jax_causal.attention import NO_KEYS, attention, merge
from jax_causal.attention_hopper import COMPILER_PARAMS, THREADS
from jax_causal.attention_plan import CLUSTER, Plan
from jax_causal.hopper_rows import HEADS, TOKENS

SENDERS = 8  # clusters that send: together they fill the link of an H100


class Peers(NamedTuple):
    """Devices that share the S tokens of every frame, m each and fewer at the end, and each hold the whole cache.

    Attributes:
      count: of the devices.
      tokens: S.
      axis: of the mesh, along which they lie; the kernel is inside its `shard_map`. None for devices that are not
        there (`sharding.share`).
    """

    count: int
    tokens: int
    axis: str | None

    def suit(self, m: int) -> bool:
        """Whether a frame's keys are in eights, and no block of threads holds both tokens and padding."""
        return self.tokens % 8 == 0 and (self.count * m == self.tokens or m % TOKENS == 0)


def can_reach_peers() -> bool:
    """Whether this version of jax lets a kernel write to other devices of its process."""
    return hasattr(pl, "get_global") and jax.__version_info__ >= (0, 11)


def attend(
    q, keys, values, slots, length, *, peers: Peers, fresh=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention to the cache, which gets the rows of a block that the peers hold; inside `shard_map`.

    Args:
      q: [B, F, m, N, D] bfloat16 queries of this device; see `hopper_rows.suits`.
      keys, values: one layer of this device's cache, [B, 1, K, N, D], with its own m rows of every frame in place.
        Donate them, or let the caller's `jax.jit`.
      slots: int32 [F], the slot of S keys of each frame.
      length: int32 scalar, valid keys, those of the block included; whole frames.
      peers: the devices; they must `suit` m.
      fresh: int32 scalar, the first key that a peer may still have to send; None where that can be any.

    Returns:
      out [B, F, m, N, D], and the cache's keys and values, the whole block in place.
    """
    fresh = jnp.int32(0) if fresh is None else fresh
    numbers = jnp.concatenate([jnp.stack([length, fresh]), slots]).astype(jnp.int32)
    return _attend(peers, q, keys, values, numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(peers, q, keys, values, numbers):
    return _attend_kernel(peers, q, keys, values, numbers)


def _attend_fwd(peers, q, keys, values, numbers):
    return _attend(peers, q, keys, values, numbers), (q, keys, values, numbers)


def _attend_bwd(peers, inputs, cotangents):
    *differentiable, numbers = inputs
    _, pullback = jax.vjp(functools.partial(plain_attend, peers, numbers=numbers), *differentiable)
    return *pullback(cotangents), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def plain_attend(peers, q, keys, values, numbers):
    """`attend` by a collective and without overlap."""
    B, F, m, N, D = q.shape
    length, _, *slots = numbers
    first = lax.axis_index(peers.axis) * m

    def whole(cache):
        # Rows past the end of a frame are those of the next: they are cut off behind.
        padded = jnp.pad(cache, ((0, 0), (0, 0), (0, m), (0, 0), (0, 0)))
        for slot in slots:
            own = lax.dynamic_slice_in_dim(padded, slot * peers.tokens + first, m, axis=2)
            frame = lax.all_gather(own, peers.axis, axis=2, tiled=True)[:, :, : peers.tokens]
            cache = lax.dynamic_update_slice_in_dim(cache, frame, slot * peers.tokens, axis=2)
        return cache

    keys, values = whole(keys), whole(values)
    out = attention(q.reshape(B, F * m, N, D), keys, values, length=length)
    return out.reshape(q.shape), keys, values


# Compiled by itself, so that the layers of a model share their kernel.
@functools.partial(jax.jit, static_argnums=0)
def _attend_kernel(peers, q, keys, values, numbers):
    B, F, m, N, D = q.shape
    flat = attention_hopper.pad(q.reshape(B, F * m, N, D))
    processors = getattr(jax.local_devices()[0], "core_count", 132)
    plan = Plan.cheapest(F * m, B * N, keys.shape[2], processors)
    keys_ref, values_ref = (jax.new_ref(x[:, 0]) for x in (keys, values))

    def kernel(q_ref, numbers_ref, k_ref, v_ref, *out_refs, **scratch):
        # Counts what has been sent to this device.
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        cluster, side = lax.axis_index("cluster"), lax.axis_index("side")
        workers = SENDERS * CLUSTER * THREADS["num_threads"]

        @pl.when(cluster < SENDERS)
        def _send():
            worker = (cluster * CLUSTER + side) * THREADS["num_threads"] + lax.axis_index("warpgroup")
            send(peers, (B, F, m), worker, workers, k_ref, v_ref, numbers_ref, arrived)

        @pl.when(cluster >= SENDERS)
        def _attend():
            def arrive():
                pl.semaphore_wait(arrived, workers * (peers.count - 1), decrement=False)
                _before_copies()

            attention_hopper.attend_block(
                q_ref, k_ref, v_ref, numbers_ref[0], *out_refs,
                place=plan.place(cluster - SENDERS, side, B * N), plan=plan, no_keys=NO_KEYS,
                fresh=numbers_ref[1], arrive=arrive, **scratch,
            )  # fmt: skip

    def scoped(*refs):
        scratch = attention_hopper.scratch_types(D, q.dtype)
        pl.run_scoped(functools.partial(kernel, *refs), collective_axes=THREADS["thread_name"], **scratch)

    # Not `plgpu.kernel`, which takes no references.
    mesh = plgpu.Mesh(grid=(SENDERS + sum(plan.clusters(B * N)),), **THREADS)
    found = pl.kernel(
        scoped,
        attention_hopper.out_types(flat, plan),
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        name="send_and_attend_flash_attention_hopper",
    )(flat, numbers, keys_ref, values_ref)
    out, _ = attention_hopper.together(F * m, plan, merge, *found)
    return out.reshape(q.shape), *(jax.freeze(ref)[:, None] for ref in (keys_ref, values_ref))


def send(peers: Peers, sizes: tuple[int, int, int], worker, workers: int, keys, values, numbers, arrived):
    """What one of so many warpgroups sends: its part of this device's keys and values, to all peers, and word of it.

    `sizes` are B, F and m; `keys` and `values` are references [B, K, N, D], the rows in place. No peer still reads what
    is written over: devices wait for each other before the kernel begins.
    """
    B, F, m = sizes
    me = lax.axis_index(peers.axis)
    others = [{peers.axis: lax.rem(me + step, peers.count)} for step in range(1, peers.count)]
    pieces = B * F * hopper_rows.tiles(m)

    @pl.loop(0, -(-pieces // workers))
    def _(i):
        piece = i * workers + worker
        frame, tile = lax.div(piece, hopper_rows.tiles(m)), lax.rem(piece, hopper_rows.tiles(m))
        first = me * m + hopper_rows.tile(tile, m).start  # in its frame

        @pl.when((piece < pieces) & (first < peers.tokens))  # padding has no place
        def _send():
            batch, slot = lax.div(frame, F), numbers[2 + lax.rem(frame, F)]
            at = batch, pl.ds(slot * peers.tokens + first, TOKENS)
            rows = [(ref, hopper_rows.load(ref.at[at], HEADS)) for ref in (keys, values)]
            for other in others:
                for ref, x in rows:
                    plgpu.remote_ref(ref, other)[at] = x

    for other in others:
        pl.semaphore_signal(arrived, device_id=other)


def _before_copies():
    """What peers have written by stores, and this thread has waited for, is seen by the copies that it starts."""

    @plgpu.inline_mgpu()
    def fence(ctx):
        from jax.experimental.mosaic.gpu import utils

        utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    fence()
