"""The block loop against the golden rollouts: every call's prediction, the video, the held keys and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import flow, fused_norm, fused_rotation, rollout, transformer
from jax_causal.config import SamplerConfig, TransformerConfig
from jax_causal.parallel import SingleDevice
from jax_causal.rollout import RolloutSpec
from tests import golden_data
from tests.golden_rollout import ATOL, FRAME_TOKENS, ROLLOUTS, GoldenRollout
from tests.models import patchify


@pytest.mark.golden
@pytest.mark.parametrize("name", ROLLOUTS)
@pytest.mark.parametrize("unrolled", [False, True], ids=["scanned", "unrolled"])
def test_rollout(name, unrolled):
    golden = GoldenRollout(name, unrolled=unrolled)
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)


@pytest.mark.golden
@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout_fused(monkeypatch, name):
    """By the order of things that the fused kernels want, with their plain forms in the kernels' place."""
    called = []

    class Fusing(SingleDevice):  # of this test alone: programs are kept by it
        def fuses(self, tokens, heads, head_dim, dtype):
            return True

    def rotate(eps, peers, products, scales, factors, written, numbers):
        called.append(numbers)
        return fused_rotation.plain_rotate(eps, peers, products, scales, factors, *written, *numbers)

    monkeypatch.setattr(fused_rotation, "_rotate_kernel", rotate)
    monkeypatch.setattr(fused_norm, "_add_norm_kernel", fused_norm.plain_add_norm)
    golden = GoldenRollout(name, Fusing(), unrolled=True)
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)
    assert called


@pytest.mark.golden
@pytest.mark.parametrize("parts", golden_data.divisors(FRAME_TOKENS))
def test_rollout_with_split_keys(parts):
    golden = GoldenRollout("rollout_local_sink", SingleDevice(parts=parts))
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)


@pytest.mark.golden
@pytest.mark.parametrize("name", ROLLOUTS)
def test_every_call(name):
    """The same loop pass by pass: velocity where recorded, and the clean prediction of all calls."""
    golden = GoldenRollout(name)
    data, spec, shift = golden.data, golden.spec, golden.sampler.shift
    predict = jax.jit(rollout.predict, static_argnums=0)
    times = flow.warp(golden.sampler.steps, shift)
    np.testing.assert_allclose(times, data["step_timesteps"], rtol=1e-6)
    calls = iter(range(int(data["n_calls"])))

    def call(x, t, place):
        index = next(calls)
        assert data["call_timestep"][index] == np.float32(t)
        assert data["call_frames"][index] == x.shape[1]
        assert data["call_local_end"][index] == place.held * spec.layout.tokens
        v, x0, golden.cache = predict(
            spec, golden.params, golden.cache, golden.text, x, jnp.float32(t), place
        )
        np.testing.assert_allclose(golden.latent(x0), data[f"call{index:03d}_x0"], atol=ATOL)
        if f"call{index:03d}_flow" in data:
            np.testing.assert_allclose(golden.latent(x), data[f"call{index:03d}_x"], atol=ATOL)
            np.testing.assert_allclose(golden.latent(v), data[f"call{index:03d}_flow"], atol=ATOL)
        return x0

    for place, x0 in golden.initial_blocks():
        call(x0, 0.0, place)
    for place, x, renoise in golden.blocks():
        for step, t in enumerate(times):
            x0 = call(x, t, place)
            if step < len(renoise):
                x = flow.add_noise(x0, renoise[step], flow.sigma_at(times[step + 1], shift))
        call(x0, golden.sampler.context_noise, place)
    assert next(calls, None) is None


@pytest.mark.golden
def test_bfloat16_error_per_block(record_property):
    """A bf16 rollout drifts from fp32 by rounding alone, and no more in late blocks than in early ones.

    What rounding must cost is measured beside it: an fp32 rollout with weights rounded to bf16, 0.35 to 0.39 % of each
    block. Activations, modulation and the residual stream round as coarsely and about as often again; the whole was
    0.65 to 0.70 %. Four times the floor leaves a factor of two; a wrong dtype or order of operations gives 10 % up.
    """
    golden = GoldenRollout("rollout_full", dtype=jnp.bfloat16)
    rounded = GoldenRollout("rollout_full")
    rounded.params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), rounded.params)
    rounded.text = rollout.embed_text(rounded.spec, rounded.params, rounded.data["context"])
    expected = golden.data["latents"]
    size = golden.sampler.frames_per_block

    def relative_errors(latents):
        blocks = (slice(start, start + size) for start in range(0, golden.num_frames, size))
        return [
            np.linalg.norm(latents[:, b] - expected[:, b]) / np.linalg.norm(expected[:, b]) for b in blocks
        ]

    errors, floor = relative_errors(golden.run()), max(relative_errors(rounded.run()))
    for block, error in enumerate(errors):
        record_property(f"bf16_relative_error_block_{block}", float(error))
        print(f"bf16 relative error of block {block}: {error:.4f} (weights alone: {floor:.4f})")
        assert error < 4 * floor


# A seeded model for properties that need no golden file.

