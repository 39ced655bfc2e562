"""The diffusion transformer of Wan2.1 (arXiv:2503.20314), as run causally by Self-Forcing (arXiv:2506.08009).

Tokens stay as [B, F, S, E] throughout: frames are a real axis, so per-frame modulation broadcasts and every device
can hold the same slice of every frame. Latents enter and leave as patch tokens [B, F, S, 4C], channel fastest on
both sides (the converter has reordered the patch embedding), so that nothing is permuted between passes.

Parameters of the blocks are stacked over layers and scanned; `unroll` gives per-layer arrays instead, which a GPU
runs faster and compiles more slowly; there q, k and v of self-attention are one weight. Both forms compute the same.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_causal import flow, modules
from jax_causal.cache import CacheLayout, KVCache, Placement
from jax_causal.config import TransformerConfig
from jax_causal.parallel import Parallel
from jax_causal.transformer_layers import ACTIVATION, MLP, MLP_GATE, Block, Head, gelu


class TextKV(NamedTuple):
    """Cross-attention keys and values of all layers, fixed for a prompt.

    Attributes:
      k, v: [L, B, text, N, D], or tuples over L.
      distinct: int32 scalar: keys from this one on are equal, and values too, in every layer. They are of padding.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    distinct: jax.Array

    def layer(self, index: int):
        """What one layer attends to, where layers are unrolled."""
        return self.k[index], self.v[index], self.distinct


