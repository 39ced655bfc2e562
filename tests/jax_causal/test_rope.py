"""Rotary embedding against the golden vectors and float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import rope
from tests import golden_data


@pytest.fixture(scope="module", params=["d128", "d32"])
def case(request):
    data = golden_data.load("rope_time")
    groups = {k.split("/")[0] for k in data if "/" in k}
    name = request.param if request.param in groups else sorted(groups)[-1]
    return {k.removeprefix(f"{name}/"): v for k, v in data.items() if k.startswith(f"{name}/")}


def _table(data, start):
    head_dim = data["x"].shape[-1]
    frames, height, width = (int(n) for n in np.ravel(data["grid"]))
    factors = rope.frame_factors(start, frames, head_dim)
    return rope.tables(factors, rope.spatial_factors(height, width, head_dim)), (frames, height * width)


def _rotated(data, start):
    table, (f, s) = _table(data, start)
    x = data["x"]
    out = rope.rotate(jnp.asarray(x.reshape(1, f, s, *x.shape[2:])), table)
    return np.asarray(out).reshape(x.shape)


@pytest.mark.golden
def test_axis_pairs(case):
    assert rope.axis_pairs(case["x"].shape[-1]) == tuple(case["split"])


@pytest.mark.golden
def test_rotation(case):
    starts = {k: int(k.removeprefix("out_start")) for k in case if k.startswith("out_start")}
    assert starts
    for key, start in starts.items():
        np.testing.assert_allclose(_rotated(case, start), case[key], atol=5e-6, err_msg=key)
    np.testing.assert_allclose(_rotated(case, 0), case["out_bidirectional"], atol=5e-6)


@pytest.mark.golden
def test_frame_factors_match_the_table(case):
    positions = case["positions"].astype(int)
    head_dim = case["x"].shape[-1]
    pairs = rope.axis_pairs(head_dim)[0]
    for row, position in enumerate(positions):
        cos, sin = rope.frame_factors(position, 1, head_dim)
        np.testing.assert_allclose(cos[0], case["table_cos"][row, :pairs], atol=1e-7)
        np.testing.assert_allclose(sin[0], case["table_sin"][row, :pairs], atol=1e-7)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("start", [0, 1023, 99_997])
def test_rotation_at_any_time_is_exact(head_dim, start):
    """At frame 100,000 the rotation still agrees with float64 to 1e-6."""
    f, h, w = 3, 4, 5
    rng = np.random.default_rng(start + head_dim)
    x = rng.uniform(-1, 1, (1, f, h * w, 2, head_dim)).astype(np.float32)
    table = rope.tables(rope.frame_factors(start, f, head_dim), rope.spatial_factors(h, w, head_dim))
    out = np.asarray(rope.rotate(jnp.asarray(x), table), np.float64)

    frame, row, column = np.meshgrid(start + np.arange(f), np.arange(h), np.arange(w), indexing="ij")
    angles = []
    for position, pairs in zip((frame, row, column), rope.axis_pairs(head_dim), strict=True):
        angles.append(position.reshape(f, h * w, 1) * 10000.0 ** (-2.0 * np.arange(pairs) / (2 * pairs)))
    turn = np.exp(1j * np.concatenate(angles, axis=-1))[None, :, :, None]
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    expected = np.stack([expected.real, expected.imag], axis=-1).reshape(x.shape)
    assert np.abs(out - expected).max() < 1e-6


def test_rotation_keeps_dtype():
    x = jnp.ones((1, 1, 4, 1, 8), jnp.bfloat16)
    table = rope.tables(rope.frame_factors(0, 1, 8), rope.spatial_factors(2, 2, 8))
    assert rope.rotate(x, table).dtype == jnp.bfloat16
