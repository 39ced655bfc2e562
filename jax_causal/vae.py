"""The causal 3-D VAE of Wan2.1, streaming: video to latents and back, a chunk at a time.

A clip is a first chunk and any number of further ones. One latent frame holds `temporal_factor` video
frames, a clip's first latent frame a single one. From chunk to chunk goes a *state*: the last frames that
each layer looking back in time has seen, a tuple in execution order. A chunk is computed whole, and how a
clip is cut into chunks does not change the result.

The mathematics is that of the public Wan2.1 VAE (Wan-Video/Wan2.1, `wan/modules/vae.py`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_causal import modules
from jax_causal.config import VAEConfig
from jax_causal.vae_layers import (
    ACTIVATION_AXES,
    CONV_FORMS,
    Attention,
    CausalConv,
    Downsample,
    Norm,
    ResidualBlock,
    Stream,
    Upsample,
    alone,
)

State = tuple[jax.Array, ...]


def _identity(x, names):
    return x


class Encoder(nnx.Module):
    """[B, T, H, W, 3] to [B, F, h, w, 2 z_dim]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.dim * multiplier for multiplier in config.multipliers]
        self.conv_in = CausalConv(3, widths[0], rngs=rngs)
        layers, width = [], widths[0]
        for stage, stage_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(width, stage_width, rngs=rngs))
                width = stage_width
            if stage < len(config.temporal_downsample):
                layers.append(Downsample(width, temporal=config.temporal_downsample[stage], rngs=rngs))
        self.downsamples = nnx.List(layers)
        self.middle = _middle(width, rngs)
        self.norm_out = Norm(width, rngs=rngs)
        self.conv_out = CausalConv(width, 2 * config.z_dim, rngs=rngs)

    def __call__(self, x, stream: Stream):
        x = _run((self.conv_in, *self.downsamples, *self.middle), x, stream)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), stream)