class CausalDiT(nnx.Module):
    """The network: patch tokens, timesteps and text in, velocity out (as patch tokens).

    With `unrolled`, blocks are separate modules instead of one stacked over layers. With `remat`, a gradient keeps
    only what enters each block and computes the rest of it again.
    """

    def __init__(
        self, config: TransformerConfig, *, rngs: nnx.Rngs, unrolled: bool = False, remat: bool = False
    ):
        dim = config.dim
        self.config, self.remat = config, remat
        self.patch_embedding = nnx.Linear(config.patch_size**2 * config.in_channels, dim, rngs=rngs)
        self.text_embedding = MLP((config.text_dim, dim, dim), gelu, rngs)
        self.time_embedding = MLP((config.frequency_dim, dim, dim), jax.nn.silu, rngs)
        self.time_projection = nnx.Linear(dim, 6 * dim, rngs=rngs)
        self.head = Head(config, rngs)
        if unrolled:
            self.blocks = nnx.List([Block(config, rngs, merged=True) for _ in range(config.num_layers)])
        else:
            stack = nnx.vmap(Block, in_axes=(None, 0), transform_metadata={nnx.PARTITION_NAME: None})
            self.blocks = nnx.split_rngs(splits=config.num_layers)(lambda r: stack(config, r))(rngs)

    # Embeddings.

    def embed_time(self, t):
        """Timesteps [B, F] in [0, 1000] -> (e [B, F, E] for the head, e0 [B, F, 6, E] for the blocks)."""
        feature = flow.time_sinusoid(t, self.config.frequency_dim)
        e = self.time_embedding(feature.astype(self.time_embedding.fc1.kernel.dtype))
        return e, self.time_projection(jax.nn.silu(e)).reshape(*t.shape, 6, -1)

    def embed_text(self, context) -> TextKV:
        """Cross-attention keys and values of prompt embeddings [B, <= text_length, text_dim].

        Shorter contexts are padded with zero vectors, which the biases then make nonzero and every query attends
        to, exactly as in training.

        Raises:
          ValueError: more positions than `text_length`, or the wrong width.
        """
        length, width = self.config.text_length, self.config.text_dim
        if context.shape[1] > length or context.shape[2] != width:
            raise ValueError(
                f"prompt embeddings must be [B, at most {length}, {width}], not {list(context.shape)}"
            )
        context = jnp.pad(context, ((0, 0), (0, length - context.shape[1]), (0, 0)))
        distinct = jnp.max(jnp.where((context != 0).any((0, 2)), jnp.arange(1, length + 1), 0))
        text = self.text_embedding(context.astype(self.text_embedding.fc1.kernel.dtype))
        if isinstance(self.blocks, nnx.List):
            pairs = (block.cross_attn.key_value(text) for block in self.blocks)
            return TextKV(*zip(*pairs, strict=True), distinct)
        graphdef, stacked = nnx.split(self.blocks.cross_attn)
        pair = jax.lax.map(lambda layer: nnx.merge(graphdef, layer).key_value(text), stacked)
        return TextKV(*pair, distinct)

    # The forwards.

    def denoise(
        self,
        x,
        t,
        text: TextKV,
        cache: KVCache,
        placement: Placement,
        layout: CacheLayout,
        grid: tuple[int, int],
        parallel: Parallel,
    ) -> tuple[jax.Array, KVCache]:
        """One causal pass over a block, which joins (or replaces itself in) the cache before attending to it.

        Args:
          x: patch tokens [B, F, S, 4C].
          t: timesteps [B, F'] where F' divides F; each covers F / F' frames.
          text: from `embed_text`.
          cache, placement, layout: where the block stands.
          grid: token rows and columns of a frame; S is their product.
          parallel: how to run.

        Returns:
          Velocity [B, F, S, 4C] and the cache with this block's keys and values.
        """
        config = self.config
        table = parallel.rope(placement.frames, *grid, config.head_dim)
        sizes = grid[0] * grid[1], config.num_heads, config.head_dim, self.patch_embedding.kernel.dtype
        if isinstance(self.blocks, nnx.List) and not self.remat and parallel.fuses(*sizes):
            x, e, cache = self._run_fused(x, t, text, table, cache, placement, layout, parallel)
            return self.head(x, e), cache

        def attend(q, k, v, layer, cache):
            return parallel.attend_cached(q, k, v, table, cache, layer, placement, layout)

        x, e, cache = self._run(x, t, text, attend, cache, parallel)
        return self.head(x, e), cache

    def forward(self, x, t, text: TextKV, frames, grid, parallel: Parallel, *, frame_mask=None) -> jax.Array:
        """One pass without a cache over whole clips, as the bidirectional model and training need it.

        Args:
          x: patch tokens [B, F, S, 4C].
          t: timesteps [B, F'] where F' divides F (F' = 1: one per sample).
          text: from `embed_text`.
          frames: rotary factors of the frame axis [2, F, pairs], from `rope.frame_factors`.
          grid: token rows and columns of a frame.
          parallel: how to run.
          frame_mask: static bool [F, F], query frame by key frame; None is full attention. See `block_causal_mask`.

        Returns:
          Velocity [B, F, S, 4C].
        """
        x, e = self._forward(x, t, text, frames, grid, parallel, frame_mask)
        return self.head(x, e)

    def teacher_forcing(
        self,
        noisy,
        t,
        clean,
        text: TextKV,
        frames,
        grid,
        parallel: Parallel,
        *,
        frame_mask,
        clean_t=None,
        detach_clean: bool = False,
    ) -> jax.Array:
        """Velocity of `noisy` [B, F, S, 4C] given `clean` frames of the past of the same shape.

        Both halves stand at the same positions; `frame_mask` is [2F, 2F], see `teacher_forcing_mask`. The clean
        half is modulated with `clean_t` [B, F'] (default 0), the noisy half with `t`. With `detach_clean` no gradient
        flows through the clean half's keys and values, as none does through a cache.
        """
        f = noisy.shape[1]
        clean_t = jnp.zeros_like(t) if clean_t is None else clean_t
        times = jnp.concatenate([_per_frame(clean_t, f), _per_frame(t, f)], axis=1)
        both = jnp.concatenate([clean, noisy], axis=1)
        frames = jnp.concatenate([frames, frames], axis=1)
        detached = f if detach_clean else 0
        x, e = self._forward(both, times, text, frames, grid, parallel, frame_mask, detached)
        return self.head(x[:, f:], e[:, f:])

    def _forward(self, x, t, text, frames, grid, parallel, frame_mask, detached: int = 0):
        """`detached` frames give keys and values without gradient."""
        table = parallel.rope(frames, *grid, self.config.head_dim)

        def attend(q, k, v, layer, carry):
            if detached:
                k, v = (
                    jnp.concatenate([jax.lax.stop_gradient(y[:, :detached]), y[:, detached:]], 1)
                    for y in (k, v)
                )
            return parallel.attend(q, k, v, table, grid[0] * grid[1], frame_mask), carry

        x, e, _ = self._run(x, t, text, attend, None, parallel)
        return x, e

    def _embed(self, x, t, parallel):
        """x [B, F, S, E], and the timesteps' e [B, F, E] and e0 [B, F, 6, E]."""
        e, e0 = (_per_frame(y, x.shape[1]) for y in self.embed_time(t))
        return parallel.constrain(self.patch_embedding(x), ACTIVATION), e, e0

    def _run_fused(self, x, t, text, table, cache, placement, layout, parallel):
        """`_run` by `Block.fused`, against a cache."""
        x, e, e0 = self._embed(x, t, parallel)
        cache, pending = parallel.begin_pass(cache, layout.tokens), None
        for layer, block in enumerate(self.blocks):
            x, pending, one = _fused_layer(
                *nnx.split(block), x, pending, e0, text.layer(layer), cache.layer(layer), jnp.int32(layer),
                table, placement, layout=layout, parallel=parallel,
            )  # fmt: skip
            cache = dataclasses.replace(cache.replace_layer(layer, *one.read(0)), reach=one.reach)
        out, param = pending
        x = x + (param[MLP_GATE] + e0[:, :, MLP_GATE])[:, :, None] * out
        return x, e, dataclasses.replace(cache, reach=None)

    def _run(self, x, t, text, attend, carry, parallel):
        """Embeddings and all blocks: (x [B, F, S, E], e [B, F, E], carry)."""
        x, e, e0 = self._embed(x, t, parallel)

        def step(block, x, carry, text, layer):
            return block(x, e0, text, lambda q, k, v: attend(q, k, v, layer, carry), parallel)

        if isinstance(self.blocks, nnx.List):
            for layer, block in enumerate(self.blocks):
                run = functools.partial(step, block, layer=layer)
                run = jax.checkpoint(run) if self.remat else run
                x, carry = run(x, carry, text.layer(layer))
            return x, e, carry

        graphdef, stacked = nnx.split(self.blocks)

        def body(state, layer):
            params, k, v, index = layer
            return step(nnx.merge(graphdef, params), *state, (k, v, text.distinct), index), None

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)  # a scan keeps the two passes apart by itself
        layers = (stacked, text.k, text.v, jnp.arange(self.config.num_layers))
        (x, carry), _ = jax.lax.scan(body, (x, carry), layers)
        return x, e, carry


