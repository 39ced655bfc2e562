"""Optimizers against Adam and the polar decomposition in float64, schedules in closed form, accumulation against one
batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jax_causal.training import optim
from tests import toy_stage


def test_schedules_in_closed_form():
    warmup, total, peak = 10, 50, 0.02
    options = {"warmup_steps": warmup, "num_steps": total, "learning_rate": peak}
    steps = np.arange(total)
    rising = peak * steps / warmup
    constant = np.where(steps < warmup, rising, peak)
    cosine = np.where(
        steps < warmup, rising, peak * 0.5 * (1 + np.cos(np.pi * (steps - warmup) / (total - warmup)))
    )
    for name, expected in (("constant", constant), ("cosine", cosine)):
        rate = jax.jit(jax.vmap(optim.schedule(toy_stage.config(schedule=name, **options))))
        np.testing.assert_allclose(rate(steps), expected, atol=1e-8)
    at_once = optim.schedule(toy_stage.config(warmup_steps=0, learning_rate=0.5))
    assert at_once(0) == 0.5
    assert at_once(0).dtype == jnp.float32


def _draw(rng, shapes):
    """Standard normal arrays, float64, in the place of nested shapes."""
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_as_written_out(clip):
    config = toy_stage.config(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.3, betas=[0.8, 0.95], eps=1e-3, grad_clip=clip
    )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    stacked = {"blocks": {"kernel": (2, 3, 4), "bias": (2, 4)}, "list": {0: {"kernel": (2, 2)}}}
    params, *grads = (_draw(rng, shapes | stacked) for _ in range(5))

    optimizer = optim.optimizer(config)
    found = optim.cast(params, jnp.float32)
    state = optimizer.init(found)
    norms = []
    for step, grad in enumerate(grads):
        found, state, metrics = optimizer.update(optim.cast(grad, jnp.float32), state, found, jnp.int32(step))
        norms.append(metrics["grad_norm"])

    # Matrices decay, vectors do not; a vector of each of two layers is stacked to rank 2 and is still a vector.
    decays = {
        "kernel": True,
        "bias": False,
        "blocks": {"kernel": True, "bias": False},
        "list": {0: {"kernel": True}},
    }
    expected_norms = [np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grad))) for grad in grads]
    scales = [min(1.0, clip / norm) if clip else 1.0 for norm in expected_norms]

    def adam(p, decay, *gradients):
        m = v = 0
        for t, g in enumerate(gradients, 1):
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            direction = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
            p = p - 0.1 * (direction + 0.3 * decay * p)
        return p

    clipped = [jax.tree.map(lambda g, s=s: g * s, grad) for grad, s in zip(grads, scales, strict=True)]
    expected = jax.tree.map(adam, params, decays, *clipped)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)
    assert state["count"] == 4


def test_muon_as_written_out():
    """Kernels move along the orthogonal factor of their momentum, all else as under Adam. Some are of one shape."""
    config = toy_stage.config(
        learning_rate=0.1,
        warmup_steps=0,
        weight_decay=0.3,
        betas=[0.8, 0.95],
        grad_clip=0.0,
        optimizer="muon",
    )
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 4, 6), "bias": (6,)},
        "blocks": {"kernel": (2, 8, 5), "embedding": (2, 4, 3)},
        "flat": {"kernel": (36, 6)},
        "list": {0: {"kernel": (4, 9)}, 1: {"kernel": (8, 5)}},
    }
    params, *grads = (optim.cast(_draw(rng, shapes), jnp.float32) for _ in range(4))
    optimizer = optim.optimizer(config)
    adam = optim.optimizer(dataclasses.replace(config, optimizer="adamw"))
    found, state = params, optimizer.init(params)
    plain, adam_state = params, adam.init(params)
    for step, grad in enumerate(grads):
        before = found
        found, state, _ = optimizer.update(grad, state, found, jnp.int32(step))
        plain, adam_state, _ = adam.update(grad, adam_state, plain, jnp.int32(step))

    def momentum(*gradients):
        m = 0
        for g in gradients:
            m = 0.95 * m + 0.05 * g
        # Nesterov's, each part freed of its bias: a step ahead, so one count more.
        return 0.95 * m / (1 - 0.95**4) + 0.05 * gradients[-1] / (1 - 0.95**3)

    def check(name, rows, layers):
        *gradients, old, new = (np.float64(flatten_dict(tree)[name]) for tree in (*grads, before, found))
        m = momentum(*gradients).reshape(layers, rows, -1)
        old, new = old.reshape(m.shape), new.reshape(m.shape)
        move = -(new - old) / 0.1 - 0.3 * old
        u, _, v = np.linalg.svd(m, full_matrices=False)
        expected = 0.2 * np.sqrt(max(m.shape[1:])) * u @ v
        assert np.linalg.norm(move - expected) < 0.35 * np.linalg.norm(
            expected
        )  # five steps of Newton and Schulz
        assert np.vdot(move, expected) > 0.95 * np.linalg.norm(move) * np.linalg.norm(expected)

    check(("conv", "kernel"), rows=36, layers=1)
    check(("blocks", "kernel"), rows=8, layers=2)
    check(("flat", "kernel"), rows=36, layers=1)
    check(("list", 0, "kernel"), rows=4, layers=1)
    check(("list", 1, "kernel"), rows=8, layers=1)
    np.testing.assert_array_equal(found["conv"]["bias"], plain["conv"]["bias"])
    np.testing.assert_array_equal(found["blocks"]["embedding"], plain["blocks"]["embedding"])
    assert state["count"] == state["others"]["count"] == 3
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(params))


def _loss(params, keys):
    """Of a batch of examples, each from its key; not linear, and with a metric that differs from the loss."""
    x = jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)
    out = jnp.tanh(x.astype(params["w"].dtype) @ params["w"])
    loss = jnp.square(out).mean()
    return loss, {"loss": loss, "error": jnp.abs(out).mean()}


@pytest.mark.parametrize("n", [1, 2, 4, 12])
def test_accumulation_equals_one_batch(n):
    params = {"w": jax.random.normal(jax.random.key(1), (5, 3))}
    keys = jax.random.split(jax.random.key(0), 12)
    (_, metrics), grads = jax.value_and_grad(_loss, has_aux=True)(params, keys)
    found = jax.jit(lambda p, k: optim.accumulate(_loss, p, k, n))(params, keys)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, (grads, metrics))


def test_accumulation_from_one_key_is_the_mean_over_those_it_splits_into():
    params = {"w": jax.random.normal(jax.random.key(1), (5, 3))}

    def loss(params, key):
        return _loss(params, jax.random.split(key, 4))

    parts = [
        jax.value_and_grad(loss, has_aux=True)(params, k) for k in jax.random.split(jax.random.key(0), 3)
    ]
    expected = jax.tree.map(lambda *g: np.mean(g, axis=0), *[grads for _, grads in parts])
    grads, metrics = optim.accumulate(loss, params, jax.random.key(0), 3)
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean([loss for (loss, _), _ in parts]), rtol=1e-6)


def test_accumulation_adds_in_fp32():
    """1 + 1/256 needs nine bits, and bf16 has eight: a sum in bf16 would stay at 1."""
    params = {"w": jnp.ones((), jnp.bfloat16)}
    values = jnp.asarray([256.0, 1.0])

    def loss(params, key):
        scale = values[jax.random.key_data(key)[..., 1].ravel()[0]].astype(jnp.bfloat16)
        return params["w"] * scale, {"loss": params["w"] * scale}

    keys = jax.random.wrap_key_data(jnp.asarray([[0, 0], [0, 1]], jnp.uint32))
    grads, metrics = optim.accumulate(loss, params, keys, 2)
    assert grads["w"].dtype == metrics["loss"].dtype == jnp.float32
    assert grads["w"] == 128.5


def test_moving_average():
    params = [{"w": jnp.float32(x)} for x in (1.0, 3.0, -2.0)]
    ema = {"w": jnp.float32(5.0)}
    for p in params:
        ema = optim.ema_update(ema, p, 0.9)
    np.testing.assert_allclose(ema["w"], 0.9**3 * 5 + 0.1 * (0.81 * 1 + 0.9 * 3 - 2), rtol=1e-6)


def test_cast_leaves_integers():
    tree = optim.cast({"a": jnp.ones(2), "b": jnp.arange(3), "c": jnp.ones(1, jnp.bfloat16)}, jnp.bfloat16)
    assert [tree[k].dtype for k in "abc"] == [jnp.bfloat16, jnp.int32, jnp.bfloat16]


def test_bf16_computation_gives_fp32_gradients():
    def loss(params, key):
        return _loss(optim.cast(params, "bfloat16"), key)

    params = {"w": jax.random.normal(jax.random.key(1), (5, 3))}
    keys = jax.random.split(jax.random.key(0), 8)
    rounded, _ = optim.accumulate(loss, params, keys, 2)
    exact, _ = optim.accumulate(_loss, params, keys, 2)
    assert rounded["w"].dtype == jnp.float32
    error = np.linalg.norm(rounded["w"] - exact["w"]) / np.linalg.norm(exact["w"])
    assert 1e-5 < error < 0.03
