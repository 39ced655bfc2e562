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

from jax_causal import attention_tile, mosaic
from jax_causal.attention_plan import CLUSTER, TILE, Plan
from jax_causal.attention_tile import BLOCK_K, ROWS

WORKERS = TILE // ROWS  # warpgroups that multiply
NAME = "flash_attention_hopper"
STAGES = 2  # steps that keys and values are copied ahead


def supported() -> bool:
    """Whether this version of jax has what the kernel is written with."""
    return hasattr(plgpu, "wgmma_accumulator_load")


def attend(
    q, k, v, length, *, distinct=None, queries=None, no_keys: float, merge, processors: int
) -> tuple[jax.Array, jax.Array]:
    """Attention over the first `length` keys (None for all) and its log-sum-exp.

    Takes q [B, T, N, D] and k, v [B, K, N, D] of one 16-bit dtype, D 64 or 128 and K a multiple of 8, and an int32
    scalar. Keys behind `length` are loaded, and must be finite. `merge` is `attention.merge`. With `distinct`, an int32
    scalar in the place of `length`, attention is over all keys, of which those from `distinct` on are equal, and so are
    their values: the first of them stands for all, its weight so many times its own. With `queries`, an int32 scalar,
    only so many of the T are wanted; what comes out for others is finite.

    Returns:
      out [B, T, N, D] in the dtype of q and lse [B, N, T] in float32, which is `no_keys` where `length` is 0.
    """
    (B, T, N, _), K = q.shape, k.shape[1]
    plan = Plan.cheapest(T, B * N, K, processors, may_be_short=queries is not None)
    short = None
    if plan.may_be_short:
        short = queries <= (plan.tiles - 1) * TILE
    q = jnp.pad(q, ((0, 0), (0, -T % 8), (0, 0), (0, 0)))  # the copy engine wants eights of rows
    log_times = None
    if distinct is not None:
        length = jnp.minimum(distinct + 1, K)
        log_times = jnp.log(jnp.full((1,), K + 1 - length, jnp.float32))
    length = jnp.full((1,), K if length is None else length, jnp.int32)
    out, lse, *shared = forward(q, k, v, length, log_times, short, plan=plan, no_keys=no_keys)
    if plan.shared:
        rows = q.shape[1] - plan.whole * TILE
        outs, lses = merge(*_runs(plan, short, *(x[:, :, :rows] for x in shared), no_keys))
        outs = outs.astype(out.dtype)
        if plan.whole:
            # In place. Without the barrier XLA (of jax 0.11.2) may draw the update into the kernel, and find a circle.
            outs = lax.dynamic_update_slice_in_dim(
                lax.optimization_barrier(out), outs, plan.whole * TILE, axis=1
            )
        out = outs
        lse = jnp.concatenate([lse, lses], axis=2) if plan.whole else lses
    return out[:, :T], lse[:, :, :T]


def _runs(plan, short, outs, lses, no_keys):
    """Lists of [B, T, N, D] and [B, N, T] for `merge` from outs [runs, B, T, N, D] and lses [runs, B, T, N], with what
    no block has written replaced by what an attention without keys finds."""
    B, T, N = lses.shape[1:]

    def found(is_run):
        rows = np.repeat(is_run.reshape(plan.runs, B, N, plan.shared), TILE, axis=3)[..., :T]
        return np.swapaxes(rows, 2, 3)

    def only(here, x, otherwise):
        return x if isinstance(here, np.ndarray) and here.all() else jnp.where(here, x, otherwise)

    all_found = found(plan.is_run())
    if short is not None:
        of_short = found(plan.is_run(short=True))
        all_found = [
            jnp.where(short, *x) if np.any(x[0] != x[1]) else x[0]
            for x in zip(of_short, all_found, strict=True)
        ]
    outs = [only(here[..., None], x, 0) for here, x in zip(all_found, outs, strict=True)]
    lses = [only(here, x, no_keys) for here, x in zip(all_found, lses, strict=True)]
    return outs, [jnp.swapaxes(x, 1, 2) for x in lses]


