"""Flash-attention forward kernel for NVIDIA Hopper in Pallas (Mosaic GPU): the `hopper` back end of `attention`.

A block of threads takes 128 queries of one head after another: two warpgroups of 64 that multiply, and a third that
copies keys and values to shared memory ahead of them, also those of the next queries. What a warpgroup does with a tile
is in `attention_tile`.

Two such blocks on neighbouring processors, a cluster, walk over the same keys for 128 queries each: a block copies one
half of every step's keys and values, to both, and so half as much passes from the L2 cache. Which block does what is
said by `attention_plan`; what several find for the same queries is merged by fp32 statistics, from fp32 outputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import attention_tile
from jax_causal.attention_plan import CLUSTER, TILE, Plan
from jax_causal.attention_tile import BLOCK_K, ROWS

WORKERS = TILE // ROWS  # warpgroups that multiply
BUFFERS = 5  # for keys and values in turn, as many as a block has room for: what is copied ahead
# Registers of a thread that copies and of one that multiplies, in eights: together no more than a block starts with, or
# those that ask for more wait for ever.
COPYING, MULTIPLYING = 24, 240


def supported() -> bool:
    """Whether this version of jax has what the kernel is written with."""
    return hasattr(plgpu, "wgmma_accumulator_load")


def attend(q, k, v, length, *, no_keys: float, merge, processors: int) -> tuple[jax.Array, jax.Array]:
    """Attention over the first `length` keys (None for all) and its log-sum-exp.

    Takes q [B, T, N, D] and k, v [B, K, N, D] of one 16-bit dtype, D 64 or 128 and K a multiple of 8, and an int32
    scalar. Keys behind `length` are loaded, and must be finite. `merge` is `attention.merge`.

    Returns:
      out [B, T, N, D] in the dtype of q and lse [B, N, T] in float32, which is `no_keys` where `length` is 0.
    """
    (B, T, N, _), K = q.shape, k.shape[1]
    plan = Plan.cheapest(T, B * N, K, processors)
    length = jnp.full((1,), K if length is None else length, jnp.int32)
    return together(T, plan, merge, no_keys, *forward(pad(q), k, v, length, plan=plan, no_keys=no_keys))


def pad(q):
    """Queries [B, T, N, D] in eights, which the copy engine wants."""
    return jnp.pad(q, ((0, 0), (0, -q.shape[1] % 8), (0, 0), (0, 0)))


def together(T: int, plan: Plan, merge, no_keys, out, lse, *shared) -> tuple[jax.Array, jax.Array]:
    """`attend` of T queries, from what the kernel gives."""
    if plan.shared:
        rows = T + -T % 8 - plan.whole * TILE
        outs, lses = merge(*_runs(plan, *(x[:, :, :rows] for x in shared), no_keys))
        outs = outs.astype(out.dtype)
        if plan.whole:
            # In place. Without the barrier XLA (of jax 0.11.2) may draw the update into the kernel, and find a circle.
            outs = lax.dynamic_update_slice_in_dim(
                lax.optimization_barrier(out), outs, plan.whole * TILE, axis=1
            )
        out = outs
        lse = jnp.concatenate([lse, lses], axis=2) if plan.whole else lses
    return out[:, :T], lse[:, :, :T]


def _runs(plan, outs, lses, no_keys):
    """Lists of [B, T, N, D] and [B, N, T] for `merge` from outs [runs, B, T, N, D] and lses [runs, B, T, N], with what
    no block has written replaced by what an attention without keys finds."""
    B, T, N = lses.shape[1:]
    found = np.repeat(plan.is_run().reshape(plan.runs, B, N, plan.shared), TILE, axis=3)[..., :T]
    found = np.swapaxes(found, 2, 3)
    outs = [
        jnp.where(here[..., None], x, 0) if not here.all() else x for here, x in zip(found, outs, strict=True)
    ]
    lses = [jnp.where(here, x, no_keys) if not here.all() else x for here, x in zip(found, lses, strict=True)]
    return outs, [jnp.swapaxes(x, 1, 2) for x in lses]


# Compiled by itself, so that the layers of a model share one kernel: each costs a second.
@functools.partial(jax.jit, static_argnames=("plan", "no_keys"))
def forward(q, k, v, length, *, plan: Plan, no_keys: float):
    """The kernel. T and K are multiples of 8.

    Returns out [B, T, N, D], undefined where tiles are shared, and lse [B, N, whole * 128] of whole tiles (both smaller
    and undefined where there are none). Of shared ones each run's fp32 out [runs, B, shared * 128, N, D] and lse [runs,
    B, shared * 128, N], undefined where `Plan.is_run` says that there is none.
    """
    return plgpu.kernel(
        functools.partial(walk_tiles, plan=plan, no_keys=no_keys),
        out_type=out_types(q, plan),
        scratch_types=scratch_types(q.shape[-1], q.dtype),
        grid=(plan.clusters,),
        num_threads=WORKERS + 1,
        compiler_params=COMPILER_PARAMS,
        kernel_name="flash_attention_hopper",
        **NAMES,
    )(q, k, v, length, jnp.asarray(plan.borders()))


# Rows are reduced within a warp, which needs no scratch.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512)
NAMES = {
    "grid_names": ("cluster",),
    "cluster": (CLUSTER,),
    "cluster_names": ("side",),
    "thread_name": "warpgroup",
}


def out_types(q, plan: Plan) -> list[jax.ShapeDtypeStruct]:
    """What the kernel gives; see `forward`."""
    B, T, N, D = q.shape
    found = [
        jax.ShapeDtypeStruct((B, T if plan.whole else 8, N, D), q.dtype),
        jax.ShapeDtypeStruct((B, N, max(plan.whole, 1) * TILE), jnp.float32),
    ]
    if plan.shared:
        found += [
            jax.ShapeDtypeStruct((plan.runs, B, plan.shared * TILE, N, D), jnp.float32),
            jax.ShapeDtypeStruct((plan.runs, B, plan.shared * TILE, N), jnp.float32),
        ]
    return found


def scratch_types(D: int, dtype) -> dict:
    """Shared memory and barriers of a block of threads."""
    # Memory is free when both blocks have used theirs, for both write to both.
    free = plgpu.ClusterBarrier(collective_axes=("side",), num_arrivals=WORKERS, num_barriers=BUFFERS)
    return {
        "q_smem": _swizzled((WORKERS, ROWS, D), dtype),
        "kv_smem": _swizzled((BUFFERS, BLOCK_K, D), dtype),
        "out_smem": _swizzled((WORKERS, ROWS, D), dtype),
        "lse_smem": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WORKERS),
        "kv_ready": plgpu.Barrier(num_barriers=BUFFERS),
        "kv_free": free,
    }


def _swizzled(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def store(ref, value):
    """To global memory, a few bytes here and there."""
    if hasattr(plgpu, "store"):  # jax 0.12 does so only when told to
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def load(source, smem, ready, free, turn, together):
    """Copies the keys or values of a step when it is their turn, once there is room: `together` each block of a cluster
    copies a half, to both."""
    slot = lax.rem(turn, BUFFERS)
    smem, ready, free = (x.at[slot] for x in (smem, ready, free))
    pl.when(turn >= BUFFERS)(lambda: plgpu.barrier_wait(free))

    @pl.when(together)
    def _half():
        plgpu.copy_gmem_to_smem(source, smem, ready, collective_axes="side")

    @pl.when(jnp.logical_not(together))
    def _all():
        plgpu.copy_gmem_to_smem(source, smem, ready)


class NewestFirst:
    """The order in which a block walks over the keys of a tile: only the first step, with the newest, can be partly
    valid. All arguments and results are int32 scalars."""

    def begin(self, start, count, length):
        """What `first` is given in each of `count` steps from `start` on, and what `before`."""
        return (start + count - 1) * BLOCK_K, None

    def first(self, origin, step):
        """The first key of a step."""
        return origin - step * BLOCK_K

    def valid(self, start, stop, count, length):
        """How many keys are valid in the first step."""
        return jnp.minimum(length, stop * BLOCK_K) - (start + count - 1) * BLOCK_K

    def before(self, pace, step, count, state):
        """Called before the keys of a step are copied, and once behind the last step. Gives a state, which is 0 at
        first."""
        return state

    def finish(self, state):
        """Called when all keys are copied."""

    def release(self, index):
        """Called before `out_smem` is written to for the tile `index` of a block."""


def walk_tiles(
    q_ref, k_ref, v_ref, length_ref, borders_ref, out_ref, lse_ref, *shared_refs,
    plan, no_keys, arrivals=None, **scratch,
):  # fmt: skip
    """The kernel. `arrivals` is another order of keys than `NewestFirst`, with the same methods."""
    q_smem, out_smem, lse_smem, q_ready = (
        scratch[name] for name in ("q_smem", "out_smem", "lse_smem", "q_ready")
    )
    buffers = tuple(scratch[name] for name in ("kv_smem", "kv_ready", "kv_free"))
    N = q_ref.shape[2]
    me, cluster, side = (lax.axis_index(name) for name in ("warpgroup", "cluster", "side"))
    tiles = plan.count(cluster, borders_ref[cluster], borders_ref[cluster + 1])

    # These read from memory what would have to stay in registers from tile to tile.

    def find(index):
        """The place of the `index`th tile."""
        return plan.place(cluster, side, index, borders_ref[cluster], borders_ref[cluster + 1])

    def walk(index):
        """Where the `index`th tile is, which steps of all keys it takes, and how many."""
        place = find(index)
        start, stop = plan.span(place, lax.div(length_ref[0] + (BLOCK_K - 1), BLOCK_K))
        return place, start, jnp.maximum(stop - start, 1)  # without keys, a step of which nothing is valid

    order = arrivals or NewestFirst()

    @pl.when(me == WORKERS)
    def _copy():
        plgpu.set_max_registers(COPYING, action="decrease")

        def tile(index, carry):
            done, state = carry
            place, start, count = walk(index)
            batch, head = lax.div(place.head, N), lax.rem(place.head, N)

            origin, pace = order.begin(start, count, length_ref[0])

            def copy(ref, step, turn):
                source = ref.at[batch, pl.ds(order.first(origin, step), BLOCK_K), head]
                load(source, *buffers, turn, place.together)

            def step(i, state):
                state = order.before(pace, i, count, state)
                pl.when(i < count)(lambda: copy(k_ref, i, attention_tile.turn_of_keys(done, i)))
                pl.when(i > 0)(lambda: copy(v_ref, i - 1, attention_tile.turn_of_values(done, i - 1, count)))
                return state

            return done + count, lax.fori_loop(0, count + 1, step, state)

        steps, state = lax.fori_loop(0, tiles, tile, (jnp.int32(0), jnp.int32(0)))
        order.finish(state)

        # Before the other block has said for the last time that it has used something, this one must not end.
        @pl.loop(jnp.maximum(2 * steps - BUFFERS, 0), 2 * steps)
        def _(turn):
            *_, free = buffers
            plgpu.barrier_wait(free.at[lax.rem(turn, BUFFERS)])

    @pl.when(me < WORKERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        queries, shown, ready = q_smem.at[me], out_smem.at[me], q_ready.at[me]

        def first_query(place):
            return (place.tile + jnp.where(place.shared, plan.whole, 0)) * TILE + me * ROWS

        def load_queries(index):
            place = find(index)
            batch, head = lax.div(place.head, N), lax.rem(place.head, N)
            rows = pl.ds(first_query(place), ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], queries, ready)

        def attend_to(index, done, start, count, ahead):
            _, stop = plan.span(find(index), lax.div(length_ref[0] + (BLOCK_K - 1), BLOCK_K))
            valid = order.valid(start, stop, count, length_ref[0])
            attended = functools.partial(
                attention_tile.attend, queries, buffers, done, count, valid, no_keys, ahead
            )
            out, lse = pl.run_scoped(attended, plgpu.ACC((ROWS, queries.shape[1]), jnp.float32))
            place = find(index)
            batch, head = lax.div(place.head, N), lax.rem(place.head, N)
            rows = pl.ds(place.tile * TILE + me * ROWS, ROWS)  # in whole or shared ones

            @pl.when(jnp.logical_not(place.shared))
            def _whole():
                order.release(index)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left this memory
                shown[...] = out.astype(shown.dtype)
                lse_smem[me] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(shown, out_ref.at[batch, rows, head])
                plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[batch, head, rows])

            if plan.shared:

                @pl.when(place.shared)
                def _shared():
                    shared_out, shared_lse = shared_refs
                    shared_out[place.run, batch, rows, head] = out
                    store(shared_lse.at[place.run, batch, rows, head], lse)

        def tile(index, done):
            place, start, count = walk(index)

            def ahead():
                pl.when(index + 1 < tiles)(lambda: load_queries(index + 1))

            plgpu.barrier_wait(ready)
            # The last queries of a head may leave one of the two warpgroups without any.
            any_queries = first_query(place) < q_ref.shape[1]
            pl.when(any_queries)(lambda: attend_to(index, done, start, count, ahead))
            pl.when(jnp.logical_not(any_queries))(lambda: attention_tile.skip(buffers, done, count, ahead))
            return done + count

        load_queries(0)
        lax.fori_loop(0, tiles, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
