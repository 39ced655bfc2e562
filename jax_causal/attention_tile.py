"""What a warpgroup of `attention_hopper` does with one tile: 64 queries over a run of keys, in Pallas (Mosaic GPU).

The product of the next scores is started before the last ones are used, so that softmax runs beside the tensor cores
(FlashAttention-3, arXiv:2407.08608, section 3.2).
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

from jax_causal import hopper_rows

ROWS = 64  # queries of one warpgroup
BLOCK_K = 128  # keys of one step


def skip(keys, values, done, count, ahead):
    """A warpgroup over `count` steps of keys for which it has no queries; arguments as of `attend`."""
    ahead()

    @pl.loop(done, done + count)
    def _(step):
        for smem, ready, free in (keys, values):
            slot = lax.rem(step, smem.shape[0])
            plgpu.barrier_wait(ready.at[slot])
            gather_warps()
            plgpu.barrier_arrive(free.at[slot])


def gather_warps():
    """Waits for all four warps of the warpgroup.

    One warp alone arrives at a barrier of a cluster. Products keep the four together; without any, another warp could
    still wait for a step's keys when this one has let two more steps take their place. A wait tells only odd steps from
    even ones: that warp would wait for ever, as it did, once in some ten thousand calls, on two H200s.
    """

    @plgpu.inline_mgpu()
    def gather(ctx):
        mgpu_utils.warpgroup_barrier()

    gather()


def end_of_straight_code(number):
    """Ends the program where `number` is negative, which it never is: for the branch, over which the assembler moves
    nothing. Keys are free as soon as the wait for their product is over. Nothing in the softmax depends on that being
    said, so the assembler would say it in the middle of it, and the next keys would come as much later."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def branch(ctx, number):
        (number,) = number.registers.flat
        code = "{ .reg .pred p; setp.ge.s32 p, $0, 0; @p bra on; trap; on: }"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [number], code, "r", has_side_effects=True)

    branch(number)


def attend(q, keys, values, done, count, valid, repeated, no_keys, ahead, out_acc):
    """One warpgroup over `count` steps of keys, `valid` ones of the first step.

    Args:
      q: queries [ROWS, D] in shared memory.
      keys, values: of both the shared memory [stages, BLOCK_K, D] and the barriers of what is ready and free.
      done: steps before these, which used the memory in turn.
      repeated: None, or a key of the first step that stands for several (one of another step for none), and the
        logarithm of how many.
      ahead: called once `q` is no longer read.
      out_acc: accumulator [ROWS, D].

    Returns:
      out [ROWS, D] and its log-sum-exp [ROWS], float32.
    """
    (k_smem, k_ready, k_free), (v_smem, v_ready, v_free) = keys, values
    # Read from shared memory at every step, queries made all of this 1-2 % slower under load, in which a card lowers
    # its clock: likely by the power that it takes.
    q = hopper_rows.load(q, plgpu.Layout.WGMMA)
    scale = math.log2(math.e) / math.sqrt(q.shape[1])  # scores in base 2: exp2 is the native instruction
    scores_type = plgpu.ACC((ROWS, BLOCK_K), jnp.float32)

    def slot(i):
        return lax.rem(done + jnp.asarray(i, jnp.int32), k_smem.shape[0])

    def softmax(s, peak, total):
        new_peak = jnp.maximum(peak, jnp.max(s, axis=1) * scale)
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(s * scale - _over(new_peak, s.shape))
        return weights, new_peak, total * shrink + jnp.sum(weights, axis=1), shrink

    def first(s_acc):
        plgpu.wgmma(s_acc, q, k_smem.at[slot(0)].transpose((1, 0)))
        return s_acc[...]

    plgpu.barrier_wait(k_ready.at[slot(0)])
    s = pl.run_scoped(first, scores_type)
    plgpu.barrier_arrive(k_free.at[slot(0)])
    column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    s = jnp.where(column < valid, s, no_keys)
    if repeated is not None:
        key, log_times = repeated
        s = jnp.where(column == key, s + log_times * math.sqrt(q.shape[1]), s)
    # Below any score, and so far above `no_keys` that what is masked weighs nothing, even where all of it is.
    weights, peak, total, _ = softmax(s, _full(-1e30), _full(0))
    plgpu.barrier_wait(v_ready.at[slot(0)])

    def step(i, carry):
        weights, peak, total = carry
        this, last = slot(i), slot(i - 1)

        def scores(s_acc):
            plgpu.wgmma(s_acc, q, k_smem.at[this].transpose((1, 0)))
            plgpu.wgmma(out_acc, weights, v_smem.at[last])
            return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # the scores; the second product goes on

        # Waits are before the scores are begun, or these are set to zero before the waits, which takes instructions.
        plgpu.barrier_wait(k_ready.at[this])
        s = pl.run_scoped(scores, scores_type)
        plgpu.barrier_arrive(k_free.at[this])
        end_of_straight_code(done)
        # Softmax runs beside the second product only if the assembler cannot have the wait for that first: a loop that
        # waits keeps them apart. And 16-bit weights made before it would be registers of a product under way, which
        # the assembler forbids by waiting after every instruction of products.
        weights, peak, total, shrink = lax.optimization_barrier(softmax(s, peak, total))
        plgpu.barrier_wait(v_ready.at[this])
        out = out_acc[...]
        plgpu.barrier_arrive(v_free.at[last])
        out_acc[...] = _rescaled(out, shrink)
        return weights.astype(q.dtype), peak, total

    weights, peak, total = lax.fori_loop(1, count, step, (weights.astype(q.dtype), peak, total))
    ahead()
    last = slot(count - 1)
    plgpu.wgmma(out_acc, weights, v_smem.at[last])
    out = out_acc[...]
    plgpu.barrier_arrive(v_free.at[last])
    total = jnp.maximum(total, 1e-30)  # it is 1 or more, or 0 without keys
    any_keys = (valid > 0).astype(jnp.float32)
    lse = peak * math.log(2) + jnp.log(total)
    return out / _over(total, out.shape), lse * any_keys + no_keys * (1 - any_keys)


def _rescaled(out, shrink):
    """`out` [ROWS, D] times `shrink` [ROWS].

    Where no peak of a warp's rows has risen, and after the first steps few do, that is times 1, and left out.
    """
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout, layout.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(out.shape, out.dtype, layout=layout),
    )
    def rescale(ctx, out, shrink):
        one = arith.constant(ir.F32Type.get(), 1.0)
        factors = [vector.extract(x, [], [0]) for x in shrink.registers.flat]
        rose = [arith.cmpf(arith.CmpFPredicate.OLT, x, one) for x in factors]
        whole_warp = arith.constant(ir.IntegerType.get_signless(32), -1)
        registers = list(out.registers.flat)
        branch = scf.IfOp(
            nvvm.vote_sync(whole_warp, functools.reduce(arith.ori, rose), "any"),
            [x.type for x in registers],
            has_else=True,
        )
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(list((out * shrink.broadcast_in_dim(out.shape, (0,), out.layout)).registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(registers)
        rescaled = np.empty_like(out.registers)
        rescaled.flat = branch.results
        return mgpu.FragmentedArray(_registers=rescaled, _layout=out.layout, _is_signed=out.is_signed)

    return rescale(out, shrink)


def _full(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _over(x, shape):
    """One number per row, for every column."""
    return lax.broadcast_in_dim(x, shape, [0])
