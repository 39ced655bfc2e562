"""Attention over a cache whose newest keys and values other devices send, for NVIDIA Hopper in Pallas (Mosaic GPU).

Devices share the tokens of every frame, and each holds the whole cache. Every device has written the keys and values
of its own tokens to its own cache. Then one kernel, that of `attention_hopper` with a warpgroup more, sends them and
attends: that warpgroup copies rows into the caches of all peers, by stores over the link, while the others attend to
the past, and wait for what the peers send when they come to it. So what travels is hidden behind the past, is never
packed, and is never copied after it has arrived.

Blocks that wait fill their processors. Some processors are left to whatever else a device is asked to do meanwhile:
where it cannot run, and the device that is waited for cannot go on before it has, they wait for ever.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import attention_hopper, hopper_rows
from jax_causal.attention import NO_KEYS, attention, merge
from jax_causal.attention_hopper import COMPILER_PARAMS, NAMES, WORKERS
from jax_causal.attention_plan import CLUSTER, Plan
from jax_causal.attention_tile import BLOCK_K
from jax_causal.fused_rotation import Peers
from jax_causal.hopper_rows import HEADS, TOKENS

SPARE = 2  # processors that are left to others
HEADS_AT_ONCE = 4  # of a piece: what fits into the registers of the warpgroup that sends


def suits(tokens: int) -> bool:
    """Whether frames of so many tokens can be attended to: keys are walked in eights."""
    return tokens % 8 == 0


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


class Arrivals:
    """The order of keys where the newest may still have to come: from the oldest, of which the first step has as many
    as are left of whole steps. See `attention_hopper.NewestFirst`."""

    registers = 232

    def __init__(self, arrived, count: int):
        self.arrived, self.count = arrived, count

    def first(self, start, count, step, length):
        index = start + step
        return pl.multiple_of(jnp.where(index == 0, 0, _oldest(length) + (index - 1) * BLOCK_K), 8)

    def valid(self, start, stop, count, length):
        return jnp.where(stop > start, jnp.where(start == 0, _oldest(length), BLOCK_K), 0)

    def wait(self, start, step, numbers):
        length, fresh = numbers[0], numbers[1]
        oldest = _oldest(length)
        index = jnp.where(fresh < oldest, 0, lax.div(fresh - oldest, BLOCK_K) + 1)

        @pl.when(start + step == jnp.maximum(index, start))
        def _wait():
            pl.semaphore_wait(self.arrived, self.count, decrement=False)
            _before_copies()


def _oldest(length):
    """Keys of the first step."""
    return length - jnp.maximum(lax.div(length + (BLOCK_K - 1), BLOCK_K) - 1, 0) * BLOCK_K


# Compiled by itself, so that the layers of a model share their kernel.
@functools.partial(jax.jit, static_argnums=0)
def _attend_kernel(peers, q, keys, values, numbers):
    B, F, m, N, D = q.shape
    flat = attention_hopper.pad(q.reshape(B, F * m, N, D))
    processors = getattr(jax.local_devices()[0], "core_count", 132) - SPARE
    plan = Plan.cheapest(F * m, B * N, keys.shape[2], processors)
    keys_ref, values_ref = (jax.new_ref(x[:, 0]) for x in (keys, values))
    senders = plan.clusters * CLUSTER

    def kernel(q_ref, numbers_ref, borders_ref, k_ref, v_ref, *out_refs, **scratch):
        # Counts the senders of other devices that have sent all that they had for this one.
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)

        @pl.when(lax.axis_index("warpgroup") == WORKERS + 1)
        def _send():
            plgpu.set_max_registers(24, action="decrease")
            sender = lax.axis_index("cluster") * CLUSTER + lax.axis_index("side")
            send(peers, (B, F, m), sender, senders, k_ref, v_ref, numbers_ref, arrived)

        attention_hopper.walk_tiles(
            q_ref, k_ref, v_ref, numbers_ref, borders_ref, *out_refs, plan=plan, no_keys=NO_KEYS,
            arrivals=Arrivals(arrived, senders * (peers.count - 1)), **scratch,
        )  # fmt: skip

    def scoped(*refs):
        scratch = attention_hopper.scratch_types(D, q.dtype)
        pl.run_scoped(functools.partial(kernel, *refs), collective_axes=NAMES["thread_name"], **scratch)

    # Not `plgpu.kernel`, which takes no references.
    mesh = plgpu.Mesh(grid=(plan.clusters,), num_threads=WORKERS + 2, **NAMES)
    found = pl.kernel(
        scoped,
        attention_hopper.out_types(flat, plan),
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        name="send_and_attend_flash_attention_hopper",
    )(flat, numbers, jnp.asarray(plan.borders()), keys_ref, values_ref)
    out, _ = attention_hopper.together(F * m, plan, merge, NO_KEYS, *found)
    return out.reshape(q.shape), *(jax.freeze(ref)[:, None] for ref in (keys_ref, values_ref))


def send(peers: Peers, sizes: tuple[int, int, int], sender, senders: int, keys, values, numbers, arrived):
    """What one of so many warpgroups sends: its part of this device's keys and values, to all peers, and word of it.

    `sizes` are B, F and m; `keys` and `values` are references [B, K, N, D], the rows in place. No peer still reads what
    is written over: devices wait for each other before the kernel begins.
    """
    B, F, m = sizes
    N = keys.shape[2]
    me = lax.axis_index(peers.axis)
    others = [{peers.axis: lax.rem(me + step, peers.count)} for step in range(1, peers.count)]
    pieces = B * F * hopper_rows.tiles(m)
    parts = [(n, min(HEADS_AT_ONCE, N - n)) for n in range(0, N, HEADS_AT_ONCE)]

    @pl.loop(0, -(-pieces // senders))
    def _(i):
        piece = i * senders + sender
        frame, tile = lax.div(piece, hopper_rows.tiles(m)), lax.rem(piece, hopper_rows.tiles(m))
        first = me * m + hopper_rows.tile(tile, m).start  # in its frame

        @pl.when((piece < pieces) & (first < peers.tokens))  # padding has no place
        def _send():
            batch, slot = lax.div(frame, F), numbers[2 + lax.rem(frame, F)]
            rows = pl.ds(slot * peers.tokens + first, TOKENS)
            for ref in (keys, values):
                for n, count in parts:
                    at = batch, rows, pl.ds(n, count)
                    x = hopper_rows.load(ref.at[at], HEADS)
                    for other in others:
                        plgpu.remote_ref(ref, other)[at] = x

    for other in others:
        pl.semaphore_signal(arrived, device_id=other)


def _before_copies():
    """What peers have written by stores, and this thread has waited for, is seen by the copies that it starts."""

    @plgpu.inline_mgpu()
    def fence(ctx):
        mgpu_utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    fence()
