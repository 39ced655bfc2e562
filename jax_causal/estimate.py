"""How much memory a run will take, from shapes alone: worth knowing before minutes of loading and compiling.

Weights, key/value cache, text and decoder state are exact. Activations are XLA's to arrange; the formulas below
are its own account (`memory_analysis` on CPU in float32) put in terms of the largest arrays, good to about 30 %
where activations matter.
"""

from __future__ import annotations

import functools
import math
import os

import jax
import jax.numpy as jnp

from jax_causal import attention, attention_xla, modules, vae
from jax_causal.components import COMPONENTS
from jax_causal.config import ModelConfig
from jax_causal.rollout import RolloutSpec

# Full-resolution feature maps alive at once in the VAE: a residual block's input, its three taps side by side, what
# comes out, and the same again while the next one starts.
_VAE_MAPS = 9


def memory_estimate(
    config: ModelConfig, spec: RolloutSpec, batch: int, dtype, *, given_frames: int = 0
) -> dict[str, int]:
    """Bytes by part. With B `batch`, T tokens of a block, K cached tokens, L layers, E width, all times the size of
    `dtype` except scores:

      transformer, vae, text_encoder: parameters; absent where the model has no such component.
      kv_cache: 2 L B K E, where K is the window if there is one, rounded up to eights.
      text_kv: 2 L B text_length E.
      block_activations: B T (8 E + 2 ffn), and where attention is not one fused kernel its fp32 scores and weights,
        8 B T N K bytes, which are bounded by walking the keys in chunks.
      decoder_state: the frames that the decoder's layers look back at.
      vae_activations: 9 B frames H W vae.dim, where frames are those of one block or the `given_frames`.

    Their sum is what a run needs. No memory is used.
    """
    dtype = jnp.dtype(dtype)
    dit, size = config.transformer, jnp.dtype(dtype).itemsize
    per_frame = spec.layout.tokens
    tokens = batch * spec.sampler.frames_per_block * per_frame
    cached = spec.layout.parts * spec.layout.room
    height, width = (side * dit.patch_size * config.vae.spatial_factor for side in spec.grid)
    frames = max(spec.sampler.frames_per_block * config.vae.temporal_factor, given_frames)
    state = jax.eval_shape(functools.partial(vae.init_decoder_state, config.vae, batch, height, width, dtype))
    return {
        name: _nbytes(modules.abstract(module, getattr(config, name), dtype=dtype))
        for name, module in COMPONENTS.items()
        if getattr(config, name) is not None
    } | {
        "kv_cache": 2 * dit.num_layers * batch * cached * dit.dim * size,
        "text_kv": 2 * dit.num_layers * batch * dit.text_length * dit.dim * size,
        "block_activations": tokens * (8 * dit.dim + 2 * dit.ffn_dim) * size
        + _scores(spec, tokens, cached, dtype),
        "decoder_state": _nbytes(state),
        "vae_activations": _VAE_MAPS * batch * frames * height * width * config.vae.dim * size,
    }


def summary(parts: dict[str, int]) -> dict[str, int]:
    """`memory_estimate` in the five parts worth showing."""
    return {
        "weights": sum(parts.get(name, 0) for name in COMPONENTS),
        "KV cache": parts["kv_cache"],
        "text": parts["text_kv"],
        "block": parts["block_activations"],
        "decoder": parts["decoder_state"] + parts["vae_activations"],
    }


def device_memory() -> int | None:
    """Bytes that the default device lets a program use; for a CPU the machine's memory; None where unknown."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return stats.get("bytes_limit")
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def mend(parts: dict[str, int], spec: RolloutSpec, dtype) -> str:
    """What to change, as command-line options, when a run does not fit: whatever shrinks the largest part."""
    if jnp.dtype(dtype).itemsize > 2:
        return "--precision bfloat16"
    largest = max(parts, key=parts.get)
    block, sink = spec.sampler.frames_per_block, spec.layout.sink
    window = sink + max(2, (spec.layout.capacity - sink) // (2 * block)) * block
    if largest == "kv_cache" and window < spec.layout.capacity:
        return f"--window {window}"
    if largest in COMPONENTS:
        return "a smaller model"
    return "a smaller --height and --width"


def _scores(spec: RolloutSpec, tokens: int, cached: int, dtype) -> int:
    """Bytes of attention scores and weights, in fp32."""
    heads = spec.transformer.num_heads
    query = jax.ShapeDtypeStruct((1, tokens, heads, spec.head_dim), dtype)
    if attention.choose_backend(getattr(spec.parallel, "backend", "auto"), query) != "xla":
        return 0
    rows = tokens * heads
    chunks = math.ceil(cached / max(128, attention_xla.MAX_SCORES // rows))
    return 2 * 4 * rows * math.ceil(cached / chunks)


def _nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
