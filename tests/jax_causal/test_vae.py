"""The streaming VAE against the golden vectors, and its layers against plain numpy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from converters.names import to_params
from jax_causal import modules
from jax_causal.config import VAEConfig
from jax_causal.vae import VAE, init_decoder_state, init_encoder_state, num_latent_frames, to_uint8
from jax_causal.vae_layers import ACTIVATION_AXES, Norm, causal_conv, upsampling_conv
from tests import golden_data

ATOL = 1e-4  # against the golden vectors
CHUNKED_ATOL = 1e-5  # between different ways to cut a clip


@functools.cache
def _golden():
    """(arrays, config, fp32 parameters) of the golden file."""
    data = golden_data.load("vae")
    settings = golden_data.settings(data)
    config = VAEConfig(
        dim=settings["dim"],
        z_dim=settings["z_dim"],
        latents_mean=tuple(data["latents_mean"].tolist()),
        latents_std=tuple(data["latents_std"].tolist()),
    )
    params = to_params("vae", golden_data.state_dict(data), modules.abstract(VAE, config))
    return data, config, jax.tree.map(jnp.asarray, params)


def _compiled(method, config, conv="auto"):
    """`method` of the VAE, a jitted function of (params, input, state, first); the state is donated."""

    def call(params, x, state, first):
        return getattr(modules.bind(VAE, config, params, conv=conv), method)(x, state, first=first)

    return jax.jit(call, static_argnames="first", donate_argnums=2)


@functools.cache
def _shared(method):
    return _compiled(method, _golden()[1])


def _stream(function, params, x, chunks, state=None):
    """Runs x, cut along its frames, through the function: (outputs joined, frames of each, last state)."""
    outputs = []
    for i, chunk in enumerate(np.split(x, np.cumsum(chunks)[:-1], axis=1)):
        out, *_, state = function(params, chunk, state, first=i == 0)
        outputs.append(np.asarray(out))
    return np.concatenate(outputs, axis=1), [out.shape[1] for out in outputs], state


@functools.cache
def _one_shot():
    data, _, params = _golden()
    return _stream(_shared("decode"), params, data["latent"], [data["latent"].shape[1]])[0]


def _channels_last(x):
    """Golden frames [B, T, C, H, W] as [B, T, H, W, C]."""
    return np.moveaxis(x, 2, -1)


# Decoding


@pytest.mark.golden
def test_decode():
    data, _, _ = _golden()
    video = _one_shot()
    np.testing.assert_allclose(video, _channels_last(data["decoded_raw"]), atol=ATOL)
    np.testing.assert_allclose(video.clip(-1, 1), _channels_last(data["decoded"]), atol=ATOL)


@pytest.mark.golden
def test_decode_with_3d_convolutions():
    data, config, params = _golden()
    video, *_ = _stream(_compiled("decode", config, "3d"), params, data["latent"], [data["latent"].shape[1]])
    np.testing.assert_allclose(video, _channels_last(data["decoded_raw"]), atol=ATOL)


@pytest.mark.golden
def test_decode_in_recorded_chunks():
    data, _, params = _golden()
    runs = [key.removesuffix("_latent_chunks") for key in data if key.endswith("_latent_chunks")]
    assert runs
    for run in runs:
        chunks = data[f"{run}_latent_chunks"]
        video, frames, state = _stream(_shared("decode"), params, data["latent"], chunks)
        np.testing.assert_array_equal(frames, data[f"{run}_frames"])
        np.testing.assert_allclose(video, _one_shot(), atol=CHUNKED_ATOL)
        slots = golden_data.numbered(data, f"{run}_final_cache")
        for ours, slot in zip(state, slots, strict=True) if slots else ():
            np.testing.assert_allclose(ours, np.moveaxis(slot, 1, -1), atol=ATOL)


@pytest.mark.golden
def test_decode_in_other_chunks():
    data, _, params = _golden()
    frames = data["latent"].shape[1]
    for chunks in ([1] * frames, [2] * (frames // 2) + [1] * (frames % 2)):
        video, *_ = _stream(_shared("decode"), params, data["latent"], chunks)
        np.testing.assert_allclose(video, _one_shot(), atol=CHUNKED_ATOL)
        np.testing.assert_allclose(video, _channels_last(data["decoded_raw"]), atol=ATOL)


@pytest.mark.golden
def test_same_chunks_give_the_same_bits():
    """Two streams interleaved in an instance of their own equal each stream run alone in another."""
    data, config, params = _golden()
    chunks = data["stream_3_latent_chunks"]
    clips = data["latent"], data["latent"][:, ::-1]
    alone = [_stream(_shared("decode"), params, clip, chunks)[0] for clip in clips]
    decode, states, outputs = _compiled("decode", config), [None, None], ([], [])
    for i, end in enumerate(np.cumsum(chunks)):
        for k in (1, 0):
            out, states[k] = decode(params, clips[k][:, end - chunks[i] : end], states[k], first=i == 0)
            outputs[k].append(out)
    for video, expected in zip(outputs, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(video, axis=1), expected)


@pytest.mark.golden
def test_first_chunk_does_not_read_the_state():
    data, config, params = _golden()
    height, width = data["decoded"].shape[-2:]
    stale = jax.tree.map(
        lambda slot: slot + 7, init_decoder_state(config, len(data["latent"]), height, width)
    )
    latents = data["latent"][:, :1]
    decode = _shared("decode")
    fresh, expected = decode(params, latents, None, first=True)
    video, state = decode(params, latents, stale, first=True)
    jax.tree.map(np.testing.assert_array_equal, (video, state), (fresh, expected))


@pytest.mark.golden
def test_bfloat16_stays_close():
    """Computing in bfloat16 costs no more than a few times what storing the weights in it does."""
    data, config, params = _golden()
    expected = _channels_last(data["decoded_raw"])
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)

    def error(function, params):
        video, _, state = _stream(function, params, data["latent"], [data["latent"].shape[1]])
        assert {video.dtype, *(slot.dtype for slot in state)} == {params["quant_conv"]["kernel"].dtype}
        return np.linalg.norm(video.astype(np.float32) - expected) / np.linalg.norm(expected)

    floor = error(_shared("decode"), rounded)  # 0.016 relative
    assert floor < error(_compiled("decode", config), low) < 4 * floor  # 0.036


# Encoding


@pytest.mark.golden
def test_encode():
    data, _, params = _golden()
    video = np.moveaxis(data["video"], 1, -1)
    for frames, latent_frames in ((video.shape[1], None), (1, 1)):
        latents, *_ = _stream(_shared("encode"), params, video[:, :frames], [frames])
        np.testing.assert_allclose(latents, data["encoded"][:, :latent_frames], atol=ATOL)


@pytest.mark.golden
def test_posterior_in_chunks():
    data, config, params = _golden()
    video, factor = np.moveaxis(data["video"], 1, -1), config.temporal_factor
    chunks = [1 + factor] + [factor] * (video.shape[1] // factor - 1)
    mean, *_ = _stream(_shared("posterior"), params, video, chunks)
    np.testing.assert_allclose(mean, data["encoded_unnormalized"], atol=CHUNKED_ATOL)


# State


def _spatial(slot):
    frames, height, width, channels = slot.shape[1:]
    return channels, frames, height, width


def test_state_of_the_full_model():
    config = VAEConfig()
    state = jax.eval_shape(lambda: init_decoder_state(config, 2, 480, 832, jnp.bfloat16))
    assert [_spatial(slot) for slot in state] == [
        (16, 2, 60, 104),
        *[(384, 2, 60, 104)] * 11,
        (192, 2, 120, 208),
        *[(384, 2, 120, 208)] * 6,
        *[(192, 2, 240, 416)] * 6,
        *[(96, 2, 480, 832)] * 7,
    ]
    assert {(slot.shape[0], slot.dtype) for slot in state} == {(2, jnp.dtype(jnp.bfloat16))}
    state = jax.eval_shape(lambda: init_encoder_state(config, 1, 480, 832))
    assert [_spatial(slot) for slot in state] == [
        (3, 2, 480, 832),
        *[(96, 2, 480, 832)] * 4,
        (96, 2, 240, 416),
        *[(192, 2, 240, 416)] * 3,
        (192, 1, 120, 208),
        (192, 2, 120, 208),
        *[(384, 2, 120, 208)] * 3,
        (384, 1, 60, 104),
        *[(384, 2, 60, 104)] * 9,
    ]


def test_full_model_has_the_published_size():
    params = modules.abstract(VAE, VAEConfig())
    assert len(jax.tree.leaves(params)) == 194
    assert modules.num_parameters(params) == 126_892_531


_SMALL = VAEConfig(dim=4, multipliers=(1, 2), num_res_blocks=1, temporal_downsample=(True,))


def test_state_is_zero_and_updated_in_place():
    state = init_decoder_state(_SMALL, 1, 8, 8)
    assert not any(slot.any() for slot in state)
    params = modules.abstract(VAE, _SMALL)
    latents = jax.ShapeDtypeStruct((1, 2, _SMALL.z_dim, 4, 4), jnp.float32)
    compiled = _compiled("decode", _SMALL).lower(params, latents, state, first=False).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(slot.nbytes for slot in state)


# Sharding


def test_width_can_be_sharded():
    """Convolutions exchange their halos; only the attention of the middle block gathers, keys and values."""
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("width",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "width"))

    def constrain(x, names):
        assert names == ACTIVATION_AXES
        return jax.lax.with_sharding_constraint(x, sharding)

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.uniform(-0.5, 0.5, leaf.shape).astype(leaf.dtype), modules.abstract(VAE, _SMALL)
    )
    latents = rng.standard_normal((1, 2, _SMALL.z_dim, 4, 2 * devices), np.float32)
    expected, _ = _compiled("decode", _SMALL)(params, latents, None, first=True)

    def decode(params, latents):
        return modules.bind(VAE, _SMALL, params).decode(latents, None, first=True, constrain=constrain)

    compiled = jax.jit(decode).lower(params, latents).compile()
    video, state = compiled(params, latents)
    np.testing.assert_allclose(video, expected, atol=1e-5)
    # Slot 0 holds the latents themselves, which `constrain` does not see.
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in (video, *state[1:]))
    assert len(re.findall(r" all-gather(?:-start)?\(", compiled.as_text())) <= 2


# Layers


def _correlate(x, kernel, stride):
    """[B, T, H, W, C] with [3, kh, kw, C, O] in float64: valid in time, zero-padded in space."""
    taps, rows, columns = kernel.shape[:3]
    height, width = x.shape[2:4]
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *((n // 2, n // 2) for n in (rows, columns)), (0, 0)])
    frames = range(0, x.shape[1] - taps + 1, stride)
    return sum(
        np.stack([x[:, f + t, i : i + height, j : j + width] for f in frames], axis=1) @ kernel[t, i, j]
        for t, i, j in np.ndindex(taps, rows, columns)
    )


@pytest.mark.parametrize("form", ["3d", "folded", "spread", "auto"])
@pytest.mark.parametrize("spatial", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("outputs", [3, 8])
def test_causal_conv(form, spatial, stride, outputs):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 4, 5, 6), np.float32)
    kernel = rng.standard_normal((3, spatial, spatial, 6, outputs), np.float32)
    expected = _correlate(x, kernel, stride)
    out = causal_conv(x[:, :2], x[:, 2:], kernel, form, stride=stride)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    bias, residual = rng.standard_normal(outputs, np.float32), rng.standard_normal(out.shape, np.float32)
    out = causal_conv(x[:, :2], x[:, 2:], kernel, form, stride=stride, bias=bias, residual=residual)
    np.testing.assert_allclose(out, expected + bias + residual, atol=2e-5)


def test_spread_convolution_in_bfloat16():
    """Rounding each tap's sum costs little beside rounding the whole: less than half as much again."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 6, 16, 16, 96)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 96, 3)) / 50, jnp.bfloat16)
    exact = _correlate(np.asarray(x, np.float64), np.asarray(kernel, np.float64), 1)
    errors = {
        form: np.linalg.norm(np.asarray(causal_conv(x[:, :2], x[:, 2:], kernel, form), np.float64) - exact)
        / np.linalg.norm(exact)
        for form in ("folded", "spread")
    }
    assert 1e-4 < errors["folded"] < 4e-3
    assert errors["spread"] < 1.5 * errors["folded"]