CONFIG = TransformerConfig(dim=48, num_layers=2, num_heads=4, ffn_dim=64, text_dim=16, text_length=8)
SAMPLER = SamplerConfig(frames_per_block=2)
GRID = (2, 4)


@functools.cache
def _params():
    return transformer.init(CONFIG, jax.random.key(0))


def _run(spec, num_blocks, stacked=True, dtype=jnp.float32):
    """Latents per block, and the final cache, for seeded noise that depends on frame numbers alone."""
    params = jax.tree.map(lambda p: p.astype(dtype), _params())
    params = params if stacked else transformer.unroll(params, spec.parallel.joined)
    keys = jax.random.split(jax.random.key(1), 1)
    cache = rollout.init_cache(spec, 1, dtype, stacked=stacked)
    text = rollout.embed_text(spec, params, jax.random.normal(jax.random.key(2), (1, 5, 16)))
    out = []
    for start, size in rollout.block_sizes(num_blocks * 2, SAMPLER):
        place = spec.place(start, size)
        noise, renoise = rollout.draw_noise(spec, keys, start, size, dtype)
        x0, cache = rollout.denoise_block(spec, params, cache, text, noise, renoise, place)
        cache = rollout.write_context(spec, params, cache, text, x0, place, np.float32(0))
        out.append(np.asarray(x0))
    return out, cache


def test_window_equals_a_long_cache_restricted_to_the_same_keys():
    """One pass at a late block: over a ring, and over an unwindowed cache holding just the frames it should see."""
    spec = RolloutSpec.create(CONFIG, SAMPLER, GRID, None, window=8, sink=2)
    _, cache = _run(spec, 12)
    start, size, heads = 24, 2, (CONFIG.num_heads, CONFIG.head_dim)
    held = spec.layout.held_frames(start + size)[:-size]
    assert held == [0, 1, 20, 21, 22, 23]
    longer = RolloutSpec.create(CONFIG, SAMPLER, GRID, len(held) + size)
    restricted = rollout.init_cache(longer, 1, jnp.float32)
    for layer in range(CONFIG.num_layers):
        frames = [cache.read_frame(spec.layout, layer, int(spec.layout.slot(f))) for f in held]
        k, v = (jnp.stack(x, axis=1).reshape(1, len(held), -1, *heads) for x in zip(*frames, strict=True))
        restricted = restricted.write(longer.layout, layer, np.arange(len(held)), k, v)
    noise, _ = rollout.draw_noise(spec, jax.random.split(jax.random.key(3), 1), start, size, jnp.float32)
    text = rollout.embed_text(spec, _params(), jnp.ones((1, 3, 16)))
    place = spec.place(start, size)
    slots = np.arange(len(held), len(held) + size, dtype=np.int32)
    moved = place._replace(slots=slots, held=np.int32(len(held) + size))
    predict = jax.jit(rollout.predict, static_argnums=0)
    ring, _, _ = predict(spec, _params(), cache, text, noise, jnp.float32(625), place)
    plain, _, _ = predict(longer, _params(), restricted, text, noise, jnp.float32(625), moved)
    np.testing.assert_allclose(ring, plain, atol=2e-5)


def test_unaligned_ring_equals_aligned_history():
    """A window that blocks wrap around in computes the same as the goldens' rule: checked against no window at all
    while nothing has been evicted, and finite long after."""
    ring = RolloutSpec.create(CONFIG, SAMPLER, GRID, None, window=7, sink=1)
    assert not ring.layout.contiguous
    plain = RolloutSpec.create(CONFIG, SAMPLER, GRID, 6)
    (ours, _), (theirs, _) = _run(ring, 9), _run(plain, 3)
    for a, b in zip(ours[:3], theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert all(np.isfinite(block).all() for block in ours)


@pytest.mark.parametrize("stacked", [True, False], ids=["scanned", "unrolled"])
def test_one_program_and_no_tracing_after_the_first_block(stacked):
    spec = RolloutSpec.create(CONFIG, SAMPLER, GRID, None, window=6, sink=2)
    _run(spec, 2, stacked)
    programs = rollout.denoise_block._cache_size(), rollout.write_context._cache_size()
    with jax.no_tracing():
        _run_more(spec, stacked)
    assert (rollout.denoise_block._cache_size(), rollout.write_context._cache_size()) == programs


@pytest.mark.parametrize("stacked", [True, False], ids=["scanned", "unrolled"])
def test_a_new_cache_is_an_empty_one(stacked):
    spec = RolloutSpec.create(CONFIG, SAMPLER, GRID, None, window=6, sink=2)
    new, empty = (
        make(spec, 1, jnp.float32, stacked=stacked) for make in (rollout.new_cache, rollout.init_cache)
    )
    assert jax.tree.structure(new) == jax.tree.structure(empty)
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(empty), strict=True):
        assert (x.shape, x.dtype, x.sharding, x.committed) == (y.shape, y.dtype, y.sharding, True)
        assert not x.any()


