"""Columns beyond one's own: how layers of the VAE are run where the width of activations is sharded.

A layer runs over a device's columns as if there were no others, and then again for the outermost columns of its result,
with the neighbours' columns that have come meanwhile. So nothing large waits for a neighbour, and nothing large is
copied: where columns are joined to an activation first, XLA's kernel that puts the taps of a convolution side by side
takes 3.2 ms on one of two H100s, and 0.6 by its bytes. Few columns are joined, which is fewer kernels.

Left to itself, XLA's partitioner exchanges halos too, but masks all of what a convolution reads, by arrays of
predicates as large as that. It still does where the width does not divide.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_causal.vae_layers import ACTIVATION_AXES, alone
from sharding.specs import Rules

_WIDTH = ACTIVATION_AXES.index("width")
NARROW = 32  # columns of a device that are too few to run twice for the outermost ones


def exchange(mesh: Mesh, rules: Rules, run, seen, columns: tuple[int, int], weights, *others):
    """`jax_causal.vae_layers.alone` over a mesh: every device runs the layer on its share of the width.

    `seen` and `others` are activations [B, T, H, W, C] of one width, sharded as `rules` say; weights are whole.
    """
    spec = rules.spec(ACTIVATION_AXES)
    batch, width = (_axes(spec[ACTIVATION_AXES.index(name)]) for name in ("batch", "width"))
    count = math.prod(mesh.shape[axis] for axis in width)
    copies = math.prod(mesh.shape[axis] for axis in batch)
    videos, whole = seen[0].shape[0], seen[0].shape[_WIDTH]
    uneven = videos % copies or whole % count or whole // count < sum(columns)
    if count == 1 or uneven or not any(columns):
        return alone(run, seen, columns, weights, *others)

    def body(seen, weights, *others):
        left, right = columns
        mine = whole // count
        # What the outermost columns of the result see of one's own.
        first, last = (_cut(seen, start, left + right) for start in (0, mine - left - right))
        to_right, to_left = _cut(last, right, left), _cut(first, 0, right)
        rightwards = [(i, i + 1) for i in range(count - 1)]
        leftwards = [(j, i) for i, j in rightwards]
        pair = count == 2 and left == right  # either device has one neighbour: one message, and one edge
        # Who is sent nothing gets zeros: those at both ends of the width.
        if pair:
            at_left = lax.axis_index(width) == 0
            met = _send(_choose(at_left, to_right, to_left), width, rightwards + leftwards)
            from_left, from_right = (
                tuple(jnp.where(at_end, 0, x) for x in met) for at_end in (at_left, ~at_left)
            )
        else:
            from_left, from_right = (
                _send(to_right, width, rightwards),
                _send(to_left, width, leftwards),
            )
        if mine < NARROW:
            return run(_join(from_left, seen, from_right), (0, 0), weights, *others)
        out = run(seen, columns, weights, *others)

        def replace(out, around, start, size):
            """The columns of the result that belong to `size` columns from `start` on, from what is around them."""
            edge = run(around, (0, 0), weights, *_cut(others, start, size))
            return lax.dynamic_update_slice_in_dim(out, edge, start * (out.shape[_WIDTH] // mine), _WIDTH)

        if pair:
            around = _choose(at_left, _join(last, met), _join(met, first))
            return replace(out, around, jnp.where(at_left, mine - right, 0), left)
        out = replace(out, _join(from_left, first), 0, left) if left else out
        return replace(out, _join(last, from_right), mine - right, right) if right else out

    in_specs = (spec, P(), *[spec] * len(others))
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=spec)(seen, weights, *others)


def _cut(arrays, start, size):
    """So many columns of each."""
    return tuple(lax.dynamic_slice_in_dim(x, start, size, _WIDTH) for x in arrays)


def _join(*groups):
    """Columns of several groups side by side, array by array."""
    return tuple(jnp.concatenate(columns, _WIDTH) for columns in zip(*groups, strict=True))


def _choose(condition, yes, no):
    return tuple(jnp.where(condition, x, y) for x, y in zip(yes, no, strict=True))


def _send(arrays, axes, pairs):
    """`lax.ppermute` of all of them, which differ in their frames alone, in one message."""
    cuts = [sum(x.shape[1] for x in arrays[:i]) for i in range(1, len(arrays))]
    return tuple(jnp.split(lax.ppermute(jnp.concatenate(arrays, axis=1), axes, pairs), cuts, axis=1))


def _axes(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
