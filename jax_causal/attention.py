"""Softmax attention over keys that may lie in several parts, with four back ends chosen in one place.

Beside softmax(q k^T / sqrt(D)) v every back end returns the log-sum-exp of each query's scores. That makes
attention over disjoint sets of keys mergeable (`merge`), which serves three ends: keys split in parts give a
GPU enough independent work when queries are few, keys walked in chunks bound the memory of the plain form,
and keys held by other devices need not travel. The statistic stays fp32 from the kernel to the merge: rounded
to bfloat16 it would cost several times the error of the attention itself.

    xla     the plain einsums of `attention_xla`: any platform, any dtype
    hopper  the fused kernel of `attention_hopper`: bfloat16 and float16 on an H100 or H200
    cudnn   NVIDIA's fused kernel: bfloat16 and float16
    pallas  the fused kernel of `attention_pallas`

Mathematics: FlashAttention-2, arXiv:2307.08691, section 3.1.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_causal import attention_xla

Backend = Literal["auto", "xla", "hopper", "cudnn", "pallas"]

# The log-sum-exp of no keys at all: finite, so that the difference of two of them is zero rather than NaN.
NO_KEYS = -0.7 * float(np.finfo(np.float32).max)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    length: jax.Array | int | None = None,
    mask: np.ndarray | None = None,
    distinct: jax.Array | int | None = None,
    queries: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, differentiable in q, k and v (reverse mode).

    Args:
      q: [B, T, N, D] queries, in the dtype of k and v.
      k, v: [B, K, N, D] keys and values, or [B, P, K, N, D] for keys stored in P equal parts. Each part is
        attended to separately and the results are merged; which key lies in which part does not matter.
      length: int32 scalar, at least 1: only the first `length` keys (of each part) exist; None for all K.
        What lies behind them must be finite, as it is in a cache that starts as zeros.
      mask: static boolean array [t, s], where t divides T and s divides K: entry (i, j) says whether the i-th
        of t equal runs of queries sees the j-th of s equal runs of keys. Written with a row and a column per
        frame, any rule between frames is cheap: queries with equal rows become one unmasked attention over
        the keys they see. Not to be combined with parts or `length`.
      distinct: int32 scalar: the keys from this one on are equal, and so are their values, as where a text is padded;
        a kernel may then read the first of them alone, and count it as often. Not to be combined with parts,
        `length` or `mask`.
      queries: int32 scalar: only so many of the T are wanted, and a kernel may leave out the others; what comes out for
        them is finite.
      backend: "auto" for the fastest that can run, or the name of one.

    Returns:
      [B, T, N, D] in the dtype of q.

    Raises:
      ValueError: shapes, dtypes, `length` or `mask` do not fit, or the back end cannot run here.
    """
    if k.ndim == 5 and k.shape[1] == 1:
        k, v = k[:, 0], v[:, 0]
    if distinct is not None and (k.ndim != 4 or length is not None or mask is not None):
        raise ValueError("keys of which only some are distinct are [B, K, N, D], without a length or a mask")
    if mask is not None:
        return _block_masked(q, k, v, length, mask, backend)
    if k.ndim == 4 and (chosen := choose_backend(backend, q, k)) in ("hopper", "cudnn"):
        _check(q, k, v, length)
        limits = (x if x is None else jnp.asarray(x, jnp.int32) for x in (length, distinct, queries))
        q, k, v, length, distinct, queries = _vary_alike(q, k, v, *limits)
        if chosen == "hopper":
            return _hopper_plain(q, k, v, length, distinct, queries)
        return _cudnn_plain(q, k, v, length)
    return attention_with_lse(q, k, v, length=length, backend=backend)[0].astype(q.dtype)


def attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    length: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention before rounding and the log-sum-exp of the scores, for `merge`. Gradients flow through both.

    Takes q, k, v and `length` as `attention` does, except that `length` may be 0: then the log-sum-exp is
    `NO_KEYS` and the output finite, and a merge gives it no weight.

    Returns:
      out [B, T, N, D] and lse [B, N, T], both float32; lse is the natural logarithm of the sum over keys of
      exp(q k^T / sqrt(D)).
    """
    _check(q, k, v, length)
    backend = choose_backend(backend, q, k, lse=True)
    if length is not None:
        length = jnp.asarray(length, jnp.int32)
    q, k, v, length = _vary_alike(q, k, v, length)
    if k.ndim == 4:
        out, lse = _attend(backend, q, k, v, length)
        return out.astype(jnp.float32), lse
    # The parts become entries of the batch: one call, P times as many independent rows.
    parts = k.shape[1]
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    out, lse = _attend(backend, jnp.repeat(q, parts, axis=0), k, v, length)
    return merge([out[p::parts] for p in range(parts)], [lse[p::parts] for p in range(parts)])


def merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    Takes what `attention_with_lse` returned for the same queries: outs [B, T, N, D] and lses [B, N, T], at
    least one of each. Returns (out, lse) over all keys, both float32, so that merges can be chained.
    """
    peak = lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    weights = [jnp.exp(lse - peak) for lse in lses]
    total = sum(weights)
    out = sum(_per_query(w / total) * o for w, o in zip(weights, outs, strict=True))
    return out, peak + jnp.log(total)


