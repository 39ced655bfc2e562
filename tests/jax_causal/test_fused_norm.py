"""The fused kernels, walked through on the CPU block by block, against float64; their lowering and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jax_causal import attention, fused_norm, rope
from jax_causal.fused_norm import Rows
from jax_causal.parallel import SingleDevice

EPS = 1e-6


class _Ref:
    """Memory as a kernel sees it, over a numpy array."""

    def __init__(self, array):
        self.array = array

    at = property(lambda self: self)

    def _index(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return tuple(
            slice(int(i.start), int(i.start) + i.size) if isinstance(i, pl.Slice) else int(i) for i in index
        )

    def __getitem__(self, index):
        part = self.array[self._index(index)]
        return _Ref(part) if part.ndim else part

    def __setitem__(self, index, value):
        part = self.array[self._index(index)]
        assert part.shape == value.shape
        assert part.dtype == value.dtype
        part[...] = value


@pytest.fixture
def on_cpu(monkeypatch):
    """Runs the kernels as written, one block of threads after another."""
    place = {}

    def launch(kernel, out_type, grid, name):
        def run(*operands):
            many = isinstance(out_type, list)
            outs = [np.full(x.shape, np.nan, x.dtype) for x in (out_type if many else [out_type])]
            arrays = [np.array(x[...]) for x in operands]
            for point in itertools.product(*map(range, grid.values())):
                place.update(zip(grid, point, strict=True))
                kernel(*map(_Ref, arrays), *map(_Ref, outs))
            for ref, array in zip(operands, arrays, strict=True):
                if isinstance(ref, jax.Ref):
                    ref[...] = array
            outs = [jnp.asarray(x) for x in outs]
            return outs if many else outs[0]

        return run

    def swap_pairs(x):
        return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)

    monkeypatch.setattr(fused_norm, "_launch", launch)
    monkeypatch.setattr(fused_norm, "_load", lambda ref, layout: jnp.asarray(ref.array))
    monkeypatch.setattr(
        fused_norm, "_spread", lambda x, like, *axes: jax.lax.broadcast_in_dim(x, like.shape, axes)
    )
    monkeypatch.setattr(fused_norm, "_swap_pairs", swap_pairs)
    monkeypatch.setattr(jax.lax, "axis_index", lambda name: jnp.int32(place[name]))
    monkeypatch.setattr(pl, "when", lambda condition: lambda run: run() if condition else None)
    with jax.disable_jit():
        yield


def random(*shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def f64(x):
    return np.asarray(x, np.float64)


def _assert_rounded(actual, expected):
    """One rounding to bfloat16 away from float64, and what the fp32 sums before it explain."""
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(actual), expected, rtol=2**-8, atol=1e-4)


def _row(param, time, i):
    return (f64(param)[i] + f64(time)[:, :, i])[:, :, None]


@pytest.mark.parametrize("gate", [None, 2, 5])
@pytest.mark.parametrize("rows", [None, Rows(scale=1, shift=0), Rows(scale=4, shift=3)])
def test_add_norm(on_cpu, gate, rows):
    shape, E = (2, 3, 8, 512), 512
    x, out, gates, param, time = random(shape, shape, (6, E), (6, E), (2, 3, 6, E))
    norm = param if rows else tuple(param[:2])
    if gate is None:
        total, y = fused_norm.add_norm(x, None, None, norm, time, rows, eps=EPS)
        assert total is x
    else:
        total, y = fused_norm.add_norm(x, out, (gates, gate), norm, time, rows, eps=EPS)
        _assert_rounded(total, f64(x) + _row(gates, time, gate) * f64(out))
    centred = f64(total) - f64(total).mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    if rows:
        expected = normed * (1 + _row(param, time, rows.scale)) + _row(param, time, rows.shift)
    else:
        expected = normed * f64(param[0]) + f64(param[1])
    _assert_rounded(y, expected)


def _queries(B=2, F=3, S=8, N=4, slots=(4, 0, 2), room=48):
    D = fused_norm.HEAD_DIM
    qkv, *scales, keys, values = random((B, F, S, 3, N, D), *2 * [(N * D,)], *2 * [(B, 1, room, N, D)])
    frames, spatial = rope.frame_factors(1000, F, D), rope.spatial_factors(2, S // 2, D)
    return qkv, scales, rope.tables(jnp.asarray(frames), spatial), keys, values, jnp.asarray(slots)


def _turned(x, table):
    """By complex numbers."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    cos, sin = f64(table)[:, :, :, None]
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def test_rotate_into_cache(on_cpu):
    qkv, scales, table, keys, values, slots = _queries()
    q, new_keys, new_values = fused_norm.rotate_into_cache(
        qkv, scales, fused_norm.factors(table), keys, values, slots, eps=EPS
    )
    F, S, _, N, D = qkv.shape[1:]
    expected = []
    for i in range(2):
        x = f64(qkv)[:, :, :, i]
        x = x / np.sqrt((x**2).mean((-2, -1), keepdims=True) + EPS) * f64(scales[i]).reshape(N, D)
        expected.append(_turned(x, table))
    _assert_rounded(q, expected[0])
    untouched = np.ones(keys.shape[2], bool)
    for f, slot in enumerate(slots.tolist()):
        place = slice(slot * S, (slot + 1) * S)
        untouched[place] = False
        _assert_rounded(new_keys[:, 0, place], expected[1][:, f])
        np.testing.assert_array_equal(f64(new_values[:, 0, place]), f64(qkv)[:, f, :, 2])
    assert untouched.sum() == keys.shape[2] - F * S
    for new, old in ((new_keys, keys), (new_values, values)):
        np.testing.assert_array_equal(f64(new)[:, :, untouched], f64(old)[:, :, untouched])


