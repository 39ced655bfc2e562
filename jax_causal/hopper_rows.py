"""What the fused kernels for NVIDIA Hopper are written with, in Pallas (Mosaic GPU): rows of activations in registers.

A row lies in the registers of a warp from the load to the store, so that a block of threads holds four tokens, and sums
are taken across the threads of the warp. What is too wide for that lies in those of all four warps: see `Form`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

HEAD_DIM = 128  # of what is rotated


class Form(NamedTuple):
    """How a block of threads holds rows of up to `widest` entries, a whole number of `step`.

    Attributes:
      tokens: rows of a block.
      row, heads: layouts of [tokens, E] and of [tokens, N, D], where a thread holds eight neighbours here and there.
    """

    step: int
    widest: int
    tokens: int
    row: plgpu.Layout
    heads: plgpu.Layout

    def tiles(self, tokens: int) -> int:
        """Blocks of threads for so many tokens."""
        return -(-tokens // self.tokens)

    def tile(self, index, tokens: int):
        """The tokens of a block of threads, within [0, tokens). Where these do not divide, the last two blocks share
        some, and both write the same."""
        start, size = index * self.tokens, self.tokens
        return pl.ds(start if tokens % size == 0 else jnp.minimum(start, tokens - size), size)

    # In a kernel.

    def spread(self, x, like, *axes):
        """`x`, whose axes are these of `like`, repeated over the other ones."""
        repeated = lax.broadcast_in_dim(x, like.shape, axes)
        return plgpu.layout_cast(repeated, self.row if like.ndim == 2 else self.heads)

    def swap_pairs(self, x):
        """The two of every pair exchanged; a thread holds both."""

        @plgpu.inline_mgpu(
            arg_types=(self.heads,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=self.heads)
        )
        def swap(ctx, x):
            registers = np.empty_like(x.registers)
            for i, register in np.ndenumerate(x.registers):
                registers[i] = vector.shuffle(register, register, [1, 0, 3, 2, 5, 4, 7, 6])
            return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

        return swap(x)


# A row to a warp: a thread holds every 32nd eight neighbours.
NARROW = Form(
    256,
    2048,
    4,
    plgpu.Layout.TILED(plgpu.Tiling(((4, 256), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1),
    plgpu.Layout.TILED(
        plgpu.Tiling(((4, 2, HEAD_DIM), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
    ),
)
# A row to four warps: each holds two of eight heads.
WIDE = Form(
    1024,
    8192,
    1,
    plgpu.Layout.TILED(
        plgpu.Tiling(((1, 1024), (256,), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    ),
    plgpu.Layout.TILED(
        plgpu.Tiling(((1, 8, HEAD_DIM), (2, HEAD_DIM), (8,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    ),
)
FORMS = (NARROW, WIDE)
LOADS_WIDE = jax.__version_info__ >= (0, 11)  # jax 0.10 cannot lower the load of one row of many heads


def form_of(width: int) -> Form | None:
    """The form that takes rows of this width."""
    return next((form for form in FORMS if width % form.step == 0 and width <= form.widest), None)


def suits(tokens: int, heads: int, head_dim: int, dtype) -> bool:
    """Whether the kernels take activations [.., tokens, heads * head_dim]."""
    form = form_of(heads * head_dim)
    fits = form is not None and tokens >= form.tokens and head_dim == HEAD_DIM
    return fits and (form is NARROW or LOADS_WIDE) and dtype == jnp.bfloat16


def launch(kernel, out_type, grid: dict[str, int], name: str, *, waits: bool = True):
    """A function of arrays, and of references that are written in place.

    Devices that write to each other's memory wait for each other before the kernel, unless not `waits`.
    """
    # Not `plgpu.kernel`, which in jax 0.10 takes no references.
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid))
    # Versions that cannot do without wait where they need not.
    options = {} if waits or not CAN_SKIP else {"skip_device_barrier": True}
    return pl.kernel(kernel, out_type, mesh=mesh, compiler_params=plgpu.CompilerParams(**options), name=name)


CAN_SKIP = "skip_device_barrier" in {field.name for field in dataclasses.fields(plgpu.CompilerParams)}


# In a kernel.

# jax 0.10 wants an index beside the reference, and jax 0.12 takes none.
_index = inspect.signature(plgpu.load).parameters.get("idx")
INDEX = ((),) if _index is not None and _index.default is inspect.Parameter.empty else ()


def load(ref, layout):
    """From global memory."""
    return plgpu.load(ref, *INDEX, layout=layout, optimized=False)


def load32(ref, layout):
    """From global memory, as fp32."""
    return load(ref, layout).astype(jnp.float32)


# Counts are int32 [] in global memory. Semaphores of Pallas would do, but each kernel has its own.


def count_one(ref):
    """Adds one to a count, perhaps of another device, which then sees what this block of threads has written before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def count(ctx, ref):
        mgpu_utils.warpgroup_barrier()
        mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(ref)).signal(1)

    count(ref)


def wait_for_count(ref, value: int):
    """Waits until a count has come to `value`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(ctx, ref):
        mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(ref)).wait(value, decrement=False)

    wait(ref)