def choose_backend(backend: Backend, q: jax.Array, k: jax.Array | None = None, *, lse: bool = False) -> str:
    """The back end for queries like `q` and keys like `k` (None: any that suit) on the first local device; `lse` says
    that the statistic is wanted.

    Raises ValueError if `backend` names one that cannot, with the reason and those that can.
    """
    platform, capability = _device()
    head_dim, half = q.shape[-1], q.dtype in (jnp.bfloat16, jnp.float16)
    too_old = "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    obstacles = {
        "hopper": [
            (capability[0] != 9, "it needs an NVIDIA GPU of compute capability 9"),
            (not half, f"it computes in bfloat16 or float16, not {q.dtype}"),
            (head_dim not in (64, 128), f"head dim {head_dim} is neither 64 nor 128"),
            (k is not None and k.shape[-3] % 8, "the number of keys is not a multiple of 8"),
            (not _has_mosaic(), "this version of jax lacks what it is written with"),
        ],
        "cudnn": [
            (capability < (8, 0), too_old),
            (not half, f"it computes in bfloat16 or float16, not {q.dtype}"),
            (head_dim % 8 or head_dim > 128, f"head dim {head_dim} is not a multiple of 8 up to 128"),
            (lse and not _fused_attention(), "this version of jax does not hand out its fp32 statistic"),
        ],
        "pallas": [
            (capability < (8, 0) and platform != "cpu", f"{too_old}, or a CPU to be interpreted on"),
            (head_dim > 128, f"head dim {head_dim} is larger than 128"),
        ],
        "xla": [],
    }
    able = [name for name, checks in obstacles.items() if not any(bad for bad, _ in checks)]
    if backend == "auto":
        return able[0] if platform == "gpu" and half else "xla"
    if backend not in obstacles:
        raise ValueError(f"unknown attention back end {backend!r}: choose auto, {', '.join(obstacles)}")
    if backend not in able:
        reason = next(reason for bad, reason in obstacles[backend] if bad)
        raise ValueError(f"attention back end {backend!r} cannot run here: {reason}; use {' or '.join(able)}")
    return backend


def _device() -> tuple[str, tuple[int, ...]]:
    """Platform of the first local device and its CUDA compute capability, (0,) where there is none."""
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; "gfx942" on AMD
    return device.platform, tuple(map(int, capability.split("."))) if capability[:1].isdigit() else (0,)


def _check(q, k, v, length):
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    if q.ndim != 4 or k.ndim not in (4, 5) or k.shape != v.shape:
        raise ValueError(f"attention takes q [B, T, N, D] and k, v [B, (P,) K, N, D], not {shapes}")
    if (k.shape[0], *k.shape[-2:]) != (q.shape[0], *q.shape[-2:]):
        raise ValueError(f"batch size, heads and head dim of queries and keys differ: {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v have different dtypes, {q.dtype}, {k.dtype} and {v.dtype}: cast them")
    if isinstance(length, int | np.integer) and not 0 <= length <= k.shape[-3]:
        raise ValueError(f"length={length} is not between 0 and the {k.shape[-3]} keys of a part")


def _vary_alike(*arrays):
    """Inside `shard_map`, marks arrays as varying over every mesh axis that one of them varies over: loops
    and custom gradients want one type, and the gradient of this cast sums over devices. Elsewhere a no-op."""
    axes = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    return [x if x is None else lax.pcast(x, m, to="varying") for x, m in zip(arrays, missing, strict=True)]


