"""Small models for tests: golden weights in our layout, and configurations read from the golden files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from converters.names import to_params
from jax_causal import transformer
from jax_causal.config import (
    PRESETS,
    SamplerConfig,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
    VAEConfig,
)
from tests import golden_data

# All components, as small as they get.
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    name="small",
    transformer=TransformerConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=64, text_dim=16, text_length=32),
    vae=VAEConfig(dim=8, multipliers=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True)),
    text_encoder=TextConfig(
        vocab_size=384, dim=16, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=1, max_length=32
    ),
    tokenizer=TokenizerConfig(kind="bytes"),
    sampler=SamplerConfig(frames_per_block=2, steps=(1000, 500), trained_frames=6),
    height=16,
    width=24,
    num_frames=13,  # two blocks of 5 and 8 frames
)


def golden_transformer(data) -> tuple[TransformerConfig, dict]:
    """(config, fp32 parameters) of a golden file; shared weights live in `dit_weights`."""
    settings = golden_data.settings(data)
    weights = golden_data.state_dict(data) or golden_data.state_dict(golden_data.load("dit_weights"))
    out, in_channels = weights["head.head.weight"].shape[0], weights["patch_embedding.weight"].shape[1]
    config = TransformerConfig(
        dim=settings["dim"],
        num_layers=settings["layers"],
        num_heads=settings["heads"],
        ffn_dim=settings["ffn"],
        in_channels=in_channels,
        out_channels=out // 4,
        frequency_dim=weights["time_embedding.0.weight"].shape[1],
        text_dim=settings["text_dim"],
        text_length=settings["text_len"],
    )
    params = to_params("transformer", weights, transformer.abstract(config))
    return config, jax.tree.map(jnp.asarray, params)


def golden_sampler(data) -> SamplerConfig:
    """The sampler of a golden rollout; its steps are recovered from the warped timesteps."""
    settings = golden_data.settings(data)
    shift = float(data["shift"])
    warped = data["step_timesteps"].astype(np.float64) / 1000
    unwarped = 1000 * warped / (shift - (shift - 1) * warped)
    return SamplerConfig(
        steps=tuple(int(s) for s in np.round(unwarped)),
        shift=shift,
        context_noise=float(data.get("context_noise", 0.0)),
        frames_per_block=settings["npb"],
        independent_first_frame=bool(settings.get("independent_first_frame", 0)),
    )


def patchify(latent: np.ndarray) -> np.ndarray:
    """[B, F, C, H, W] -> [B, F, S, 4C], channel fastest, in plain numpy."""
    b, f, c, h, w = latent.shape
    x = latent.reshape(b, f, c, h // 2, 2, w // 2, 2)
    return x.transpose(0, 1, 3, 5, 4, 6, 2).reshape(b, f, (h // 2) * (w // 2), 4 * c)


def unpatchify(tokens, h: int, w: int) -> np.ndarray:
    """[B, F, S, 4C] -> [B, F, C, H, W]; the inverse of `patchify`."""
    b, f, _, c = tokens.shape
    x = np.asarray(tokens).reshape(b, f, h // 2, w // 2, 2, 2, c // 4)
    return x.transpose(0, 1, 6, 2, 4, 3, 5).reshape(b, f, c // 4, h, w)
