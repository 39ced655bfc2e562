"""Attention against softmax written out in float64 numpy, on every back end that a CPU can run or lower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import attention as attn
from jax_causal import attention_pallas, attention_xla
from jax_causal.attention import attention, attention_with_lse, choose_backend, merge

CPU, A100, H200 = ("cpu", (0,)), ("gpu", (8, 0)), ("gpu", (9, 0))


def reference(q, k, v, length=None, mask=None):
    """(out, lse) in float64; keys [B, P, K, N, D] are cut to `length` and laid end to end; mask is [T, K]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if k.ndim == 5:
        k, v = (x[:, :, :length].reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
    else:
        k, v = k[:, :length], v[:, :length]
    scores = np.einsum("btnd,bknd->bntk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    total = np.exp(scores - scores.max(-1, keepdims=True))
    lse = np.log(total.sum(-1)) + scores.max(-1)
    return np.einsum("bntk,bknd->btnd", np.exp(scores - lse[..., None]), v), lse


def reference_gradients(q, k, v, d_out, d_lse):
    """Gradients of sum(out * d_out) + sum(lse * d_lse) in float64, through the Jacobian of softmax."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    scale = 1 / np.sqrt(q.shape[-1])
    scores = np.einsum("btnd,bknd->bntk", q, k) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = np.einsum("btnd,bknd->bntk", d_out, v)
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True)) + p * d_lse[..., None]
    d_q = np.einsum("bntk,bknd->btnd", d_scores, k) * scale
    d_k = np.einsum("bntk,btnd->bknd", d_scores, q) * scale
    return d_q, d_k, np.einsum("bntk,btnd->bknd", p, d_out)


def random(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def error(actual, expected):
    """Largest difference relative to the largest expected value."""
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


def relative_norm(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes the plain form walk over more than 128 keys in several chunks."""
    monkeypatch.setattr(attention_xla, "MAX_SCORES", 1)


# Queries and keys that do and do not fill a kernel's tiles, head dims that are and are not powers of two.
@pytest.mark.parametrize(
    ("backend", "T", "K", "N", "D"),
    [
        ("xla", 7, 1, 2, 8),
        ("xla", 130, 200, 3, 24),
        ("xla", 16, 64, 1, 128),
        ("pallas", 7, 1, 2, 8),
        ("pallas", 130, 200, 3, 24),
        ("pallas", 64, 64, 1, 32),
        ("pallas", 17, 70, 2, 128),
    ],
)
def test_matches_float64(backend, T, K, N, D):
    q, k, v = random(0, (2, T, N, D), (2, K, N, D), (2, K, N, D))
    out, lse = jax.jit(functools.partial(attention_with_lse, backend=backend))(q, k, v)
    expected_out, expected_lse = reference(q, k, v)
    assert error(out, expected_out) < 2e-6
    assert error(lse, expected_lse) < 2e-6


@pytest.mark.parametrize("length", [None, 1, 128, 129, 300, 401])
def test_long_keys_are_walked_in_chunks(small_chunks, length):
    q, k, v = random(1, (2, 9, 2, 16), (2, 401, 2, 16), (2, 401, 2, 16))
    out, lse = attention_with_lse(q, k, v, length=length, backend="xla")
    expected_out, expected_lse = reference(q, k, v, length)
    assert error(out, expected_out) < 2e-6
    assert error(lse, expected_lse) < 2e-6


def test_chunks_bound_memory():
    """Scores of the full 480x832 cache would take 7.4 GB; the compiled program must need far less."""
    shapes = [jax.ShapeDtypeStruct((1, n, 12, 128), jnp.bfloat16) for n in (4680, 32760, 32760)]
    compiled = jax.jit(functools.partial(attention, backend="xla")).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


@pytest.mark.parametrize("backend", ["xla", "pallas"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_are_one_set_of_keys(backend, parts):
    q, k, v = random(2, (2, 5, 2, 16), (2, parts, 40, 2, 16), (2, parts, 40, 2, 16))
    run = jax.jit(functools.partial(attention_with_lse, backend=backend))
    for length in (None, 1, 17, 40):
        expected_out, expected_lse = reference(q, k, v, length)
        out, lse = run(q, k, v, length=length)
        assert error(out, expected_out) < 2e-6
        assert error(lse, expected_lse) < 2e-6


@pytest.mark.parametrize("parts", [1, 2])
def test_one_program_serves_every_length(parts):
    q, k, v = random(3, (1, 4, 2, 8), (1, parts, 200, 2, 8), (1, parts, 200, 2, 8))
    run = jax.jit(lambda length: attention(q, k, v, length=length))
    for length in (1, 100, 200):
        assert error(run(jnp.int32(length)), reference(q, k, v, length)[0]) < 2e-6
    assert run._cache_size() == 1


@pytest.mark.parametrize("backend", ["xla", "pallas"])
@pytest.mark.parametrize("length", [0, jnp.int32(0)])
def test_no_keys_weigh_nothing_in_a_merge(backend, length):
    q, k, v = random(4, (1, 5, 2, 16), (1, 40, 2, 16), (1, 40, 2, 16))
    empty = attention_with_lse(q, k, v, length=length, backend=backend)
    assert np.isfinite(empty[0]).all()
    np.testing.assert_array_equal(empty[1], np.float32(attn.NO_KEYS))
    some = attention_with_lse(q, k, v, backend=backend)
    for pair in ((empty, some), (some, empty)):
        out, lse = merge(*zip(*pair, strict=True))
        np.testing.assert_array_equal(out, some[0])
        np.testing.assert_array_equal(lse, some[1])
    out, lse = merge(*zip(empty, empty, strict=True))
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_what_lies_behind_the_length_is_ignored(backend):
    q, k, v = random(5, (1, 5, 2, 16), (1, 2, 70, 2, 16), (1, 2, 70, 2, 16))
    expected = reference(q, k, v, 33)[0]
    k, v = (x.at[:, :, 33:].set(jnp.nan) for x in (k, v))
    assert error(attention(q, k, v, length=33, backend=backend), expected) < 2e-6
    gradients = jax.grad(lambda *x: attention(*x, length=33, backend=backend).sum(), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in gradients)


def test_bf16_parts_cost_no_accuracy():
    q, k, v = random(6, (1, 32, 1, 64), (1, 4096, 1, 64), (1, 4096, 1, 64), dtype=jnp.bfloat16)
    expected, _ = reference(q, k, v)
    whole = relative_norm(attention(q, k, v), expected)
    assert whole < 4e-3
    for parts in (2, 4, 8):
        split_k, split_v = (x.reshape(1, parts, -1, 1, 64) for x in (k, v))
        assert relative_norm(attention(q, split_k, split_v), expected) < 1.2 * whole


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_gradients_of_output_and_statistic(small_chunks, backend):
    q, k, v, d_out, d_lse = random(7, *[(2, n, 2, 16) for n in (5, 300, 300, 5)], (2, 2, 5))
    _, pullback = jax.vjp(functools.partial(attention_with_lse, backend=backend), q, k, v)
    for actual, expected in zip(
        pullback((d_out, d_lse)), reference_gradients(q, k, v, d_out, d_lse), strict=True
    ):
        assert error(actual, expected) < 2e-6


def test_gradients_flow_through_the_merge():
    """Of two parts cut to a traced length, against those of one attention over the same keys."""
    q, k, v, d_out, d_lse = random(8, (2, 5, 2, 16), *[(2, 2, 40, 2, 16)] * 2, (2, 5, 2, 16), (2, 2, 5))

    @jax.jit
    def gradients(length):
        _, pullback = jax.vjp(functools.partial(attention_with_lse, length=length), q, k, v)
        return pullback((d_out, d_lse))

    d_q, d_k, d_v = gradients(jnp.int32(17))
    whole_k, whole_v = (np.asarray(x)[:, :, :17].reshape(2, 34, 2, 16) for x in (k, v))
    expected = reference_gradients(q, whole_k, whole_v, d_out, d_lse)
    assert error(d_q, expected[0]) < 2e-6
    for actual, whole in ((d_k, expected[1]), (d_v, expected[2])):
        assert error(np.asarray(actual)[:, :, :17].reshape(whole.shape), whole) < 2e-6
        assert not np.asarray(actual)[:, :, 17:].any()


def test_bf16_gradients():
    q, k, v, d_out = random(9, *[(1, n, 2, 32) for n in (40, 200, 200, 40)], dtype=jnp.bfloat16)
    _, pullback = jax.vjp(attention, q, k, v)
    expected = reference_gradients(q, k, v, d_out, np.zeros((1, 2, 40)))
    for actual, expected_one in zip(pullback(d_out), expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert relative_norm(actual, expected_one) < 1e-2


# Frame-level rules, written as a person would: one row per query frame, one column per key frame.
BLOCK_CAUSAL = np.kron(np.tri(3, dtype=int), np.ones((2, 2), int)).astype(bool)
TEACHER_FORCING = np.block(
    [[np.tri(4, dtype=bool), np.zeros((4, 4), bool)], [np.tri(4, k=-1, dtype=bool), np.eye(4, dtype=bool)]]
)
ROWS_SHARE_ONE_SET = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)


@pytest.mark.parametrize("mask", [BLOCK_CAUSAL, TEACHER_FORCING, ROWS_SHARE_ONE_SET])
@pytest.mark.parametrize(("tokens_q", "tokens_k"), [(5, 5), (2, 3)])
def test_mask_between_frames(mask, tokens_q, tokens_k):
    rows, columns = mask.shape
    q, k, v = random(10, (2, rows * tokens_q, 2, 16), *[(2, columns * tokens_k, 2, 16)] * 2)
    dense = np.repeat(np.repeat(mask, tokens_q, axis=0), tokens_k, axis=1)
    assert (
        error(jax.jit(functools.partial(attention, mask=mask))(q, k, v), reference(q, k, v, mask=dense)[0])
        < 2e-6
    )


def test_merge_over_devices():
    """Keys on eight devices, queries on all: one maximum and two sums unite them, gradients included."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v, d_out = random(11, (1, 5, 2, 16), (1, 320, 2, 16), (1, 320, 2, 16), (1, 5, 2, 16))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(None, "x"), jax.P(None, "x"), jax.P()),
        out_specs=jax.P(),
    )
    def sharded(q, k, v, length):
        out, lse = attention_with_lse(q, k, v, length=length)
        weight = jnp.exp(lse - jax.lax.pmax(jax.lax.stop_gradient(lse), "x"))
        weight = jnp.swapaxes(weight, 1, 2)[..., None]
        return jax.lax.psum(weight * out, "x") / jax.lax.psum(weight, "x")

    run = jax.jit(lambda *x: jax.vjp(lambda *qkv: sharded(*qkv, jnp.int32(33)), *x))
    out, pullback = run(q, k, v)
    held_k, held_v = (np.asarray(x).reshape(1, 8, 40, 2, 16)[:, :, :33].reshape(1, -1, 2, 16) for x in (k, v))
    assert error(out, reference(q, held_k, held_v)[0]) < 2e-6
    d_q, d_k, d_v = jax.jit(pullback)(d_out)
    expected = reference_gradients(q, held_k, held_v, d_out, np.zeros((1, 2, 5)))
    assert error(d_q, expected[0]) < 2e-6
    for actual, whole in ((d_k, expected[1]), (d_v, expected[2])):
        assert (
            error(np.asarray(actual).reshape(1, 8, 40, 2, 16)[:, :, :33].reshape(whole.shape), whole) < 2e-6
        )


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "chosen"),
    [
        (CPU, jnp.bfloat16, 128, "xla"),
        (("tpu", (0,)), jnp.bfloat16, 128, "xla"),
        (H200, jnp.bfloat16, 128, "hopper"),
        (H200, jnp.float16, 64, "hopper"),
        (H200, jnp.float16, 24, "cudnn"),
        (A100, jnp.bfloat16, 128, "cudnn"),
        (("gpu", (12, 0)), jnp.bfloat16, 128, "cudnn"),
        (H200, jnp.float32, 128, "xla"),
        (H200, jnp.bfloat16, 20, "pallas"),
        (H200, jnp.bfloat16, 256, "xla"),
        (("gpu", (7, 5)), jnp.float16, 64, "xla"),
    ],
)
def test_choice_by_capability(monkeypatch, device, dtype, head_dim, chosen):
    monkeypatch.setattr(attn, "_device", lambda: device)
    assert choose_backend("auto", jax.ShapeDtypeStruct((1, 8, 2, head_dim), dtype)) == chosen


def test_hopper_takes_keys_in_eights(monkeypatch):
    """The copy engine does; a share of a cache that is none goes to another kernel."""
    monkeypatch.setattr(attn, "_device", lambda: H200)
    q, k = (jax.ShapeDtypeStruct((1, n, 12, 128), jnp.bfloat16) for n in (585, 4095))
    assert choose_backend("auto", q, k) == "cudnn"
    with pytest.raises(ValueError, match="not a multiple of 8; use cudnn"):
        choose_backend("hopper", q, k)


def test_choice_without_the_private_statistic(monkeypatch):
    """Should jax move the source of the fp32 statistic, parts go to another kernel and plain calls stay."""
    monkeypatch.setattr(attn, "_device", lambda: A100)
    monkeypatch.setattr(attn, "_fused_attention", lambda: None)
    q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    assert choose_backend("auto", q) == "cudnn"
    assert choose_backend("auto", q, lse=True) == "pallas"
    with pytest.raises(ValueError, match="fp32 statistic; use pallas or xla"):
        choose_backend("cudnn", q, lse=True)


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "message"),
    [
        (CPU, "cudnn", jnp.bfloat16, "needs an NVIDIA GPU .* use pallas or xla"),
        (H200, "cudnn", jnp.float32, "bfloat16 or float16, not float32; use pallas or xla"),
        (("tpu", (0,)), "pallas", jnp.bfloat16, "'pallas' cannot run here: .* use xla"),
        (
            CPU,
            "flash",
            jnp.bfloat16,
            "unknown attention back end 'flash': choose auto, hopper, cudnn, pallas, xla",
        ),
    ],
)
def test_back_end_that_cannot_run(monkeypatch, device, backend, dtype, message):
    monkeypatch.setattr(attn, "_device", lambda: device)
    q = jnp.zeros((1, 4, 2, 16), dtype)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, backend=backend)


def test_cudnn_statistic_is_float32(monkeypatch):
    """Lowers the fused call without a GPU: the statistic must leave it in float32, in shard_map too."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(attn, "_device", lambda: H200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 48, 2, 64), (1, 4, 32, 2, 64)))
    length = jax.ShapeDtypeStruct((), jnp.int32)

    def run(q, k, v, length):
        return attention_with_lse(q, k, v, length=length, backend="cudnn")

    text = jax.jit(run).trace(q, k, k, length).lower(lowering_platforms=("cuda",)).as_text()
    assert "PADDING" in text
    assert "tensor<4x2x48xf32>" in next(line for line in text.splitlines() if "fmhaSoftmax" in line)
    one_part = jax.ShapeDtypeStruct((1, 32, 2, 64), jnp.bfloat16)
    for n in (None, length):
        assert jax.eval_shape(run, q, one_part, one_part, n)[1].dtype == jnp.float32

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    keys = jax.P(None, None, "x")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(jax.P(), keys, keys, jax.P()), out_specs=jax.P("x"))
    gradient = jax.grad(lambda *x: sum(y.astype(jnp.float32).sum() for y in sharded(*x)), (0, 1, 2))
    assert [x.shape for x in jax.eval_shape(gradient, q, k, k, length)] == [q.shape, k.shape, k.shape]


def test_equal_keys_make_no_difference_to_other_back_ends():
    q, k, v = random(11, (1, 5, 2, 8), (1, 7, 2, 8), (1, 7, 2, 8))
    np.testing.assert_array_equal(attention(q, k, v, distinct=3), attention(q, k, v))
    for other in ({"length": 2}, {"mask": np.ones((1, 1), bool)}):
        with pytest.raises(ValueError, match="without a length or a mask"):
            attention(q, k, v, distinct=3, **other)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, jnp.bfloat16), (24, jnp.float32)])
