"""The sums and norms between the products of a layer as one kernel for NVIDIA Hopper, in Pallas (Mosaic GPU).

Left to XLA, and with the rotation (`fused_rotation`), these are eight kernels a layer, some of which read again what
another has just written.

Arithmetic is fp32 from the load to the store; what is stored is rounded once, and the stored sum before its norm is
taken. The gradient is that of the plain form.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_causal import hopper_rows
from jax_causal.hopper_rows import ROW


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


def add_norm(
    x,
    out,
    gate: tuple[jax.Array, int] | None,
    norm,
    time,
    rows: Rows | None,
    *,
    eps: float,
    tokens_first: bool = False,
):
    """The sum x + gate * out, and its layer norm scaled and shifted.

    Args:
      x: [B, F, S, E] bfloat16; see `hopper_rows.suits`.
      out: the same, or None where nothing is added.
      gate: the parameter [6, E] of a modulation and its row that gates `out`.
      norm: the parameter [6, E] of the modulation that scales by 1 + row `rows.scale` and shifts by row `rows.shift`;
        with `rows` None a pair (scale, bias) [E], that of an affine norm.
      time: [B, F, 6, E], the other half of both modulations.
      eps: of the norm.
      tokens_first: `out` is [B, S, F, E].

    Returns:
      The sum, and its norm, like x.
    """
    how = How(gate and gate[1], rows, eps, tokens_first)
    return _add_norm(how, x, out, gate and gate[0], norm, time)


class How(NamedTuple):
    """What of `add_norm`'s arguments is no array."""

    gate_row: int | None
    rows: Rows | None
    eps: float
    tokens_first: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(how, x, out, gate, norm, time):
    return _add_norm_kernel(how, x, out, gate, norm, time)


def _add_norm_bwd(how, inputs, cotangents):
    _, pullback = jax.vjp(functools.partial(plain_add_norm, how), *inputs)
    return pullback(cotangents)


_add_norm.defvjp(lambda *x: (_add_norm(*x), x[1:]), _add_norm_bwd)


def plain_add_norm(how, x, out, gate, norm, time):
    """`add_norm` without a kernel."""
    gate_row, rows, eps, tokens_first = how
    if out is not None:
        x = x + Modulation(gate, time).row(gate_row) * (out.swapaxes(1, 2) if tokens_first else out)
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = (y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)).astype(x.dtype)
    if rows is None:
        return x, y * norm[0] + norm[1]
    modulation = Modulation(norm, time)
    return x, y * (1 + modulation.row(rows.scale)) + modulation.row(rows.shift)


# Compiled by themselves, so that the layers of a model share their kernels.
@functools.partial(jax.jit, static_argnums=0)
def _add_norm_kernel(how, x, out, gate, norm, time):
    gate_row, rows, eps, tokens_first = how
    B, F, S, E = x.shape
    added = out is not None
    norm = (norm,) if rows else norm

    def kernel(*refs):
        x_ref, time_ref, *norm_refs = refs[: 2 + len(norm)]
        *added_refs, y_ref = refs[2 + len(norm) :]
        frame, tile = lax.axis_index("kernel_frame"), lax.axis_index("kernel_tile")
        tokens = hopper_rows.tile(tile, S)
        here = frame, tokens

        def modulation(param, i):
            rows = param.at[i], time_ref.at[frame, i]
            return sum(hopper_rows.load32(ref, ROW.reduce(0)) for ref in rows)

        y = hopper_rows.load32(x_ref.at[here], ROW)
        if added:
            out_ref, gate_ref, sum_ref = added_refs
            there = (lax.div(frame, F), tokens, lax.rem(frame, F)) if tokens_first else here
            added_rows = hopper_rows.load32(out_ref.at[there], ROW)
            y = y + hopper_rows.spread(modulation(gate_ref, gate_row), y, 1) * added_rows
            total = y.astype(x.dtype)
            sum_ref[here] = total
            y = total.astype(jnp.float32)
        y = y - hopper_rows.spread(jnp.sum(y, axis=1) / E, y, 0)
        y = y * hopper_rows.spread(lax.rsqrt(jnp.sum(y * y, axis=1) / E + eps), y, 0)
        if rows is None:
            scale, shift = (hopper_rows.load32(ref, ROW.reduce(0)) for ref in norm_refs)
        else:
            scale, shift = 1 + modulation(*norm_refs, rows.scale), modulation(*norm_refs, rows.shift)
        y_ref[here] = (y * hopper_rows.spread(scale, y, 1) + hopper_rows.spread(shift, y, 1)).astype(x.dtype)

    operands = [x.reshape(B * F, S, E), time.reshape(B * F, 6, E), *norm]
    if added:
        operands += [out if tokens_first else out.reshape(B * F, S, E), gate]
    out_type = [jax.ShapeDtypeStruct((B * F, S, E), x.dtype)] * (1 + added)
    grid = {"kernel_frame": B * F, "kernel_tile": hopper_rows.tiles(S)}
    results = hopper_rows.launch(kernel, out_type, grid, "add_norm")(*operands)
    return (results[0].reshape(x.shape) if added else x), results[-1].reshape(x.shape)
