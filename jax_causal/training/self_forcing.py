"""Rollouts for training: as at inference, but left at a random denoising step, with a gradient through that pass only.

Without gradient the clip is rolled out block by block against the cache. What each block's last pass was given is
kept; the gradient then comes from one pass over all blocks at once, the clean blocks beside the noisy ones under the
mask of teacher forcing. To every block that is the very pass it left with: it sees the clean keys and values of the
blocks before it, as it did in the cache, and these carry no gradient, as a cache does not.

Source: Self-Forcing (arXiv:2506.08009), algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import flow, rollout, transformer
from jax_causal.cache import Placement
from jax_causal.rollout import RolloutSpec
from jax_causal.transformer import TextKV


class Rollouts(NamedTuple):
    """Clips that were rolled out.

    Attributes:
      context: their prompts' embeddings [B, text, text dim].
      inputs, clean: [B, F, S, 4C], from `roll_out`.
      exit_step: int32 [], one for all clips.
    """

    context: jax.Array
    inputs: jax.Array
    clean: jax.Array
    exit_step: jax.Array


def roll_out(spec: RolloutSpec, params, text: TextKV, noise, renoise, exit_step, frames):
    """Rolls clips out block by block, each block leaving at the denoising step `exit_step`. Not differentiable.

    One step for all clips ends the loop over steps there, and the host of a GPU waits at every turn to hear whether it
    has. Where each clip has a step of its own all turns are taken, without a wait, and a clip that has left stays.

    Args:
      text: from `embed_text`.
      noise: [B, F, S, 4C] of whole clips; F is blocks of `frames_per_block`.
      renoise: [steps - 1, B, F, S, 4C].
      exit_step: int32 [] or [B], the index of the last denoising pass, of all clips or of each.
      frames: rotary factors [2, F, pairs] of the clip's frames.

    Returns:
      inputs and clean, both [B, F, S, 4C]: what the last pass of every block was given and what it predicted.

    Raises:
      ValueError: a sampler with an independent first frame, whose blocks are not equal.
    """
    size = spec.sampler.frames_per_block
    if spec.sampler.independent_first_frame:
        raise ValueError("training rolls out equal blocks: use a sampler without an independent first frame")
    places = [spec.place(start, size) for start, _ in rollout.block_sizes(noise.shape[1], spec.sampler)]
    slots, held = (np.stack([getattr(place, name) for place in places]) for name in ("slots", "held"))
    times = jnp.asarray(flow.warp(spec.sampler.steps, spec.sampler.shift))
    sigmas = flow.sigma_at(times, spec.sampler.shift)
    split = _into_blocks(size)
    turns = len(times) if exit_step.ndim else exit_step + 1
    last = exit_step.reshape(-1, 1, 1, 1)
    cache = rollout.init_cache(spec, noise.shape[0], noise.dtype, stacked=not transformer.is_unrolled(params))

    def block(cache, inputs):
        noise, renoise, slots, held, frames = inputs
        place = Placement(slots, held, frames)

        def denoise(j, carry):
            x, x0, cache = carry
            again = flow.add_noise(x0, renoise[jnp.maximum(j - 1, 0)], sigmas[j])
            x = jnp.where(j > last, x, jnp.where(j == 0, noise, again))
            _, new, cache = rollout.predict(spec, params, cache, text, x, times[j], place)
            return x, jnp.where(j > last, x0, new), cache

        x, x0, cache = jax.lax.fori_loop(0, turns, denoise, (noise, jnp.zeros_like(noise), cache))
        t = jnp.float32(spec.sampler.context_noise)
        _, _, cache = rollout.predict(spec, params, cache, text, x0, t, place)
        return cache, (x, x0)

    each = split(noise, 1), split(renoise, 2), slots, held, split(frames, 1)
    _, (x, x0) = jax.lax.scan(block, cache, each)
    return tuple(jnp.moveaxis(y, 0, 1).reshape(noise.shape) for y in (x, x0))


def last_pass(spec: RolloutSpec, params, rollouts: Rollouts, frames, *, remat: bool = False):
    """The last denoising pass of every block of a rollout again, with gradient in `params`: x0 [B, F, S, 4C], fp32.

    `frames` are those that `roll_out` took. `remat`: see `transformer.CausalDiT`.
    """
    context, inputs, clean, exit_step = rollouts
    network = transformer.bind(spec.transformer, params, remat=remat)
    times = jnp.asarray(flow.warp(spec.sampler.steps, spec.sampler.shift))
    t = jnp.full((inputs.shape[0], 1), times[exit_step])
    blocks = transformer.block_index(inputs.shape[1], spec.sampler.frames_per_block)
    v = network.teacher_forcing(
        inputs,
        t,
        clean,
        network.embed_text(context),
        frames,
        spec.grid,
        spec.parallel,
        frame_mask=transformer.teacher_forcing_mask(blocks),
        clean_t=jnp.full_like(t, spec.sampler.context_noise),
        detach_clean=True,
    )
    return flow.x0_from_flow(
        inputs.astype(jnp.float32), v, flow.sigma_at(times[exit_step], spec.sampler.shift)
    )


def _into_blocks(size: int):
    """A function that cuts axis `axis` of x into blocks of `size` and puts their number first."""

    def split(x, axis):
        x = jnp.asarray(x)
        cut = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(cut, axis, 0)

    return split
