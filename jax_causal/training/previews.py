"""A few videos of a model in training, to look at: fixed prompts, fixed noise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import modules, sampling
from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel
from jax_causal.pipeline import Pipeline
from jax_causal.tokenizer import Tokenizer
from jax_causal.training import diffusion
from jax_causal.vae import VAE, to_uint8

PROMPTS = (
    "a red ball rolls to the right on a white background",
    "a small blue square orbits the center on a black background",
    "a large yellow star spins in place against a navy background",
    "a green triangle chases a pink ring on a gray background",
)
STEPS, GUIDANCE = 25, 3.0  # of models that are not distilled


def whole_clips(
    model: ModelConfig, components: Mapping, tokenizer: Tokenizer, parallel: Parallel, groups: int = 1
) -> np.ndarray:
    """Videos uint8 [4, T, H, W, 3] of a bidirectional model in many steps.

    Args:
      components: parameters of "transformer", "text_encoder" and "vae".
      groups: of devices, which share a batch evenly.
    """
    ids, _ = tokenizer(_shared_evenly(groups))
    ids = np.concatenate([ids, diffusion.null_prompt(tokenizer)[None]])
    components = {name: components[name] for name in ("transformer", "text_encoder", "vae")}
    return np.asarray(_whole_clips(model, parallel, components, ids)[: len(PROMPTS)])


@functools.partial(jax.jit, static_argnames=("model", "parallel"))
def _whole_clips(model: ModelConfig, parallel: Parallel, components, ids):
    setting = diffusion.Setting.create(model, parallel)
    config = model.transformer
    embeds = diffusion.encode_prompts(model, components["text_encoder"], ids)
    noise = setting.noise(jax.random.key(0), len(ids) - 1, jnp.float32)
    tokens = sampling.sample(
        config,
        components["transformer"],
        embeds[:-1],
        noise,
        setting.grid,
        steps=STEPS,
        shift=model.sampler.shift,
        guidance=GUIDANCE,
        parallel=parallel,
        null_context=embeds[-1:],
    )
    latents = parallel.from_tokens(tokens, config.patch_size, *setting.grid)
    vae = modules.bind(VAE, model.vae, components["vae"])
    return to_uint8(vae.decode(latents.astype(jnp.float32), None, first=True)[0])


def rollouts(
    model: ModelConfig, components: Mapping, tokenizer: Tokenizer, parallel: Parallel, groups: int = 1
) -> np.ndarray:
    """Videos uint8 [4, T, H, W, 3] of a causal model in its few steps, distilled for them or not yet; arguments as of
    `whole_clips`."""
    config = dataclasses.replace(model, kind="causal-distilled")
    params = {name: components[name] for name in ("transformer", "text_encoder", "vae")}
    pipe = Pipeline(config, params, tokenizer, parallel=parallel)
    return np.stack([video.frames for video in pipe(_shared_evenly(groups))[: len(PROMPTS)]])


def _shared_evenly(groups: int) -> list[str]:
    """The prompts, again and again until `groups` divides their number."""
    return [*PROMPTS] * (math.lcm(len(PROMPTS), groups) // len(PROMPTS))
