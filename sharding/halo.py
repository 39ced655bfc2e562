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


def exchange(mesh: Mesh, rules: Rules, run, x, columns: tuple[int, int], weights, *others):
    """`jax_causal.vae_layers.alone` over a mesh: every device runs the layer on its share of the width.

    x and `others` are activations [B, T, H, W, C] of one width, sharded as `rules` say; weights are whole.
    """
    spec = rules.spec(ACTIVATION_AXES)
    batch, width = (_axes(spec[ACTIVATION_AXES.index(name)]) for name in ("batch", "width"))
    count = math.prod(mesh.shape[axis] for axis in width)
    copies = math.prod(mesh.shape[axis] for axis in batch)
    uneven = x.shape[0] % copies or x.shape[3] % count or x.shape[3] // count < max(columns)
    if count == 1 or uneven or not any(columns):
        return alone(run, x, columns, weights, *others)

    def body(x, weights, *others):
        left, right = columns
        # Who is sent nothing gets zeros: those at both ends of the width.
        rightwards = [(i, i + 1) for i in range(count - 1)]
        from_left = lax.ppermute(x[:, :, :, x.shape[3] - left :], width, rightwards)
        from_right = lax.ppermute(x[:, :, :, :right], width, [(j, i) for i, j in rightwards])
        return run(jnp.concatenate([from_left, x, from_right], axis=3), (0, 0), weights, *others)

    in_specs = (spec, P(), *[spec] * len(others))
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=spec)(x, weights, *others)


def _axes(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
