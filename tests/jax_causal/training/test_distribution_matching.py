"""Distribution matching and its critic on data whose answer is known in closed form: independent Gaussians.

For data N(m, s^2) with noise, x = (1 - sigma) x0 + sigma eps, the best predictions are linear in x:

    gain = (1 - sigma) s^2 / ((1 - sigma)^2 s^2 + sigma^2)
    x0 = m + gain (x - (1 - sigma) m)
    v = -m + (sigma - (1 - sigma) s^2) / ((1 - sigma)^2 s^2 + sigma^2) (x - (1 - sigma) m)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_causal import flow
from jax_causal.training import diffusion
from jax_causal.training.diffusion import dmd_loss

MEAN, STD, SHIFT = 1.5, 0.6, 5.0
SHAPE = (64, 2, 4, 4)  # samples [B, F, S, C]
TOKENS = SHAPE[2]


def best_x0(x, sigma, mean, std):
    gain = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return mean + gain * (x - (1 - sigma) * mean)


def best_velocity(sigma, mean, std):
    """Slope and intercept in x."""
    slope = (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return slope, -mean - slope * (1 - sigma) * mean


def test_the_gradient_is_the_direction():
    keys = jax.random.split(jax.random.key(0), 3)
    x, real, fake = (np.asarray(jax.random.normal(key, SHAPE)) for key in keys)
    (loss, size), gradient = jax.value_and_grad(dmd_loss, has_aux=True)(x, real, fake, TOKENS)
    scale = np.abs(x - real).reshape(SHAPE[0], -1).mean(1).reshape(-1, 1, 1, 1)
    direction = (fake - real) / scale
    np.testing.assert_allclose(gradient, direction / x.size, rtol=1e-5, atol=1e-6 / x.size)
    np.testing.assert_allclose(loss, np.square(direction).mean() / 2, rtol=1e-5)
    np.testing.assert_allclose(size, np.abs(direction).mean(), rtol=1e-5)
    # In bfloat16 the loss and the direction are as of the rounded sample in fp32.
    half = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_allclose(
        dmd_loss(half, real, fake, TOKENS)[0],
        dmd_loss(half.astype(jnp.float32), real, fake, TOKENS)[0],
        rtol=1e-6,
    )


def test_scores_carry_no_gradient():
    x, real, fake = (jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(0), 3))
    for gradient in jax.grad(lambda scores: dmd_loss(x, *scores, TOKENS)[0])((real, fake)):
        np.testing.assert_array_equal(gradient, 0)


def test_padding_does_not_count():
    x, real, fake = (jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(0), 3))
    padded = [jnp.pad(y, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=1e6) for y in (x, real, fake)]
    (loss, size), gradient = jax.value_and_grad(dmd_loss, has_aux=True)(*padded, TOKENS)
    (expected, expected_size), direction = jax.value_and_grad(dmd_loss, has_aux=True)(x, real, fake, TOKENS)
    np.testing.assert_allclose((loss, size), (expected, expected_size), rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :, :TOKENS], direction, rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, :, TOKENS:], 0)


def test_samples_equal_to_the_real_prediction_stay():
    """There the direction is 0 / 0. A network that is not finite, however, must be seen."""
    x, fake = (jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(0)))
    real = fake.at[0].set(x[0])
    _, gradient = jax.value_and_grad(dmd_loss, has_aux=True)(x, real, fake, TOKENS)
    np.testing.assert_array_equal(gradient, 0)
    assert np.isnan(dmd_loss(x, real.at[1, 0, 0, 0].set(jnp.nan), fake, TOKENS)[0])
    assert np.isnan(dmd_loss(x, real, fake.at[1, 0, 0, 0].set(jnp.nan), TOKENS)[0])


# A generator a + b z.


def generated(params, key):
    return params["a"] + params["b"] * jax.random.normal(key, SHAPE)


def generator_loss(params, fake_x0, key):
    keys = jax.random.split(key, 3)
    x = generated(params, keys[0])
    _, sigma = diffusion.clipped_times(keys[1], SHAPE[:1], SHIFT, 20.0, 980.0)
    noisy = flow.add_noise(jax.lax.stop_gradient(x), jax.random.normal(keys[2], SHAPE), sigma)
    sigma = sigma[:, None, None, None]
    return dmd_loss(x, best_x0(noisy, sigma, MEAN, STD), fake_x0(noisy, sigma), TOKENS)[0]


def trained(update, state, num_steps, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_steps)
    return jax.jit(lambda state: jax.lax.scan(update, state, (jnp.arange(num_steps), keys))[0])(state)


@pytest.mark.parametrize("start", [(-1.0, 0.2), (4.0, -1.5)])
def test_the_generator_becomes_the_data(start):
    """With exact scores of the data and of what is generated: a + b z goes to the data's mean and deviation."""
    rate = optax.cosine_decay_schedule(0.03, 1500)
    optimizer = optax.adam(rate, b1=0.0, b2=0.99)
    params = {"a": jnp.float32(start[0]), "b": jnp.float32(start[1])}

    def update(state, inputs):
        params, moments = state
        fixed = jax.lax.stop_gradient(params)
        loss = functools.partial(
            generator_loss, fake_x0=lambda x, sigma: best_x0(x, sigma, fixed["a"], fixed["b"])
        )
        gradient = jax.grad(lambda params: loss(params, key=inputs[1]))(params)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    params, _ = trained(update, (params, optimizer.init(params)), 1500)
    assert params["a"] == pytest.approx(MEAN, abs=0.02)
    assert abs(params["b"]) == pytest.approx(STD, abs=0.02)
    assert np.sign(params["b"]) == np.sign(start[1])


