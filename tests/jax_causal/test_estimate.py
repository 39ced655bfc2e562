"""Memory estimates: exact where they claim to be, and within a stated factor of XLA's own account."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import components, estimate, modules, rollout, transformer, vae
from jax_causal.config import PRESETS
from jax_causal.rollout import RolloutSpec

TINY = PRESETS["tiny"]


def _spec(config, height, width, frames=21, **limits):
    grid = height // 16, width // 16
    return RolloutSpec.create(config.transformer, config.sampler, grid, frames, **limits)


def _nbytes(tree):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "parameters"), [("wan-1.3b", 1_418_996_800), ("wan-14b", 14_288_491_584)])
def test_full_size_models_by_hand(name, parameters):
    config = PRESETS[name]
    parts = estimate.memory_estimate(config, _spec(config, 480, 832), 1, "bfloat16")
    assert parts["transformer"] == 2 * parameters
    assert parts["vae"] == 2 * 126_892_531
    assert parts["text_encoder"] == 2 * 5_680_910_336
    dit = config.transformer
    assert parts["kv_cache"] == 2 * dit.num_layers * 21 * 1560 * dit.dim * 2
    assert parts["text_kv"] == 2 * dit.num_layers * 512 * dit.dim * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limits", [{}, {"window": 9, "sink": 3}])
def test_state_equals_what_is_allocated(dtype, limits):
    spec = _spec(TINY, 64, 96, **limits)
    parts = estimate.memory_estimate(TINY, spec, 2, dtype)
    cache = rollout.init_cache(spec, 2, jnp.dtype(dtype))
    assert parts["kv_cache"] == _nbytes(cache)
    assert parts["decoder_state"] == _nbytes(vae.init_decoder_state(TINY.vae, 2, 64, 96, jnp.dtype(dtype)))


def test_text_and_weights_equal_what_is_allocated():
    spec = _spec(TINY, 64, 64)
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), transformer.abstract(TINY.transformer)
    )
    text = rollout.embed_text(spec, params, jnp.zeros((2, 32, 128)))
    parts = estimate.memory_estimate(TINY, spec, 2, "float32")
    assert parts["transformer"] == _nbytes(params)
    assert parts["text_kv"] == _nbytes((text.k, text.v))


def test_parts_that_a_model_lacks_are_left_out():
    config = dataclasses.replace(TINY, text_encoder=None)
    assert "text_encoder" not in estimate.memory_estimate(config, _spec(TINY, 64, 64), 1, "float32")


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the plain attention of CPUs is what is measured")
def test_activations_are_within_a_third_of_what_xla_plans():
    spec, f32 = _spec(TINY, 96, 96), jnp.float32
    parts = estimate.memory_estimate(TINY, spec, 1, f32)

    params = transformer.abstract(TINY.transformer)
    cache = _abstract(jax.eval_shape(functools.partial(rollout.init_cache, spec, 1, f32)))
    embeds = jax.ShapeDtypeStruct((1, 32, 128), f32)
    text = _abstract(jax.eval_shape(functools.partial(rollout.embed_text, spec), params, embeds))
    tokens, renoise = (jax.ShapeDtypeStruct((*lead, 1, 3, 36, 64), f32) for lead in ((), (3,)))
    denoise = rollout.denoise_block.lower(spec, params, cache, text, tokens, renoise, spec.place(0, 3))
    planned = denoise.compile().memory_analysis().temp_size_in_bytes
    assert planned / 1.34 < parts["block_activations"] < planned * 1.34

    state = _abstract(vae.init_decoder_state(TINY.vae, 1, 96, 96))
    decode = components.decode_chunk.lower(
        TINY.vae, spec.framing, modules.abstract(vae.VAE, TINY.vae), tokens, state, first=False
    )
    planned = decode.compile().memory_analysis().temp_size_in_bytes
    assert planned / 1.34 < parts["vae_activations"] < planned * 1.34


def test_a_given_clip_is_encoded_in_one_piece():
    spec = _spec(TINY, 64, 64)
    small, large = (
        estimate.memory_estimate(TINY, spec, 1, "float32", given_frames=frames)["vae_activations"]
        for frames in (9, 36)
    )
    assert small == estimate.memory_estimate(TINY, spec, 1, "float32")["vae_activations"]
    assert large == 3 * small


def test_the_summary_leaves_nothing_out():
    parts = estimate.memory_estimate(TINY, _spec(TINY, 64, 64), 1, "float32")
    assert sum(estimate.summary(parts).values()) == sum(parts.values())


def test_the_mend_shrinks_the_largest_part():
    config = PRESETS["wan-1.3b"]

    def mend(frames, dtype="bfloat16", height=480, width=832, **limits):
        spec = _spec(config, height, width, frames, **limits)
        return estimate.mend(estimate.memory_estimate(config, spec, 1, dtype), spec, dtype)

    assert mend(21, "float32") == "--precision bfloat16"
    assert mend(210) == "--window 105"
    assert mend(210, window=105, sink=3) == "--window 54"
    assert mend(21) == "a smaller model"  # the text encoder
    assert mend(21, height=1088, width=1920, window=6) == "a smaller --height and --width"


def test_device_memory_is_that_of_the_machine():
    available = estimate.device_memory()
    assert available is None or 2**28 < available < 2**50
