"""Small models for tests: golden weights in our layout, and configurations read from the golden files."""

import jax
import jax.numpy as jnp
import numpy as np

from converters.names import to_params
from jax_causal import transformer
from jax_causal.config import SamplerConfig, TransformerConfig
from tests import golden_data


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
