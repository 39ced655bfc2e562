"""Three-axis rotary position embedding with a global time index.

Each head dim is cut into consecutive (frame, row, column) ranges of interleaved pairs; pair k of an axis with n
dims turns by position * 10000^(-2k/n). The frame factors of a block are computed on the host in float64 from its
absolute start frame, so time has no table to run out of and no precision to lose; rows and columns never change.

Source: RoFormer (arXiv:2104.09864) as laid out by Wan2.1 (arXiv:2503.20314).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs of the frame, row and column axes; (22, 21, 21) for head dim 128."""
    pairs = head_dim // 2
    third = pairs // 3
    return pairs - 2 * third, third, third


def _factors(positions, pairs: int) -> np.ndarray:
    """cos and sin stacked [2, positions, pairs], float64 angles rounded once to fp32."""
    angle = np.outer(np.asarray(positions, np.float64), 10000.0 ** (-np.arange(pairs) / pairs))
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def frame_factors(start_frame: int, num_frames: int, head_dim: int) -> np.ndarray:
    """fp32 [2, F, pairs]: cos and sin of the frame axis for frames start_frame .. start_frame + F - 1."""
    return _factors(start_frame + np.arange(num_frames), axis_pairs(head_dim)[0])


@functools.lru_cache(maxsize=64)
def axis_factors(height: int, width: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [2, height, pairs] and [2, width, pairs]: cos and sin of the row and of the column axis."""
    _, row_pairs, column_pairs = axis_pairs(head_dim)
    return _factors(np.arange(height), row_pairs), _factors(np.arange(width), column_pairs)


@functools.lru_cache(maxsize=64)
def spatial_factors(height: int, width: int, head_dim: int) -> np.ndarray:
    """fp32 [2, S, pairs]: cos and sin of both spatial axes for a height x width token grid, row by row."""
    rows, columns = axis_factors(height, width, head_dim)
    return np.concatenate([np.repeat(rows, width, axis=1), np.tile(columns, (1, height, 1))], axis=-1)


def tables(frames: jax.Array, spatial: jax.Array) -> jax.Array:
    """Factors of every token of a block, fp32 [2, F, S, D/2], from [2, F, pairs] and [2, S, pairs].

    `spatial` may hold any subset of a frame's tokens, such as one device's share.
    """
    (_, f, p), (_, s, q) = frames.shape, spatial.shape
    return jnp.concatenate(
        [
            jnp.broadcast_to(frames[:, :, None], (2, f, s, p)),
            jnp.broadcast_to(spatial[:, None], (2, f, s, q)),
        ],
        axis=-1,
    )


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Turns the interleaved pairs of `x` [B, F, S, N, D] by `table` [2, F, S, D/2]; fp32 inside, dtype kept."""
    # Written with a reversal instead of strided slices, which XLA would give a kernel of their own: so it becomes one
    # kernel with the norm before it and the cast after it.
    with jax.named_scope("rope"):
        cos, sin = table[
            :, :, :, None, :, None
        ]  # axes for heads and for the two of a pair: [F, S, 1, D/2, 1]
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        turned = pairs * cos + pairs[..., ::-1] * (sin * np.float32([-1, 1]))
        return turned.reshape(x.shape).astype(x.dtype)
