"""Training rollouts against rollouts as at inference: the same blocks, and gradients of the same passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import flow, rollout, rope, transformer
from jax_causal.config import SamplerConfig, TransformerConfig
from jax_causal.rollout import RolloutSpec
from jax_causal.training import self_forcing

CONFIG = TransformerConfig(dim=64, num_layers=2, num_heads=8, ffn_dim=96, text_dim=16, text_length=8)
SAMPLER = SamplerConfig(frames_per_block=2)
GRID = (2, 4)
BATCH, FRAMES = 2, 6
STEPS = len(SAMPLER.steps)
SPEC = RolloutSpec.create(CONFIG, SAMPLER, GRID, FRAMES)
BLOCKS = [slice(start, start + size) for start, size in rollout.block_sizes(FRAMES, SAMPLER)]

# Rotary factors of the frames: as they follow each other, and with a gap of 9 behind the first block.
FACTORS = {
    "plain": rope.frame_factors(0, FRAMES, CONFIG.head_dim),
    "gapped": np.concatenate(
        [rope.frame_factors(0, 2, CONFIG.head_dim), rope.frame_factors(11, 4, CONFIG.head_dim)], axis=1
    ),
}


@functools.cache
def _params():
    return transformer.init(CONFIG, jax.random.key(0))


@functools.cache
def _context():
    return jax.random.normal(jax.random.key(1), (BATCH, 5, CONFIG.text_dim))


@functools.cache
def _noise():
    """Starting noise and noise to add again."""
    shape = (STEPS, BATCH, FRAMES, GRID[0] * GRID[1], 64)
    noise = jax.random.normal(jax.random.key(2), shape)
    return noise[0], noise[1:]


@functools.cache
def _rolled_out(exit_step, factors, dtype=jnp.float32):
    params, *noise = jax.tree.map(lambda x: x.astype(dtype), (_params(), *_noise()))
    text = rollout.embed_text(SPEC, params, _context().astype(dtype))
    run = jax.jit(self_forcing.roll_out, static_argnums=0)
    return run(SPEC, params, text, *noise, jnp.asarray(exit_step, jnp.int32), FACTORS[factors])


def _places(factors):
    for block in BLOCKS:
        place = SPEC.place(block.start, block.stop - block.start)
        yield block, place._replace(frames=factors[:, block])


@pytest.mark.parametrize("factors", FACTORS)
def test_left_at_the_last_step_it_is_the_rollout_of_inference(factors):
    _, clean = _rolled_out(STEPS - 1, factors)
    noise, renoise = _noise()
    text = rollout.embed_text(SPEC, _params(), _context())
    cache = rollout.init_cache(SPEC, BATCH, jnp.float32)
    for block, place in _places(FACTORS[factors]):
        x0, cache = rollout.denoise_block(
            SPEC, _params(), cache, text, noise[:, block], renoise[:, :, block], place
        )
        np.testing.assert_allclose(clean[:, block], x0, atol=2e-5)
        cache = rollout.write_context(SPEC, _params(), cache, text, x0, place, np.float32(0))


@pytest.mark.parametrize(("exit_step", "factors"), [(0, "plain"), (1, "gapped"), (2, "plain")])
def test_left_at_an_earlier_step(exit_step, factors):
    """Every block stops there, and what it has then is what later blocks see."""
    inputs, clean = _rolled_out(exit_step, factors)
    noise, renoise = _noise()
    text = rollout.embed_text(SPEC, _params(), _context())
    cache = rollout.init_cache(SPEC, BATCH, jnp.float32)
    predict = jax.jit(rollout.predict, static_argnums=0)
    times = flow.warp(SAMPLER.steps, SAMPLER.shift)
    for block, place in _places(FACTORS[factors]):
        x0 = 0
        for time, eps in list(zip(times, [noise, *renoise], strict=True))[: exit_step + 1]:
            level = time / 1000  # 1 at the first step: noise alone
            x = (1 - level) * x0 + level * eps[:, block]
            v, _, cache = predict(SPEC, _params(), cache, text, x, jnp.float32(time), place)
            x0 = x - level * v
        np.testing.assert_allclose(inputs[:, block], x, atol=2e-5)
        np.testing.assert_allclose(clean[:, block], x0, atol=2e-5)
        _, _, cache = predict(SPEC, _params(), cache, text, x0, jnp.float32(0), place)


@pytest.mark.parametrize("factors", FACTORS)
def test_clips_that_leave_at_steps_of_their_own(factors):
    """Each is as if all had left where it does, wherever the others do."""
    for exits in ((0, 3), (2, 1)):
        rolled_out = _rolled_out(exits, factors)
        for clip, exit_step in enumerate(exits):
            for ours, alone in zip(rolled_out, _rolled_out(exit_step, factors), strict=True):
                np.testing.assert_allclose(ours[clip], alone[clip], atol=2e-5)


def test_in_bfloat16():
    """Blocks stay in the dtype of the noise and near those of fp32."""
    inputs, clean = _rolled_out(STEPS - 1, "plain", jnp.bfloat16)
    _, expected = _rolled_out(STEPS - 1, "plain")
    assert inputs.dtype == clean.dtype == jnp.bfloat16
    error = jnp.linalg.norm(clean.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 0.02


TIMES = jnp.asarray(flow.warp(SAMPLER.steps, SAMPLER.shift))


def _sequential(params, inputs, clean, exit_step, factors):
    """The last pass of every block against a cache of clean blocks that lets no gradient through."""
    text = rollout.embed_text(SPEC, params, _context())
    cache = rollout.init_cache(SPEC, BATCH, jnp.float32)
    out = []
    for block, place in _places(factors):
        cache = jax.lax.stop_gradient(cache)
        _, x0, _ = rollout.predict(SPEC, params, cache, text, inputs[:, block], TIMES[exit_step], place)
        out.append(x0)
        _, _, cache = rollout.predict(SPEC, params, cache, text, clean[:, block], jnp.float32(0), place)
    return jnp.concatenate(out, axis=1)


def _at_once(params, inputs, clean, exit_step, factors, remat=False):
    rollouts = self_forcing.Rollouts(_context(), inputs, clean, exit_step)
    return self_forcing.last_pass(SPEC, params, rollouts, factors, remat=remat)


def _attached(params, inputs, clean, exit_step, factors):
    """As `_at_once`, but the past carries a gradient."""
    t = jnp.full((BATCH, 1), TIMES[exit_step])
    network = transformer.bind(CONFIG, params)
    mask = transformer.teacher_forcing_mask(transformer.block_index(FRAMES, 2))
    text = network.embed_text(_context())
    v = network.teacher_forcing(inputs, t, clean, text, factors, GRID, SPEC.parallel, frame_mask=mask)
    return flow.x0_from_flow(inputs, v, t / 1000)


@functools.cache
def _compiled(function):
    """Value and gradient of a random projection of the output."""

    def loss(params, inputs, *rest):
        x0 = function(params, inputs, *rest)
        return (jax.random.normal(jax.random.key(3), inputs.shape) * x0).sum(), x0

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _gradient(function, exit_step, factors):
    """Output of a form of the last pass, and the gradient's leaves by name."""
    rolled_out = _rolled_out(exit_step, factors)
    (_, x0), gradient = _compiled(function)(_params(), *rolled_out, jnp.int32(exit_step), FACTORS[factors])
    return x0, {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradient)}


