"""Flash-attention forward kernel for NVIDIA Hopper in Pallas (Mosaic GPU): the `hopper` back end of `attention`.

A block of threads holds 128 queries of one head: two warpgroups of 64 that multiply, and a third that copies keys and
values to shared memory ahead of them. A warpgroup starts the product of the next scores before it has used the last
ones, so that softmax runs beside the tensor cores (FlashAttention-3, arXiv:2407.08608, section 3.2).

One block fills a processor. 4680 queries of 12 heads are 444 blocks, 3.4 rounds of the 132 processors of a card, and
in the last round half of these would be idle. So the last queries of every head are walked by several blocks each, a
run of the keys for each, and what these find is merged by fp32 statistics, from fp32 outputs (`Plan`).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # queries of one warpgroup
WORKERS = 2  # warpgroups that multiply
TILE = ROWS * WORKERS
BLOCK_K = 128  # keys of one step
STAGES = 2  # steps that keys and values are copied ahead
# Measured on an H200, in keys that a block could walk over meanwhile (11.7 ns each): what a block costs beside its
# keys, what a merge costs, and what it costs for each run.
BLOCK_COST, MERGE_COST, RUN_COST = 700, 450, 150


def supported() -> bool:
    """Whether this version of jax has what the kernel is written with."""
    return hasattr(plgpu, "wgmma_accumulator_load")


class Plan(NamedTuple):
    """How the tiles of 128 queries are dealt to blocks: in every head the last `shared` of `tiles` are walked by
    `runs` blocks each, the others by one."""

    tiles: int
    shared: int
    runs: int

    @classmethod
    def cheapest(cls, queries: int, heads: int, keys: int, processors: int) -> Plan:
        """The plan with the shortest rounds for `queries` of `heads` (all samples' together) over `keys`."""
        tiles = -(-queries // TILE)

        def cost(plan):
            whole = -(-heads * (tiles - plan.shared) // processors) * (keys + BLOCK_COST)
            if not plan.shared:
                return whole
            rounds = -(-heads * plan.shared * plan.runs // processors)
            return whole + rounds * (keys / plan.runs + BLOCK_COST) + MERGE_COST + plan.runs * RUN_COST

        shares = (cls(tiles, *how) for how in itertools.product(range(1, tiles + 1), range(2, 9)))
        return min([cls(tiles, 0, 1), *shares], key=cost)

    @property
    def whole(self) -> int:
        """Tiles of a head that one block walks."""
        return self.tiles - self.shared


def attend(q, k, v, length, *, no_keys: float, merge, processors: int) -> tuple[jax.Array, jax.Array]:
    """Attention over the first `length` keys (None for all) and its log-sum-exp.

    Takes q [B, T, N, D] and k, v [B, K, N, D] of one 16-bit dtype, D 64 or 128 and K a multiple of 8, and an int32
    scalar. Keys behind `length` are loaded, and must be finite. `merge` is `attention.merge`.

    Returns:
      out [B, T, N, D] in the dtype of q and lse [B, N, T] in float32, which is `no_keys` where `length` is 0.
    """
    (B, T, N, _), K = q.shape, k.shape[1]
    plan = Plan.cheapest(T, B * N, K, processors)
    q = jnp.pad(q, ((0, 0), (0, -T % 8), (0, 0), (0, 0)))  # the copy engine wants eights of rows
    length = jnp.full((1,), K if length is None else length, jnp.int32)
    out, lse, *shared = forward(q, k, v, length, plan=plan, no_keys=no_keys)
    if plan.shared:
        outs, lses = merge(list(shared[0]), list(shared[1][..., : shared[0].shape[2]]))
        outs = outs.astype(out.dtype)
        if plan.whole:
            # In place. Without the barrier XLA (of jax 0.11.2) may draw the update into the kernel, and find a circle.
            outs = lax.dynamic_update_slice_in_dim(
                lax.optimization_barrier(out), outs, plan.whole * TILE, axis=1
            )
        out = outs
        lse = jnp.concatenate([lse, lses], axis=2) if plan.whole else lses
    return out[:, :T], lse[:, :, :T]


# Compiled by itself, so that the layers of a model share one kernel: each costs a second.
@functools.partial(jax.jit, static_argnames=("plan", "no_keys"))
def forward(q, k, v, length, *, plan: Plan, no_keys: float):
    """The kernel: out [B, T, N, D], undefined where tiles are shared, and lse [B, N, whole * 128] of whole tiles (both
    smaller and undefined where there are none); of shared ones each run's fp32 out [runs, B, rows, N, D] and lse
    [runs, B, N, shared * 128]. T and K are multiples of 8."""
    B, T, N, D = q.shape
    out_type = [
        jax.ShapeDtypeStruct((B, T if plan.whole else 8, N, D), q.dtype),
        jax.ShapeDtypeStruct((B, N, max(plan.whole, 1) * TILE), jnp.float32),
    ]
    scratch = {
        "q_smem": _swizzled((WORKERS, ROWS, D), q.dtype),
        "k_smem": _swizzled((STAGES, BLOCK_K, D), q.dtype),
        "v_smem": _swizzled((STAGES, BLOCK_K, D), q.dtype),
        "lse_smem": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WORKERS),
        "k_ready": plgpu.Barrier(num_barriers=STAGES),
        "v_ready": plgpu.Barrier(num_barriers=STAGES),
        "k_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES),
        "v_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES),
    }
    if plan.shared:
        out_type += [
            jax.ShapeDtypeStruct((plan.runs, B, T - plan.whole * TILE, N, D), jnp.float32),
            jax.ShapeDtypeStruct((plan.runs, B, N, plan.shared * TILE), jnp.float32),
        ]
        scratch["out_smem"] = _swizzled((WORKERS, ROWS, D), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan, no_keys=no_keys),
        out_type=out_type,
        scratch_types=scratch,
        grid=(B * N * (plan.whole + plan.shared * plan.runs),),
        grid_names=("block",),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        # Rows are reduced within a warp, which needs no scratch.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name="flash_attention_hopper",
    )(q, k, v, length)


def _swizzled(shape, dtype):
    width = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    )


def _kernel(q_ref, k_ref, v_ref, length_ref, out_ref, lse_ref, *shared_refs, plan, no_keys, **scratch):
    q_smem, k_smem, v_smem, lse_smem = (scratch[f"{name}_smem"] for name in ("q", "k", "v", "lse"))
    q_ready, k_ready, v_ready, k_free, v_free = (
        scratch[name] for name in ("q_ready", "k_ready", "v_ready", "k_free", "v_free")
    )
    B, _, N, D = q_ref.shape
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")

    # Whole tiles first. Neighbours share their keys, so that these are read from the L2 cache.
    num_whole = B * N * plan.whole
    is_shared = block >= num_whole
    index = jnp.where(is_shared, block - num_whole, block)
    per_head = jnp.where(is_shared, max(plan.shared, 1), max(plan.whole, 1))
    tile, rest = lax.rem(index, per_head), lax.div(index, per_head)
    head, rest = lax.rem(rest, N), lax.div(rest, N)
    batch, run = lax.rem(rest, B), lax.div(rest, B)
    runs = jnp.where(is_shared, plan.runs, 1)

    length = length_ref[0]
    key_tiles = lax.div(length + (BLOCK_K - 1), BLOCK_K)
    start, stop = lax.div(run * key_tiles, runs), lax.div((run + 1) * key_tiles, runs)
    count = jnp.maximum(stop - start, 1)  # a run without keys walks over one tile of which nothing is valid
    last = start + count - 1  # only this one can be partly valid: it comes first
    limit = jnp.minimum(length, stop * BLOCK_K)

    @pl.when(me == WORKERS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, count)
        def _(step):
            slot = lax.rem(step, STAGES)
            keys = (batch, pl.ds((last - step) * BLOCK_K, BLOCK_K), head)
            for ref, smem, ready, free in (
                (k_ref, k_smem, k_ready, k_free),
                (v_ref, v_smem, v_ready, v_free),
            ):
                pl.when(step >= STAGES)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(ref.at[keys], smem.at[slot], ready.at[slot])

    @pl.when(me < WORKERS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        queries = q_smem.at[me]
        mine = pl.ds(tile * TILE + me * ROWS, ROWS)  # in whole or shared rows
        first_row = (tile + jnp.where(is_shared, plan.whole, 0)) * TILE + me * ROWS
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(first_row, ROWS), head], queries, q_ready.at[me])
        plgpu.barrier_wait(q_ready.at[me])
        attended = functools.partial(
            _attend,
            queries,
            k_smem,
            v_smem,
            k_ready,
            v_ready,
            k_free,
            v_free,
            count,
            limit - last * BLOCK_K,
            no_keys,
        )
        out, peak, total = pl.run_scoped(attended, plgpu.ACC((ROWS, D), jnp.float32))
        total = jnp.maximum(total, 1e-30)  # it is 1 or more, or 0 without keys
        out = out / _over(total, out.shape)
        any_keys = (limit > last * BLOCK_K).astype(jnp.float32)
        lse = peak * math.log(2) + jnp.log(total)
        lse_smem[me] = lse * any_keys + no_keys * (1 - any_keys)

        def hand_over(smem, out_ref, lse_ref):
            smem[...] = out.astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, out_ref.at[batch, mine, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[batch, head, mine])
            plgpu.wait_smem_to_gmem(0)

        if plan.whole:
            pl.when(jnp.logical_not(is_shared))(lambda: hand_over(queries, out_ref, lse_ref))
        if plan.shared:
            run_refs = (ref.at[run] for ref in shared_refs)
            pl.when(is_shared)(lambda: hand_over(scratch["out_smem"].at[me], *run_refs))


