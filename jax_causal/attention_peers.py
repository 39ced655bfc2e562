"""Attention over a cache whose newest keys and values other devices send, for NVIDIA Hopper in Pallas (Mosaic GPU).

Devices share the tokens of every frame, and each holds the whole cache. Every device has written the keys and values
of its own tokens to its own cache. Then one kernel, that of `attention_hopper`, sends them and attends: the threads
that copy keys and values for the others to attend to the past also copy new ones into the caches of all peers, a few
now and then, and wait for what the peers send when the others come to it. So what travels is hidden behind the past, is
never packed, and is never copied after it has arrived.

Blocks that wait fill their processors: nothing else runs on that device meanwhile. Were code loaded for it, with all
devices locked until that is done, they would wait for ever: `CUDA_MODULE_LOADING` must be `EAGER`.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import attention_hopper
from jax_causal.attention import NO_KEYS, attention, merge
from jax_causal.attention_hopper import COMPILER_PARAMS, NAMES, WORKERS
from jax_causal.attention_plan import CLUSTER, Plan
from jax_causal.attention_tile import BLOCK_K, ROWS
from jax_causal.fused_rotation import Peers

SPARE = 0  # processors that are left to others
SLOWEST = 16  # steps of keys to one action of a sender
PIECES = WORKERS  # that a sender has room for


def suits(tokens: int, m: int, devices: int) -> bool:
    """Whether frames of so many tokens can be attended to by devices that hold m of them each: keys are walked in
    eights, and sent in pieces of which everyone who holds any must hold one. And only where no code is loaded while the
    kernel waits."""
    if os.environ.get("CUDA_MODULE_LOADING") != "EAGER":
        return False
    last = min(tokens - first for first in range(0, tokens, m))
    return tokens % 8 == m % 8 == 0 and len(range(0, tokens, m)) <= devices and last >= ROWS


def attend(q, keys, values, slots, length, fresh, *, peers: Peers) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention to the cache, which gets the rows of a block that the peers hold; inside `shard_map`.

    Args:
      q: [B, F, m, N, D] bfloat16 queries of this device; see `hopper_rows.suits`.
      keys, values: one layer of this device's cache, [B, 1, K, N, D], with its own m rows of every frame in place.
        Donate them, or let the caller's `jax.jit`.
      slots: int32 [F], the slot of S keys of each frame.
      length: int32 scalar, valid keys, those of the block included; whole frames.
      peers: the devices; they must `suit` m.
      fresh: int32 scalar, the first key that a peer may still have to send.

    Returns:
      out [B, F, m, N, D], and the cache's keys and values, the whole block in place.
    """
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

    There is one in every block of threads. A round sends two pieces, each `ROWS` rows of one head of the keys or values
    of a frame: one action copies them to shared memory, which holds results later, and the next copies them from there,
    so that nothing waits for long. The last action waits for all to have arrived, and says so. No peer still reads what
    is written over: devices wait for each other before the kernel begins.

    Args:
      peers: the devices.
      sizes: B, F, m and N.
      block, blocks: which it is, and of how many.
      caches: references to keys and values [B, K, N, D], the rows in place.
      numbers: reference to the slots, behind two others.
      buffers: shared memory [PIECES, ROWS, D].
      ready: barriers of the pieces in it.
      sent: barrier of one arrival: the shared memory is read no longer.
      arrived: the semaphore that counts on every device.
    """

    def __init__(self, peers, sizes, block, blocks, caches, numbers, buffers, ready, sent, arrived):
        self.peers, self.sizes, self.block, self.blocks = peers, sizes, block, blocks
        self.caches, self.numbers, self.buffers = caches, numbers, buffers
        self.ready, self.sent, self.arrived = ready, sent, arrived
        B, F, m, N = sizes
        self.tiles = -(-m // ROWS)
        self.of_one = B * F * self.tiles * N  # pieces of the keys, and of the values
        self.actions = 2 * -(-2 * self.of_one // (PIECES * blocks)) + 1

    def act(self, action):
        """One of `actions`, int32, which must follow each other."""
        last = action == self.actions - 1
        loads = (lax.rem(action, 2) == 0) & jnp.logical_not(last)
        pl.when(loads)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))  # the round before has left
        for i in range(PIECES):
            here, of_keys, place = self._piece((lax.div(action, 2) * self.blocks + self.block) * PIECES + i)
            for cache, mine in zip(self.caches, (of_keys, jnp.logical_not(of_keys)), strict=True):
                pl.when(here & mine & loads)(functools.partial(self._load, cache, place, i))
            stores = here & (lax.rem(action, 2) == 1)
            pl.when(stores)(lambda i=i: plgpu.barrier_wait(self.ready.at[i]))
            for cache, mine in zip(self.caches, (of_keys, jnp.logical_not(of_keys)), strict=True):
                pl.when(stores & mine)(functools.partial(self._store, cache, place, i))
        pl.when(last)(self._signal)

    def _piece(self, piece):
        """Whether there is such a piece, whether of keys, and where in a cache."""
        _, F, m, N = self.sizes
        of_keys = piece < self.of_one
        rest, head = lax.div(piece, N), lax.rem(piece, N)
        rest, tile = lax.div(rest, self.tiles), lax.rem(rest, self.tiles)
        frame = jnp.where(of_keys, rest, rest - self.of_one // (N * self.tiles))
        begin = lax.axis_index(self.peers.axis) * m
        own = jnp.minimum(self.peers.tokens - begin, m)  # padding has no place
        here = (piece < 2 * self.of_one) & (tile * ROWS < own)
        slot = self.numbers[jnp.where(here, 2 + lax.rem(frame, F), 2)]
        # The last rows go twice where they are no whole piece.
        first = slot * self.peers.tokens + begin + jnp.minimum(tile * ROWS, own - ROWS)
        return here, of_keys, (lax.div(frame, F), pl.ds(pl.multiple_of(first, 8), ROWS), head)

    def _load(self, cache, place, i):
        plgpu.copy_gmem_to_smem(cache.at[place], self.buffers.at[i], self.ready.at[i])

    def _store(self, cache, place, i):
        for other in self._others():
            plgpu.copy_smem_to_gmem(self.buffers.at[i], plgpu.remote_ref(cache, other).at[place])

    def _signal(self):
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(self.sent)
        for other in self._others():
            pl.semaphore_signal(self.arrived, device_id=other)

    def _others(self):
        me, count = lax.axis_index(self.peers.axis), self.peers.count
        return [{self.peers.axis: lax.rem(me + step, count)} for step in range(1, count)]


class Arrivals:
    """The order of keys where the newest may still have to come: from the oldest, of which the first step has as many
    as are left of whole steps; see `attention_hopper.NewestFirst`. Meanwhile `sender` sends what the peers wait for.

    What blocks send waits for the link, and what they copy next waits behind it. So they send as slowly as the past
    allows, and not all at once.

    The state counts the sender's actions, and is one more when all that the peers send has come.
    """

    def __init__(self, sender: Sender, numbers):
        self.sender, self.numbers = sender, numbers

    def begin(self, start, count, length):
        oldest, fresh = _oldest(length), self.numbers[1]
        # The first step with keys that may still have to come.
        awaited = jnp.where(fresh < oldest, 0, lax.div(fresh - oldest, BLOCK_K) + 1)
        every = jnp.clip(lax.div(awaited, self.sender.actions + 1), 1, SLOWEST)
        return oldest + (start - 1) * BLOCK_K, (awaited - start, every)

    def first(self, origin, step):
        return pl.multiple_of(jnp.maximum(origin + step * BLOCK_K, 0), 8)

    def valid(self, start, stop, count, length):
        return jnp.where(stop > start, jnp.where(start == 0, _oldest(length), BLOCK_K), 0)

    def before(self, pace, step, count, state):
        awaited, every = pace
        wait = (step >= awaited) & (step < count) & (state <= self.sender.actions)
        # The peers wait too, and results need the memory: all is sent before.
        mine = lax.rem(step + self.sender.block, every) == 0
        due = jnp.where(wait | (step == count), self.sender.actions, state + mine)
        state = self._act(state, due.astype(jnp.int32))

        @pl.when(wait)
        def _wait():
            others = self.sender.peers.count - 1
            pl.semaphore_wait(self.sender.arrived, self.sender.blocks * others, decrement=False)
            _before_copies()

        return jnp.where(wait, self.sender.actions + 1, state)

    def finish(self, state):
        self._act(state, jnp.int32(self.sender.actions))

    def release(self, index):
        pl.when(index == 0)(lambda: plgpu.barrier_wait(self.sender.sent))

    def _act(self, state, stop):
        """Does the actions from `state` to `stop`, if there are any; returns the new state."""
        stop = jnp.minimum(stop, self.sender.actions)

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
    processors = getattr(jax.local_devices()[0], "core_count", 132) - SPARE
    plan = Plan.cheapest(F * m, B * N, keys.shape[2], processors)
    keys_ref, values_ref = (jax.new_ref(x[:, 0]) for x in (keys, values))

    def kernel(q_ref, numbers_ref, borders_ref, k_ref, v_ref, *out_refs, ready, sent, **scratch):
        # Counts the blocks of other devices that have sent all that they had for this one.
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        block = lax.axis_index("cluster") * CLUSTER + lax.axis_index("side")
        sender = Sender(
            peers, (B, F, m, N), block, plan.clusters * CLUSTER, (k_ref, v_ref), numbers_ref,
            scratch["out_smem"], ready, sent, arrived,
        )  # fmt: skip
        attention_hopper.walk_tiles(
            q_ref, k_ref, v_ref, numbers_ref, borders_ref, *out_refs, plan=plan, no_keys=NO_KEYS,
            arrivals=Arrivals(sender, numbers_ref), **scratch,
        )  # fmt: skip

    def scoped(*refs):
        scratch = attention_hopper.scratch_types(D, q.dtype) | {
            "ready": plgpu.Barrier(num_barriers=PIECES), "sent": plgpu.Barrier(),
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