def _worst(gradient, expected):
    """The largest error of a leaf, relative to the leaf's norm. The bias of keys has no gradient but rounding."""
    scale = max(float(jnp.linalg.norm(leaf)) for leaf in expected.values())
    return max(
        float(jnp.linalg.norm(gradient[name] - leaf) / jnp.maximum(jnp.linalg.norm(leaf), 1e-3 * scale))
        for name, leaf in expected.items()
    )


@pytest.mark.parametrize(("exit_step", "factors"), [(0, "plain"), (3, "plain"), (1, "gapped"), (3, "gapped")])
def test_the_pass_over_all_blocks_is_the_last_pass_of_each(exit_step, factors):
    """In value for every block, and in the gradient of every parameter."""
    x0, gradient = _gradient(_at_once, exit_step, factors)
    expected_x0, expected = _gradient(_sequential, exit_step, factors)
    np.testing.assert_allclose(x0, expected_x0, atol=2e-5)
    np.testing.assert_allclose(x0, _rolled_out(exit_step, factors)[1], atol=2e-5)
    assert _worst(gradient, expected) < 5e-6


def test_blocks_computed_again_give_the_same_gradient():
    _, gradient = _gradient(functools.partial(_at_once, remat=True), 3, "gapped")
    assert _worst(gradient, _gradient(_sequential, 3, "gapped")[1]) < 5e-6


def test_a_gradient_through_the_past_would_be_seen():
    """So small is the tolerance above: keys and values of clean blocks that do carry a gradient change it by more."""
    x0, gradient = _gradient(_attached, 3, "plain")
    np.testing.assert_allclose(x0, _rolled_out(3, "plain")[1], atol=2e-5)
    assert _worst(gradient, _gradient(_sequential, 3, "plain")[1]) > 1e-3


def test_an_independent_first_frame_is_refused():
    sampler = SamplerConfig(frames_per_block=2, independent_first_frame=True)
    spec = RolloutSpec.create(CONFIG, sampler, GRID, 7)
    with pytest.raises(ValueError, match="equal blocks"):
        self_forcing.roll_out(spec, _params(), None, jnp.zeros((1, 7, 8, 64)), None, 0, FACTORS["plain"])
