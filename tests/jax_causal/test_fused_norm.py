"""Sums and norms by one kernel, walked through on the CPU, against float64; the plain form; when kernels are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import attention, fused_norm, hopper_rows
from jax_causal.fused_norm import Rows
from jax_causal.parallel import SingleDevice
from tests.kernels_on_cpu import assert_rounded, f64, machine, random, relative

__all__ = ["machine"]

EPS = 1e-6


def _row(param, time, i):
    return (f64(param)[i] + f64(time)[:, :, i])[:, :, None]


@pytest.mark.parametrize("tokens", [8, 10])
@pytest.mark.parametrize("gate", [None, 2, 5])
@pytest.mark.parametrize("rows", [None, Rows(scale=1, shift=0), Rows(scale=4, shift=3)])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_add_norm(machine, gate, rows, tokens, tokens_first):
    shape, E = (2, 3, tokens, 512), 512
    x, out, gates, param, time = random(shape, shape, (6, E), (6, E), (2, 3, 6, E))
    norm = param if rows else tuple(param[:2])
    if gate is None:
        total, y = fused_norm.add_norm(x, None, None, norm, time, rows, eps=EPS)
        assert total is x
    else:
        added = out.swapaxes(1, 2) if tokens_first else out
        total, y = fused_norm.add_norm(
            x, added, (gates, gate), norm, time, rows, eps=EPS, tokens_first=tokens_first
        )
        assert_rounded(total, f64(x) + _row(gates, time, gate) * f64(out))
    centred = f64(total) - f64(total).mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    if rows:
        expected = normed * (1 + _row(param, time, rows.scale)) + _row(param, time, rows.shift)
    else:
        expected = normed * f64(param[0]) + f64(param[1])
    assert_rounded(y, expected)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_the_plain_form_is_the_same_function(machine, tokens_first):
    """Of which the gradient is taken."""
    shape, E = (1, 2, 8, 256), 256
    x, out, gates, param, time = random(shape, shape, (6, E), (6, E), (1, 2, 6, E))
    out = out.swapaxes(1, 2) if tokens_first else out
    rows = Rows(4, 3)
    results = fused_norm.add_norm(x, out, (gates, 5), param, time, rows, eps=EPS, tokens_first=tokens_first)
    arguments = [y.astype(jnp.float32) for y in (x, out, gates, param, time)]
    how = fused_norm.How(5, rows, EPS, tokens_first)
    for result, plain in zip(results, fused_norm.plain_add_norm(how, *arguments), strict=True):
        assert relative(result, plain) < 4e-3


@pytest.mark.parametrize(
    ("sizes", "able"),
    [((1560, 12, 128), True), ((1560, 40, 128), False), ((3, 12, 128), False), ((1560, 12, 64), False)],
)
def test_suits(sizes, able):
    assert hopper_rows.suits(*sizes, jnp.bfloat16) == able
    assert not hopper_rows.suits(*sizes, jnp.float32)


@pytest.mark.parametrize("tokens", [4, 7, 8, 195])
def test_blocks_of_threads_cover_all_tokens(tokens):
    tiles = [hopper_rows.tile(jnp.int32(i), tokens) for i in range(hopper_rows.tiles(tokens))]
    covered = [int(tile.start) + i for tile in tiles for i in range(tile.size)]
    assert set(covered) == set(range(tokens))
    assert len(covered) - tokens < hopper_rows.TOKENS


def test_chosen_where_attention_is_by_the_hopper_kernel(monkeypatch):
    sizes = (1560, 12, 128)
    assert not SingleDevice().fuses(*sizes, jnp.bfloat16)
    monkeypatch.setattr(attention, "_device", lambda: ("gpu", (9, 0)))
    assert SingleDevice().fuses(*sizes, jnp.bfloat16)
    assert not SingleDevice().fuses(*sizes, jnp.float32)
    assert not SingleDevice().fuses(1560, 40, 128, jnp.bfloat16)
    assert not SingleDevice(parts=2).fuses(*sizes, jnp.bfloat16)
    assert not SingleDevice(backend="cudnn").fuses(*sizes, jnp.bfloat16)
    monkeypatch.setattr(attention, "_device", lambda: ("gpu", (10, 0)))
    assert not SingleDevice().fuses(*sizes, jnp.bfloat16)


def test_kernels_lower_for_a_gpu():
    """One of each kind serves all layers."""

    def layers(x, out, param, time):
        for i in range(3):
            affine = tuple(param[:2])
            x, y = fused_norm.add_norm(x, out, (param, 2), affine, time, None, eps=EPS, tokens_first=True)
            x, y = fused_norm.add_norm(x, y, (param, 5), param, time, Rows(1, 0), eps=EPS)
            out = fused_norm.add_norm(x, None, None, param, time, Rows(4, 3), eps=EPS)[1] + i * y
            out = out.swapaxes(1, 2)
        return x, out

    E = 1536
    shapes = (1, 3, 1560, E), (1, 1560, 3, E), (6, E), (1, 3, 6, E)
    x, out, param, time = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    text = jax.jit(layers).trace(x, out, param, time).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