def _run_more(spec, stacked):
    params = _params() if stacked else _unrolled()
    cache = rollout.init_cache(spec, 1, jnp.float32, stacked=stacked)
    text = rollout.embed_text(spec, params, _context())
    for start, size in rollout.block_sizes(20, SAMPLER):
        place = spec.place(start, size)
        noise, renoise = rollout.draw_noise(spec, _keys(), start, size, jnp.float32)
        x0, cache = rollout.denoise_block(spec, params, cache, text, noise, renoise, place)
        cache = rollout.write_context(spec, params, cache, text, x0, place, np.float32(0))


_unrolled = functools.cache(lambda: transformer.unroll(_params(), SingleDevice().joined))
_context = functools.cache(lambda: jax.random.normal(jax.random.key(2), (1, 5, 16)))
_keys = functools.cache(lambda: jax.random.split(jax.random.key(1), 1))


@pytest.mark.parametrize("stacked", [True, False], ids=["scanned", "unrolled"])
def test_cache_is_updated_in_place(stacked):
    """The block step aliases the donated cache and keeps no second copy of it."""
    spec = RolloutSpec.create(CONFIG, SAMPLER, (8, 8), 64)
    abstract = transformer.abstract(CONFIG)
    params = abstract if stacked else jax.eval_shape(transformer.unroll, abstract)
    cache = jax.eval_shape(lambda: rollout.init_cache(spec, 1, jnp.float32, stacked=stacked))
    text = jax.eval_shape(lambda p: rollout.embed_text(spec, p, jnp.zeros((1, 8, 16))), params)
    shapes = jax.eval_shape(
        lambda k: rollout.draw_noise(spec, k, 0, 2, jnp.float32), jax.random.split(jax.random.key(0), 1)
    )
    lowered = rollout.denoise_block.lower(spec, params, cache, text, *shapes, spec.place(0, 2))
    memory = lowered.compile().memory_analysis()
    size = sum(x.size * 4 for x in jax.tree.leaves(cache))
    one_layer = size / CONFIG.num_layers
    assert memory.alias_size_in_bytes >= size
    # One layer's keys and values may be read out for attention, and its scores are materialised on a CPU.
    scores = 4 * 2 * 64 * spec.layout.capacity * 64 * CONFIG.num_heads
    assert memory.temp_size_in_bytes < one_layer + 3 * scores


def test_noise_belongs_to_the_frame():
    """The noise of a frame does not depend on how frames are grouped, nor on the rest of the batch."""
    spec = RolloutSpec.create(CONFIG, SAMPLER, GRID, 8)
    keys = jax.random.split(jax.random.key(5), 3)
    whole, again = rollout.draw_noise(spec, keys, 2, 4, jnp.float32)
    part, part_again = rollout.draw_noise(spec, keys[1:2], 4, 2, jnp.float32)
    np.testing.assert_array_equal(whole[1:2, 2:], part)
    np.testing.assert_array_equal(again[:, 1:2, 2:], part_again)
    assert again.shape[0] == len(SAMPLER.steps) - 1
    flat = np.concatenate([np.ravel(whole), np.ravel(again)])
    assert abs(flat.mean()) < 0.05
    assert abs(flat.std() - 1) < 0.05


def test_tokens_round_trip():
    spec = RolloutSpec.create(CONFIG, SAMPLER, GRID, 8)
    latent = np.random.default_rng(0).normal(size=(2, 3, 16, 4, 8)).astype(np.float32)
    tokens = rollout.to_tokens(spec, latent)
    np.testing.assert_array_equal(tokens, patchify(latent))
    np.testing.assert_array_equal(rollout.from_tokens(spec, tokens), latent)


def test_plans():
    independent = SamplerConfig(frames_per_block=4, independent_first_frame=True)
    assert list(rollout.block_sizes(9, independent)) == [(0, 1), (1, 4), (5, 4)]
    assert list(rollout.block_sizes(9, independent, 1)) == [(1, 4), (5, 4)]
    assert rollout.initial_blocks(5, independent) == [(0, 1), (1, 4)]
    assert list(rollout.block_sizes(9, SamplerConfig(), 3)) == [(3, 3), (6, 3)]


@pytest.mark.parametrize(
    ("frames", "sampler", "message"),
    [
        (20, SamplerConfig(), "use 18 or 21"),
        (2, SamplerConfig(), "use 3"),
        (0, SamplerConfig(), "use 3"),
        (20, SamplerConfig(independent_first_frame=True), "use 19 or 22"),
    ],
)
def test_frame_counts_that_do_not_fit(frames, sampler, message):
    with pytest.raises(ValueError, match=message):
        rollout.check_frames(frames, sampler)


def test_injected_noise_is_checked():
    spec = RolloutSpec.create(CONFIG, SAMPLER, GRID, 4)
    with pytest.raises(ValueError, match="6, not 5"):
        rollout.split_renoise(spec, np.zeros((5, 2, 16, 4, 8)), 4)
    with pytest.raises(ValueError, match="must have 2 frames"):
        rollout.split_renoise(spec, np.zeros((6, 3, 16, 4, 8)), 4)
