"""The key/value cache of causal generation: sink frames, then a ring of the newest frames.

Keys are stored after rotation at absolute positions and softmax does not care about order, so nothing is ever
shifted: a new block overwrites the slots of the oldest frames after the sink. Valid frames are always a prefix of
the slots. Repeating a pass over the same frames lands in the same slots, which is how the context pass replaces
the keys and values of the noisy passes.

Storage per layer is [B, P, K/P, N, D]: every frame's tokens are dealt evenly over P parts, so that all parts have
the same valid length at any time. Parts are what attention splits on one device and what devices share.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import rope

ALIGNMENT = 8  # keys: what the copy engine of a Hopper GPU moves at a time


class Placement(NamedTuple):
    """Where a block of F frames stands: in the cache and in time. Arrays only, so one program serves all blocks."""

    slots: np.ndarray  # int32 [F]: cache slot of each frame
    held: np.ndarray  # int32 []: valid frames once the block is written
    frames: np.ndarray  # fp32 [2, F, pairs]: rotary factors of the frame axis


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Static geometry of a cache. Build it with `create`.

    Attributes:
      capacity: frames held at most; with a window this is the window.
      sink: first frames that are never overwritten.
      tokens: S, tokens of one frame.
      stored: tokens of one frame that there is room for, S or more; the room behind S is never valid.
      parts: P; divides `stored`. Part p holds tokens p * stored / P onward of every frame.
      ring: whether frames beyond the capacity overwrite the oldest ones after the sink.
      contiguous: whether a block never wraps around inside the ring and so is written in one piece.
    """

    capacity: int
    sink: int
    tokens: int
    stored: int
    parts: int = 1
    ring: bool = False
    contiguous: bool = True

    @classmethod
    def create(
        cls,
        num_frames: int | None,
        *,
        tokens: int,
        block: int,
        lead: int = 0,
        window: int | None = None,
        sink: int = 0,
        stored: int | None = None,
        parts: int = 1,
    ) -> CacheLayout:
        """Layout for a rollout.

        Args:
          num_frames: latent frames of the whole video, or None for as many as wanted (needs a window).
          tokens: tokens of one frame.
          block: frames per block.
          lead: frames before the first regular block (an independent first frame, say).
          window: frames attended to, sink and current block included; None keeps everything.
          sink: first frames that stay attended to for ever; counts into the window.
          stored, parts: see the class; `stored` is `tokens` by default.

        Raises:
          ValueError: the window cannot hold sink and block, or an endless video has no window.
        """
        stored = stored or tokens
        if stored % parts:
            raise ValueError(f"parts={parts} must divide the {stored} tokens of a frame")
        if window is None:
            if num_frames is None:
                raise ValueError("a video without an end needs a bounded cache: pass window=, e.g. window=21")
            if sink:
                raise ValueError(f"sink={sink} has no effect without a window: pass window= as well")
            return cls(num_frames, 0, tokens, stored, parts)
        if sink < 0 or window < sink + block:
            raise ValueError(
                f"window={window} must hold the sink and one block: with sink={sink} and {block} frames per block "
                f"use window={max(sink, 0) + block} or more"
            )
        if num_frames is not None and num_frames <= window:
            return cls(num_frames, 0, tokens, stored, parts)
        aligned = (window - sink) % block == 0 and (sink - lead) % block == 0
        return cls(window, sink, tokens, stored, parts, ring=True, contiguous=aligned)

    def slot(self, frame):
        """Cache slot of an absolute frame number (integer or integer array)."""
        if not self.ring:
            return frame
        turned = self.sink + (frame - self.sink) % (self.capacity - self.sink)
        return np.where(np.asarray(frame) < self.sink, frame, turned)

    def held_frames(self, end: int) -> list[int]:
        """Absolute numbers of the frames held once frames 0 .. end - 1 are written, sink first."""
        if end <= self.capacity:
            return list(range(end))
        return [*range(self.sink), *range(end - (self.capacity - self.sink), end)]

    def place(self, start: int, num_frames: int, head_dim: int) -> Placement:
        """Placement of frames start .. start + num_frames - 1. Host arithmetic; raises ValueError on overflow."""
        end = start + num_frames
        if end > self.capacity and not self.ring:
            raise ValueError(
                f"frames {start}..{end - 1} do not fit a cache of {self.capacity} frames without a window"
            )
        if num_frames > self.capacity - self.sink and self.ring:
            raise ValueError(f"{num_frames} frames at once overrun a ring of {self.capacity - self.sink}")
        slots = np.asarray(self.slot(start + np.arange(num_frames)), np.int32)
        if self.contiguous and slots[-1] - slots[0] != num_frames - 1:
            raise ValueError(
                f"frames {start}..{end - 1} wrap around the ring: they are not a block of this layout"
            )
        held = np.asarray(min(end, self.capacity), np.int32)
        return Placement(slots, held, rope.frame_factors(start, num_frames, head_dim))

    def part_length(self, held):
        """Valid keys in each part when `held` frames are valid (room for them, where tokens are short)."""
        return held * (self.stored // self.parts)

    @property
    def room(self) -> int:
        """Keys that there is room for in each part, rounded up to what fused kernels want; the rest is never valid."""
        return -(-self.part_length(self.capacity) // ALIGNMENT) * ALIGNMENT

    def part_tokens(self, part: int) -> int:
        """Tokens of each frame that one part holds; fewer in the last ones where `stored` exceeds `tokens`."""
        size = self.stored // self.parts
        return min(max(self.tokens - part * size, 0), size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers: stacked [L, B, P, K/P, N, D], or a tuple of L arrays [B, P, K/P, N, D].

    The stacked form is carried through a scan over layers, the tuple through unrolled layers. Either is updated in
    place when the buffers are donated.

    `reach` lives within a pass, from layer to layer, where devices write to each other's caches: see
    `peer_memory.Reach`.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    reach: tuple | None = None

    @classmethod
    def zeros(
        cls,
        layout: CacheLayout,
        num_layers: int,
        batch: int,
        num_heads: int,
        head_dim: int,
        dtype,
        *,
        stacked: bool = True,
        device=None,
    ) -> KVCache:
        """An empty cache; zero, never uninitialised, because masked keys still enter products.

        `device` is a device or sharding that the cache is committed to, as the block step's outputs are: a cache
        that began elsewhere would compile the step twice.
        """
        shape = (batch, layout.parts, layout.room, num_heads, head_dim)
        if stacked:
            return cls(*(jnp.zeros((num_layers, *shape), dtype, device=device) for _ in "kv"))
        return cls(*(tuple(jnp.zeros(shape, dtype, device=device) for _ in range(num_layers)) for _ in "kv"))

    def write(self, layout: CacheLayout, layer, slots, k, v) -> KVCache:
        """A cache with `k` and `v` [B, F, S, N, D] in the given slots [F] of `layer` (an index)."""
        return KVCache(*(_write(layout, s, layer, slots, x) for s, x in ((self.k, k), (self.v, v))))

    def write_short(self, layout: CacheLayout, layer, slots, k, v, valid) -> KVCache:
        """`write` for a share of which only the first `valid` (int32 []) of S tokens exist, in one part.

        Frame slots then lie `valid` apart, and what follows a slot is kept.
        """

        def put(store, x):
            size = x.shape[2]
            exists = (jnp.arange(size) < valid)[:, None, None]
            for i in range(x.shape[1]):
                start = slots[i] * valid
                old = jax.lax.dynamic_slice_in_dim(store, start, size, axis=2)
                new = jnp.where(exists, x[:, None, i].astype(store.dtype), old)
                store = jax.lax.dynamic_update_slice_in_dim(store, new, start, axis=2)
            return store

        return self.replace_layer(layer, *map(put, self.read(layer), (k, v)))

    def replace_layer(self, layer, k, v) -> KVCache:
        """A cache with `k` and `v` [B, P, K/P, N, D] as the whole of one layer."""
        if isinstance(self.k, tuple):
            return KVCache(*((*s[:layer], x, *s[layer + 1 :]) for s, x in ((self.k, k), (self.v, v))))
        put = jax.lax.dynamic_update_index_in_dim
        return KVCache(put(self.k, k, layer, 0), put(self.v, v, layer, 0))

    def layer(self, layer: int) -> KVCache:
        """That of one layer, where layers are unrolled."""
        return KVCache(self.k[layer : layer + 1], self.v[layer : layer + 1], self.reach)

    def read(self, layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, P, K/P, N, D] of one layer, valid or not."""
        if isinstance(self.k, tuple):
            return self.k[layer], self.v[layer]
        return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.k, self.v))

    def read_frame(self, layout: CacheLayout, layer, slot: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, N, D] of the frame in one slot of one layer."""
        sizes = [layout.part_tokens(part) for part in range(layout.parts)]
        return tuple(
            jnp.concatenate([x[:, p, slot * n : (slot + 1) * n] for p, n in enumerate(sizes)], axis=1)
            for x in self.read(layer)
        )


def _write(layout: CacheLayout, store, layer, slots, x):
    if isinstance(store, tuple):
        return (*store[:layer], _write_layer(layout, store[layer], (), slots, x), *store[layer + 1 :])
    return _write_layer(layout, store, (layer,), slots, x)


def _write_layer(layout: CacheLayout, store, index, slots, x):
    """Writes frames into `store`, whose leading axes are addressed by `index`."""
    b, f, s, n, d = x.shape
    size = s // layout.parts
    step = f if layout.contiguous else 1
    x = x.reshape(b, f, layout.parts, size, n, d).swapaxes(1, 2).astype(store.dtype)
    for i in range(0, f, step):
        piece = x[:, :, i : i + step].reshape(b, layout.parts, step * size, n, d)
        piece = piece.reshape((1,) * len(index) + piece.shape)
        start = (*index, 0, 0, slots[i] * size, 0, 0)
        store = jax.lax.dynamic_update_slice(store, piece, start)
    return store
