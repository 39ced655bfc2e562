"""What the diffusion stages share: where a clip stands, its prompts, and the terms of the losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import flow, modules, rope, transformer
from jax_causal.config import ModelConfig, TransformerConfig
from jax_causal.parallel import Parallel
from jax_causal.text import UMT5Encoder
from jax_causal.tokenizer import Tokenizer
from jax_causal.training import data, optim
from jax_causal.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """What stages that train on encoded clips have in common.

    Attributes:
      num_clips: clips that are encoded before the first step.
      wordings: captions of each.
      encode_batch: clips encoded at a time.
      drop_prompt: share of prompts left out.
      often: motions and shapes that clips show more often than others; see `world.sample`.
    """

    num_clips: int = 20_480
    wordings: int = 4
    encode_batch: int = 8
    drop_prompt: float = 0.1
    often: tuple[str, ...] = ()


class Clips(NamedTuple):
    """Encoded clips [N, F, S, 4C] and their prompts."""

    latents: jax.Array
    prompts: data.Prompts


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """Where a clip of the model's own length stands: token grid and rotary factors of its frames, and how it is run."""

    config: TransformerConfig
    grid: tuple[int, int]
    num_frames: int
    frames: np.ndarray
    parallel: Parallel

    @classmethod
    def create(cls, model: ModelConfig, parallel: Parallel) -> Setting:
        step = model.transformer.patch_size * model.vae.spatial_factor
        num_frames = 1 + (model.num_frames - 1) // model.vae.temporal_factor
        return cls(
            model.transformer,
            (model.height // step, model.width // step),
            num_frames,
            rope.frame_factors(0, num_frames, model.transformer.head_dim),
            parallel,
        )

    @property
    def tokens(self) -> int:
        """S of a frame, without the padding that a mesh may add."""
        return self.grid[0] * self.grid[1]

    def noise(self, key, batch: int, dtype):
        """Standard normal patch tokens [B, F, S, 4C]. Drawn in fp32: in bfloat16 there would be 128 different values,
        none beyond 2.9. Drawn as latents, so that they are the same on any mesh."""
        patch = self.config.patch_size
        sides = (self.grid[0] * patch, self.grid[1] * patch)
        shape = (batch, self.num_frames, self.config.in_channels, *sides)
        return self.parallel.to_tokens(jax.random.normal(key, shape).astype(dtype), patch)


def zero_velocity(params: dict) -> dict:
    """Parameters whose last projection and whose modulation by time start at zero, so that training starts calmly."""
    head = params["head"] | {"linear": jax.tree.map(jnp.zeros_like, params["head"]["linear"])}
    return params | {"head": head, "time_projection": jax.tree.map(jnp.zeros_like, params["time_projection"])}


def computed(params: dict, config: TrainConfig) -> dict:
    """Parameters of a transformer as an update computes with them: in the run's dtype, and unrolled without `remat`.

    A scan over layers copies all that their gradients need into stacked arrays and back, which takes longer than the
    layers themselves. With `remat` that is what enters each block and no more, and the program stays small.
    """
    params = optim.cast(params, config.dtype)
    return params if config.remat else transformer.unroll(params)


def encoded_clips(model: ModelConfig, vae, tokenizer, parallel, options, config: TrainConfig) -> Clips:
    """Scenes of the split "train", encoded and captioned; a function of the configuration alone."""
    draw_scenes = jax.jit(lambda key: data.scenes(key, options.num_clips, often=options.often))
    scenes = draw_scenes(jax.random.key(config.seed + 2))
    latents = data.encode_scenes(
        model.vae,
        jax.jit(lambda params: optim.cast(params, config.dtype))(vae),
        scenes,
        parallel,
        num_frames=model.num_frames,
        size=model.height,
        patch=model.transformer.patch_size,
        chunk=options.encode_batch,
    )
    return Clips(latents, data.prompts(data.attribute_sets(scenes), tokenizer, options.wordings))


def clips_like(model: ModelConfig, parallel: Parallel, options, dtype) -> Clips:
    """The form of `encoded_clips`, as `jax.ShapeDtypeStruct`s; nothing is computed."""
    setting = Setting.create(model, parallel)
    tokens = jax.eval_shape(lambda: setting.noise(jax.random.key(0), options.num_clips, dtype))
    rows = (options.num_clips, options.wordings)
    ids = jax.ShapeDtypeStruct((*rows, model.text_encoder.max_length), jnp.int32)
    labels = jax.ShapeDtypeStruct((*rows, len(data.LABELS)), jnp.int32)
    return Clips(tokens, data.Prompts(ids, labels))


def draw(key, clips: Clips, batch: int):
    """Latents [B, F, S, 4C], token ids [B, L] and labels [B, 6] of random clips in random wordings."""
    clip_key, wording_key = jax.random.split(key)
    which = jax.random.randint(clip_key, (batch,), 0, clips.latents.shape[0])
    wording = jax.random.randint(wording_key, (batch,), 0, clips.prompts.ids.shape[1])
    return clips.latents[which], clips.prompts.ids[which, wording], clips.prompts.labels[which, wording]


def drop_prompts(key, ids, share: float, null):
    """Token ids [B, L] with a `share` of them replaced by the prompt `null` [L], and bool [B, 1]: which."""
    dropped = jax.random.bernoulli(key, share, (ids.shape[0], 1))
    return jnp.where(dropped, null, ids), dropped


def null_prompt(tokenizer: Tokenizer) -> np.ndarray:
    """Token ids [L] of a prompt that says nothing."""
    ids = np.full(tokenizer.max_length, tokenizer.pad_id, np.int32)
    ids[0] = tokenizer.eos_id
    return ids


def require(components: Mapping, stage: str, *names: str) -> None:
    """Raises ValueError unless the model folder that stage `stage` starts from has all these components."""
    if absent := [name for name in names if name not in components]:
        raise ValueError(
            f"the stage {stage} starts from a model folder with {' and '.join(names)}, and init_from has no "
            f"{' and no '.join(absent)}: set init_from to the folder that the stage before left"
        )


def encode_prompts(model: ModelConfig, params, ids):
    """Prompt embeddings [B, L, E] of token ids [B, L]."""
    mask = ids != model.tokenizer.pad_id
    return modules.bind(UMT5Encoder, model.text_encoder, params)(ids, mask)


def probe_loss(context, labels, probe):
    """Cross-entropy of reading each named label from the mean of the prompt's embeddings, averaged over labels."""
    used = jnp.any(context != 0, axis=-1, keepdims=True)
    mean = context.astype(jnp.float32).sum(1) / jnp.maximum(used.sum(1), 1)
    logits = jnp.split(mean @ probe.astype(jnp.float32), np.cumsum(list(data.LABELS.values()))[:-1], axis=-1)
    named = (labels != data.UNNAMED).astype(jnp.float32)
    losses = [
        -jnp.take_along_axis(jax.nn.log_softmax(one), jnp.maximum(labels[:, i : i + 1], 0), axis=-1)[:, 0]
        for i, one in enumerate(logits)
    ]
    return (jnp.stack(losses, -1) * named).sum() / jnp.maximum(named.sum(), 1)


def draw_times(key, shape, shift: float):
    """Timesteps and sigmas (fp32, of `shape`) drawn evenly from the schedule's table."""
    index = jax.random.randint(key, shape, 0, flow.NUM_TIMESTEPS)
    return jnp.asarray(flow.timesteps(shift))[index], jnp.asarray(flow.sigmas(shift))[index]


def clipped_times(key, shape, shift: float, earliest: float, latest: float):
    """`draw_times`, and what lies outside the timesteps from `earliest` to `latest` moved to their ends."""
    t, sigma = draw_times(key, shape, shift)
    ends = np.array([earliest, latest], np.float32)
    return jnp.clip(t, *ends), jnp.clip(sigma, *(ends / flow.NUM_TIMESTEPS))


def flow_matching_loss(velocity: Callable, x0, noise, t, sigma, tokens: int):
    """Mean squared error [] of a network that is to tell the velocity from a noisy sample (arXiv:2210.02747).

    Args:
      velocity: (x, t) -> v, of x0 [B, F, S, C] with noise.
      noise: of the shape of x0.
      t, sigma: timesteps and noise levels [B, F'].
      tokens: of a frame that count; see `token_mean`.
    """
    return velocity_error(velocity(flow.add_noise(x0, noise, sigma), t), noise, x0, tokens)


def velocity_error(v, noise, x0, tokens: int):
    """Mean squared error [] of a predicted velocity [B, F, S, C], fp32; see `token_mean`."""
    v, noise, x0 = (x.astype(jnp.float32) for x in (v, noise, x0))
    return token_mean(jnp.square(v - (noise - x0)), tokens)


def dmd_loss(x, real, fake, tokens: int):
    """Loss [] whose gradient in `x` is that of distribution matching, and the mean size [] of that direction.

    Args:
      x: generated samples [B, F, S, C]; the only argument with a gradient.
      real, fake: clean predictions of teacher and critic for `x` with noise, fp32.
      tokens: of a frame that count; see `token_mean`.

    The direction is (fake - real) / mean |x - real|, the mean over all but the batch (DMD, arXiv:2405.14867, equation
    8), and zero where that is. What is not a number stays so: the trainer is to see it.
    """
    x = x.astype(jnp.float32)
    fixed, real, fake = jax.lax.stop_gradient((x, real, fake))
    scale = token_mean(jnp.abs(fixed - real), tokens, each=True)
    direction = jnp.where(scale == 0, 0, (fake - real) / scale)
    loss = 0.5 * token_mean(jnp.square(x - (fixed - direction)), tokens)
    return loss, token_mean(jnp.abs(direction), tokens)


def token_mean(x, tokens: int, *, each: bool = False):
    """Mean [] of x [B, F, S, C] over the first `tokens` of every frame: what follows is a mesh's padding. With `each`,
    of every sample apart, [B, 1, 1, 1]."""
    real = jnp.arange(x.shape[2]) < tokens
    return x.mean((1, 2, 3) if each else None, keepdims=each, where=real[:, None])
