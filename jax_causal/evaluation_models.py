"""What can be scored: the causal model, the many-step model it was distilled from, and the ground truth.

Each is a function (prompts, seeds) -> uint8 [B, T, H, W, 3], as `evaluation.Variant` takes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import components, rollout, sampling, transformer
from jax_causal.config import ModelConfig
from jax_causal.evaluation import Prompt
from jax_causal.model_folder import read_config
from jax_causal.parallel import SingleDevice
from jax_causal.pipeline import Pipeline
from jax_causal.rollout import RolloutSpec
from jax_causal.training import world
from jax_causal.vae import num_latent_frames
from jax_causal.video import to_model_range

Make = Callable[[Sequence[Prompt], Sequence[int]], np.ndarray]


def causal(pipe: Pipeline, num_frames: int | None = None) -> Make:
    """The pipeline as it is; `num_frames` defaults to the model's."""

    def make(prompts, seeds):
        videos = pipe([p.text for p in prompts], seed=list(seeds), num_frames=num_frames)
        return np.stack([video.frames for video in videos])

    return make


def truth(num_frames: int, size: int) -> Make:
    """The scene behind each prompt, rendered."""

    def make(prompts, seeds):
        scenes = jax.tree.map(lambda *leaves: np.stack(leaves), *[p.scene for p in prompts])
        return np.asarray(_render(scenes, num_frames, size))

    return make


@functools.partial(jax.jit, static_argnames=("num_frames", "size"))
def _render(scenes: world.Scene, num_frames: int, size: int):
    """A batch of scenes as uint8 [B, T, size, size, 3]."""
    draw = jax.vmap(lambda scene: world.render(scene, world.frame_times(num_frames), size))
    return jnp.clip((draw(scenes) + 1) * 127.5, 0, 255).round().astype(jnp.uint8)


def reconstruction(pipe: Pipeline) -> Make:
    """The ground truth after the model's VAE: the most that its latents can show."""
    config = pipe.config
    render = truth(config.num_frames, _side(config))
    spec = _spec(config)

    def make(prompts, seeds):
        params = pipe.params["vae"]
        dtype = jax.tree.leaves(params)[0].dtype
        video = jnp.asarray(to_model_range(render(prompts, seeds)), dtype)
        return decode(config, spec, params, components.encode_video(config.vae, spec.framing, params, video))

    return make


class ManyStep:
    """A bidirectional or block-causal model, sampled in many steps with guidance: the teacher.

    Attributes:
      config: its `ModelConfig`.
      params: component name to parameters.
      tokenizer: prompts to token ids.
      steps, guidance: see `sampling.sample`; the shift is the model's.
    """

    def __init__(self, config: ModelConfig, params, tokenizer, *, steps: int = 50, guidance: float = 3.0):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.spec = _spec(config)
        frame_mask = None
        if config.kind != "bidirectional":
            blocks = transformer.block_index(
                num_latent_frames(config.vae, config.num_frames),
                config.sampler.frames_per_block,
                config.sampler.independent_first_frame,
            )
            frame_mask = transformer.block_causal_mask(blocks)
        self._sample = jax.jit(
            functools.partial(
                sampling.sample,
                config.transformer,
                grid=self.spec.grid,
                steps=steps,
                shift=config.sampler.shift,
                guidance=guidance,
                parallel=self.spec.parallel,
                frame_mask=frame_mask,
            )
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype="bfloat16", **options) -> ManyStep:
        """Loads a model folder whose transformer was not distilled.

        Raises:
          FileNotFoundError: no such folder, or a component is missing.
          ValueError: a few-step model, a damaged checkpoint or a config that does not fit it.
        """
        config = read_config(Path(folder), str(folder))
        if config.kind == "causal-distilled":
            raise ValueError(
                f"{folder} holds a few-step causal model: --teacher takes a bidirectional one, and this goes to --model"
            )
        params, tokenizer = components.restore(config, Path(folder), jnp.dtype(dtype), SingleDevice())
        for part in ("transformer", "vae", "text_encoder"):
            if part not in params:
                raise FileNotFoundError(f"{folder} has no {part}: a teacher needs its own")
        return cls(config, params, tokenizer, **options)

    def __call__(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> np.ndarray:
        config, spec = self.config, self.spec
        keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
        frames = num_latent_frames(config.vae, config.num_frames)
        # As a causal rollout draws it: video i of either model begins with the same noise.
        noise, _ = rollout.draw_noise(spec, keys, np.int32(0), frames, jnp.dtype("float32"))
        encode = functools.partial(components.encode_text, config.text_encoder, self.params["text_encoder"])
        context = encode(*self.tokenizer([p.text for p in prompts]))
        tokens = self._sample(
            self.params["transformer"], context, noise, null_context=encode(*empty_prompt(self.tokenizer))
        )
        params = self.params["vae"]
        return decode(config, spec, params, tokens.astype(jax.tree.leaves(params)[0].dtype))


def empty_prompt(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [1, length] of a prompt without words: the end of sequence alone."""
    ids = np.full((1, tokenizer.max_length), tokenizer.pad_id, np.int32)
    ids[0, 0] = tokenizer.eos_id
    return ids, (np.arange(tokenizer.max_length) == 0).astype(np.int32)[None]


def decode(config: ModelConfig, spec: RolloutSpec, params, tokens) -> np.ndarray:
    """Patch tokens of whole clips [B, F, S, 4C] to uint8 [B, T, H, W, 3], a block of frames at a time."""
    block = config.sampler.frames_per_block
    chunks, state = [], None
    for start in range(0, tokens.shape[1], block):
        frames, state = components.decode_chunk(
            config.vae, spec.framing, params, tokens[:, start : start + block], state, first=start == 0
        )
        chunks.append(np.asarray(frames))
    return np.concatenate(chunks, axis=1)


def _side(config: ModelConfig) -> int:
    if config.height != config.width:
        raise ValueError(f"{config.name} makes {config.height} x {config.width} pixels; the world is square")
    return config.height


def _spec(config: ModelConfig) -> RolloutSpec:
    """Geometry of whole clips of the model's own size, on one device."""
    step = config.vae.spatial_factor * config.transformer.patch_size
    grid = (config.height // step, config.width // step)
    frames = num_latent_frames(config.vae, config.num_frames)
    return RolloutSpec.create(config.transformer, config.sampler, grid, frames)
