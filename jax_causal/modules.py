"""NNX modules used functionally: a module class and its config name a structure; parameters are plain
nested dicts of arrays, the form that `jit`, optax, orbax and the converters all take.

`abstract` gives the structure without memory, `init` random values, `bind` a callable module.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx


@functools.cache
def _structure(cls, config, options):
    module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **dict(options)))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def abstract(cls, config, *, dtype=jnp.float32, **options) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`, one per parameter of `cls(config, **options)`; no memory."""
    _, shapes = _structure(cls, config, tuple(sorted(options.items())))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def init(cls, config, key: jax.Array, *, dtype=jnp.float32, **options) -> dict:
    """Randomly initialised parameters, cast to `dtype`. A pure function of `key`: run it under `jax.jit`."""
    module = cls(config, rngs=nnx.Rngs(key), **options)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.to_pure_dict(nnx.state(module)))


def bind(cls, config, params: dict, **options):
    """The module `cls(config, **options)` holding `params`; call its methods. Meant for use inside `jax.jit`."""
    graphdef, _ = _structure(cls, config, tuple(sorted(options.items())))
    return nnx.merge(graphdef, params)


def num_parameters(params) -> int:
    """Total number of elements; takes arrays or `ShapeDtypeStruct`s."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
