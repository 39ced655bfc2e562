"""The UMT5 text encoder (arXiv:2304.09151): mT5's encoder with position biases of its own in every layer.

It differs from a plain transformer encoder in what it leaves out: no biases, no mean in the norms and no
1 / sqrt(head dim) in the attention. Prompts come from `jax_causal.tokenizer`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jax_causal.config import TextConfig


def relative_position_bucket(relative_position, num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of T5's bidirectional relative positions (arXiv:1910.10683, section 2.1).

    Half of the buckets serve keys behind the query, half keys ahead of it. In each half the first half holds
    one distance each; the rest grow logarithmically up to `max_distance`, beyond which all share the last.

    Args:
      relative_position: integers, key position minus query position. Static: computed on the host, in fp32 as
        in training, so that bucket borders fall alike on every device.

    Returns:
      int32 of the same shape, in [0, num_buckets).
    """
    relative_position = np.asarray(relative_position)
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative_position)
    growth = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    coarse = exact + (growth / np.float32(np.log(max_distance / exact)) * (half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(coarse, half - 1))
    return (bucket + np.where(relative_position > 0, half, 0)).astype(np.int32)


def _lookup(table: nnx.Embed, ids):
    """Rows of the table in its own dtype (calling an `nnx.Embed` gives the dtype it was created with)."""
    return jnp.take(table.embedding[...], ids, axis=0)


class Attention(nnx.Module):
    """Self-attention with an additive position bias."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        dim, inner = config.dim, config.attention_dim
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        # The scores are not divided by sqrt(head_dim), so the query's initial scale does it.
        self.q = linear(dim, inner, kernel_init=nnx.initializers.normal((dim * config.head_dim) ** -0.5))
        self.k, self.v = linear(dim, inner), linear(dim, inner)
        self.o = linear(inner, dim)
        self.num_heads = config.num_heads

    def __call__(self, x, bias, mask):
        """x [B, L, E], bias [N, L, L], mask bool [B, L] -> [B, L, E]. Scores and softmax are fp32."""
        heads = "b l (n d) -> b l n d"
        q, k, v = (rearrange(linear(x), heads, n=self.num_heads) for linear in (self.q, self.k, self.v))
        out = jax.nn.dot_product_attention(
            q, k, v, bias[None], mask[:, None, None, :], scale=1.0, implementation="xla"
        )
        return self.o(rearrange(out, "b l n d -> b l (n d)"))


class GatedMLP(nnx.Module):
    """fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate, self.fc1 = linear(config.dim, config.ffn_dim), linear(config.dim, config.ffn_dim)
        self.fc2 = linear(config.ffn_dim, config.dim)

    def __call__(self, x):
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(config.dim, epsilon=config.eps, rngs=rngs)
        self.attn = Attention(config, rngs)
        self.pos_embedding = nnx.Embed(config.num_buckets, config.num_heads, rngs=rngs)
        self.norm2 = nnx.RMSNorm(config.dim, epsilon=config.eps, rngs=rngs)
        self.ffn = GatedMLP(config, rngs)

    def __call__(self, x, buckets, mask):
        """x [B, L, E], buckets int32 [L, L] (query by key), mask bool [B, L] -> [B, L, E]."""
        bias = rearrange(_lookup(self.pos_embedding, buckets), "q k n -> n q k")
        x = x + self.attn(self.norm1(x), bias, mask)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """Token ids to prompt embeddings. Blocks are stacked over layers and scanned."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocab_size, config.dim, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        stack = nnx.vmap(Block, in_axes=(None, 0), transform_metadata={nnx.PARTITION_NAME: None})
        self.blocks = nnx.split_rngs(splits=config.num_layers)(lambda r: stack(config, r))(rngs)
        self.norm = nnx.RMSNorm(config.dim, epsilon=config.eps, rngs=rngs)

    def __call__(self, ids, mask):
        """Prompt embeddings, the context that the DiT attends to.

        Args:
          ids: int32 [B, L], padded on the right.
          mask: bool or int [B, L], nonzero at tokens.

        Returns:
          [B, L, E] in the dtype of the parameters; padded positions are exactly zero.
        """
        return jnp.where(mask[..., None] != 0, self.hidden_states(ids, mask), 0)

    def hidden_states(self, ids, mask):
        """Encoder output [B, L, E] at all positions, including padding (which nothing attends to)."""
        position = np.arange(ids.shape[1])
        buckets = jnp.asarray(
            relative_position_bucket(
                position[None, :] - position[:, None], self.config.num_buckets, self.config.max_distance
            )
        )
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x, params):
            return nnx.merge(graphdef, params)(x, buckets, mask != 0), None

        x, _ = jax.lax.scan(layer, _lookup(self.token_embedding, ids), stacked)
        return self.norm(x)
