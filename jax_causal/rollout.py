"""Causal rollout: the block step as pure functions, and the plan of blocks.

A block of latent frames is denoised in a few steps against the cache (`denoise_block`), then passed once more, clean,
so that later blocks see clean keys and values (`write_context`). Both take parameters and state explicitly and
return new state; they are compiled once for all full-size blocks, because position enters only through the arrays of
a `Placement`. They may be called inside the caller's own `jax.jit`.

Source: Self-Forcing (arXiv:2506.08009), algorithm 2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import flow, transformer
from jax_causal.cache import CacheLayout, KVCache, Placement
from jax_causal.config import SamplerConfig, TransformerConfig
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.transformer import TextKV


@dataclasses.dataclass(frozen=True)
class Framing:
    """How the tokens of a frame make a picture: all that the VAE needs to know of a rollout, whatever its length.

    Attributes:
      grid: token rows and columns of a frame.
      patch: latent rows and columns of a token.
      parallel: how to run.
    """

    grid: tuple[int, int]
    patch: int
    parallel: Parallel

    def to_tokens(self, latent) -> jax.Array:
        """Latent [B, F, C, h, w] to patch tokens [B, F, S, 4C]."""
        return self.parallel.to_tokens(latent, self.patch)

    def from_tokens(self, tokens) -> jax.Array:
        """Patch tokens [B, F, S, 4C] to a latent [B, F, C, h, w]."""
        return self.parallel.from_tokens(tokens, self.patch, *self.grid)


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """Everything static about a rollout; hashable, one compiled program per distinct value.

    Attributes:
      layout: geometry of the cache.
      grid: token rows and columns of a frame.
      parallel: how to run.
    """

    transformer: TransformerConfig
    sampler: SamplerConfig
    layout: CacheLayout
    grid: tuple[int, int]
    parallel: Parallel

    @classmethod
    def create(
        cls,
        transformer: TransformerConfig,
        sampler: SamplerConfig,
        grid: tuple[int, int],
        num_frames: int | None,
        *,
        window: int | None = None,
        sink: int = 0,
        parallel: Parallel | None = None,
    ) -> RolloutSpec:
        """A spec for `num_frames` latent frames (initial ones included; None: without end).

        Raises ValueError where window, sink and block do not fit; see `CacheLayout.create`.
        """
        tokens, parallel = grid[0] * grid[1], parallel or SingleDevice()
        stored, parts = parallel.cache_shape(tokens)
        layout = CacheLayout.create(
            num_frames,
            tokens=tokens,
            block=sampler.frames_per_block,
            lead=int(sampler.independent_first_frame),
            window=window,
            sink=sink,
            stored=stored,
            parts=parts,
        )
        return cls(transformer, sampler, layout, grid, parallel)

    @property
    def head_dim(self) -> int:
        return self.transformer.head_dim

    @property
    def framing(self) -> Framing:
        return Framing(self.grid, self.transformer.patch_size, self.parallel)

    def place(self, start: int, num_frames: int) -> Placement:
        """Placement of a block; see `CacheLayout.place`."""
        return self.layout.place(start, num_frames, self.head_dim)


def block_sizes(
    num_frames: int | None, sampler: SamplerConfig, initial_frames: int = 0
) -> Iterator[tuple[int, int]]:
    """(start frame, frames) of every block to denoise after `initial_frames`, in order; endless for None."""
    start = initial_frames
    while num_frames is None or start < num_frames:
        size = 1 if sampler.independent_first_frame and start == 0 else sampler.frames_per_block
        yield start, size
        start += size


def initial_blocks(initial_frames: int, sampler: SamplerConfig) -> list[tuple[int, int]]:
    """(start frame, frames) of the passes that write `initial_frames` clean frames to the cache."""
    return list(block_sizes(initial_frames, sampler))


def check_frames(num_frames: int, sampler: SamplerConfig, what: str = "latent frames") -> None:
    """Raises ValueError, naming the nearest counts that do fit, unless `num_frames` is whole blocks."""
    n, lead = sampler.frames_per_block, int(sampler.independent_first_frame)
    blocks, rest = divmod(num_frames - lead, n)
    if num_frames < 1 or rest:
        low, high = lead + max(blocks, 0) * n, lead + (max(blocks, 0) + 1) * n
        near = f"{low} or {high}" if low >= max(lead, 1) else f"{high}"
        layout = f"1 + k * {n}" if lead else f"k * {n}"
        raise ValueError(f"{num_frames} {what} do not make whole blocks ({layout}): use {near}")


# State.


def init_cache(spec: RolloutSpec, batch: int, dtype, *, stacked: bool = True) -> KVCache:
    """An empty cache, committed to its devices. `stacked` must match the parameters: False for unrolled ones.

    May be called while tracing; elsewhere `new_cache` gives the same sooner.
    """
    config = spec.transformer
    return spec.parallel.init_cache(
        spec.layout, config.num_layers, batch, config.num_heads, config.head_dim, dtype, stacked=stacked
    )


def new_cache(spec: RolloutSpec, batch: int, dtype, *, stacked: bool = True) -> KVCache:
    """`init_cache` as one program: unrolled, it is two arrays a layer, and the first frame waits for them all."""
    return _cache_program(spec, batch, jnp.dtype(dtype), stacked)()


@functools.lru_cache(maxsize=64)
def _cache_program(spec, batch, dtype, stacked):
    make = functools.partial(init_cache, spec, batch, dtype, stacked=stacked)
    return jax.jit(make, out_shardings=spec.parallel.cache_sharding(stacked=stacked))


@functools.partial(jax.jit, static_argnames="spec")
def embed_text(spec: RolloutSpec, params, prompt_embeds) -> TextKV:
    """Cross-attention keys and values from prompt embeddings [B, text, text_dim]; once per prompt."""
    return transformer.bind(spec.transformer, params).embed_text(prompt_embeds)


@functools.partial(jax.jit, static_argnames=("spec", "num_frames", "dtype"))
def draw_noise(spec: RolloutSpec, keys, start, num_frames: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Noise of one block, a function of each video's key and the absolute frame alone.

    Args:
      keys: one PRNG key per video [B].
      start: int32 [], first frame of the block.
      num_frames: frames of the block.
      dtype: of the result; drawn in fp32.

    Returns:
      noise [B, F, S, 4C] and renoise [steps - 1, B, F, S, 4C], as patch tokens.
    """
    config, patch = spec.transformer, spec.transformer.patch_size
    shape = (len(spec.sampler.steps), config.in_channels, spec.grid[0] * patch, spec.grid[1] * patch)

    def frame(key, index):
        return jax.random.normal(jax.random.fold_in(key, index), shape)

    frames = start + jnp.arange(num_frames)
    draws = jax.vmap(lambda key: jax.vmap(lambda index: frame(key, index))(frames))(keys)
    draws = jnp.moveaxis(draws, 2, 0).astype(dtype)  # [steps, B, F, C, h, w]
    tokens = jax.vmap(lambda latent: spec.parallel.to_tokens(latent, patch))(draws)
    return tokens[0], tokens[1:]