# A critic that is linear in x, with slope and intercept linear in sigma between knots.

KNOTS = jnp.linspace(0, 1, 21)


def critic_of(mean, std):
    return dict(zip(("slope", "intercept"), best_velocity(KNOTS, mean, std), strict=True))


def critic_at(params, sigma):
    return [jnp.interp(sigma, KNOTS, params[name]) for name in ("slope", "intercept")]


def critic_loss(params, x, key):
    keys = jax.random.split(key)
    t, sigma = diffusion.clipped_times(keys[0], SHAPE[:1], SHIFT, 20.0, 980.0)

    def velocity(x, t):
        slope, intercept = critic_at(params, t[:, None, None, None] / 1000)
        return slope * x + intercept

    noise = jax.random.normal(keys[1], SHAPE)
    return diffusion.flow_matching_loss(velocity, x, noise, t, sigma, TOKENS)


def test_the_critic_learns_the_best_velocity():
    """From nothing, at noise levels low and high, between knots and on them."""
    rate = optax.cosine_decay_schedule(0.05, 4000)
    optimizer = optax.adam(rate)
    params = {"slope": jnp.zeros_like(KNOTS), "intercept": jnp.zeros_like(KNOTS)}

    def update(state, inputs):
        params, moments = state
        keys = jax.random.split(inputs[1])
        x = MEAN + STD * jax.random.normal(keys[0], SHAPE)
        gradient = jax.grad(critic_loss)(params, x, keys[1])
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    params, _ = trained(update, (params, optimizer.init(params)), 4000)
    for sigma in (0.2, 0.325, 0.5, 0.7, 0.85, 0.95):
        np.testing.assert_allclose(
            critic_at(params, sigma), best_velocity(sigma, MEAN, STD), atol=0.03, err_msg=f"sigma {sigma}"
        )


def test_with_a_critic_that_learns_beside_it():
    """Five updates of the critic for one of the generator, the critic starting as the data's: as in the stage."""
    num_steps, start = 1500, {"a": jnp.float32(0.5), "b": jnp.float32(1.2)}
    rate = optax.cosine_decay_schedule(0.02, num_steps)
    optimizer, critic_optimizer = optax.adam(rate, b1=0.0, b2=0.99), optax.adam(0.02, b1=0.0, b2=0.99)
    critic = critic_of(MEAN, STD)

    def fake_x0(critic, x, sigma):
        slope, intercept = critic_at(critic, sigma)
        return x - sigma * (slope * x + intercept)

    def update(state, inputs):
        generator, moments, critic, critic_moments = state
        keys = jax.random.split(inputs[1], 6)
        gradient = jax.grad(generator_loss)(generator, functools.partial(fake_x0, critic), keys[0])
        updates, moments = optimizer.update(gradient, moments)
        generator = optax.apply_updates(generator, updates)

        def critic_step(state, key):
            critic, moments = state
            keys = jax.random.split(key)
            gradient = jax.grad(critic_loss)(critic, generated(generator, keys[0]), keys[1])
            updates, moments = critic_optimizer.update(gradient, moments)
            return (optax.apply_updates(critic, updates), moments), None

        (critic, critic_moments), _ = jax.lax.scan(critic_step, (critic, critic_moments), keys[1:])
        return (generator, moments, critic, critic_moments), None

    state = (start, optimizer.init(start), critic, critic_optimizer.init(critic))
    generator, _, critic, _ = trained(update, state, num_steps)
    assert generator["a"] == pytest.approx(MEAN, abs=0.03)
    assert generator["b"] == pytest.approx(STD, abs=0.03)
