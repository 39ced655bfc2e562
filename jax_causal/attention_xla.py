"""Attention by plain einsums, and its gradient: the `xla` back end of `attention`, for any platform and dtype.

The other back ends take the gradient from here too. Both walk over long keys in chunks, to bound how many scores are
held at once.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

# The plain form holds about this many fp32 scores at once (64 MiB).
MAX_SCORES = 2**24

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def forward(q, k, v, length, *, no_keys: float, merge) -> tuple[jax.Array, jax.Array]:
    """Attention over the first `length` keys (None for all) and its log-sum-exp.

    Takes q [B, T, N, D] and k, v [B, K, N, D] of one dtype, and an int32 scalar. Keys behind `length` take no part,
    whatever they hold. `merge` is `attention.merge`.

    Returns:
      out [B, T, N, D] and lse [B, N, T], both float32; lse is `no_keys` where `length` is 0.
    """
    chunk, size, count = _key_chunks(q, k, v, length)

    def attend(i):
        _, k_i, v_i, valid = chunk(i)
        s = jnp.where(valid, _scores(q, k_i), -jnp.inf)
        peak = jnp.max(s, axis=-1, initial=no_keys)
        weights = jnp.exp(s - peak[..., None])
        total = jnp.sum(weights, axis=-1)
        total = jnp.where(total > 0, total, 1)
        out = _einsum("bntk,bknd->btnd", weights.astype(v.dtype), v_i)
        return out / jnp.swapaxes(total, 1, 2)[..., None], peak + jnp.log(total)

    held = attend(0)
    if size < k.shape[1]:
        held = lax.fori_loop(1, count, lambda i, held: merge(*zip(held, attend(i), strict=True)), held)
    return held


def backward(q, k, v, length, out, lse, d_out, d_lse) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients in q, k and v, in their dtypes, from what a back end took and returned and the gradients in that.

    With scores s and p = exp(s - lse):  ds = p (d_out v^T - rowsum(d_out out) + d_lse), since dlse/ds = p. Scores are
    computed anew, chunk by chunk.
    """
    d_out = d_out.astype(q.dtype)
    shift = d_lse - _einsum("btnd,btnd->bnt", d_out, out)
    chunk, _, count = _key_chunks(q, k, v, length)

    def step(i, gradients):
        dq, dk, dv = gradients
        start, k_i, v_i, valid = chunk(i)
        p = jnp.where(valid, jnp.exp(_scores(q, k_i) - lse[..., None]), 0)
        ds = p * (_einsum("btnd,bknd->bntk", d_out, v_i) + shift[..., None]) / math.sqrt(q.shape[-1])
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq += _einsum("bntk,bknd->btnd", ds, k_i)
        dk = add(dk, start, _einsum("bntk,btnd->bknd", ds, q))
        dv = add(dv, start, _einsum("bntk,btnd->bknd", p, d_out))
        return dq, dk, dv

    def add(total, start, part):
        here = lax.dynamic_slice_in_dim(total, start, part.shape[1], axis=1)
        return lax.dynamic_update_slice_in_dim(total, here + part, start, axis=1)

    zeros = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (q, k, v))
    dq, dk, dv = lax.fori_loop(0, count, step, zeros)
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype)


def _scores(q, k):
    return _einsum("btnd,bknd->bntk", q, k) / math.sqrt(q.shape[-1])


def _key_chunks(q, k, v, length):
    """How the plain form walks over long keys: a function of i giving (start, k_i, v_i, valid), the length of
    a chunk, and the number of chunks that hold keys. The last chunk starts early rather than end late; the
    keys it repeats are not valid."""
    (B, T, N, _), K = q.shape, k.shape[1]
    size = math.ceil(K / math.ceil(K / max(128, MAX_SCORES // (B * T * N))))
    length = K if length is None else length

    def chunk(i):
        start = jnp.minimum(i * size, K - size)
        index = start + jnp.arange(size)
        exists = (index < length)[:, None, None]
        # A weight of zero does not silence a NaN: what does not exist must not take part.
        k_i, v_i = (jnp.where(exists, lax.dynamic_slice_in_dim(x, start, size, axis=1), 0) for x in (k, v))
        return start, k_i, v_i, (index >= i * size) & (index < length)

    return chunk, size, (length + size - 1) // size
