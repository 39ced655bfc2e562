"""A model so small that `bench` runs all of it on a CPU, and what it is asked for."""

import dataclasses

from jax_causal.config import PRESETS, SamplerConfig, TransformerConfig, VAEConfig

SMALL = dataclasses.replace(
    PRESETS["tiny"],
    name="small",
    transformer=TransformerConfig(dim=32, num_layers=1, num_heads=4, ffn_dim=32, text_dim=16, text_length=8),
    vae=VAEConfig(dim=8, multipliers=(1, 1), num_res_blocks=1, temporal_downsample=(True,)),
    sampler=SamplerConfig(frames_per_block=2, steps=(1000, 500)),
    height=8,
    width=32,
    num_frames=7,
)
INPUTS = {"num_frames": 7, "height": 8, "width": 32, "seed": 0}  # 4 latent frames of 16 tokens
LIMITS = {"window": None, "sink": 0}
