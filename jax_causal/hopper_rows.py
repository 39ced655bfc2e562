"""What the fused kernels for NVIDIA Hopper are written with, in Pallas (Mosaic GPU): rows of activations in registers.

A block of threads holds `TOKENS` tokens, a warp one of them: its row lies in registers from the load to the store, and
sums are taken across the threads of the warp.
"""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

from jax_causal import mosaic

TOKENS = 4  # of a block of threads: one to each warp
HEAD_DIM = 128  # of what is rotated
MAX_WIDTH = 2048  # of a row in registers

# A thread holds every 32nd eight neighbours of its warp's row: of [tokens, E], and of [tokens, N, D].
ROW = plgpu.Layout.TILED(plgpu.Tiling(((TOKENS, 256), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
HEADS = plgpu.Layout.TILED(
    plgpu.Tiling(((TOKENS, 2, HEAD_DIM), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)


def suits(tokens: int, heads: int, head_dim: int, dtype) -> bool:
    """Whether the kernels take activations [.., tokens, heads * head_dim]."""
    width = heads * head_dim
    fits = tokens >= TOKENS and head_dim == HEAD_DIM and width % 256 == 0 and width <= MAX_WIDTH
    return fits and dtype == jnp.bfloat16


def tiles(tokens: int) -> int:
    """Blocks of threads for so many tokens."""
    return -(-tokens // TOKENS)


def tile(index, tokens: int):
    """The tokens of a block of threads, within [0, tokens). Where these do not divide, the last two blocks share some,
    and both write the same."""
    start = index * TOKENS
    return pl.ds(start if tokens % TOKENS == 0 else jnp.minimum(start, tokens - TOKENS), TOKENS)


def launch(kernel, out_type, grid: dict[str, int], name: str):
    """A function of arrays, and of references that are written in place."""
    # Not `plgpu.kernel`, which in jax 0.10 takes no references.
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid))
    named = mosaic.named(kernel, name)
    return pl.kernel(named, out_type, mesh=mesh, compiler_params=plgpu.CompilerParams(), name=name)


# In a kernel.

# jax 0.10 wants an index beside the reference, and jax 0.12 takes none.
_index = inspect.signature(plgpu.load).parameters.get("idx")
INDEX = ((),) if _index is not None and _index.default is inspect.Parameter.empty else ()


def load(ref, layout):
    """From global or shared memory."""
    return plgpu.load(ref, *INDEX, layout=layout, optimized=False)


def load32(ref, layout):
    """From global memory, as fp32."""
    return load(ref, layout).astype(jnp.float32)


def spread(x, like, *axes):
    """`x`, whose axes are these of `like`, repeated over the other ones."""
    repeated = lax.broadcast_in_dim(x, like.shape, axes)
    return plgpu.layout_cast(repeated, ROW if like.ndim == 2 else HEADS)


def swap_pairs(x):
    """The two of every pair exchanged; a thread holds both."""

    @plgpu.inline_mgpu(arg_types=(HEADS,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=HEADS))
    def swap(ctx, x):
        registers = np.empty_like(x.registers)
        for i, register in np.ndenumerate(x.registers):
            registers[i] = vector.shuffle(register, register, [1, 0, 3, 2, 5, 4, 7, 6])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

    return swap(x)
