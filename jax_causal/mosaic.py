"""What every kernel in Pallas (Mosaic GPU) is wrapped in, so that compiled programs that have it are found again."""

from __future__ import annotations

from collections.abc import Callable

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

_NAME = "mosaic_gpu.dump_basename"


def named(kernel: Callable, name: str) -> Callable:
    """`kernel`, the same however many others the process has made before.

    Without a name jaxlib gives every kernel one that counts them. It is in the kernel's text, and that in the key under
    which JAX keeps the compiled program: the same program, made after another one, would be compiled again, and a
    program with two alike would compile both.
    """

    def with_name(*refs, **scratch):
        @plgpu.inline_mgpu()
        def set_name(ctx):
            ctx.module.operation.attributes[_NAME] = ir.StringAttr.get(name)

        set_name()
        kernel(*refs, **scratch)

    return with_name