def test_upsampling_conv():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5, 6), np.float32)
    kernel = rng.standard_normal((3, 3, 6, 7), np.float32)
    nearest = x.repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_allclose(upsampling_conv(x, kernel), _correlate(nearest, kernel[None], 1), atol=2e-5)


def test_norm():
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 3, 8), np.float32), rng.standard_normal(8, np.float32)
    x[0, 0] = 0
    x[0, 1] *= 1e-13  # shorter than the floor
    length = np.maximum(np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), 1e-12)
    norm = modules.bind(_Norm8, None, {"norm": {"scale": jnp.asarray(scale)}}).norm
    np.testing.assert_allclose(norm(x), x / length * np.sqrt(8) * scale, atol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: norm(x).sum())(jnp.zeros(8))).all()
    half = norm(jnp.full(8, 300, jnp.float16))  # its squares overflow float16
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, scale.astype(np.float16), rtol=1e-3)


class _Norm8(VAE):
    """A norm in the form that `modules.bind` takes."""

    def __init__(self, config, *, rngs):
        self.norm = Norm(8, rngs=rngs)


def test_to_uint8():
    video = jnp.asarray([-2, -1, -0.5, 0, 0.4999, 1, 1.5])
    expected = np.round((np.clip(video, -1, 1) + 1) / 2 * 255).astype(np.uint8)
    for dtype in (jnp.float32, jnp.bfloat16):
        out = to_uint8(video.astype(dtype))
        assert out.dtype == jnp.uint8
        np.testing.assert_allclose(out.astype(int), expected, atol=0 if dtype == jnp.float32 else 1)