def _per_query(x):
    """[B, N, T] -> [B, T, N, 1], to scale outputs with."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def _block_masked(q, k, v, length, mask, backend):
    """One unmasked attention for every run of queries that see the same keys."""
    if k.ndim != 4 or length is not None:
        raise ValueError("a mask takes keys [B, K, N, D] in one part, and no length")
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2:
        raise ValueError("mask must be a two-dimensional boolean numpy array: it is static")
    (rows, columns), T, K = mask.shape, q.shape[1], k.shape[1]
    if T % rows or K % columns:
        raise ValueError(
            f"{T} queries x {K} keys do not divide into the {rows} x {columns} tiles of the mask"
        )
    if blind := np.flatnonzero(~mask.any(axis=1)).tolist():
        raise ValueError(f"the queries of mask rows {blind} see no key")
    outs = []
    for start, stop in _runs(mask):
        seen = [(a * K // columns, b * K // columns) for a, b in _runs(mask[start]) if mask[start, a]]
        k_seen, v_seen = (jnp.concatenate([x[:, a:b] for a, b in seen], axis=1) for x in (k, v))
        queries = q[:, start * T // rows : stop * T // rows]
        outs.append(attention(queries, k_seen, v_seen, backend=backend))
    return jnp.concatenate(outs, axis=1)


def _runs(x):
    """(start, stop) of every run of equal consecutive entries of `x`."""
    changes = [i for i in range(1, len(x)) if np.any(x[i] != x[i - 1])]
    return itertools.pairwise([0, *changes, len(x)])


# --- one gradient for every back end ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(backend, q, k, v, length):
    """(out, lse) of one part; out in float32 where the back end can leave it unrounded."""
    if backend == "pallas":
        from jax_causal import attention_pallas  # on demand: importing Pallas takes its time

        return attention_pallas.forward(q, k, v, length, no_keys=NO_KEYS, interpret=_device()[0] == "cpu")
    if backend == "xla":
        return attention_xla.forward(q, k, v, length, no_keys=NO_KEYS, merge=merge)
    return {"hopper": _hopper, "cudnn": _cudnn}[backend](q, k, v, length)


def _attend_fwd(backend, q, k, v, length):
    out, lse = _attend(backend, q, k, v, length)
    return (out, lse), (q, k, v, length, out, lse)


def _attend_bwd(backend, residuals, cotangents):
    return *attention_xla.backward(*residuals, *cotangents), None


_attend.defvjp(_attend_fwd, _attend_bwd)


# --- hopper ---


def _hopper(q, k, v, length, distinct=None, queries=None):
    from jax_causal import attention_hopper

    processors = getattr(jax.local_devices()[0], "core_count", 132)
    out, lse = attention_hopper.attend(
        q, k, v, length,
        distinct=distinct, queries=queries, no_keys=NO_KEYS, merge=merge, processors=processors,
    )  # fmt: skip
    _, out, lse = _vary_alike(q, out, lse)  # the kernel forgets what varies over a mesh
    return out, lse


@jax.custom_vjp
def _hopper_plain(q, k, v, length, distinct, queries):
    return _hopper(q, k, v, length, distinct, queries)[0]


def _hopper_plain_bwd(residuals, d_out):
    """By cuDNN, whose gradient is a fused kernel too: one forward more is less than what it saves."""
    q, k, v, length, *_ = residuals
    _, pullback = jax.vjp(lambda *x: _cudnn_plain(*x, length), q, k, v)
    return *pullback(d_out), None, None, None


_hopper_plain.defvjp(lambda *x: (_hopper_plain(*x), x), _hopper_plain_bwd)


@functools.cache
def _has_mosaic() -> bool:
    try:
        from jax_causal import attention_hopper
    except ImportError:
        return False
    return attention_hopper.supported()


# --- cudnn ---


def _cudnn_plain(q, k, v, length):
    """Through the public function, which brings cuDNN's own gradient."""
    if length is not None:
        length = jnp.full(q.shape[:1], length, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation="cudnn")


def _cudnn(q, k, v, length):
    fused, mask_type = _fused_attention()
    options = {"scale": 1 / math.sqrt(q.shape[-1]), "return_residual": True}
    if length is None:
        return fused(q, k, v, **options)
    # What cuDNN gives a query without keys is not specified, so there is always one.
    queries, keys = (jnp.full(q.shape[:1], n, jnp.int32) for n in (q.shape[1], jnp.maximum(length, 1)))
    out, lse = fused(q, k, v, q_seqlen=queries, kv_seqlen=keys, mask_type=mask_type.PADDING, **options)
    return out, jnp.where(length > 0, lse, NO_KEYS)


@functools.cache
def _fused_attention():
    """cuDNN's attention with its fp32 [B, N, T] statistic, one call below `jax.nn.dot_product_attention`,
    which casts the statistic to the dtype of the output. Private to jax: None where it is not as expected."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError:
        return None
    expected = {"q_seqlen", "kv_seqlen", "scale", "mask_type", "return_residual"}
    known = inspect.signature(dot_product_attention).parameters
    return (dot_product_attention, MaskType) if expected <= set(known) else None
