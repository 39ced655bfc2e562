"""Many-step sampling: the integrator on an ODE with a known solution, guidance, and the network's place in it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import flow, rope, sampling, transformer
from jax_causal.config import TransformerConfig
from jax_causal.parallel import SingleDevice

CONFIG = TransformerConfig(
    dim=16, num_layers=2, num_heads=2, ffn_dim=32, in_channels=2, out_channels=2, text_dim=8, text_length=4
)
GRID = (2, 3)


def gaussian_velocity(mean, std):
    """E[noise - clean | x_t] of clean data N(mean, std^2): linear in x."""

    def velocity(x, t):
        sigma = t / 1000
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        noise = sigma * (x - (1 - sigma) * mean) / variance
        clean = mean + (1 - sigma) * std**2 * (x - (1 - sigma) * mean) / variance
        return noise - clean

    return velocity


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_gaussian_is_reached_with_error_of_first_order(shift):
    """Its flow takes each noise value e to mean + std e, whatever the schedule."""
    mean, std = 1.5, 0.4
    noise = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    exact = mean + std * noise
    errors = [
        np.abs(sampling.integrate(gaussian_velocity(mean, std), jnp.asarray(noise), steps, shift) - exact)
        for steps in (25, 50, 100, 500)
    ]
    sizes = [e.mean() for e in errors]
    assert sizes[-1] < 0.005
    for coarse, fine in itertools.pairwise(sizes[:-1]):
        assert coarse / fine == pytest.approx(2, abs=0.4)


def test_one_step_is_one_euler_step():
    x = jnp.asarray([2.0, -1.0])
    out = sampling.integrate(lambda x, t: 0.5 * x + t / 1000, x, 1, 3.0)
    np.testing.assert_allclose(out, x - (0.5 * x + 1), rtol=1e-6)


def test_the_schedule_is_warped_uniform():
    u = np.linspace(1, 0, 9)
    expected = 1000 * 5 * u / (1 + 4 * u)
    np.testing.assert_allclose(sampling.schedule(8, 5.0), expected, rtol=1e-6)
    np.testing.assert_array_equal(sampling.schedule(4, 5.0)[:-1], flow.warp((1000, 750, 500, 250), 5.0))
    assert len(np.unique(sampling.schedule(333, 5.0))) == 334
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="from 1 to 1000"):
            sampling.schedule(steps, 5.0)


def test_guidance_is_linear():
    cond, uncond = (np.random.default_rng(i).normal(size=5) for i in range(2))
    np.testing.assert_array_equal(sampling.guide(cond, uncond, 1), cond)
    np.testing.assert_allclose(sampling.guide(cond, uncond, 0), uncond)
    np.testing.assert_allclose(sampling.guide(cond, uncond, 3), 3 * cond - 2 * uncond)


@functools.cache
def _model():
    params = transformer.init(CONFIG, jax.random.key(0))
    # Away from the symmetric start, or text would hardly matter.
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    keys = jax.random.split(jax.random.key(1), 3)
    context = jax.random.normal(keys[0], (2, 4, CONFIG.text_dim))
    null = jax.random.normal(keys[1], (1, 2, CONFIG.text_dim))
    noise = jax.random.normal(keys[2], (2, 4, 6, 8))
    return params, context, null, noise


def _sample(guidance, *, steps=1, context=None, noise=None, frame_mask=None, null=True):
    params, given, null_context, given_noise = _model()
    run = functools.partial(
        sampling.sample, CONFIG, grid=GRID, steps=steps, shift=5.0, guidance=guidance, parallel=SingleDevice(),
        frame_mask=frame_mask,
    )  # fmt: skip
    context = given if context is None else context
    noise = given_noise if noise is None else noise
    return jax.jit(run)(params, context, noise, null_context=null_context if null else None)


def test_a_step_is_the_networks_guided_velocity():
    params, context, null, noise = _model()
    network = transformer.bind(CONFIG, params)
    frames = rope.frame_factors(0, 4, CONFIG.head_dim)

    def velocity(text):
        text = network.embed_text(text)
        return network.forward(noise, jnp.full((2, 1), 1000.0), text, frames, GRID, SingleDevice())

    cond, uncond = velocity(context), velocity(jnp.repeat(null, 2, axis=0))
    assert np.abs(cond - uncond).max() > 0.05
    np.testing.assert_allclose(_sample(1.0), noise - cond, atol=1e-5)
    np.testing.assert_allclose(_sample(3.0), noise - (cond + 2 * (cond - uncond)), atol=2e-5)


def test_without_guidance_the_null_context_plays_no_part():
    np.testing.assert_array_equal(_sample(1.0, steps=3), _sample(1.0, steps=3, null=False))
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs null_context"):
        _sample(2.0, null=False)


def test_samples_of_a_batch_are_independent():
    _, context, _, noise = _model()
    both = _sample(2.0, steps=3)
    alone = _sample(2.0, steps=3, context=context[1:], noise=noise[1:])
    np.testing.assert_allclose(both[1:], alone, rtol=1e-5, atol=1e-5)


def test_with_a_block_causal_mask_the_past_does_not_see_the_future():
    _, _, _, noise = _model()
    mask = transformer.block_causal_mask(transformer.block_index(4, 2))
    other = noise.at[:, 2:].add(1)
    for frame_mask, same in ((mask, True), (None, False)):
        a, b = (_sample(1.0, steps=2, noise=x, frame_mask=frame_mask) for x in (noise, other))
        assert np.allclose(a[:, :2], b[:, :2], atol=1e-6) == same