def _attend(q, k_smem, v_smem, k_ready, v_ready, k_free, v_free, count, valid, no_keys, out_acc):
    """One warpgroup over `count` tiles of keys, `valid` of the first one: unscaled out [ROWS, D], maximum and sum."""
    scale = math.log2(math.e) / math.sqrt(q.shape[1])  # scores in base 2: exp2 is the native instruction
    scores_type = plgpu.ACC((ROWS, BLOCK_K), jnp.float32)

    def softmax(s, peak, total):
        new_peak = jnp.maximum(peak, jnp.max(s, axis=1) * scale)
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(s * scale - _over(new_peak, s.shape))
        return weights.astype(q.dtype), new_peak, total * shrink + jnp.sum(weights, axis=1), shrink

    def first(s_acc):
        plgpu.wgmma(s_acc, q, k_smem.at[0].transpose((1, 0)))
        return s_acc[...]

    plgpu.barrier_wait(k_ready.at[0])
    s = pl.run_scoped(first, scores_type)
    plgpu.barrier_arrive(k_free.at[0])
    column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    s = jnp.where(column < valid, s, no_keys)
    # Below any score, and so far above `no_keys` that what is masked weighs nothing, even where all of it is.
    weights, peak, total, _ = softmax(s, _full(-1e30), _full(0))

    def step(i, carry):
        weights, peak, total = carry
        slot, before = lax.rem(i, STAGES), lax.rem(i - 1, STAGES)

        def scores(s_acc):
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.wgmma(s_acc, q, k_smem.at[slot].transpose((1, 0)))
            plgpu.barrier_wait(v_ready.at[before])
            plgpu.wgmma(out_acc, weights, v_smem.at[before])
            return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # the scores; the second product goes on

        s = pl.run_scoped(scores, scores_type)
        plgpu.barrier_arrive(k_free.at[slot])
        weights, peak, total, shrink = softmax(s, peak, total)
        out = out_acc[...]
        plgpu.barrier_arrive(v_free.at[before])
        out_acc[...] = out * _over(shrink, out.shape)
        return weights, peak, total

    weights, peak, total = lax.fori_loop(1, count, step, (weights, peak, total))
    slot = lax.rem(count - 1, STAGES)
    plgpu.barrier_wait(v_ready.at[slot])
    plgpu.wgmma(out_acc, weights, v_smem.at[slot])
    return out_acc[...], peak, total


def _full(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _over(x, shape):
    """One number per row, for every column."""
    return lax.broadcast_in_dim(x, shape, [0])