def test_pallas_kernel_lowers_for_a_gpu(head_dim, dtype):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    q, k = (jax.ShapeDtypeStruct((1, n, 2, head_dim), dtype) for n in (585, 1001))
    length = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(functools.partial(attention_pallas.forward, no_keys=attn.NO_KEYS)).trace(
            q, k, k, length
        )
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 2, 8), (1, 6, 2, 8), (1, 5, 2, 8)), {}, "attention takes"),
        (((4, 2, 8), (6, 2, 8), (6, 2, 8)), {}, "attention takes"),
        (((1, 4, 2, 8), (1, 6, 3, 8), (1, 6, 3, 8)), {}, "batch size, heads and head dim"),
        (
            ((1, 4, 2, 8), (1, 2, 6, 2, 8), (1, 2, 6, 2, 8)),
            {"length": 7},
            "length=7 is not between 0 and the 6",
        ),
        (((1, 4, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"mask": np.ones((3, 3), bool)}, "do not divide"),
        (((1, 4, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"mask": np.ones((2, 2))}, "boolean numpy array"),
        (
            ((1, 4, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8)),
            {"mask": np.array([[True], [False]])},
            r"rows \[1\]",
        ),
        (((1, 4, 2, 8), (1, 2, 6, 2, 8), (1, 2, 6, 2, 8)), {"mask": np.ones((2, 2), bool)}, "in one part"),
    ],
)
def test_bad_input(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros(shape) for shape in shapes), **options)


def test_mixed_dtypes_are_refused():
    q, k = jnp.zeros((1, 4, 2, 8), jnp.bfloat16), jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="different dtypes, bfloat16, float32 and float32"):
        attention(q, k, k)
