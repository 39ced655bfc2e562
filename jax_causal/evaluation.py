"""Scores of text-to-video models of the procedural world: fixed prompts and seeds, read back by the oracle.

A `Variant` is anything that makes clips of prompts: a model in one way of running it, or the ground truth itself.
All variants get the same prompts and seeds, so that they can be compared pair by pair.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal.training import captions, oracle, world

# Name of a set of prompts -> (split of the world, objects).
SETS = {
    "held-out": ("held_out", 1),
    "seen": ("train", 1),
    "held-out-pairs": ("held_out", 2),
    "seen-pairs": ("train", 2),
}
# As `oracle.score` tells them; "all" is the first four at once.
ATTRIBUTES = ("background", "color", "shape", "motion", "all", "size", "smooth")
_KEY = 20260306  # of all evaluation scenes
_DRAWN = 32  # scenes drawn at once, however many are asked for: one compiled program


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One thing to ask for. `scene` is one clip that shows it; `index` is its number in the set."""

    index: int
    text: str
    attributes: world.Attributes
    scene: world.Scene

    def seed(self, number: int) -> int:
        """Of the noise of its clip `number`; other prompts of the set have others."""
        return self.index + 2**16 * number


def prompts(split: str, count: int, objects: int | None) -> list[Prompt]:
    """The first `count` prompts of a fixed, endless sequence; arguments as in `world.sample`. Captions are complete:
    a clip that is right in every attribute is one that was asked for. Raises ValueError for fewer than one."""
    if count < 1:
        raise ValueError(f"count={count} must be 1 or more")
    parts = [_scenes(split, objects, start) for start in range(0, count, _DRAWN)]
    scenes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(jax.device_get, parts))
    found = []
    for index in range(count):
        scene = jax.tree.map(lambda leaf, index=index: leaf[index], scenes)
        attributes = world.attributes(scene)
        text = captions.caption(attributes, 2**16 * _number(split, objects) + index, complete=True)
        found.append(Prompt(index, text, attributes, scene))
    return found


@functools.partial(jax.jit, static_argnames=("split", "objects"))
def _scenes(split: str, objects: int | None, start) -> world.Scene:
    """The evaluation scenes `start` to `start + _DRAWN - 1`, each a function of its own number."""
    key = jax.random.fold_in(jax.random.key(_KEY), _number(split, objects))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(_DRAWN))
    return jax.vmap(lambda k: world.sample(k, split=split, objects=objects))(keys)


def _number(split: str, objects: int | None) -> int:
    """Of a sequence of prompts."""
    return 10 * ("all", "train", "held_out").index(split) + (objects or 0)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of making clips.

    Attributes:
      name: in reports.
      make: (prompts, seeds) -> uint8 [B, T, H, W, 3].
      windows: a clip is scored in so many windows; more than one asks for motions that go on only.
      window_frames, stride: length of a window, and from one window's start to the next's, in frames.
      seeded: whether seeds matter; if not, one clip of each prompt is scored.
    """

    name: str
    make: Callable[[Sequence[Prompt], Sequence[int]], np.ndarray]
    windows: int = 1
    window_frames: int | None = None
    stride: int = 0
    seeded: bool = True

    def cut(self, frames: np.ndarray) -> list[np.ndarray]:
        """The windows of one clip [T, H, W, 3]. Raises ValueError if it is too short for them."""
        length = self.window_frames or len(frames)
        needed = (self.windows - 1) * self.stride + length
        if len(frames) < needed:
            raise ValueError(f"{self.name} made {len(frames)} frames, and its windows need {needed}")
        return [frames[i * self.stride : i * self.stride + length] for i in range(self.windows)]


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What a variant got right.

    Attributes:
      variant, set: names.
      prompts: those asked for.
      right: bool [windows, prompts, seeds, attributes], the last in the order of `ATTRIBUTES`.
      clips: frames of the first prompts' first seeds, for looking at.
    """

    variant: str
    set: str
    prompts: list[Prompt]
    right: np.ndarray
    clips: list[np.ndarray] = dataclasses.field(repr=False, default_factory=list)

    def of(self, attribute: str, window: int = 0) -> np.ndarray:
        """bool [prompts, seeds]"""
        return self.right[window, :, :, ATTRIBUTES.index(attribute)]


def scoring(workers: int) -> Executor:
    """An executor for `evaluate`: so many processes (started afresh, no jax backend in them), or for 1 a thread."""
    if workers <= 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def evaluate(
    variant: Variant,
    name: str,
    asked: Sequence[Prompt],
    *,
    seeds: int,
    batch: int,
    executor: Executor,
    keep: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcomes:
    """Makes and scores `seeds` clips of every prompt.

    Args:
      name: of the set of prompts.
      asked: prompts; a variant with several windows takes those whose motion goes on for ever.
      batch: clips made at once. The last batch is filled up, so that all are of one compiled size.
      executor: from `scoring`; a batch is scored while the next is made.
      keep: prompts whose first clip is kept in `Outcomes.clips`.
      progress: called with clips made, and clips in all.

    Raises:
      ValueError: no prompts are left to ask for, or fewer than one seed or batch.
    """
    if seeds < 1 or batch < 1:
        raise ValueError(f"seeds={seeds} and batch={batch} must be 1 or more")
    if variant.windows > 1:
        asked = [p for p in asked if p.attributes.motion in world.SUSTAINED]
    if not asked:
        raise ValueError(f"no prompts for {variant.name} on {name}: raise --limit")
    seeds = seeds if variant.seeded else 1
    jobs = [(prompt, number) for prompt in asked for number in range(seeds)]
    batch = min(batch, len(jobs))
    scores, clips, pending = [], [], collections.deque()

    def collect():
        scores.extend([[future.result() for future in windows] for windows in pending.popleft()])

    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        filled = part + part[-1:] * (batch - len(part))
        made = variant.make([p for p, _ in filled], [p.seed(number) for p, number in filled])
        made = made[: len(part)]
        clips += [c for (_, number), c in zip(part, made, strict=True) if number == 0][: keep - len(clips)]
        pending.append(
            [
                [executor.submit(oracle.score, window, prompt.attributes) for window in variant.cut(clip)]
                for (prompt, _), clip in zip(part, made, strict=True)
            ]
        )
        if len(pending) > 1:
            collect()
        progress(start + len(part), len(jobs))
    while pending:
        collect()
    right = np.asarray([[[s[a] for a in ATTRIBUTES] for s in windows] for windows in scores], bool)
    right = right.reshape(len(asked), seeds, variant.windows, len(ATTRIBUTES))
    return Outcomes(variant.name, name, list(asked), np.moveaxis(right, 2, 0), clips)
