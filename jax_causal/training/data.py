"""Training data, made on the device: clips of the procedural world, their latents, and tokenized captions.

Everything is a function of a key, so that data has no position of its own that could be lost.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import modules
from jax_causal.config import VAEConfig
from jax_causal.parallel import Parallel
from jax_causal.tokenizer import Tokenizer
from jax_causal.training import captions, world
from jax_causal.vae import VAE

UNNAMED = -1  # label of an attribute that the caption leaves out


class Prompts(NamedTuple):
    """Tokenized captions of N scenes in V wordings each, and what they name.

    Attributes:
      ids: int32 [N, V, L], padded with `pad_id`.
      labels: int32 [N, V, labels], in the order of `LABELS`; `UNNAMED` where the caption says nothing.
    """

    ids: jax.Array
    labels: jax.Array


# What a label is about, and how many values it takes. The last ones, the shape of whatever has a color, cannot be read
# from words one by one: of two objects it takes a word that knows its neighbour.
LABELS = {
    "motion": len(world.MOTIONS),
    "background": len(world.BACKGROUNDS),
    "color": len(world.COLORS),
    "shape": len(world.SHAPES),
    "second color": len(world.COLORS),
    "second shape": len(world.SHAPES),
    **{f"shape of what is {color}": len(world.SHAPES) for color in world.COLORS},
}


def scenes(key, count: int, *, split: str = "train", often: tuple[str, ...] = ()) -> world.Scene:
    """`count` scenes, arrays [count, ...]; see `world.sample`."""
    return jax.vmap(lambda k: world.sample(k, split=split, often=often))(jax.random.split(key, count))


def clips(
    key,
    count: int,
    num_frames: int,
    size: int,
    *,
    latest_start: float = 4.0,
    cuts: float = 0.0,
    cut_every: int = 4,
    often: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Clips of the world, each from a moment up to `latest_start` seconds on.

    Args:
      cuts: every clip draws a share of 0 to `cuts`; with that probability it goes on with another scene, at each of
        the frames 1, 1 + cut_every, 1 + 2 cut_every, ...
      often: what is shown more often than other things; see `world.sample`.

    Returns:
      Video [count, T, size, size, 3] in [-1, 1], fp32; and the color of the background in each frame [count, T, 3].
    """
    scene_key, time_key, cut_key = jax.random.split(key, 3)
    start = jax.random.uniform(time_key, (count, 1), maxval=latest_start)
    times = start + world.frame_times(num_frames)
    most = 1 + (num_frames - 1) // cut_every if cuts else 1
    batch = jax.tree.map(
        lambda x: x.reshape(count, most, *x.shape[1:]), scenes(scene_key, count * most, often=often)
    )
    share_key, draw_key = jax.random.split(cut_key)
    share = jax.random.uniform(share_key, (count, 1), maxval=cuts)
    new = jax.random.bernoulli(draw_key, share, (count, most - 1)).astype(jnp.int32)
    at = (
        np.arange(num_frames) + cut_every - 1
    ) // cut_every  # how many times a frame could have been cut before
    shown = jnp.pad(jnp.cumsum(new, axis=1), ((0, 0), (1, 0)))[:, np.minimum(at, most - 1)]
    by_frame = jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, shown), batch)
    video = jax.vmap(jax.vmap(lambda scene, t: world.render(scene, t[None], size)[0]))(by_frame, times)
    colors = jnp.asarray(list(world.BACKGROUNDS.values()), jnp.float32) / 127.5 - 1
    return video, colors[by_frame.background]


@functools.partial(jax.jit, static_argnames=("config", "parallel", "num_frames", "size", "patch"))
def _encode(config: VAEConfig, params, batch: world.Scene, parallel: Parallel, num_frames, size, patch):
    video = jax.vmap(lambda s: world.render(s, world.frame_times(num_frames), size))(batch)
    latents, _ = modules.bind(VAE, config, params).encode(video, None, first=True)
    return parallel.to_tokens(latents, patch)


def encode_scenes(
    config: VAEConfig,
    params,
    batch: world.Scene,
    parallel: Parallel,
    *,
    num_frames: int,
    size: int,
    patch: int,
    chunk: int = 32,
) -> jax.Array:
    """Latents of whole clips of scenes [N, ...] as patch tokens [N, F, S, 4C], in the dtype of `params`.

    Clips are rendered and encoded `chunk` at a time.

    Raises ValueError unless `chunk` divides N.
    """
    count = len(batch.motion)
    if count % chunk:
        raise ValueError(f"{count} clips are not a multiple of the {chunk} that are encoded at a time")
    pieces = [
        _encode(
            config,
            params,
            jax.tree.map(lambda x, i=i: x[i : i + chunk], batch),
            parallel,
            num_frames,
            size,
            patch,
        )
        for i in range(0, count, chunk)
    ]
    return jnp.concatenate(pieces)


def attribute_sets(batch: world.Scene) -> list[world.Attributes]:
    """The words for scenes [N, ...]; on the host."""
    batch = jax.tree.map(np.asarray, batch)
    return [world.attributes(world.Scene(*(x[i] for x in batch))) for i in range(len(batch.motion))]


def prompts(attributes: list[world.Attributes], tokenizer: Tokenizer, wordings: int) -> Prompts:
    """`wordings` tokenized captions of each scene, as host arrays."""
    texts = [captions.caption(a, i * wordings + v) for i, a in enumerate(attributes) for v in range(wordings)]
    ids, _ = tokenizer(texts)
    labels = [_labels(a, texts[i * wordings + v]) for i, a in enumerate(attributes) for v in range(wordings)]
    shape = (len(attributes), wordings, -1)
    return Prompts(ids.reshape(shape), np.asarray(labels, np.int32).reshape(shape))


def _labels(attributes: world.Attributes, text: str) -> list[int]:
    names = captions.BACKGROUND_WORDS.get(attributes.background, (attributes.background,))
    named = any(word in text.lower() for word in names)
    first, *second = attributes.objects
    row = [
        world.MOTIONS.index(attributes.motion),
        tuple(world.BACKGROUNDS).index(attributes.background) if named else UNNAMED,
    ]
    for thing in (first, second[0] if second else None):
        row += (
            [tuple(world.COLORS).index(thing.color), world.SHAPES.index(thing.shape)]
            if thing
            else [UNNAMED, UNNAMED]
        )
    shapes = {thing.color: world.SHAPES.index(thing.shape) for thing in attributes.objects}
    return row + [shapes.get(color, UNNAMED) for color in world.COLORS]
