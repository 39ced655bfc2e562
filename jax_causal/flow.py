"""Flow matching: the noise schedule and conversions between sample, velocity and clean prediction.

    x_t = (1 - sigma) x0 + sigma eps,    v = eps - x0,    timestep = 1000 sigma

The schedule is a table of 1000 entries warped by `shift`; any timestep is mapped to the sigma of its
nearest entry, as the original does, so that t = 0 means sigma 0.00498 at shift 5 and not 0.
Source: Self-Forcing (arXiv:2506.08009) and Wan2.1 (arXiv:2503.20314), whose tables are reproduced in fp32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

NUM_TIMESTEPS = 1000


@functools.cache
def sigmas(shift: float) -> np.ndarray:
    """fp32 [1000] noise levels, descending from 1."""
    u = np.linspace(1.0, 0.0, NUM_TIMESTEPS + 1)[:-1].astype(np.float32)
    shift = np.float32(shift)
    return shift * u / (1 + (shift - 1) * u)


def timesteps(shift: float) -> np.ndarray:
    """fp32 [1000] timesteps in (0, 1000], descending."""
    return sigmas(shift) * np.float32(NUM_TIMESTEPS)


def warp(steps, shift: float) -> np.ndarray:
    """Maps unwarped steps (integers 0..1000) to the fp32 timesteps that the network is given.

    (1000, 750, 500, 250) at shift 5 becomes (1000, 937.5, 833.3333, 625).
    """
    table = np.append(timesteps(shift), np.float32(0))
    return table[NUM_TIMESTEPS - np.asarray(steps)]


def sigma_at(t, shift: float) -> jax.Array:
    """fp32 sigma of the table entry nearest to timestep `t` (any shape; the first entry on ties)."""
    distance = jnp.abs(timesteps(shift) - jnp.asarray(t, jnp.float32)[..., None])
    return jnp.asarray(sigmas(shift))[jnp.argmin(distance, axis=-1)]


def _over(sigma, x):
    """Adds trailing axes to `sigma` so that it broadcasts over `x`."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def add_noise(x0, noise, sigma):
    """x_t of clean `x0` and `noise` (same shape) at `sigma` (its leading axes); in the dtype of `noise`."""
    sigma = _over(sigma, noise)
    return ((1 - sigma) * x0 + sigma * noise).astype(noise.dtype)


def x0_from_flow(x, flow, sigma):
    """Clean prediction from the noisy sample and the velocity; fp32 inside, in the dtype of `x`."""
    return (x.astype(jnp.float32) - _over(sigma, x) * flow.astype(jnp.float32)).astype(x.dtype)


def flow_from_x0(x, x0, sigma):
    """Velocity from the noisy sample and the clean prediction; the inverse of `x0_from_flow`."""
    return ((x.astype(jnp.float32) - x0.astype(jnp.float32)) / _over(sigma, x)).astype(x.dtype)


def euler_step(x, flow, t, shift: float):
    """One Euler step from timestep `t` [leading axes of `x`] to the next table entry (0 after the last)."""
    index = jnp.argmin(jnp.abs(timesteps(shift) - jnp.asarray(t, jnp.float32)[..., None]), axis=-1)
    levels = jnp.asarray(np.append(sigmas(shift), np.float32(0)))
    return (x + flow * _over(levels[index + 1] - levels[index], x)).astype(x.dtype)


@functools.cache
def training_weights(shift: float) -> np.ndarray:
    """fp32 [1000] loss weight of each table entry: a bell around t = 500, zero at t = 1000, mean 1."""
    y = np.exp(-2 * ((timesteps(shift).astype(np.float64) - 500) / NUM_TIMESTEPS) ** 2)
    y -= y.min()
    return (y * NUM_TIMESTEPS / y.sum()).astype(np.float32)


def training_weight_at(t, shift: float) -> jax.Array:
    """fp32 loss weight of the table entry nearest to timestep `t` (any shape)."""
    index = jnp.argmin(jnp.abs(timesteps(shift) - jnp.asarray(t, jnp.float32)[..., None]), axis=-1)
    return jnp.asarray(training_weights(shift))[index]


def time_sinusoid(t, dim: int) -> jax.Array:
    """Sinusoidal feature [..., dim] of timestep `t` [...]: cosines first, then sines, fp32.

    The original evaluates t * 10000^(-k / (dim/2)) in float64. A plain fp32 product of up to 1000 radians is
    off by 3e-5, so the product is taken in turns and in exact halves, and only its fraction is kept.
    """
    half = dim // 2
    turns = 10000.0 ** (-np.arange(half) / half) / (2 * np.pi)  # float64
    head = _upper_bits(turns)
    tail = (turns - head).astype(np.float32)
    t = jnp.asarray(t, jnp.float32)[..., None]
    t_head = jnp.floor(t)
    t_tail = t - t_head
    fraction = (
        _fraction(t_head * head.astype(np.float32))
        + _fraction(t_tail * head.astype(np.float32))
        + _fraction(t * tail)
    )
    angle = np.float32(2 * np.pi) * _fraction(fraction)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _upper_bits(x):
    """`x` rounded to 12 significant bits: its product with an integer below 4096 is exact in fp32."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 4096) / 4096, exponent)


def _fraction(x):
    return x - jnp.round(x)
