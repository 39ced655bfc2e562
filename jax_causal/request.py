"""What a caller asks a pipeline for, checked and made definite before anything runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np

from jax_causal import rollout
from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel
from jax_causal.rollout import RolloutSpec
from jax_causal.vae import num_latent_frames
from jax_causal.video import read_image, read_video, to_model_range


@dataclasses.dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
      spec: geometry of the rollout.
      prompts: one per video, or None where `prompt_embeds` are given.
      prompt_embeds: [B, text, D], or None.
      batched: whether the caller gave a list and gets a batch axis back.
      num_frames: latent frames in all, or None for no end.
      keys: one PRNG key per video.
      given: clean video [1, T, H, W, 3] in [-1, 1] that the result begins with, or None.
      given_frames: its latent frames.
      noise: injected [B, new frames, C, h, w], or None.
      renoise: injected, one [steps - 1, B or 1, F, C, h, w] per block, or None.
    """

    spec: RolloutSpec
    prompts: list[str] | None
    prompt_embeds: np.ndarray | None
    batched: bool
    num_frames: int | None
    keys: jax.Array
    given: np.ndarray | None
    given_frames: int
    noise: np.ndarray | None
    renoise: list[np.ndarray] | None

    @property
    def batch(self) -> int:
        return len(self.keys)

    def renoise_shape(self, num_frames: int) -> tuple[int, ...]:
        """[B, F, C, h, w] of a block."""
        config, (h, w) = self.spec.transformer, self.spec.grid
        patch = config.patch_size
        return self.batch, num_frames, config.in_channels, h * patch, w * patch


