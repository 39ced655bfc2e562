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
        from_left, from_right = _neighbours(_cut(last, right, left), _cut(first, 0, right), width, count)
        if mine < NARROW:
            return run(_join(from_left, seen, from_right), (0, 0), weights, *others)
        out = run(seen, columns, weights, *others)
        # What is around the outermost columns, where they begin, and how many they are.
        edges = [(_join(from_left, first), 0, left), (_join(last, from_right), mine - right, right)]
        if count == 2 and left == right:
            # Either device has one neighbour: the edge at its other side is right already.
            (at_left, _, _), (at_right, start, _) = edges
            leftmost = lax.axis_index(width) == 0
            edges = [(_choose(leftmost, at_right, at_left), jnp.where(leftmost, start, 0), left)]
        for around, start, size in edges:
            if size:
                edge = run(around, (0, 0), weights, *_cut(others, start, size))
                start *= out.shape[_WIDTH] // mine
                out = lax.dynamic_update_slice_in_dim(out, edge, start, _WIDTH)
        return out

    in_specs = (spec, P(), *[spec] * len(others))
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=spec)(seen, weights, *others)


def _neighbours(to_right, to_left, axes, count: int):
    """What the neighbours to the left and to the right have sent; zeros at both ends of the width."""
    rightwards = [(i, i + 1) for i in range(count - 1)]
    leftwards = [(j, i) for i, j in rightwards]
    if count > 2 or to_right[0].shape != to_left[0].shape:
        return _send(to_right, axes, rightwards), _send(to_left, axes, leftwards)
    leftmost = lax.axis_index(axes) == 0  # one message: either device has one neighbour
    met = _send(_choose(leftmost, to_right, to_left), axes, rightwards + leftwards)
    nothing = tuple(map(jnp.zeros_like, met))
    return _choose(leftmost, nothing, met), _choose(leftmost, met, nothing)


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
