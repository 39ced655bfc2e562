"""What a run costs at least: operations counted, and the speeds that the device reaches on large, simple work.

Operations are those of matrix products, convolutions and attention, a multiplication and an addition each; norms,
activations and softmax are left out. A floor is operations by a ceiling measured in the same run, so that a ratio to
it says how far a model is from its products and attention alone, at the speed of large ones.

One pass of the transformer over T tokens of width E, with L layers, MLP width M, K cached keys, X text positions and
c = patch^2 channels in and d out:

    products    L (12 T E^2 + 4 T E M) + 2 T E (c + d) + 2 (f E + 7 E^2)
    attention   4 L T E (K + X)

12 = 2 (q, k, v, output of self-attention; q and output of cross-attention), and the last term is the time embedding
from a feature of length f, once for each pass. Text keys and values are made once per prompt:

    products    2 X E (D + E) + 4 L X E^2      (D: width of the prompt embedding)
"""

from __future__ import annotations

import math
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_causal import modules, rollout
from jax_causal.attention import attention
from jax_causal.config import ModelConfig, TextConfig, TransformerConfig, VAEConfig
from jax_causal.rollout import RolloutSpec
from jax_causal.text import UMT5Encoder
from jax_causal.vae import VAE, init_decoder_state


class Operations(NamedTuple):
    """Operations by the kind of ceiling that they run against."""

    products: int = 0
    attention: int = 0

    def plus(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.attention + other.attention)

    @property
    def total(self) -> int:
        return self.products + self.attention


class Ceilings(NamedTuple):
    """Speeds of one device, each as (median, min, max): products and attention in operations per second, copies in
    bytes read plus written per second."""

    product: tuple[float, float, float]
    attention: tuple[float, float, float]
    copy: tuple[float, float, float]

    def floor(self, operations: Operations, devices: int = 1) -> float:
        """Seconds that `operations` take at these speeds, shared evenly by `devices`."""
        seconds = operations.products / self.product[0] + operations.attention / self.attention[0]
        return seconds / devices


# Counting.


def pass_operations(config: TransformerConfig, tokens: int, keys: int) -> Operations:
    """One pass over a block of `tokens` that attends to `keys` cached ones, its own included; batch 1."""
    e, patch = config.dim, config.patch_size**2
    layer = 12 * tokens * e**2 + 4 * tokens * e * config.ffn_dim
    ends = 2 * tokens * e * patch * (config.in_channels + config.out_channels)
    clock = 2 * (config.frequency_dim * e + 7 * e**2)
    attended = 4 * tokens * e * (keys + config.text_length)
    return Operations(config.num_layers * layer + ends + clock, config.num_layers * attended)


def text_kv_operations(config: TransformerConfig) -> Operations:
    """Text keys and values of all layers, once per prompt."""
    x, e = config.text_length, config.dim
    return Operations(2 * x * e * (config.text_dim + e) + 4 * config.num_layers * x * e**2)


def block_operations(spec: RolloutSpec, start: int, frames: int, passes: int) -> Operations:
    """`passes` passes over the block of `frames` latent frames that begins at `start`."""
    tokens, keys = frames * spec.layout.tokens, int(spec.place(start, frames).held) * spec.layout.tokens
    one = pass_operations(spec.transformer, tokens, keys)
    return Operations(passes * one.products, passes * one.attention)


def rollout_operations(spec: RolloutSpec, frames: int, *, last_context: bool) -> Operations:
    """Denoising and context passes of `frames` latent frames, with or without the last context pass."""
    counted = Operations()
    for start, size in rollout.block_sizes(frames, spec.sampler):
        context = last_context or start + size < frames
        counted = counted.plus(block_operations(spec, start, size, len(spec.sampler.steps) + context))
    return counted


def decode_operations(config: VAEConfig, frames: int, height: int, width: int, *, first: bool) -> Operations:
    """Decoding of `frames` latent frames to `height` x `width` pixels, as the decoder computes it."""
    params = modules.abstract(VAE, config)
    size = (height // config.spatial_factor, width // config.spatial_factor)
    latents = jax.ShapeDtypeStruct((1, frames, config.z_dim, *size), jnp.float32)
    state = jax.eval_shape(lambda: init_decoder_state(config, 1, height, width))

    def decode(params, latents, state):
        return modules.bind(VAE, config, params).decode(latents, state, first=first)

    return Operations(count_products(decode, params, latents, state))


def text_operations(config: TextConfig) -> Operations:
    """The text encoder over all its positions, its attention counted with the products."""
    ids = jax.ShapeDtypeStruct((1, config.max_length), jnp.int32)

    def encode(params, ids, mask):
        return modules.bind(UMT5Encoder, config, params)(ids, mask)

    return Operations(count_products(encode, modules.abstract(UMT5Encoder, config), ids, ids))


def count_products(function, *args) -> int:
    """Operations of all matrix products and convolutions in `function` of (abstract) `args`, loops included.

    Raises ValueError for a loop whose number of turns is not known before it runs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            out, right = equation.outvars[0].aval.shape, equation.invars[1].aval.shape
            if name == "dot_general":
                summed = math.prod(right[axis] for axis in params["dimension_numbers"][0][1])
            else:
                out_axis = params["dimension_numbers"].rhs_spec[0]
                summed = math.prod(right) // right[out_axis]
            total += 2 * math.prod(out) * summed
            continue
        inner = sum(_count(sub) for value in params.values() for sub in _jaxprs(value))
        if name == "while" and inner:
            raise ValueError("a while loop does not say how often its products run: count them by hand")
        total += inner * (params["length"] if name == "scan" else 1)
    return total


def _jaxprs(value):
    if isinstance(value, (tuple, list)):
        return [sub for one in value for sub in _jaxprs(one)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


# Measuring.


def measure_ceilings(config: ModelConfig, dtype, *, backend: str = "auto", repeats: int = 5) -> Ceilings:
    """Runs one large product, attention with the model's heads, and a copy, on the first device.

    Args:
      dtype: of all three.
      backend: of attention.
      repeats: of each; every one is a run of calls that keep the device busy.

    Returns:
      Speeds. CPUs get sizes that take milliseconds there.
    """
    small = jax.default_backend() == "cpu"
    side, queries, keys, copied = (512, 256, 1024, 2**24) if small else (8192, 8192, 16384, 2**30)
    heads, head_dim = config.transformer.num_heads, config.transformer.head_dim
    calls = 3 if small else 10

    def random(seed, *shape):
        # A device draws less power, and runs faster, on constant data.
        return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)

    a, b = random(0, side, side), random(1, side, side)
    q, k, v = random(2, 1, queries, heads, head_dim), *(random(i, 1, keys, heads, head_dim) for i in (3, 4))
    x = random(5, copied // jnp.dtype(dtype).itemsize)
    attend = jax.jit(lambda q, k, v: attention(q, k, v, backend=backend))
    return Ceilings(
        _speed(2 * side**3, jax.jit(jnp.matmul), a, b, calls=calls, repeats=repeats),
        _speed(4 * heads * head_dim * queries * keys, attend, q, k, v, calls=calls, repeats=repeats),
        _speed(2 * copied, jax.jit(jnp.copy), x, calls=calls, repeats=repeats),
    )


def _speed(amount, function, *args, calls: int, repeats: int) -> tuple[float, float, float]:
    """(median, min, max) of `amount` per second over `repeats` runs of `calls` calls."""
    jax.block_until_ready(function(*args))
    speeds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        speeds.append(amount * calls / (time.perf_counter() - begin))
    return statistics.median(speeds), min(speeds), max(speeds)