# Compiled by itself, so that the layers of a model share one kernel: each costs a second.
@functools.partial(jax.jit, static_argnames=("plan", "no_keys"))
def forward(q, k, v, length, log_times, short, *, plan: Plan, no_keys: float):
    """The kernel. T and K are multiples of 8. The last of `length` (int32 [1]) keys stands for as many as `log_times`
    (float32 [1], or None for one) is the logarithm of. `short` (bool [], None where `plan` is not for it) says that the
    last tile of every head has no queries.

    Returns out [B, T, N, D], undefined where tiles are shared, and lse [B, N, whole * 128] of whole tiles (both smaller
    and undefined where there are none). Of shared ones each run's fp32 out [runs, B, shared * 128, N, D] and lse [runs,
    B, shared * 128, N], undefined where `Plan.is_run` says that there is none.
    """
    B, T, N, D = q.shape
    out_type = [
        jax.ShapeDtypeStruct((B, T if plan.whole else 8, N, D), q.dtype),
        jax.ShapeDtypeStruct((B, N, max(plan.whole, 1) * TILE), jnp.float32),
    ]
    # Memory is free when both blocks have used theirs, for both write to both.
    free = plgpu.ClusterBarrier(collective_axes=("side",), num_arrivals=WORKERS, num_barriers=STAGES)
    scratch = {
        "q_smem": _swizzled((WORKERS, ROWS, D), q.dtype),
        "k_smem": _swizzled((STAGES, BLOCK_K, D), q.dtype),
        "v_smem": _swizzled((STAGES, BLOCK_K, D), q.dtype),
        "out_smem": _swizzled((WORKERS, ROWS, D), q.dtype),
        "lse_smem": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WORKERS),
        "k_ready": plgpu.Barrier(num_barriers=STAGES),
        "v_ready": plgpu.Barrier(num_barriers=STAGES),
        "k_free": free,
        "v_free": free,
    }
    if plan.shared:
        out_type += [
            jax.ShapeDtypeStruct((plan.runs, B, plan.shared * TILE, N, D), jnp.float32),
            jax.ShapeDtypeStruct((plan.runs, B, plan.shared * TILE, N), jnp.float32),
        ]
    repeats = [] if log_times is None else [log_times]
    borders, shorts = plan.borders(), []
    if plan.may_be_short:
        borders, shorts = jnp.where(short, plan.borders(short=True), borders), [short.astype(jnp.int32)[None]]
    kernel = functools.partial(_kernel, plan=plan, no_keys=no_keys, repeats=bool(repeats))
    return plgpu.kernel(
        mosaic.named(kernel, NAME),
        out_type=out_type,
        scratch_types=scratch,
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("side",),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        # Rows are reduced within a warp, which needs no scratch.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name=NAME,
    )(q, k, v, length, jnp.asarray(borders), *shorts, *repeats)


def _swizzled(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def store(ref, value):
    """To global memory, a few bytes here and there."""
    if hasattr(plgpu, "store"):  # jax 0.12 does so only when told to
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def load(source, smem, ready, free, step, together):
    """Copies the keys or values of a step, once there is room: `together` each block of a cluster copies a half, to
    both."""
    slot = lax.rem(step, STAGES)
    smem, ready, free = (x.at[slot] for x in (smem, ready, free))
    pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free))

    @pl.when(together)
    def _half():
        plgpu.copy_gmem_to_smem(source, smem, ready, collective_axes="side")

    @pl.when(jnp.logical_not(together))
    def _all():
        plgpu.copy_gmem_to_smem(source, smem, ready)


