"""What lies between the products of a layer, as kernels for NVIDIA Hopper in Pallas (Mosaic GPU), each in one pass.

    add_norm           residual x + gate * out, and the norm of the sum
    rotate_into_cache  norms of queries and keys, their rotation, and the write of keys and values to the cache

Left to XLA these are eight kernels a layer, some of which read again what another has just written. Here a warp holds
a token: its row lies in registers from the load to the store, and sums are taken across the threads of the warp.

Arithmetic is fp32 from the load to the store; what is stored is rounded once, and the stored sum before its norm is
taken. Each takes the gradient of its plain form.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

from jax_causal import rope

TOKENS = 4  # of a block of threads: one to each warp
HEAD_DIM = 128  # of what is rotated
MAX_WIDTH = 2048  # of a row in registers

# A thread holds every 32nd eight neighbours of its warp's row: of [tokens, E], and of [tokens, N, D].
ROW = plgpu.Layout.TILED(plgpu.Tiling(((TOKENS, 256), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
HEADS = plgpu.Layout.TILED(
    plgpu.Tiling(((TOKENS, 2, HEAD_DIM), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)


def suits(tokens: int, heads: int, head_dim: int, dtype) -> bool:
    """Whether the kernels take activations [.., tokens, heads * head_dim]."""
    width = heads * head_dim
    fits = tokens % TOKENS == 0 and head_dim == HEAD_DIM and width % 256 == 0 and width <= MAX_WIDTH
    return fits and dtype == jnp.bfloat16


class Modulation(NamedTuple):
    """Shifts, scales and gates of a layer by frame: row i is param[i] + time[:, :, i]."""

    param: jax.Array  # [6, E]
    time: jax.Array  # [B, F, 6, E]

    def row(self, i: int) -> jax.Array:
        """[B, F, 1, E], to broadcast over tokens."""
        return (self.param[i] + self.time[:, :, i])[:, :, None]


class Rows(NamedTuple):
    """Which rows of a modulation scale and shift a norm."""

    scale: int
    shift: int


# --- residual and norm ---


def add_norm(x, out, gate: tuple[jax.Array, int] | None, norm, time, rows: Rows | None, *, eps: float):
    """The sum x + gate * out, and its layer norm scaled and shifted.

    Args:
      x: [B, F, S, E] bfloat16; see `suits`.
      out: the same, or None where nothing is added.
      gate: the parameter [6, E] of a modulation and its row that gates `out`.
      norm: the parameter [6, E] of the modulation that scales by 1 + row `rows.scale` and shifts by row `rows.shift`;
        with `rows` None a pair (scale, bias) [E], that of an affine norm.
      time: [B, F, 6, E], the other half of both modulations.
      eps: of the norm.

    Returns:
      The sum, and its norm, like x.
    """
    return _add_norm(gate and gate[1], rows, eps, x, out, gate and gate[0], norm, time)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _add_norm(gate_row, rows, eps, x, out, gate, norm, time):
    return _add_norm_kernel(gate_row, rows, eps, x, out, gate, norm, time)


def _add_norm_bwd(gate_row, rows, eps, inputs, cotangents):
    _, pullback = jax.vjp(functools.partial(plain_add_norm, gate_row, rows, eps), *inputs)
    return pullback(cotangents)


_add_norm.defvjp(lambda *x: (_add_norm(*x), x[3:]), _add_norm_bwd)


def plain_add_norm(gate_row, rows, eps, x, out, gate, norm, time):
    """`add_norm` without a kernel."""
    if out is not None:
        x = x + Modulation(gate, time).row(gate_row) * out
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = (y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)).astype(x.dtype)
    if rows is None:
        return x, y * norm[0] + norm[1]
    modulation = Modulation(norm, time)
    return x, y * (1 + modulation.row(rows.scale)) + modulation.row(rows.shift)


# Compiled by themselves, so that the layers of a model share their kernels.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _add_norm_kernel(gate_row, rows, eps, x, out, gate, norm, time):
    B, F, S, E = x.shape
    added = out is not None
    norm = (norm,) if rows else norm

    def kernel(*refs):
        x_ref, time_ref, *norm_refs = refs[: 2 + len(norm)]
        *added_refs, y_ref = refs[2 + len(norm) :]
        frame, tile = lax.axis_index("frame"), lax.axis_index("tile")
        here = (frame, pl.ds(tile * TOKENS, TOKENS))

        def modulation(param, i):
            return _load32(param.at[i], ROW.reduce(0)) + _load32(time_ref.at[frame, i], ROW.reduce(0))

        y = _load32(x_ref.at[here], ROW)
        if added:
            out_ref, gate_ref, sum_ref = added_refs
            y = y + _spread(modulation(gate_ref, gate_row), y, 1) * _load32(out_ref.at[here], ROW)
            total = y.astype(x.dtype)
            sum_ref[here] = total
            y = total.astype(jnp.float32)
        y = y - _spread(jnp.sum(y, axis=1) / E, y, 0)
        y = y * _spread(lax.rsqrt(jnp.sum(y * y, axis=1) / E + eps), y, 0)
        if rows is None:
            scale, shift = (_load32(ref, ROW.reduce(0)) for ref in norm_refs)
        else:
            scale, shift = 1 + modulation(*norm_refs, rows.scale), modulation(*norm_refs, rows.shift)
        y_ref[here] = (y * _spread(scale, y, 1) + _spread(shift, y, 1)).astype(x.dtype)

    operands = [x.reshape(B * F, S, E), time.reshape(B * F, 6, E), *norm]
    if added:
        operands += [out.reshape(B * F, S, E), gate]
    out_type = [jax.ShapeDtypeStruct((B * F, S, E), x.dtype)] * (1 + added)
    results = _launch(kernel, out_type, {"frame": B * F, "tile": S // TOKENS}, "add_norm")(*operands)
    return (results[0].reshape(x.shape) if added else x), results[-1].reshape(x.shape)


# --- queries and keys ---


def rotate_into_cache(qkv, scales, factors, keys, values, slots, *, eps: float):
    """Queries and keys normalised over all heads jointly and rotated, these and the values written to the cache.

    Args:
      qkv: [B, F, S, 3, N, D] bfloat16, products of the three projections; see `suits`.
      scales: of the two norms, [E] each.
      factors: from `factors`.
      keys, values: one layer of the cache, [B, 1, K, N, D]. Donate them, or let the caller's `jax.jit`: they are
        written in place, and copied before where they are still needed.
      slots: int32 [F], the slot of S keys that each frame goes to.
      eps: of the norms.

    Returns:
      Rotated queries [B, F, S, N, D], keys and values of the cache.
    """
    return _rotate(eps, qkv, scales, factors, keys, values, slots)


def factors(table):
    """Rotary factors [2, F, S, D/2] as `rotate_into_cache` takes them, [2, F, S, D]: what an entry is multiplied by,
    and what the other one of its pair."""
    cos, sin = table
    both = jnp.stack([jnp.stack([cos, cos], axis=-1), jnp.stack([-sin, sin], axis=-1)])
    return both.reshape(*table.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(eps, qkv, scales, factors, keys, values, slots):
    return _rotate_kernel(eps, qkv, scales, factors, keys, values, slots)


def _rotate_fwd(eps, qkv, scales, factors, keys, values, slots):
    results = _rotate(eps, qkv, scales, factors, keys, values, slots)
    return results, (qkv, scales, factors, slots)


def _rotate_bwd(eps, inputs, cotangents):
    """What the cache held before does not matter, only where it is replaced: it need not be kept."""
    qkv, scales, factors, slots = inputs
    caches = [jnp.zeros_like(x) for x in cotangents[1:]]
    plain = functools.partial(plain_rotate, eps, slots=slots)
    _, pullback = jax.vjp(plain, qkv, scales, factors, *caches)
    return *pullback(cotangents), None


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


def plain_rotate(eps, qkv, scales, factors, keys, values, slots):
    """`rotate_into_cache` without a kernel."""
    F, S, _, N, D = qkv.shape[1:]
    q, k, v = jnp.unstack(qkv, axis=3)
    table = jnp.stack([factors[0, ..., ::2], factors[1, ..., 1::2]])
    rotated = []
    for x, scale in zip((q, k), scales, strict=True):
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), (-2, -1), keepdims=True) + eps)
        rotated.append(rope.rotate(y.astype(x.dtype) * scale.reshape(N, D), table))
    q, k = rotated
    for f in range(F):
        start = (0, 0, slots[f] * S, 0, 0)
        keys = lax.dynamic_update_slice(keys, k[:, None, f], start)
        values = lax.dynamic_update_slice(values, v[:, None, f], start)
    return q, keys, values


@functools.partial(jax.jit, static_argnums=0)
def _rotate_kernel(eps, qkv, scales, factors, keys, values, slots):
    B, F, S, _, N, D = qkv.shape
    keys_ref, values_ref = (jax.new_ref(x[:, 0]) for x in (keys, values))

    def kernel(qkv_ref, q_scale_ref, k_scale_ref, factors_ref, slots_ref, keys_ref, values_ref, q_ref):
        index, tile, part = (lax.axis_index(name) for name in ("frame", "tile", "part"))
        batch, frame = lax.div(index, F), lax.rem(index, F)
        tokens = pl.ds(tile * TOKENS, TOKENS)
        slot = pl.ds(slots_ref[frame] * S + tile * TOKENS, TOKENS)
        own = qkv_ref.at[index, tokens, part]

        @pl.when(part < 2)
        def _rotate():
            x = _load32(own, HEADS)
            inverse = lax.rsqrt(jnp.sum(jnp.sum(x * x, axis=2), axis=1) / (N * D) + eps)
            q_scale, k_scale = (_load32(ref, HEADS.reduce(0)) for ref in (q_scale_ref, k_scale_ref))
            of_k = part.astype(jnp.float32)  # 0 or 1; no number chooses between arrays here
            scale = q_scale * (1 - of_k) + k_scale * of_k
            x = x * _spread(inverse, x, 0) * _spread(scale, x, 1, 2)
            cos, sin = (_load32(factors_ref.at[i, frame, tokens], HEADS.reduce(1)) for i in range(2))
            x = (x * _spread(cos, x, 0, 2) + _swap_pairs(x) * _spread(sin, x, 0, 2)).astype(qkv.dtype)

            @pl.when(part == 0)
            def _query():
                q_ref[index, tokens] = x

            @pl.when(part == 1)
            def _key():
                keys_ref[batch, slot] = x

        @pl.when(part == 2)
        def _value():
            values_ref[batch, slot] = _load(own, HEADS)

    out_type = jax.ShapeDtypeStruct((B * F, S, N, D), qkv.dtype)
    grid = {"frame": B * F, "tile": S // TOKENS, "part": 3}
    q = _launch(kernel, out_type, grid, "rotate_into_cache")(
        qkv.reshape(B * F, S, 3, N, D),
        *(x.reshape(N, D) for x in scales),
        factors,
        slots,
        keys_ref,
        values_ref,
    )
    return q.reshape(B, F, S, N, D), *(jax.freeze(ref)[:, None] for ref in (keys_ref, values_ref))


def _launch(kernel, out_type, grid: dict[str, int], name: str):
    """A function of arrays, and of references that are written in place."""
    # Not `plgpu.kernel`, which in jax 0.10 takes no references.
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid))
    return pl.kernel(kernel, out_type, mesh=mesh, compiler_params=plgpu.CompilerParams(), name=name)


# --- in the kernels ---

# jax 0.10 wants an index beside the reference, and jax 0.12 takes none.
_index = inspect.signature(plgpu.load).parameters.get("idx")
INDEX = ((),) if _index is not None and _index.default is inspect.Parameter.empty else ()


def _load(ref, layout):
    """From global memory."""
    return plgpu.load(ref, *INDEX, layout=layout, optimized=False)


def _load32(ref, layout):
    return _load(ref, layout).astype(jnp.float32)


def _spread(x, like, *axes):
    """`x`, whose axes are these of `like`, repeated over the other ones."""
    repeated = lax.broadcast_in_dim(x, like.shape, axes)
    return plgpu.layout_cast(repeated, ROW if like.ndim == 2 else HEADS)


def _swap_pairs(x):
    """The two of every pair exchanged; a thread holds both."""

    @plgpu.inline_mgpu(arg_types=(HEADS,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=HEADS))
    def swap(ctx, x):
        registers = np.empty_like(x.registers)
        for i, register in np.ndenumerate(x.registers):
            registers[i] = vector.shuffle(register, register, [1, 0, 3, 2, 5, 4, 7, 6])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

    return swap(x)
