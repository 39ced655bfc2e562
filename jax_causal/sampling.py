"""Many-step sampling without a cache: how undistilled flow-matching models make a whole clip at once.

The probability-flow ODE dx / dsigma = v(x, sigma) is integrated by Euler from noise at sigma 1 to the clean clip at
sigma 0, on uniform steps warped by `shift`, with classifier-free guidance in velocity space.

Source: Wan2.1 (arXiv:2503.20314); guidance as in arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import flow, rope, transformer
from jax_causal.config import TransformerConfig
from jax_causal.parallel import Parallel


def schedule(steps: int, shift: float) -> np.ndarray:
    """fp32 [steps + 1] timesteps from 1000 to 0: entries of the table of `flow`, as evenly spaced as it allows.

    Raises ValueError for fewer than one step, or more than the table has.
    """
    if not 1 <= steps <= flow.NUM_TIMESTEPS:
        raise ValueError(f"steps={steps} must be from 1 to {flow.NUM_TIMESTEPS}")
    return flow.warp(np.linspace(flow.NUM_TIMESTEPS, 0, steps + 1).round().astype(int), shift)


def integrate(velocity: Callable, noise, steps: int, shift: float):
    """Follows a velocity field from noise to a clean sample.

    Args:
      velocity: (x, t) -> v of the shape of x, for a timestep t, fp32 [] in (0, 1000].
      noise: any shape.
      steps, shift: see `schedule`.

    Returns:
      The sample, in the dtype of `noise`; fp32 in between.
    """
    times = schedule(steps, shift)
    changes = np.diff(times / np.float32(flow.NUM_TIMESTEPS))

    def step(x, inputs):
        t, change = inputs
        return x + change * velocity(x, t).astype(jnp.float32), None

    x, _ = jax.lax.scan(step, noise.astype(jnp.float32), (times[:-1], changes))
    return x.astype(noise.dtype)


def guide(cond, uncond, guidance: float):
    """Classifier-free guidance: `cond` at 1, and beyond it away from `uncond`."""
    return cond + (guidance - 1) * (cond - uncond)


def sample(
    config: TransformerConfig,
    params,
    context,
    noise,
    grid: tuple[int, int],
    *,
    steps: int,
    shift: float,
    guidance: float,
    parallel: Parallel,
    null_context=None,
    frame_mask: np.ndarray | None = None,
):
    """Whole clips from a bidirectional model, or a block-causal one; pure, for use under the caller's `jax.jit`.

    Args:
      params: of the transformer, stacked or unrolled; everything that is not an array is static.
      context: prompt embeddings [B, text, text_dim].
      noise: patch tokens [B, F, S, 4C] of standard normal noise.
      grid: token rows and columns of a frame.
      steps, shift: see `schedule`.
      guidance: 1 is none, and costs one pass a step instead of two.
      parallel: how to run.
      null_context: embeddings [1, text, text_dim] of the empty prompt, for guidance.
      frame_mask: bool [F, F], query frame by key frame; None is full attention.

    Returns:
      Clean patch tokens [B, F, S, 4C] in the dtype of `noise`.

    Raises:
      ValueError: guidance without `null_context`, or steps that the schedule does not have.
    """
    if guidance != 1 and null_context is None:
        raise ValueError(f"guidance={guidance} needs null_context, the embeddings of the empty prompt")
    network = transformer.bind(config, params)
    dtype = jax.tree.leaves(params)[0].dtype
    frames = rope.frame_factors(0, noise.shape[1], config.head_dim)

    def passes(text):
        def velocity(x, t):
            times = jnp.full((x.shape[0], 1), t, jnp.float32)
            x = x.astype(dtype)
            return network.forward(x, times, text, frames, grid, parallel, frame_mask=frame_mask)

        return velocity

    cond = passes(network.embed_text(context))
    if guidance == 1:
        return integrate(cond, noise, steps, shift)
    shape = (context.shape[0], *null_context.shape[1:])
    uncond = passes(network.embed_text(jnp.broadcast_to(null_context, shape)))

    def guided(x, t):
        return guide(*(v(x, t).astype(jnp.float32) for v in (cond, uncond)), guidance)

    return integrate(guided, noise, steps, shift)
