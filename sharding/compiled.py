"""What a block step compiles to under a way of sharding it, found without weights, memory or accelerators.

`rollout.denoise_block` is lowered with abstract arguments and compiled for the devices of the mesh, virtual ones
included. The result is a real program: what it sends and what it holds can be read from it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_causal import rollout, transformer
from jax_causal.rollout import RolloutSpec
from jax_causal.transformer import TextKV
from sharding.hlo import Program


@dataclasses.dataclass(frozen=True)
class CompiledBlock:
    """A compiled `rollout.denoise_block`.

    Attributes:
      program: the instructions of one device.
      memory: bytes on one device: `weights`, `text_kv`, `cache`, `latents` (noise and re-noise of the block), and
        `temporaries`, whatever else is alive at once. With `latents`, the last are the activations; on a CPU they
        include attention's scores, and with scanned layers the weights of one layer.
    """

    program: Program
    memory: dict[str, int]


def compile_block(spec: RolloutSpec, dtype, batch: int = 1) -> CompiledBlock:
    """Compiles the denoising of a block for a model in `dtype`. `spec.parallel` must be `Sharded`.

    XLA widens bfloat16 for CPUs, collectives included: compile in float32 to read sizes there.
    """
    arguments = abstract_block(spec, dtype, batch)
    compiled = rollout.denoise_block.lower(spec, *arguments).compile()
    params, cache, text, noise, renoise, _ = arguments
    memory = {
        "weights": device_bytes(params),
        "text_kv": device_bytes((text.k, text.v)),
        "cache": device_bytes(cache),
        "latents": device_bytes((noise, renoise)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    return CompiledBlock(Program(compiled.as_text()), memory)


def abstract_block(spec: RolloutSpec, dtype, batch: int = 1) -> tuple:
    """The arguments of `rollout.denoise_block` behind `spec`, as `jax.ShapeDtypeStruct` with their shardings."""
    config, parallel, frames = spec.transformer, spec.parallel, spec.sampler.frames_per_block
    stacked = not parallel.unrolled

    def laid_out(tree, *names):
        return _with(tree, parallel.rules.sharding(names, parallel.mesh))

    params = transformer.abstract(config, dtype)
    if not stacked:
        params = jax.eval_shape(transformer.unroll, params)
    params = jax.tree.map(_with, params, parallel.shardings(params))
    cache = jax.eval_shape(functools.partial(rollout.init_cache, spec, batch, dtype, stacked=stacked))
    cache = _with(cache, parallel.cache_sharding(stacked=stacked))
    embeds = jax.ShapeDtypeStruct((batch, config.text_length, config.text_dim), dtype)
    text = jax.eval_shape(functools.partial(rollout.embed_text, spec), params, embeds)
    names = (*(["layers"] if stacked else []), "batch")
    text = TextKV(laid_out(text.k, *names), laid_out(text.v, *names), laid_out(text.distinct))

    height, width = (side * config.patch_size for side in spec.grid)
    latent = jax.ShapeDtypeStruct((batch, frames, config.in_channels, height, width), dtype)
    noise = jax.eval_shape(functools.partial(rollout.to_tokens, spec), latent)
    renoise = jax.ShapeDtypeStruct((len(spec.sampler.steps) - 1, *noise.shape), dtype)
    noise = laid_out(noise, "batch", "frames", "tokens")
    renoise = laid_out(renoise, "steps", "batch", "frames", "tokens")
    place = jax.tree.map(jnp.asarray, spec.place(0, frames))
    return params, cache, text, noise, renoise, place


def device_bytes(tree) -> int:
    """Bytes that arrays, or abstract ones with shardings, take on one device."""
    return sum(
        leaf.dtype.itemsize * functools.reduce(int.__mul__, leaf.sharding.shard_shape(leaf.shape), 1)
        for leaf in jax.tree.leaves(tree)
    )


def _with(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
