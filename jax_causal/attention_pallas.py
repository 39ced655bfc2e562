"""Flash-attention forward kernel in Pallas, lowered through Triton: the `pallas` back end of `attention`.

One program per (tile of queries, sample, head) walks over the valid keys with a running maximum and sum
(FlashAttention-2, arXiv:2307.08691, algorithm 1). Queries, keys and the head dim need not fill their tiles.

From 0.11 on, jax warns that a later version will drop this lowering.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def forward(q, k, v, length, *, no_keys: float, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Attention over the first `length` keys (None for all) and its log-sum-exp.

    Takes q [B, T, N, D] and k, v [B, K, N, D] of one dtype, D up to 128, and an int32 scalar. Returns out
    [B, T, N, D] and lse [B, N, T], both float32; `no_keys` is the lse where `length` is 0. Keys behind `length`
    are not loaded. `interpret` runs the kernel on a CPU, for tests; jax cannot do that inside `shard_map` unless
    its check_vma is off.
    """
    (B, T, N, D), K = q.shape, k.shape[1]
    width = max(16, pl.next_power_of_2(D))  # the smallest tile a tensor core multiplies
    block_q, block_k = (128, 64) if q.dtype.itemsize == 2 else (64, 32)  # two stages of k and v fit in 99 KiB
    kernel = functools.partial(_kernel, num_queries=T, head_dim=D, block_k=block_k, no_keys=no_keys)
    queries = pl.BlockSpec((None, block_q, None, width), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, K, None, width), lambda i, b, n: (b, 0, n, 0))
    varying = jax.typeof(q).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(T, block_q), B, N),
        in_specs=[pl.BlockSpec((1,), lambda i, b, n: (0,)), queries, keys, keys],
        out_specs=[queries, pl.BlockSpec((None, None, block_q), lambda i, b, n: (b, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32, manual_axis_type=varying),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32, manual_axis_type=varying),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8 if width > 64 else 4, num_stages=2),
        interpret=interpret,
        name="flash_attention",
    )(jnp.full((1,), K if length is None else length, jnp.int32), q, k, v)


def _kernel(length_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, num_queries, head_dim, block_k, no_keys):
    block_q, width = q_ref.shape
    length = length_ref[0]
    rows = pl.program_id(0) * block_q + jnp.arange(block_q) < num_queries
    columns = (jnp.arange(width) < head_dim)[None, :]
    q_mask = rows[:, None] & columns
    dot = functools.partial(plgpu.dot, precision=lax.Precision.HIGHEST)  # no TF32 for float32 inputs

    q = plgpu.load(q_ref, mask=q_mask, other=0.0)
    scale = math.log2(math.e) / math.sqrt(head_dim)  # scores in base 2: exp2 is the native instruction

    def step(i, carry, *, partly):
        out, peak, total = carry
        tile = pl.ds(i * block_k, block_k)
        valid = i * block_k + jnp.arange(block_k) < length
        mask = columns if width > head_dim else None
        if partly:
            mask = valid[:, None] & columns
        k, v = (
            plgpu.load(ref.at[tile, :], mask=mask, other=0.0 if mask is not None else None)
            for ref in (k_ref, v_ref)
        )
        s = dot(q, k, trans_b=True) * scale
        if partly:
            s = jnp.where(valid[None, :], s, no_keys)
        new_peak = jnp.maximum(peak, jnp.max(s, axis=1))
        weights = jnp.exp2(s - new_peak[:, None])
        shrink = jnp.exp2(peak - new_peak)
        out = out * shrink[:, None] + dot(weights.astype(v.dtype), v)
        return out, new_peak, total * shrink + jnp.sum(weights, axis=1)

    carry = (
        jnp.zeros((block_q, width), jnp.float32),
        jnp.full((block_q,), no_keys, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
    )
    # Only the last tile of keys pays for a mask.
    full = lax.div(length, block_k)
    carry = lax.fori_loop(0, full, functools.partial(step, partly=False), carry)
    carry = lax.fori_loop(
        full, lax.div(length + block_k - 1, block_k), functools.partial(step, partly=True), carry
    )

    out, peak, total = carry
    total = jnp.where(total > 0, total, 1.0)
    plgpu.store(out_ref, out / total[:, None], mask=q_mask)
    lse = jnp.where(length > 0, (peak + jnp.log2(total)) * math.log(2), no_keys)
    plgpu.store(lse_ref, lse, mask=rows)