def _kernel(q_ref, k_ref, v_ref, length_ref, borders_ref, *refs, plan, no_keys, repeats, **scratch):
    short_ref, refs = (refs[0], refs[1:]) if plan.may_be_short else (None, refs)
    log_times_ref, refs = (refs[0], refs[1:]) if repeats else (None, refs)
    out_ref, lse_ref, *shared_refs = refs
    q_smem, k_smem, v_smem, out_smem, lse_smem = (
        scratch[f"{name}_smem"] for name in ("q", "k", "v", "out", "lse")
    )
    q_ready, k_ready, v_ready, k_free, v_free = (
        scratch[name] for name in ("q_ready", "k_ready", "v_ready", "k_free", "v_free")
    )
    N = q_ref.shape[2]
    me, cluster, side = (lax.axis_index(name) for name in ("warpgroup", "cluster", "side"))
    tiles = plan.count(cluster, borders_ref[cluster], borders_ref[cluster + 1])

    # These read from memory what would have to stay in registers from tile to tile.

    def find(index):
        """The place of the `index`th tile."""
        stretch = borders_ref[cluster], borders_ref[cluster + 1]
        return plan.place(cluster, side, index, *stretch, short_ref[0] if plan.may_be_short else 0)

    def walk(index):
        """Where the `index`th tile is, the last step of its keys, how many there are, and how many keys are valid in
        the last. Only this one can be partly valid: it comes first."""
        place, length = find(index), length_ref[0]
        start, stop = plan.span(place, lax.div(length + (BLOCK_K - 1), BLOCK_K))
        count = jnp.maximum(stop - start, 1)  # without keys, over one step of which nothing is valid
        last = start + count - 1
        return place, last, count, jnp.minimum(length, stop * BLOCK_K) - last * BLOCK_K

    @pl.when(me == WORKERS)
    def _copy():
        plgpu.set_max_registers(24, action="decrease")

        def tile(index, done):
            place, last, count, _ = walk(index)
            batch, head = lax.div(place.head, N), lax.rem(place.head, N)

            @pl.loop(0, count)
            def _(step):
                keys = (batch, pl.ds((last - step) * BLOCK_K, BLOCK_K), head)
                load(k_ref.at[keys], k_smem, k_ready, k_free, done + step, place.together)
                load(v_ref.at[keys], v_smem, v_ready, v_free, done + step, place.together)

            return done + count

        steps = lax.fori_loop(0, tiles, tile, jnp.int32(0))

        # Before the other block has said for the last time that it has used something, this one must not end.
        @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
        def _(step):
            for free in (k_free, v_free):
                plgpu.barrier_wait(free.at[lax.rem(step, STAGES)])

    @pl.when(me < WORKERS)
    def _multiply():
        plgpu.set_max_registers(240, action="increase")
        queries, shown, ready = q_smem.at[me], out_smem.at[me], q_ready.at[me]
        buffers = (k_smem, k_ready, k_free), (v_smem, v_ready, v_free)

        def first_query(place):
            return (place.tile + jnp.where(place.shared, plan.whole, 0)) * TILE + me * ROWS

        def load_queries(index):
            place = find(index)
            batch, head = lax.div(place.head, N), lax.rem(place.head, N)
            rows = pl.ds(first_query(place), ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], queries, ready)

        def attend_to(index, done, count, valid, last, ahead):
            # No key of this step where the end of all keys is another block's.
            repeated = (length_ref[0] - 1 - last * BLOCK_K, log_times_ref[0]) if repeats else None
            attended = functools.partial(
                attention_tile.attend, queries, *buffers, done, count, valid, repeated, no_keys, ahead
            )
            out, lse = pl.run_scoped(attended, plgpu.ACC((ROWS, queries.shape[1]), jnp.float32))
            place = find(index)
            batch, head = lax.div(place.head, N), lax.rem(place.head, N)
            rows = pl.ds(place.tile * TILE + me * ROWS, ROWS)  # in whole or shared ones

            @pl.when(jnp.logical_not(place.shared))
            def _whole():
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
            place, last, count, valid = walk(index)

            def ahead():
                pl.when(index + 1 < tiles)(lambda: load_queries(index + 1))

            plgpu.barrier_wait(ready)
            # The last queries of a head may leave one of the two warpgroups without any.
            any_queries = first_query(place) < q_ref.shape[1]
            pl.when(any_queries)(lambda: attend_to(index, done, count, valid, last, ahead))
            pl.when(jnp.logical_not(any_queries))(lambda: attention_tile.skip(*buffers, done, count, ahead))
            return done + count

        load_queries(0)
        lax.fori_loop(0, tiles, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
