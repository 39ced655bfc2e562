"""Columns beyond one's own: how layers of the VAE are run where the width of activations is sharded.

Left to itself, XLA's partitioner exchanges halos too, but masks all of what a convolution reads, by arrays of
predicates as large as that: two GPUs took 18 ms for what moves data in a block's decoding, and one took 21. It still
does where the width does not divide.
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


def exchange(mesh: Mesh, rules: Rules, run, seen, columns: tuple[int, int], weights, *others):
    """`jax_causal.vae_layers.alone` over a mesh: every device runs the layer on its share of the width.

    `seen` and `others` are activations [B, T, H, W, C] of one width, sharded as `rules` say; weights are whole.
    """
    spec = rules.spec(ACTIVATION_AXES)
    batch, width = (_axes(spec[ACTIVATION_AXES.index(name)]) for name in ("batch", "width"))
    count = math.prod(mesh.shape[axis] for axis in width)
    copies = math.prod(mesh.shape[axis] for axis in batch)
    videos, whole = seen[0].shape[0], seen[0].shape[3]
    uneven = videos % copies or whole % count or whole // count < max(columns)
    if count == 1 or uneven or not any(columns):
        return alone(run, seen, columns, weights, *others)

    def body(seen, weights, *others):
        left, right = columns
        # Who is sent nothing gets zeros: those at both ends of the width.
        rightwards = [(i, i + 1) for i in range(count - 1)]
        leftwards = [(j, i) for i, j in rightwards]
        last = _message(x[:, :, :, x.shape[3] - left :] for x in seen)
        first = _message(x[:, :, :, :right] for x in seen)
        if count == 2 and left == right:  # one message: either device has one neighbour
            at_left = lax.axis_index(width) == 0
            met = lax.ppermute(jnp.where(at_left, last, first), width, rightwards + leftwards)
            from_left, from_right = jnp.where(at_left, 0, met), jnp.where(at_left, met, 0)
        else:
            from_left, from_right = (
                lax.ppermute(last, width, rightwards),
                lax.ppermute(first, width, leftwards),
            )
        cuts = [sum(x.shape[1] for x in seen[:i]) for i in range(1, len(seen))]
        parts = jnp.split(from_left, cuts, 1), seen, jnp.split(from_right, cuts, 1)
        return run(parts, (0, 0), weights, *others)

    in_specs = (spec, P(), *[spec] * len(others))
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=spec)(seen, weights, *others)


def _message(columns):
    """Columns of all arrays in one."""
    return jnp.concatenate(list(columns), axis=1)


def _axes(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
