"""How a model is run: the seam where sharding enters.

Model code is written once, against the `Parallel` protocol, and never mentions a mesh. `SingleDevice` is its plain
form; a sharded form implements the same methods, each under its own mesh, on the same logical shapes.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
from einops import rearrange

from jax_causal import rope
from jax_causal.attention import attention, choose_backend
from jax_causal.cache import CacheLayout, KVCache, Placement
from jax_causal.config import ModelConfig
from jax_causal.vae_layers import alone


class Parallel(Protocol):
    """What a model asks of the way it is run. Implementations are hashable and static under `jax.jit`.

    Shapes are logical (whole) ones: latents [B, F, C, h, w]; tokens [B, F, S, 4C]; activations [B, F, S, E];
    q, k, v [B, F, S, N, D].
    """

    @property
    def name(self) -> str:
        """Of the strategy, for people."""

    @property
    def reason(self) -> str:
        """Why this strategy, for people; empty where there was no choice."""

    @property
    def num_devices(self) -> int:
        """Devices that share the work."""

    @property
    def unrolled(self) -> bool:
        """Whether layers run unrolled over per-layer arrays instead of a scan over stacked ones."""

    def for_model(self, config: ModelConfig, *, held: int | None = None) -> Parallel:
        """The form that runs this model, with everything settled that depends on its sizes; `held` latent frames are
        cached (default: as many as the model was trained on)."""

    def shardings(self, abstract, component: str = "transformer"):
        """A sharding for every leaf of a component's parameters, a nested dict of `jax.ShapeDtypeStruct`; for the
        component "data", of arrays whose first axis is a batch."""

    def cache_shape(self, tokens: int) -> tuple[int, int]:
        """(room for a frame's tokens in the cache, parts that it is dealt over); see `CacheLayout`."""

    def init_cache(
        self, layout: CacheLayout, num_layers, batch, num_heads, head_dim, dtype, *, stacked
    ) -> KVCache:
        """An empty cache, laid out as attention wants it."""

    def cache_sharding(self, *, stacked: bool):
        """Of the cache's keys and of its values; see `KVCache`."""

    def rope(self, frames, height: int, width: int, head_dim: int):
        """Rotary factors [2, F, S, D/2] of a block, from the frame axis's [2, F, pairs]."""

    def attend_cached(self, q, k, v, table, cache: KVCache, layer, placement: Placement, layout: CacheLayout):
        """Rotates q and k, writes k and v to the cache, attends to all it holds: (out [B, F, S, N, D], cache)."""

    def fuses(self, tokens: int, heads: int, head_dim: int, dtype) -> bool:
        """Whether unrolled layers run by `add_norm` and `attend_product` where they attend to a cache; `tokens` is S,
        without padding."""

    def begin_pass(self, cache: KVCache, tokens: int) -> KVCache:
        """The cache for one pass of layers that run by `attend_product`, with what that needs in its `reach`. `tokens`
        is S."""

    def add_norm(self, x, out, gate, norm, time, rows, *, eps: float, tokens_first: bool = False):
        """`fused_norm.add_norm`."""

    def attend_product(
        self,
        qk,
        v,
        scales,
        table,
        cache: KVCache,
        layer,
        placement: Placement,
        layout: CacheLayout,
        eps: float,
    ):
        """Norms of queries and keys, and `attend_cached`, from what `fused_rotation.rotate_into_cache` takes. `cache`
        is of this layer alone, and `layer` its number (int32 []). The output is [B, S, F, N, D]."""

    def attend(self, q, k, v, table, tokens: int, frame_mask=None):
        """Rotates q and k, then attends; `frame_mask` bool [F, F] says which frames see which (None: all).
        `tokens` is S without whatever padding `to_tokens` added."""

    def attend_text(self, q, k, v, distinct):
        """Attends from q [B, F, S, N, D] to text k, v [B, text, N, D]: no rotation, no mask. From the int32 scalar
        `distinct` on, keys are equal, and values too."""

    def constrain(self, x, names):
        """`x` laid out by the logical names of its axes; a hint to the partitioner."""

    def halo(self, run, seen, columns: tuple[int, int], weights, *others):
        """Runs a layer of the VAE that sees columns beyond the width of its activations; see `vae_layers.alone`."""

    def to_tokens(self, latent, patch: int):
        """Latent [B, F, C, h, w] to patch tokens [B, F, S, patch * patch * C], channel fastest; S may be padded."""

    def from_tokens(self, tokens, patch: int, height: int, width: int):
        """The inverse of `to_tokens`, for a token grid height x width."""


@dataclasses.dataclass(frozen=True)
class SingleDevice:
    """Everything on one device.

    Attributes:
      backend: attention back end, see `attention.attention`; "auto" chooses by what the device can do.
      parts: parts that attention splits the keys into, to fill a device when queries are few.
      unroll: run layers unrolled over per-layer arrays instead of scanning over stacked ones: slower to compile and
        faster to run on a GPU. None means: unroll on an accelerator.
      device: which one; None is the first.
    """

    backend: str = "auto"
    parts: int = 1
    unroll: bool | None = None
    device: jax.Device | None = None

    name, reason, num_devices = "single", "", 1

    @property
    def unrolled(self) -> bool:
        return jax.default_backend() == "gpu" if self.unroll is None else self.unroll

    def for_model(self, config, *, held=None):
        return self

    def shardings(self, abstract, component="transformer"):
        return jax.tree.map(lambda _: self._sharding, abstract)

    def cache_shape(self, tokens):
        return tokens, self.parts

    def init_cache(self, layout, num_layers, batch, num_heads, head_dim, dtype, *, stacked):
        sizes = (num_layers, batch, num_heads, head_dim)
        return KVCache.zeros(layout, *sizes, dtype, stacked=stacked, device=self._sharding)

    def cache_sharding(self, *, stacked):
        return self._sharding

    @property
    def _sharding(self):
        return jax.sharding.SingleDeviceSharding(self.device or jax.devices()[0])

    def rope(self, frames, height, width, head_dim):
        return rope.tables(frames, rope.spatial_factors(height, width, head_dim))

    def attend_cached(self, q, k, v, table, cache, layer, placement, layout):
        q, k = rope.rotate(q, table), rope.rotate(k, table)
        cache = cache.write(layout, layer, placement.slots, k, v)
        return self._attend_to(cache, layer, q, placement, layout), cache

    def fuses(self, tokens, heads, head_dim, dtype):
        q = jax.ShapeDtypeStruct((1, tokens, heads, head_dim), dtype)
        if self.parts > 1 or choose_backend(self.backend, q) != "hopper":
            return False
        from jax_causal import hopper_rows  # on demand: importing Pallas takes its time

        return hopper_rows.suits(tokens, heads, head_dim, dtype)

    def begin_pass(self, cache, tokens):
        return cache

    def add_norm(self, x, out, gate, norm, time, rows, *, eps, tokens_first=False):
        from jax_causal import fused_norm

        return fused_norm.add_norm(x, out, gate, norm, time, rows, eps=eps, tokens_first=tokens_first)

    def attend_product(self, qk, v, scales, table, cache, layer, placement, layout, eps):
        from jax_causal import fused_rotation

        q, *held, _ = fused_rotation.rotate_into_cache(
            qk, v, scales, table, *cache.read(0), placement.slots, eps=eps
        )
        cache = cache.replace_layer(0, *held)
        return self._attend_to(cache, 0, q, placement, layout), cache

    def _attend_to(self, cache, layer, q, placement, layout):
        keys, values = cache.read(layer)
        length = layout.part_length(placement.held)
        return attention(_tokens(q), keys, values, length=length, backend=self.backend).reshape(q.shape)

    def attend(self, q, k, v, table, tokens, frame_mask=None):
        q, k = rope.rotate(q, table), rope.rotate(k, table)
        out = attention(_tokens(q), _tokens(k), _tokens(v), mask=frame_mask, backend=self.backend)
        return out.reshape(q.shape)

    def attend_text(self, q, k, v, distinct):
        return attention(_tokens(q), k, v, distinct=distinct, backend=self.backend).reshape(q.shape)

    def constrain(self, x, names):
        return x

    def halo(self, run, seen, columns, weights, *others):
        return alone(run, seen, columns, weights, *others)

    def to_tokens(self, latent, patch):
        tokens = rearrange(latent, "b f c (h p) (w q) -> b f (h w) (p q c)", p=patch, q=patch)
        if self.device is None:
            return tokens
        # Noise is drawn from a key alone, which would have it lie on the first device.
        return jax.lax.with_sharding_constraint(tokens, self._sharding)

    def from_tokens(self, tokens, patch, height, width):
        return rearrange(
            tokens, "b f (h w) (p q c) -> b f c (h p) (w q)", h=height, w=width, p=patch, q=patch
        )


def _tokens(x):
    """[B, F, S, N, D] -> [B, F * S, N, D]."""
    b, f, s, n, d = x.shape
    return x.reshape(b, f * s, n, d)
