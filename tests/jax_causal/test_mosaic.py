"""Kernels that do not depend on what the process has done before."""

import jax
import jax.numpy as jnp
import pytest

from jax_causal import attention as attn
from jax_causal import fused_norm
from tests.jax_causal.test_attention import H200


def _attention():
    x = jax.ShapeDtypeStruct((1, 1560, 12, 128), jnp.bfloat16)
    return lambda q: attn.attention(q, q, q, backend="hopper"), (x,)


def _norm():
    shapes = (1, 3, 8, 512), (512,), (1, 3, 6, 512)

    def norm(x, row, time):
        return fused_norm.add_norm(x, None, None, (row, row), time, None, eps=1e-6)

    return norm, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize("program", [_attention, _norm])
def test_a_program_is_the_same_after_others(monkeypatch, program):
    """Or it is compiled again, though a cache on disk holds it: the key of that is made from the text."""
    monkeypatch.setattr(attn, "_device", lambda: H200)

    def text():
        function, arguments = program()
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    first = text()
    assert first.count("custom_call @mosaic_gpu") == 1
    assert first == text()
    assert "mosaic_gpu.dump_basename" in first  # also where this version of jaxlib does not count