# Bad input


def _abstract_call(method, shape, state=None, *, first, dtype=jnp.float32):
    config = VAEConfig(dim=4)

    def call(params, x, state):
        return getattr(modules.bind(VAE, config, params), method)(x, state, first=first)

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(call, modules.abstract(VAE, config, dtype=dtype), x, state)


@pytest.mark.parametrize(
    ("shape", "first", "message"),
    [
        ((1, 12, 16, 16, 3), True, "9 or 13"),
        ((1, 0, 16, 16, 3), True, "use 1"),
        ((1, 5, 16, 16, 3), False, "4 or 8"),
        ((1, 1, 100, 16, 3), True, "height=100 .* 96 or 104"),
        ((1, 1, 16, 7, 3), True, "width=7 .* use 8"),
        ((1, 3, 1, 16, 16), True, "batch, frames, height, width, 3"),
        ((1, 16, 16, 3), True, "batch, frames, height, width, 3"),
    ],
)
def test_video_that_does_not_fit(shape, first, message):
    with pytest.raises(ValueError, match=message):
        _abstract_call("encode", shape, first=first)


@pytest.mark.parametrize("shape", [(1, 2, 15, 2, 2), (1, 0, 16, 2, 2), (2, 16, 2, 2), (1, 16, 2, 2, 2)])
def test_latents_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"\[batch, frames, 16, height, width\]"):
        _abstract_call("decode", shape, first=True)


def test_state_that_does_not_fit():
    config, shape = VAEConfig(dim=4), (1, 3, 16, 2, 2)
    with pytest.raises(ValueError, match="needs the state"):
        _abstract_call("decode", shape, None, first=False)
    for batch, height, dtype in ((2, 16, jnp.float32), (1, 24, jnp.float32), (1, 16, jnp.bfloat16)):
        state = init_decoder_state(config, batch, height, 16, dtype)
        with pytest.raises(ValueError, match=r"this chunk needs float32\[1, 2, 2, 2, 16\]"):
            _abstract_call("decode", shape, state, first=False)
    with pytest.raises(ValueError, match=r"height=90 .* 88 or 96"):
        init_decoder_state(config, 1, 90, 16)


def test_latent_frame_counts():
    config = VAEConfig()
    assert [num_latent_frames(config, n) for n in (1, 5, 81)] == [1, 2, 21]
    assert [num_latent_frames(config, n, first=False) for n in (4, 12)] == [1, 3]


def test_unknown_conv_form():
    with pytest.raises(ValueError, match="auto, 3d, folded, spread"):
        modules.abstract(VAE, VAEConfig(dim=4), conv="2d")
