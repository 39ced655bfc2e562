"""A small seeded model with 8 heads, and the ways of sharding it that the tests compare with one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_causal import rollout, rope, transformer
from jax_causal.config import PRESETS, SamplerConfig, TransformerConfig
from jax_causal.rollout import RolloutSpec
from sharding import SequenceParallel

CONFIG = TransformerConfig(dim=64, num_layers=2, num_heads=8, ffn_dim=64, text_dim=16, text_length=8)
SAMPLER = SamplerConfig(frames_per_block=2, steps=(1000, 500))
MODEL = dataclasses.replace(PRESETS["tiny"], transformer=CONFIG, sampler=SAMPLER)

# Ways to run: a strategy and a number of devices, or a strategy and a mesh of ours (data, seq, heads).
STRATEGIES = [(name, n) for n in (2, 4, 8) for name in ("gather", "ulysses", "ring", "hybrid", "auto")]
MESHES = [("hybrid", (1, 2, 2)), ("hybrid", (1, 2, 4)), ("auto", (1, 4, 2))]
DATA_MESHES = [("gather", (2, 4, 1)), ("auto", (2, 4, 1)), ("auto", (2, 1, 4)), ("auto", (2, 2, 2))]

# Forwards without a cache, on a grid whose tokens do not divide by 2, 4 or 8.
GRID, FRAMES, BATCH = (3, 5), 4, 2
_BLOCKS = transformer.block_index(FRAMES, 2)
MASKS = {
    "bidirectional": None,
    "causal": transformer.block_causal_mask(_BLOCKS),
    "window": transformer.block_causal_mask(_BLOCKS, window=3),
    "teacher": transformer.teacher_forcing_mask(_BLOCKS),
}


def label(case) -> str:
    """Test id of a way to run."""
    strategy, devices = case
    return f"{strategy}-{'x'.join(map(str, devices)) if isinstance(devices, tuple) else devices}"


@functools.cache
def parallel(case, model=MODEL, **options):
    """The settled `Parallel` of a way to run; None is one device."""
    if case is None:
        return None
    strategy, devices = case
    if isinstance(devices, tuple):
        axes = [axis for axis, size in zip(("data", "seq", "heads"), devices, strict=True) if size > 1]
        grid = np.reshape(jax.devices()[: np.prod(devices)], [size for size in devices if size > 1])
        mesh = Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))
        return SequenceParallel(strategy=strategy, mesh=mesh, **options).for_model(model)
    return SequenceParallel(devices, strategy, **options).for_model(model)


def spec(case, grid, num_frames, *, window=None, sink=0) -> RolloutSpec:
    return RolloutSpec.create(
        CONFIG, SAMPLER, grid, num_frames, window=window, sink=sink, parallel=parallel(case)
    )


@functools.cache
def _params():
    return jax.jit(functools.partial(transformer.init, CONFIG))(jax.random.key(0))


def params(spec, dtype=jnp.float32):
    """The parameters where `spec` wants them."""
    return jax.device_put(
        jax.tree.map(lambda p: p.astype(dtype), _params()), spec.parallel.shardings(_params())
    )


def draw(*shape, seed=0) -> np.ndarray:
    """fp32 normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def latents(spec, *leading, seed=0) -> np.ndarray:
    """Normal latents [*leading, C, h, w] of the size that `spec` has."""
    return draw(*leading, CONFIG.in_channels, 2 * spec.grid[0], 2 * spec.grid[1], seed=seed)


def text(spec, params, batch):
    """Keys and values of a seeded prompt, shorter than the text length."""
    return rollout.embed_text(spec, params, draw(batch, 5, CONFIG.text_dim, seed=9))


def forward(spec, params, noisy, clean, mask):
    """Velocity [B, F, C, h, w] of tokens `noisy`; given `clean` ones of the past where the mask wants both."""
    network = transformer.bind(CONFIG, params)
    text = network.embed_text(draw(BATCH, 5, CONFIG.text_dim, seed=9))
    frames = rope.frame_factors(0, FRAMES, CONFIG.head_dim)
    t = np.linspace(0, 1000, BATCH * FRAMES, dtype=np.float32).reshape(BATCH, FRAMES)
    if mask is not None and len(mask) == 2 * FRAMES:
        inputs = (noisy, t, clean, text, frames, spec.grid, spec.parallel)
        return rollout.from_tokens(spec, network.teacher_forcing(*inputs, frame_mask=mask))
    inputs = (noisy, t, text, frames, spec.grid, spec.parallel)
    return rollout.from_tokens(spec, network.forward(*inputs, frame_mask=mask))
