"""The Hopper kernel from outside: that it lowers for a GPU, and what is done with that which it returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import attention as attn
from jax_causal import attention_hopper
from jax_causal.attention import attention, merge
from tests.jax_causal.test_attention import H200, error, random, reference

PLANS = [(3, 6, 0, 5), (3, 6, 1, 4), (3, 6, 2, 5), (3, 6, 3, 7), (3, 6, 2, 6, True), (3, 6, 3, 7, True)]


@pytest.mark.parametrize(
    ("T", "K", "D", "parts", "limit"),
    [
        (4680, 32760, 128, None, "length"),
        (585, 1000, 64, 2, "length"),
        (4680, 512, 128, None, "length"),
        (4680, 512, 128, None, "distinct"),
    ],
)
def test_hopper_kernel_lowers_for_a_gpu(monkeypatch, T, K, D, parts, limit):
    monkeypatch.setattr(attn, "_device", lambda: H200)
    keys = (1, K, 12, D) if parts is None else (1, parts, K, 12, D)
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, T, 12, D), keys))
    length = jax.ShapeDtypeStruct((), jnp.int32)

    def layers(q, k, v, length):
        for _ in range(3):
            q = attention(q, k, v, **{limit: length}, backend="hopper")
        return q

    traced = jax.jit(layers).trace(q, k, k, length)
    assert traced.out_info.shape == q.shape
    assert traced.out_info.dtype == jnp.bfloat16
    # One kernel serves all layers: each costs a second to compile.
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 1
    # One part takes cuDNN's gradient, several the plain one.
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    gradient = jax.grad(lambda *x: layers(*x).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(gradient).trace(q, k, k, length).lower(lowering_platforms=("cuda",)).as_text()
    assert ("fmhaSoftmaxBackward" in text) == (parts is None)


@pytest.fixture(params=PLANS)
def replaced_hopper_kernel(monkeypatch, request):
    """With this plan, the kernel is replaced by what it is documented to return. A list of how many keys it read."""
    lengths = []

    def kernel(q, k, v, length, log_times, short, *, plan, no_keys):
        (B, T, N, D), first, last = q.shape, plan.whole * 128, int(length[0])
        assert (short is None) == (not plan.may_be_short)
        is_run = plan.is_run(short=bool(short))
        lengths.append(last)
        times = 1 if log_times is None else round(float(np.exp(log_times[0])))
        assert T % 8 == 0
        padded = np.pad(q, ((0, 0), (0, plan.tiles * 128 - T), (0, 0), (0, 0)))

        def run(rows, start, stop, sample=slice(None), head=slice(None)):
            of = np.s_[sample, rows, head]
            stop = min(stop, last)
            if stop > start:
                often = np.where(np.arange(start, stop) == last - 1, times, 1)
                seen = (np.repeat(x[sample, start:stop, head], often, axis=1) for x in (k, v))
                return reference(padded[of], *seen)
            shape = padded[of].shape
            return np.ones(shape), np.full((shape[0], shape[2], shape[1]), no_keys)

        out, lse = run(slice(0, first), 0, k.shape[1])
        results = [np.full((2, 8, N, D), np.nan)] * 2
        if first:  # room for all queries, of which the last are undefined
            undefined = np.full((2, max(T - first, 0), N, D), np.nan)
            results = [np.concatenate([out[:, :T], undefined], axis=1), lse]
        if plan.shared:
            outs = np.full((plan.runs, B, plan.shared * 128, N, D), np.nan)
            lses = np.full((plan.runs, B, plan.shared * 128, N), np.nan)
            for head, tile in np.ndindex(plan.heads, plan.shared):
                runs = np.flatnonzero(is_run[:, head, tile])
                sample, n = divmod(head, N)
                rows = slice(first + tile * 128, first + tile * 128 + 128)
                for i, r in enumerate(runs):
                    bounds = (128 * (j * -(-last // 128) // len(runs)) for j in (i, i + 1))
                    found = run(rows, *bounds, slice(sample, sample + 1), slice(n, n + 1))
                    outs[r, sample, tile * 128 : tile * 128 + 128, n] = found[0][0, :, 0]
                    lses[r, sample, tile * 128 : tile * 128 + 128, n] = found[1][0, 0]
            results += [outs, lses]
        return [jnp.asarray(x, jnp.float32) for x in results]

    plan = attention_hopper.Plan(*request.param)
    monkeypatch.setattr(attention_hopper, "forward", kernel)
    cheapest = functools.partial(_cheapest, plan)
    monkeypatch.setattr(attention_hopper.Plan, "cheapest", cheapest)
    return lengths


def _cheapest(plan, *sizes, may_be_short):
    return plan._replace(may_be_short=plan.may_be_short and may_be_short)


@pytest.mark.usefixtures("replaced_hopper_kernel")
@pytest.mark.parametrize("wanted", [0, 1, 256, 257, 313])
@pytest.mark.parametrize("length", [0, 300])
def test_queries_that_are_not_wanted_may_be_left_out(length, wanted):
    q, k, v = random(9, (2, 313, 3, 8), (2, 320, 3, 8), (2, 320, 3, 8))
    out, lse = attention_hopper.attend(
        q, k, v, length, queries=jnp.int32(wanted), no_keys=attn.NO_KEYS, merge=merge, processors=132
    )
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    if length:
        expected_out, expected_lse = reference(q, k, v, length)
        np.testing.assert_allclose(out[:, :wanted], expected_out[:, :wanted], atol=2e-6)
        np.testing.assert_allclose(lse[:, :, :wanted], expected_lse[:, :, :wanted], atol=2e-6)


@pytest.mark.usefixtures("replaced_hopper_kernel")
@pytest.mark.parametrize("length", [0, 1, 130, 300, 320])
def test_shared_queries_of_the_hopper_kernel_are_merged(length):
    q, k, v = random(9, (2, 313, 3, 8), (2, 320, 3, 8), (2, 320, 3, 8))
    out, lse = attention_hopper.attend(q, k, v, length, no_keys=attn.NO_KEYS, merge=merge, processors=132)
    assert np.isfinite(out).all()
    if length == 0:
        assert (lse <= np.float32(attn.NO_KEYS)).all()
    else:
        expected_out, expected_lse = reference(q, k, v, length)
        assert error(out, expected_out) < 2e-6
        assert error(lse, expected_lse) < 2e-6


@pytest.mark.parametrize("distinct", [0, 1, 130, 319, 320])
def test_equal_keys_are_read_once_by_the_hopper_kernel(monkeypatch, replaced_hopper_kernel, distinct):
    """Attention over all of them is what is wanted, by definition."""
    monkeypatch.setattr(attn, "_device", lambda: H200)
    q, k, v = random(10, (2, 313, 3, 64), (2, 320, 3, 64), (2, 320, 3, 64))
    k, v = (
        np.concatenate([x[:, :distinct], np.repeat(x[:, distinct:][:, :1], 320 - distinct, 1)], 1)
        for x in (k, v)
    )
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = attention(q, k, v, distinct=jnp.int32(distinct), backend="hopper")
    assert error(out, reference(q, k, v)[0]) < 3e-3  # one rounding to bfloat16
    assert replaced_hopper_kernel == [min(distinct + 1, 320)]