@functools.partial(jax.jit, static_argnames="spec")
def to_tokens(spec: RolloutSpec, latent) -> jax.Array:
    """Latent [B, F, C, h, w] to patch tokens [B, F, S, 4C]."""
    return spec.framing.to_tokens(latent)


@functools.partial(jax.jit, static_argnames="spec")
def from_tokens(spec: RolloutSpec, tokens) -> jax.Array:
    """Patch tokens [B, F, S, 4C] to a latent [B, F, C, h, w]."""
    return spec.framing.from_tokens(tokens)


# The block step.


def predict(spec: RolloutSpec, params, cache: KVCache, text: TextKV, x, t, placement: Placement):
    """One network pass at timestep `t` (fp32 []) over x [B, F, S, 4C].

    Returns:
      flow and clean prediction x0, both [B, F, S, 4C], and the cache with this pass's keys and values.
    """
    network = transformer.bind(spec.transformer, params)
    times = jnp.full((*x.shape[:1], 1), t, jnp.float32)
    v, cache = network.denoise(x, times, text, cache, placement, spec.layout, spec.grid, spec.parallel)
    return v, flow.x0_from_flow(x, v, flow.sigma_at(t, spec.sampler.shift)), cache


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def denoise_block(
    spec: RolloutSpec, params, cache: KVCache, text: TextKV, noise, renoise, placement: Placement
) -> tuple[jax.Array, KVCache]:
    """Denoises one block in `len(spec.sampler.steps)` passes. `cache` is donated.

    Args:
      params: of the transformer, stacked or unrolled.
      cache: from `init_cache` or the block before.
      text: from `embed_text`.
      noise: [B, F, S, 4C] starting noise, whose dtype the latent keeps.
      renoise: [steps - 1, B, F, S, 4C] noise added between the passes.
      placement: from `spec.place`.

    Returns:
      The clean block x0 [B, F, S, 4C], and the cache, which holds the last pass's keys and values until
      `write_context` replaces them.
    """
    times = flow.warp(spec.sampler.steps, spec.sampler.shift)
    # The last pass adds no noise: sigma 0 times nothing, so that all passes are one loop body.
    next_sigma = jnp.append(flow.sigma_at(times[1:], spec.sampler.shift), 0)
    renoise = jnp.concatenate([renoise, jnp.zeros_like(noise)[None]])

    def step(carry, inputs):
        x, cache = carry
        t, sigma, eps = inputs
        _, x0, cache = predict(spec, params, cache, text, x, t, placement)
        return (flow.add_noise(x0, eps, sigma), cache), None

    (x0, cache), _ = jax.lax.scan(step, (noise, cache), (jnp.asarray(times), next_sigma, renoise))
    return x0, cache


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def write_context(
    spec: RolloutSpec, params, cache: KVCache, text: TextKV, x0, placement: Placement, t
) -> KVCache:
    """The context pass: clean frames x0 [B, F, S, 4C] at timestep `t` (fp32 [], normally
    `sampler.context_noise`) replace what the cache holds at their place. `cache` is donated."""
    _, _, cache = predict(spec, params, cache, text, x0, t, placement)
    return cache


def split_renoise(spec: RolloutSpec, renoise, num_frames: int, initial_frames: int = 0) -> list[np.ndarray]:
    """Cuts injected re-noise [blocks * (steps - 1)] items of [F, C, h, w] (or [B, F, C, h, w]) into one
    [steps - 1, B, F, C, h, w] array per block, checking counts and shapes."""
    per_block = len(spec.sampler.steps) - 1
    plan = list(block_sizes(num_frames, spec.sampler, initial_frames))
    if len(renoise) != per_block * len(plan):
        raise ValueError(
            f"renoise needs {per_block} entries for each of the {len(plan)} blocks: "
            f"{per_block * len(plan)}, not {len(renoise)}"
        )
    blocks = []
    for index, (_, size) in enumerate(plan):
        draws = np.stack([np.asarray(r) for r in renoise[index * per_block : (index + 1) * per_block]])
        draws = draws[:, None] if draws.ndim == 5 else draws
        if draws.shape[2] != size:
            raise ValueError(f"renoise of block {index} must have {size} frames, not {draws.shape[2]}")
        blocks.append(draws)
    return blocks
