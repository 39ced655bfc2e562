"""The layers of the diffusion transformer: what a token goes through, on activations [B, F, S, E].

Source: Wan2.1 (arXiv:2503.20314). `transformer` puts them together.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jax_causal.config import TransformerConfig
from jax_causal.parallel import Parallel

ACTIVATION = ("batch", "frames", "tokens", "embed")
# What comes out of `Parallel.attend_product`, with heads joined: a device's padding is behind all it has.
TOKENS_FIRST = ("batch", "tokens", "frames", "embed")


def layer_norm(x, eps: float):
    """Zero mean and unit variance over the last axis; fp32 statistics, no affine, dtype kept."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return y.astype(x.dtype)


def inverse_rms(x, eps: float):
    """1 / sqrt(mean(x^2) + eps) over the last axis, fp32 [..., 1]."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x * inverse_rms(x) * scale over the last axis; the scale multiplies in the dtype of `x`."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x, inverse=None):
        """`inverse` is `inverse_rms(x)` where that is known already."""
        inverse = inverse_rms(x, self.eps) if inverse is None else inverse
        return (x.astype(jnp.float32) * inverse).astype(x.dtype) * self.scale[...]


class AffineLayerNorm(nnx.Module):
    """`layer_norm` with scale and bias."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.eps = eps

    def __call__(self, x):
        return layer_norm(x, self.eps) * self.scale[...] + self.bias[...]


class Attention(nnx.Module):
    """Projections of one attention layer. Queries and keys are normalised over all heads jointly. `merged` is one
    weight for q and k."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, *, merged: bool = False):
        dim = config.dim
        if merged:
            self.qk = nnx.Linear(dim, 2 * dim, rngs=rngs)
        else:
            self.q, self.k = (nnx.Linear(dim, dim, rngs=rngs) for _ in "qk")
        self.v, self.o = (nnx.Linear(dim, dim, rngs=rngs) for _ in "vo")
        self.norm_q, self.norm_k = (RMSNorm(dim, config.eps) for _ in "qk")
        self.num_heads, self.eps, self.merged = config.num_heads, config.eps, merged

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def query(self, x):
        """[..., E] -> [..., N, D]."""
        return self._heads(self.norm_q(self.q(x)))

    def key_value(self, x):
        """[..., E] -> two of [..., N, D]."""
        return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

    def query_key_value(self, x):
        """[..., E] -> three of [..., N, D], whose first two are going to be rotated."""
        v = self.v(x)
        if self.merged:
            qk = self.qk(x).reshape(*x.shape[:-1], 2, -1)
            inverse = jnp.unstack(inverse_rms(qk, self.eps), axis=-2)
            q, k = jnp.unstack(qk, axis=-2)
        else:
            q, k = self.q(x), self.k(x)
            inverse = inverse_rms(q, self.eps), inverse_rms(k, self.eps)
        # The barrier keeps the statistic's kernel from taking the whole norm: on a GPU what follows it then becomes
        # one kernel with the rotation.
        for_q, for_k = jax.lax.optimization_barrier(inverse)
        return self._heads(self.norm_q(q, for_q)), self._heads(self.norm_k(k, for_k)), self._heads(v)

    def output(self, x):
        """[..., N, D] -> [..., E]."""
        return self.o(x.reshape(*x.shape[:-2], -1))


class MLP(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, sizes: tuple[int, int, int], activation, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(sizes[0], sizes[1], rngs=rngs)
        self.fc2 = nnx.Linear(sizes[1], sizes[2], rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.fc2(self.activation(self.fc1(x)))


@jax.checkpoint
def gelu(x):
    """The tanh form, which all of Wan2.1 uses; the erf form is off by 5e-4. A gradient keeps `x` alone: the
    rest is sooner computed again than written and read."""
    return jax.nn.gelu(x, approximate=True)


MLP_GATE = 5  # the row of a block's modulation


class Block(nnx.Module):
    """Self-attention, cross-attention and MLP, the first and last modulated per frame by the timestep."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, *, merged: bool = False):
        dim = config.dim
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, dim)) / dim**0.5)
        self.self_attn = Attention(config, rngs, merged=merged)
        self.cross_attn = Attention(config, rngs)
        self.norm3 = AffineLayerNorm(dim, config.eps)
        self.ffn = MLP((dim, config.ffn_dim, dim), gelu, rngs)
        self.eps = config.eps

    def __call__(self, x, time, text, attend, parallel: Parallel):
        """Runs the block on x [B, F, S, E].

        Args:
          time: per-frame modulation [B, F, 6, E].
          text: keys and values [B, text, N, D] and `distinct` of `Parallel.attend_text`.
          attend: (q, k, v) -> (out, carry): self-attention and whatever state it updates.

        Returns:
          x and the carry.
        """
        modulation = (self.modulation[...] + time)[:, :, :, None]  # [B, F, 6, 1, E]: broadcasts over tokens
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, :, i] for i in range(6))
        with jax.named_scope("self_attention"):
            y = layer_norm(x, self.eps) * (1 + scale1) + shift1
            out, carry = attend(*self.self_attn.query_key_value(y))
            x = parallel.constrain(x + gate1 * self.self_attn.output(out), ACTIVATION)
        with jax.named_scope("cross_attention"):
            out = parallel.attend_text(self.cross_attn.query(self.norm3(x)), *text)
            x = parallel.constrain(x + self.cross_attn.output(out), ACTIVATION)
        with jax.named_scope("mlp"):
            y = layer_norm(x, self.eps) * (1 + scale2) + shift2
            x = parallel.constrain(x + gate2 * self.ffn(y), ACTIVATION)
        return x, carry

    def fused(self, x, pending, time, text, attend, parallel: Parallel):
        """`__call__` by `Parallel.add_norm`, with the last sum left to the next block.

        `pending` is the block before's: what its MLP gives, and the modulation [6, E] whose row `MLP_GATE` gates that;
        None for the first. `attend` is (projections, y) -> (out, carry).

        Returns:
          x, what is pending, and the carry.
        """
        from jax_causal.fused_norm import Rows

        norm = functools.partial(parallel.add_norm, time=time, eps=self.eps)
        own, affine = self.modulation[...], (self.norm3.scale[...], self.norm3.bias[...])
        last, gate = (None, None) if pending is None else (pending[0], (pending[1], MLP_GATE))
        with jax.named_scope("self_attention"):
            x, y = norm(x, last, gate, own, rows=Rows(scale=1, shift=0))
            out, carry = attend(self.self_attn, y)
            out = self.self_attn.output(out)
        with jax.named_scope("cross_attention"):
            x, y = norm(x, out, (own, 2), affine, rows=None, tokens_first=True)
            x = x + self.cross_attn.output(parallel.attend_text(self.cross_attn.query(y), *text))
        with jax.named_scope("mlp"):
            x, y = norm(x, None, None, own, rows=Rows(scale=4, shift=3))
            return x, (self.ffn(y), own), carry


class Head(nnx.Module):
    """Final modulated norm and projection to patch tokens."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        out = config.patch_size**2 * config.out_channels
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, config.dim)) / config.dim**0.5)
        self.linear = nnx.Linear(config.dim, out, rngs=rngs)
        self.eps = config.eps

    def __call__(self, x, time):
        """x [B, F, S, E], time [B, F, E] -> [B, F, S, 4C]."""
        shift, scale = self.modulation[...]
        time = time[:, :, None]
        return self.linear(layer_norm(x, self.eps) * (1 + scale + time) + shift + time)