def prepare(
    config: ModelConfig,
    *,
    parallel: Parallel,
    window: int | None,
    sink: int,
    prompt: str | Sequence[str] | None,
    num_frames: int | None,
    height: int | None,
    width: int | None,
    seed: int | Sequence[int],
    prompt_embeds,
    image,
    video,
    noise,
    renoise,
) -> Request:
    """Checks the arguments of `Pipeline.stream` against the model and against each other.

    Raises ValueError with the nearest values that do fit.
    """
    height, width = height or config.height, width or config.width
    _check_size(config, height, width)
    latent_frames = None if num_frames is None else _latent_frames(config, num_frames)
    if latent_frames is None and window is None:
        window, sink = config.sampler.trained_frames, config.sampler.frames_per_block

    given = _given(config, image, video, height, width)
    given_frames = 0 if given is None else _given_frames(config, given.shape[1], image is not None)
    if latent_frames is not None and latent_frames <= given_frames:
        raise ValueError(
            f"num_frames={num_frames} counts the {given.shape[1]} given frames: ask for more than those"
        )

    step = config.vae.spatial_factor * config.transformer.patch_size
    spec = RolloutSpec.create(
        config.transformer,
        config.sampler,
        (height // step, width // step),
        latent_frames,
        window=window,
        sink=sink,
        parallel=parallel,
    )
    prompts, batch, batched = _prompts(config, prompt, prompt_embeds)
    request = Request(
        spec=spec,
        prompts=prompts,
        prompt_embeds=None if prompt_embeds is None else np.asarray(prompt_embeds),
        batched=batched,
        num_frames=latent_frames,
        keys=_keys(seed, batch),
        given=given,
        given_frames=given_frames,
        noise=None,
        renoise=None,
    )
    return _inject(request, noise, renoise)


def _check_size(config: ModelConfig, height: int, width: int) -> None:
    step = config.vae.spatial_factor * config.transformer.patch_size
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % step:
            low = size // step * step
            near = f"{low} or {low + step}" if low > 0 else f"{step}"
            raise ValueError(f"{name}={size} must be a multiple of {step} pixels: use {near}")


def _video_frames(config: ModelConfig, latent_frames: int) -> int:
    return 1 + config.vae.temporal_factor * (latent_frames - 1)


def _latent_frames(config: ModelConfig, num_frames: int) -> int:
    """Latent frames of a video of whole blocks. Raises ValueError naming the nearest frame counts."""
    n, lead = config.sampler.frames_per_block, int(config.sampler.independent_first_frame)
    factor = config.vae.temporal_factor
    frames = 1 + (num_frames - 1) // factor
    blocks = max((frames - lead) // n, 0)
    counts = [lead + k * n for k in (blocks, blocks + 1) if lead + k * n > 0]
    for count in counts:
        if _video_frames(config, count) == num_frames:
            return count
    near = " or ".join(str(_video_frames(config, count)) for count in counts)
    raise ValueError(f"num_frames={num_frames} does not make whole blocks of {n} latent frames: use {near}")


def _given(config: ModelConfig, image, video, height: int, width: int) -> np.ndarray | None:
    """The given frames [1, T, H, W, 3] in [-1, 1]."""
    if image is None and video is None:
        return None
    if image is not None and video is not None:
        raise ValueError(
            "image and video cannot both be given: an image is the first frame, a video is extended"
        )
    if image is not None:
        frames = _load_image(image, height, width)[None]
    else:
        frames = read_video(video)[0] if isinstance(video, (str, os.PathLike)) else np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"given frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if frames.shape[1:3] != (height, width):
        raise ValueError(
            f"the given frames are {frames.shape[1]} x {frames.shape[2]} pixels and the video {height} x {width}: "
            f"resize them, or pass height={frames.shape[1]}, width={frames.shape[2]}"
        )
    return to_model_range(frames)[None]


def _load_image(image, height: int, width: int) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, height, width)
    return np.asarray(image)


def _given_frames(config: ModelConfig, frames: int, is_image: bool) -> int:
    """Latent frames of the given ones, which must be whole blocks."""
    sampler = config.sampler
    if is_image and not sampler.independent_first_frame and sampler.frames_per_block > 1:
        raise ValueError(
            f"{config.name} makes {sampler.frames_per_block} latent frames at a time and cannot start from one "
            f"image: pass video= with {_video_frames(config, sampler.frames_per_block)} frames, or use a model "
            "with an independent first frame"
        )
    try:
        count = num_latent_frames(config.vae, frames)
        rollout.check_frames(count, sampler)
    except ValueError:
        try:
            _latent_frames(config, frames)
        except ValueError as error:
            near = str(error).rsplit("use ", 1)[1]
            raise ValueError(f"the given video has {frames} frames, not whole blocks: give {near}") from None
        raise
    return count


def _prompts(config: ModelConfig, prompt, prompt_embeds) -> tuple[list[str] | None, int, bool]:
    """(prompts, batch, whether the caller gave a batch)."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either a prompt or prompt_embeds")
    if prompt_embeds is not None:
        shape, dim = np.shape(prompt_embeds), config.transformer.text_dim
        if len(shape) != 3 or shape[-1] != dim:
            raise ValueError(f"prompt_embeds must be [B, text, {dim}], not {list(shape)}")
        return None, shape[0], shape[0] > 1
    if isinstance(prompt, str):
        return [prompt], 1, False
    if not prompt:
        raise ValueError("the list of prompts is empty")
    return list(prompt), len(prompt), True


def _keys(seed, batch: int) -> jax.Array:
    seeds = [seed + i for i in range(batch)] if isinstance(seed, (int, np.integer)) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} videos: give one each, or a single number")
    if outside := [s for s in seeds if not 0 <= s < 2**32]:
        raise ValueError(f"seed={outside[0]} must be a whole number from 0 to {2**32 - 1}")
    return jax.random.wrap_key_data(np.stack([jax.random.key_data(jax.random.key(s)) for s in seeds]))


def _inject(request: Request, noise, renoise) -> Request:
    """Adds the caller's noise, checked against the plan."""
    if noise is None and renoise is None:
        return request
    if request.num_frames is None:
        raise ValueError("injected noise needs num_frames: a video without an end draws its own")
    if noise is not None:
        noise = np.asarray(noise)
        expected = request.renoise_shape(request.num_frames - request.given_frames)
        if noise.shape != expected:
            raise ValueError(f"noise must be {list(expected)}, not {list(noise.shape)}")
    if renoise is not None:
        renoise = rollout.split_renoise(request.spec, renoise, request.num_frames, request.given_frames)
        for index, draws in enumerate(renoise):
            channels_and_size = request.renoise_shape(draws.shape[2])[2:]
            if draws.shape[3:] != channels_and_size or draws.shape[1] not in (1, request.batch):
                raise ValueError(
                    f"renoise of block {index} must end in {list(channels_and_size)}, not {list(draws.shape[3:])}"
                )
    return dataclasses.replace(request, noise=noise, renoise=renoise)