class Decoder(nnx.Module):
    """[B, F, h, w, z_dim] to [B, T, H, W, 3]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.dim * multiplier for multiplier in reversed(config.multipliers)]
        temporal_upsample = config.temporal_downsample[::-1]
        self.conv_in = CausalConv(config.z_dim, widths[0], rngs=rngs)
        self.middle = _middle(widths[0], rngs)
        layers, width = [], widths[0]
        for stage, stage_width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(width, stage_width, rngs=rngs))
                width = stage_width
            if stage < len(temporal_upsample):
                layers.append(Upsample(width, temporal=temporal_upsample[stage], rngs=rngs))
                width //= 2
        self.upsamples = nnx.List(layers)
        self.norm_out = Norm(width, rngs=rngs)
        self.conv_out = CausalConv(width, 3, rngs=rngs)

    def __call__(self, x, stream: Stream):
        x = _run((self.conv_in, *self.middle, *self.upsamples), x, stream)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), stream)


def _middle(width, rngs):
    blocks = ResidualBlock(width, width, rngs=rngs), Attention(width, rngs=rngs)
    return nnx.List([*blocks, ResidualBlock(width, width, rngs=rngs)])


def _run(layers, x, stream):
    for layer in layers:
        x = stream.constrain(layer(x, stream), ACTIVATION_AXES)
    return x


class VAE(nnx.Module):
    """Encoder, decoder and the linear maps around the latents. Computes in the dtype of its parameters.

    Args:
      config: sizes
      conv: how the convolutions over time are computed, one of `CONV_FORMS`; see `causal_conv`

    Raises:
      ValueError: unknown `conv`.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, conv: str = "auto"):
        if conv not in CONV_FORMS:
            raise ValueError(f"conv={conv!r} is unknown: use one of {', '.join(CONV_FORMS)}")
        self.config, self.conv = config, conv
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = nnx.Linear(2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.post_quant_conv = nnx.Linear(config.z_dim, config.z_dim, rngs=rngs)

    def decode(self, latents, state: State | None, *, first: bool, constrain=_identity, halo=alone):
        """Video of one chunk of latents.

        Args:
          latents: [B, F, C, h, w], normalised, any float dtype
          state: what the chunk before returned; not read, and possibly None, when `first`
          first: static; whether this chunk begins a clip
          constrain: `constrain(x, ACTIVATION_AXES)` returns the activation x, sharded as the caller wishes
          halo: how layers that see columns beyond their own are run, see `vae_layers.alone`

        Returns:
          video [B, T, H, W, 3] of about -1 to 1, not clamped, where T is 1 + 4 (F - 1) when `first` and 4 F
          otherwise (4 being the temporal factor); and the state for the next chunk.

        Raises:
          ValueError: latents of another rank or channel count, or a state of another batch, size or dtype.
        """
        if latents.ndim != 5 or latents.shape[2] != self.config.z_dim or latents.shape[1] < 1:
            raise ValueError(
                f"latents must be [batch, frames, {self.config.z_dim}, height, width] with at least one "
                f"frame, not {list(latents.shape)}"
            )
        mean, std = self._latent_statistics
        x = jnp.moveaxis(latents, 2, -1) * std + mean
        stream = Stream(state, first=first, constrain=constrain, halo=halo, conv=self.conv)
        video = self.decoder(self.post_quant_conv(x.astype(self._dtype)), stream)
        return video, tuple(stream.next_state)

    def encode(self, video, state: State | None, *, first: bool, constrain=_identity, halo=alone):
        """Latents of one chunk of video: the mean of `posterior`, normalised.

        Arguments and errors are those of `posterior`. Returns latents [B, F, C, h, w] in the parameters'
        dtype, and the state for the next chunk.
        """
        latents, _, state = self.posterior(video, state, first=first, constrain=constrain, halo=halo)
        mean, std = self._latent_statistics
        latents = (jnp.moveaxis(latents, 2, -1) - mean) / std
        return jnp.moveaxis(latents, -1, 2).astype(self._dtype), state

    def posterior(self, video, state: State | None, *, first: bool, constrain=_identity, halo=alone):
        """The Gaussian over the latents of one chunk of video, before normalisation.

        Args:
          video: [B, T, H, W, 3] in [-1, 1], any float dtype; H and W multiples of the spatial factor; T is
            1 + 4 k when `first` and 4 k otherwise (4 being the temporal factor)
          state, first, constrain, halo: as in `decode`

        Returns:
          mean [B, F, C, h, w], log variance of the same shape, and the state for the next chunk.

        Raises:
          ValueError: frame counts or sizes that do not fit, or a state of another batch, size or dtype.
        """
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video must be [batch, frames, height, width, 3], not {list(video.shape)}")
        num_latent_frames(self.config, video.shape[1], first=first)
        _check_size(self.config, *video.shape[2:4])
        stream = Stream(state, first=first, constrain=constrain, halo=halo, conv=self.conv)
        moments = self.quant_conv(self.encoder(video.astype(self._dtype), stream))
        mean, log_variance = jnp.split(jnp.moveaxis(moments, -1, 2), 2, axis=2)
        return mean, log_variance, tuple(stream.next_state)

    @property
    def _dtype(self):
        return self.quant_conv.kernel[...].dtype

    @property
    def _latent_statistics(self):
        """Mean and standard deviation, in float32: applied to bfloat16 latents they round only once."""
        return np.float32(self.config.latents_mean), np.float32(self.config.latents_std)


def init_decoder_state(config: VAEConfig, batch: int, height: int, width: int, dtype=jnp.float32) -> State:
    """Zeros in the form of `VAE.decode`'s state, for video of `height` x `width` pixels.

    Raises ValueError for sizes that are not multiples of the spatial factor.
    """
    _check_size(config, height, width)
    h, w = height // config.spatial_factor, width // config.spatial_factor
    return _zeros("decode", config, (batch, 1, config.z_dim, h, w), dtype)


def init_encoder_state(config: VAEConfig, batch: int, height: int, width: int, dtype=jnp.float32) -> State:
    """Zeros in the form of `VAE.encode`'s state; arguments and errors as for `init_decoder_state`."""
    _check_size(config, height, width)
    return _zeros("encode", config, (batch, 1, height, width, 3), dtype)


def _zeros(method, config, shape, dtype):
    return tuple(
        jnp.zeros(s.shape, s.dtype) for s in _state_structure(method, config, shape, jnp.dtype(dtype))
    )


@functools.cache
def _state_structure(method, config, shape, dtype):
    def first_chunk(params, x):
        return getattr(modules.bind(VAE, config, params), method)(x, None, first=True)

    params = modules.abstract(VAE, config, dtype=dtype)
    return jax.eval_shape(first_chunk, params, jax.ShapeDtypeStruct(shape, dtype))[1]


def num_latent_frames(config: VAEConfig, frames: int, *, first: bool = True) -> int:
    """Latent frames that `frames` video frames encode to, as a clip's first chunk (or the whole clip) or a
    later one.

    Raises ValueError, naming the nearest frame counts that fit, for one that does not.
    """
    factor, lone = config.temporal_factor, int(first)
    groups, rest = divmod(frames - lone, factor)
    if rest or frames < 1:
        nearby = [n for n in (groups * factor + lone, (groups + 1) * factor + lone) if n > 0]
        form = f"1 + {factor} k" if first else f"{factor} k"
        raise ValueError(f"{frames} video frames must be {form}: use {' or '.join(map(str, nearby))}")
    return groups + lone


def _check_size(config, height, width):
    factor = config.spatial_factor
    for name, size in (("height", height), ("width", width)):
        if size % factor or size < 1:
            nearby = [n for n in (size // factor * factor, (size // factor + 1) * factor) if n > 0]
            raise ValueError(
                f"{name}={size} must be a multiple of {factor} pixels: use {' or '.join(map(str, nearby))}"
            )


def to_uint8(video):
    """Video in [-1, 1], clamped to it, as uint8 0..255 of the same shape; any float dtype. Runs on device."""
    video = jnp.clip(video.astype(jnp.float32), -1, 1)
    return jnp.round((video + 1) * 127.5).astype(jnp.uint8)
