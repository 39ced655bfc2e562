"""Gradients through every strategy against those of one device: training differentiates through all of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import flow, rollout
from tests.sharding import seeded
from tests.sharding.seeded import BATCH, DATA_MESHES, FRAMES, GRID, MASKS, MESHES, SAMPLER, STRATEGIES

pytestmark = pytest.mark.sp
RTOL = 1e-5  # of each leaf's norm; measured 7e-7

# Rollouts of three blocks; with the window, the third overwrites the second one's keys.
BLOCKS = 3
CACHES = {"rollout": {}, "rollout-window": {"window": 4, "sink": 2}}

ALWAYS = {
    ("rollout", ("gather", 8)),
    ("rollout", ("hybrid", (1, 2, 4))),
    ("window", ("auto", (2, 2, 2))),
}


def rollout_loss(spec, params, noise, renoise, target):
    """A Self-Forcing loss: the last pass of every block is differentiated, through the cache into earlier blocks too.

    noise, renoise, target: [B, F, S, 4C] tokens of all blocks.
    """
    first, last = flow.warp(SAMPLER.steps, SAMPLER.shift)
    text = seeded.text(spec, params, BATCH)
    size = SAMPLER.frames_per_block

    def block(cache, inputs):
        noise, renoise, target, place = inputs
        frozen = jax.lax.stop_gradient((params, cache, text, noise))
        _, x0, _ = rollout.predict(spec, *frozen, first, place)
        x = flow.add_noise(x0, renoise, flow.sigma_at(last, SAMPLER.shift))
        _, x0, cache = rollout.predict(spec, params, cache, text, x, last, place)
        return cache, jnp.mean(jnp.square(rollout.from_tokens(spec, x0 - target)))

    places = [spec.place(start * size, size) for start in range(BLOCKS)]
    places = jax.tree.map(lambda *leaves: np.stack(leaves), *places)
    by_block = [jnp.stack(jnp.split(x, BLOCKS, axis=1)) for x in (noise, renoise, target)]
    _, losses = jax.lax.scan(block, rollout.init_cache(spec, BATCH, jnp.float32), (*by_block, places))
    return losses.mean()


def forward_loss(name, spec, params, noisy, clean, target):
    """The loss of a forward without a cache."""
    velocity = seeded.forward(spec, params, noisy, clean, MASKS[name])
    return jnp.mean(jnp.square(velocity - rollout.from_tokens(spec, target)))


@functools.cache
def _gradients(name, case):
    """Loss and gradients with respect to the parameters and all tokens, by name of the leaf."""
    if name in CACHES:
        frames, loss = BLOCKS * SAMPLER.frames_per_block, rollout_loss
    else:
        frames, loss = FRAMES, functools.partial(forward_loss, name)
    spec = seeded.spec(case, GRID, frames, **CACHES.get(name, {}))
    tokens = [rollout.to_tokens(spec, x) for x in seeded.latents(spec, 3, BATCH, frames)]
    params = seeded.params(spec)
    run = jax.jit(jax.value_and_grad(functools.partial(loss, spec), argnums=(0, 1, 2)))
    value, (by_params, *by_tokens) = run(params, *tokens)
    by_tokens = [rollout.from_tokens(spec, x) for x in by_tokens]
    leaves = jax.tree_util.tree_leaves_with_path({"params": by_params, "tokens": by_tokens})
    return float(value), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _cases():
    ways = [(name, n) for name, n in STRATEGIES if name != "auto"] + MESHES + DATA_MESHES
    for name, cases in {
        "rollout": ways,
        "rollout-window": ways,
        "teacher": ways,
        "window": DATA_MESHES,
    }.items():
        for case in cases:
            slow = () if (name, case) in ALWAYS else (pytest.mark.slow,)
            yield pytest.param(name, case, marks=slow, id=f"{name}-{seeded.label(case)}")


@pytest.mark.parametrize(("name", "case"), list(_cases()))
def test_gradients(name, case):
    value, gradients = _gradients(name, case)
    expected_value, expected = _gradients(name, None)
    assert value == pytest.approx(expected_value, rel=1e-5)
    for leaf, right in expected.items():
        error = np.linalg.norm(gradients[leaf] - right)
        assert error <= RTOL * np.linalg.norm(right), leaf
