"""Attention over a cache whose newest keys and values other devices send, for NVIDIA Hopper in Pallas (Mosaic GPU).

Devices share the tokens of every frame, and each holds the whole cache. Every device has written the keys and values
of its own tokens to its own cache. Then one kernel, that of `attention_hopper`, sends them and attends: the threads
that copy keys and values for the others to attend to the past also copy new ones into the caches of all peers, a few
now and then, and wait for what the peers send when the others come to it. So what travels is hidden behind the past, is
never packed, and is never copied after it has arrived.

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
from jax_causal.hopper_rows import TOKENS

SPARE = 2  # processors that are left to others
EVERY = 4  # steps of keys to one action of a sender: as fast as the link takes what is sent


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


class Sender:
    """Sends a part of this device's rows to all peers, by the copy engine, and word of it.

    There are `senders` of it, one in every block of threads. A piece of keys and values, `TOKENS` tokens, is copied to
    shared memory by one action, and from there to the peers by the next, so that nothing waits for long; the last
    action waits for all to have arrived, and says so. No peer still reads what is written over: devices wait for each
    other before the kernel begins.

    Args:
      peers: the devices.
      sizes: B, F and m.
      sender, senders: which it is.
      caches: references to keys and values [B, K, N, D], the rows in place.
      numbers: reference to the slots, behind two others.
      buffers: shared memory for keys and values, each [TOKENS, N, D].
      ready: barrier of two arrivals.
      arrived: the semaphore that counts on every device.
    """

    def __init__(self, peers, sizes, sender, senders, caches, numbers, buffers, ready, arrived):
        self.peers, self.sizes, self.sender, self.senders = peers, sizes, sender, senders
        self.caches, self.numbers = caches, numbers
        self.buffers, self.ready, self.arrived = buffers, ready, arrived
        B, F, m = sizes
        self.pieces = B * F * hopper_rows.tiles(m)
        self.actions = 2 * -(-self.pieces // senders) + 1

    def act(self, action):
        """One of `actions`, int32, which must follow each other."""
        here, rows = self._piece(lax.div(action, 2) * self.senders + self.sender)
        last = action == self.actions - 1
        of_even = lax.rem(action, 2) == 0
        pl.when(here & of_even & jnp.logical_not(last))(lambda: self._load(rows))
        pl.when(here & jnp.logical_not(of_even))(lambda: self._store(rows))
        pl.when(last)(self._signal)

    def _piece(self, piece):
        """Whether there is such a piece, and where its rows are in a cache."""
        _, F, m = self.sizes
        tiles = hopper_rows.tiles(m)
        frame, tile = lax.div(piece, tiles), lax.rem(piece, tiles)
        first = lax.axis_index(self.peers.axis) * m + hopper_rows.tile(tile, m).start  # in its frame
        here = (piece < self.pieces) & (first < self.peers.tokens)  # padding has no place
        batch = lax.div(frame, F)
        slot = self.numbers[jnp.where(here, 2 + lax.rem(frame, F), 2)]
        return here, (batch, pl.ds(slot * self.peers.tokens + first, TOKENS))

    def _load(self, rows):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the piece before has left this memory
        for ref, buffer in zip(self.caches, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[rows], buffer, self.ready)

    def _store(self, rows):
        plgpu.barrier_wait(self.ready)
        for other in self._others():
            for ref, buffer in zip(self.caches, self.buffers, strict=True):
                plgpu.copy_smem_to_gmem(buffer, plgpu.remote_ref(ref, other).at[rows])

    def _signal(self):
        plgpu.wait_smem_to_gmem(0)
        for other in self._others():
            pl.semaphore_signal(self.arrived, device_id=other)

    def _others(self):
        me, count = lax.axis_index(self.peers.axis), self.peers.count
        return [{self.peers.axis: lax.rem(me + step, count)} for step in range(1, count)]


class Arrivals:
    """The order of keys where the newest may still have to come: from the oldest, of which the first step has as many
    as are left of whole steps; see `attention_hopper.NewestFirst`. Meanwhile `sender` sends what the peers wait for.

    The state counts the sender's actions, and is one more when all that the peers send has come.
    """

    registers = 32

    def __init__(self, sender: Sender, numbers):
        self.sender, self.numbers = sender, numbers

    def begin(self, start, count, length):
        oldest, fresh = _oldest(length), self.numbers[1]
        # The first step with keys that may still have to come.
        awaited = jnp.where(fresh < oldest, 0, lax.div(fresh - oldest, BLOCK_K) + 1)
        return oldest + (start - 1) * BLOCK_K, awaited - start

    def first(self, origin, step):
        return pl.multiple_of(jnp.maximum(origin + step * BLOCK_K, 0), 8)

    def valid(self, start, stop, count, length):
        return jnp.where(stop > start, jnp.where(start == 0, _oldest(length), BLOCK_K), 0)

    def before(self, awaited, step, position, state):
        wait = (step >= awaited) & (state <= self.sender.actions)
        due = jnp.minimum(state + (lax.rem(position, EVERY) == 0).astype(jnp.int32), self.sender.actions)
        # The peers wait too: all is sent before.
        state = self._act(state, jnp.where(wait, self.sender.actions, due))

        @pl.when(wait)
        def _wait():
            others = self.sender.peers.count - 1
            pl.semaphore_wait(self.sender.arrived, self.sender.senders * others, decrement=False)
            _before_copies()

        return jnp.where(wait, self.sender.actions + 1, state)

    def finish(self, state):
        self._act(state, jnp.int32(self.sender.actions))

    def _act(self, state, stop):
        """Does the actions from `state` to `stop`; returns the state."""

        @pl.loop(state, stop)
        def _(action):
            self.sender.act(action)

        return jnp.maximum(state, stop)


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

    def kernel(
        q_ref, numbers_ref, borders_ref, k_ref, v_ref, *out_refs, k_sent, v_sent, sent_ready, **scratch
    ):
        # Counts the senders of other devices that have sent all that they had for this one.
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        sender = Sender(
            peers, (B, F, m), lax.axis_index("cluster") * CLUSTER + lax.axis_index("side"), senders,
            (k_ref, v_ref), numbers_ref, (k_sent, v_sent), sent_ready, arrived,
        )  # fmt: skip
        attention_hopper.walk_tiles(
            q_ref, k_ref, v_ref, numbers_ref, borders_ref, *out_refs, plan=plan, no_keys=NO_KEYS,
            arrivals=Arrivals(sender, numbers_ref), **scratch,
        )  # fmt: skip

    def scoped(*refs):
        piece = plgpu.SMEM((TOKENS, N, D), q.dtype)
        scratch = attention_hopper.scratch_types(D, q.dtype) | {
            "k_sent": piece, "v_sent": piece, "sent_ready": plgpu.Barrier(num_arrivals=2),
        }  # fmt: skip
        pl.run_scoped(functools.partial(kernel, *refs), collective_axes=NAMES["thread_name"], **scratch)

    # Not `plgpu.kernel`, which takes no references.
    mesh = plgpu.Mesh(grid=(plan.clusters,), num_threads=WORKERS + 1, **NAMES)
    found = pl.kernel(
        scoped,
        attention_hopper.out_types(flat, plan),
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        name="send_and_attend_flash_attention_hopper",
    )(flat, numbers, jnp.asarray(plan.borders()), keys_ref, values_ref)
    out, _ = attention_hopper.together(F * m, plan, merge, NO_KEYS, *found)
    return out.reshape(q.shape), *(jax.freeze(ref)[:, None] for ref in (keys_ref, values_ref))


def _before_copies():
    """What peers have written by stores, and this thread has waited for, is seen by the copies that it starts."""

    @plgpu.inline_mgpu()
    def fence(ctx):
        mgpu_utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    fence()