def _per_frame(values, num_frames: int):
    """Repeats [B, F', ...] along its second axis to F frames."""
    groups = values.shape[1]
    if num_frames % groups:
        raise ValueError(f"{groups} timesteps cannot be shared evenly by {num_frames} frames")
    return values if groups == num_frames else jnp.repeat(values, num_frames // groups, axis=1)


# Frame masks of the training forwards: static numpy, query frame by key frame.


def block_index(num_frames: int, block: int, independent_first: bool = False) -> np.ndarray:
    """Block number of each frame [F]; with `independent_first` frame 0 is a block of its own."""
    frames = np.arange(num_frames)
    return (frames + block - 1) // block if independent_first else frames // block


def block_causal_mask(blocks: np.ndarray, window: int | None = None) -> np.ndarray:
    """bool [F, F]: a frame sees all blocks up to its own; a window is counted back from its own block's end."""
    mask = blocks[:, None] >= blocks[None, :]
    if window is not None:
        end = np.searchsorted(blocks, blocks, side="right")
        mask &= np.arange(len(blocks))[None, :] >= end[:, None] - window
    return mask


def teacher_forcing_mask(blocks: np.ndarray) -> np.ndarray:
    """bool [2F, 2F] over [clean | noisy]: clean sees clean blocks up to its own; noisy sees strictly earlier clean
    blocks and its own noisy block."""
    own = blocks[:, None] == blocks[None, :]
    earlier = blocks[:, None] > blocks[None, :]
    return np.block([[earlier | own, np.zeros_like(own)], [earlier, own]])


# Parameters.


def init(config: TransformerConfig, key, dtype=jnp.float32) -> dict:
    """Random stacked parameters."""
    return modules.init(CausalDiT, config, key, dtype=dtype)


def abstract(config: TransformerConfig, dtype=jnp.float32) -> dict:
    """Shapes of the stacked parameters, the form of checkpoints."""
    return modules.abstract(CausalDiT, config, dtype=dtype)


# Traced once for all layers but the first, which has nothing pending.
@functools.partial(jax.jit, static_argnames=("graphdef", "layout", "parallel"))
def _fused_layer(
    graphdef, params, x, pending, time, text, cache, layer, table, placement, *, layout, parallel
):
    """`Block.fused` of one layer; `layer` is its number, and `cache` of it alone."""
    block = nnx.merge(graphdef, params)

    def attend(projections, y):
        # Values first: they may travel while queries and keys are multiplied. Without the barrier XLA would make one
        # product of the two.
        v, y = jax.lax.optimization_barrier((projections.v(y), y))
        qk, v = (parallel.constrain(x, ACTIVATION) for x in (projections.qk(y), v))
        qk = qk.reshape(*y.shape[:-1], 2, projections.num_heads, -1)
        v = v.reshape(*y.shape[:-1], projections.num_heads, -1)
        scales = projections.norm_q.scale[...], projections.norm_k.scale[...]
        return parallel.attend_product(qk, v, scales, table, cache, layer, placement, layout, block.eps)

    return block.fused(x, pending, time, text, attend, parallel)


def unroll(params: dict, *, consume: bool = False) -> dict:
    """Stacked parameters with the blocks cut into per-layer arrays, and q and k of self-attention joined.

    With `consume` every stacked array is deleted once it is cut, so that a device never holds all of them twice.
    """

    def cut(stacks):
        layers = [jnp.concatenate([x[i] for x in stacks], axis=-1) for i in range(len(stacks[0]))]
        if consume:
            for x in stacks:
                x.delete()
        return layers

    own = dict(params["blocks"]["self_attn"])
    joined = jax.tree.map(lambda *x: x, *(own.pop(name) for name in "qk"))
    rest = jax.tree.map(lambda x: (x,), params["blocks"] | {"self_attn": own})
    blocks = rest | {"self_attn": rest["self_attn"] | {"qk": joined}}
    leaves, structure = jax.tree.flatten(blocks, is_leaf=lambda x: isinstance(x, tuple))
    layers = zip(*map(cut, leaves), strict=True)
    return params | {"blocks": {i: structure.unflatten(layer) for i, layer in enumerate(layers)}}


def is_unrolled(params: dict) -> bool:
    """Whether the blocks are per-layer arrays."""
    return "self_attn" not in params["blocks"]


def bind(config: TransformerConfig, params: dict, *, remat: bool = False) -> CausalDiT:
    """The network holding `params`, stacked or unrolled; for use inside `jax.jit`."""
    return modules.bind(CausalDiT, config, params, unrolled=is_unrolled(params), remat=remat)