def _relative(actual, expected):
    return np.linalg.norm(f64(actual) - expected) / np.linalg.norm(expected)


def test_plain_forms_are_the_same_functions(on_cpu):
    """Of which the gradients are taken."""
    shape, E = (1, 2, 8, 256), 256
    x, out, gates, param, time = random(shape, shape, (6, E), (6, E), (1, 2, 6, E))
    rows = Rows(4, 3)
    results = fused_norm.add_norm(x, out, (gates, 5), param, time, rows, eps=EPS)
    arguments = [y.astype(jnp.float32) for y in (x, out, gates, param, time)]
    for result, plain in zip(results, fused_norm.plain_add_norm(5, rows, EPS, *arguments), strict=True):
        assert _relative(result, f64(plain)) < 4e-3

    qkv, scales, table, keys, values, slots = _queries()
    factors = fused_norm.factors(table)
    results = fused_norm.rotate_into_cache(qkv, scales, factors, keys, values, slots, eps=EPS)
    arguments = jax.tree.map(lambda y: y.astype(jnp.float32), (qkv, scales, factors, keys, values))
    for result, plain in zip(results, fused_norm.plain_rotate(EPS, *arguments, slots), strict=True):
        assert _relative(result, f64(plain)) < 4e-3


def test_gradient_goes_around_the_kernel(on_cpu):
    """With respect to the cache too, whose values before are not kept for it."""
    qkv, scales, table, *caches, slots = _queries(B=1, F=2, N=2, slots=(1, 0), room=24)
    factors = fused_norm.factors(table)
    weights = random(*[(1, 2, 8, 2, 128)], *2 * [(1, 1, 24, 2, 128)], seed=1)

    def loss(run, qkv, scales, caches):
        results = run(qkv, scales, factors, *caches, slots)
        return sum((y.astype(jnp.float32) * w).sum() for y, w in zip(results, weights, strict=True))

    fused = functools.partial(fused_norm.rotate_into_cache, eps=EPS)
    plain = functools.partial(fused_norm.plain_rotate, EPS)
    of = (qkv, scales, caches)
    actual = jax.grad(functools.partial(loss, fused), (0, 1, 2))(*of)
    exact = jax.tree.map(lambda y: y.astype(jnp.float32), of)
    expected = jax.grad(functools.partial(loss, plain), (0, 1, 2))(*exact)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert _relative(a, f64(b)) < 2e-2


def test_kernels_lower_for_a_gpu():
    """One of each kind serves all layers, and the cache is written in place."""

    def layers(x, out, param, time, qkv, scale, factors, keys, values, slots):
        for i in range(3):
            q, keys, values = fused_norm.rotate_into_cache(
                qkv, (scale, scale), factors, keys, values, slots, eps=EPS
            )
            qkv = qkv.at[:, :, :, 0].set(q)
            x, y = fused_norm.add_norm(x, out, (param, 2), tuple(param[:2]), time, None, eps=EPS)
            x, y = fused_norm.add_norm(x, y, (param, 5), param, time, Rows(1, 0), eps=EPS)
            out = fused_norm.add_norm(x, None, None, param, time, Rows(4, 3), eps=EPS)[1] + i * y
        return x, out, qkv, keys, values

    E, D = 1536, 128
    x, param, time = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 3, 1560, E), (6, E), (1, 3, 6, E)))
    qkv, scale, cache = (
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 3, 1560, 3, 12, D), (E,), (1, 1, 32760, 12, D))
    )
    factors, slots = jax.ShapeDtypeStruct((2, 3, 1560, D), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    traced = jax.jit(layers).trace(x, x, param, time, qkv, scale, factors, cache, cache, slots)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 4
    assert sorted(line.count("output_operand_alias<") for line in calls) == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("sizes", "able"),
    [((1560, 12, 128), True), ((1560, 40, 128), False), ((1558, 12, 128), False), ((1560, 12, 64), False)],
)
def test_suits(sizes, able):
    assert fused_norm.suits(*sizes, jnp.bfloat16) == able
    assert not fused_norm.suits(*sizes, jnp.float32)


def test_chosen_where_attention_is_by_the_hopper_kernel(monkeypatch):
    sizes = (1560, 12, 128)
    assert not SingleDevice().fuses(*sizes, jnp.bfloat16)
    monkeypatch.setattr(attention, "_device", lambda: ("gpu", (9, 0)))
    assert SingleDevice().fuses(*sizes, jnp.bfloat16)
    assert not SingleDevice().fuses(*sizes, jnp.float32)
    assert not SingleDevice().fuses(1558, 12, 128, jnp.bfloat16)
    assert not SingleDevice(parts=2).fuses(*sizes, jnp.bfloat16)
    assert not SingleDevice(backend="cudnn").fuses(*sizes, jnp.bfloat16)
    monkeypatch.setattr(attention, "_device", lambda: ("gpu", (10, 0)))
    assert not SingleDevice().fuses(*sizes, jnp.bfloat16)
