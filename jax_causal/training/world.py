"""A procedural world of plain moving shapes: endless video whose content is known exactly.

A `Scene` is a handful of numbers: attribute ids and continuous parameters. `render` draws it at any time in
seconds, so clips of any length and frame rate come from the same scene. Lengths are in frame sides, x to the
right and y down. Space is a torus: what leaves on one side comes back on the other.

Some combinations of attributes are never given by the split "train", so that a model can be asked for things
that it has not seen.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FPS = 16

BACKGROUNDS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "navy": (0, 0, 96),
    "beige": (238, 222, 190),
    "brown": (96, 60, 30),
}
COLORS = {
    "red": (225, 20, 20),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 0),
    "green": (0, 160, 40),
    "cyan": (0, 225, 235),
    "blue": (20, 70, 255),
    "purple": (150, 20, 190),
    "pink": (255, 110, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.115, "medium": 0.157, "large": 0.208}  # radius
SINGLE_MOTIONS = (
    "still", "left", "right", "up", "down", "bounce", "orbit", "spin",
    "grow", "shrink", "pulse", "appear", "disappear", "blink",
)  # fmt: skip
PAIR_MOTIONS = ("pass", "chase", "collide", "circle")  # the first object acts on the second
MOTIONS = SINGLE_MOTIONS + PAIR_MOTIONS
SUSTAINED = tuple(m for m in MOTIONS if m not in ("grow", "shrink", "appear", "disappear", "collide"))
ROUND = ("circle", "ring")  # their spin cannot be seen

HELD_OUT_COLOR_SHAPE = (
    ("green", "star"), ("blue", "triangle"), ("orange", "square"),
    ("purple", "circle"), ("cyan", "cross"), ("yellow", "ring"),
)  # fmt: skip
HELD_OUT_SHAPE_MOTION = (
    ("square", "bounce"), ("star", "left"), ("triangle", "orbit"),
    ("cross", "grow"), ("ring", "up"), ("circle", "blink"),
)  # fmt: skip

# Circumradius over radius, so that all shapes look about equally large.
CIRCUMRADIUS = {"circle": 0.9, "square": 1.1, "triangle": 1.15, "star": 1.15, "cross": 1.0, "ring": 1.0}
TIPS = {"square": 4, "triangle": 3, "star": 5}
STAR_INNER = 0.45  # radius of the inner corners over that of the tips
CROSS_ARM = 0.34  # half the width of an arm over its length
RING_HOLE = 0.5  # inner radius over outer radius
FADE = 0.25  # seconds to appear or disappear
SMALLEST = 0.5  # scale before growing and after shrinking
_REACH = 1.2  # no shape is wider than this many radii


class Scene(NamedTuple):
    """One scene, arrays of shape [] unless told; `vmap` gives a batch. The second object may be unused."""

    background: jax.Array  # int32, index of BACKGROUNDS
    motion: jax.Array  # int32, index of MOTIONS
    shape: jax.Array  # int32 [2], index of SHAPES
    color: jax.Array  # int32 [2], index of COLORS
    size: jax.Array  # int32 [2], index of SIZES
    start: jax.Array  # fp32 [2], x and y in [0, 1)
    speed: jax.Array  # fp32, sides per second
    heading: jax.Array  # fp32, radians
    turn: jax.Array  # fp32, +1 clockwise, -1 counterclockwise
    period: jax.Array  # fp32, seconds
    phase: jax.Array  # fp32 in [0, 1)


@dataclasses.dataclass(frozen=True)
class Object:
    """What can be said of one object."""

    color: str
    shape: str
    size: str


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What can be said of a scene. `objects` holds one or two; of two, the first is the one that acts."""

    background: str
    motion: str
    objects: tuple[Object, ...]


def held_out(attributes: Attributes) -> bool:
    """Whether the split "train" never gives this combination."""
    return any((o.color, o.shape) in HELD_OUT_COLOR_SHAPE for o in attributes.objects) or any(
        (o.shape, attributes.motion) in HELD_OUT_SHAPE_MOTION for o in attributes.objects
    )


@functools.cache
def _table(split: str, objects: int | None, often: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Allowed (motion, color, shape, color, shape) as int32 [N, 5] and probabilities [N]; arguments as in `sample`."""
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split {split!r} is unknown; choose 'train', 'held_out' or 'all'")
    if objects not in (1, 2, None):
        raise ValueError(f"objects is {objects!r}; choose 1, 2 or None for both")
    if unknown := sorted(set(often) - {*MOTIONS, *SHAPES, *SIZES}):
        raise ValueError(
            f"often has {unknown}, which are no motions, shapes or sizes; name some of "
            f"{(*MOTIONS, *SHAPES, *SIZES)}"
        )
    colors = tuple(COLORS)
    pairs = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES))]
    hidden_pair = {p: (colors[p[0]], SHAPES[p[1]]) in HELD_OUT_COLOR_SHAPE for p in pairs}
    rows, weights = [], []
    for m, motion in enumerate(MOTIONS):
        count = 2 if motion in PAIR_MOTIONS else 1
        if objects not in (None, count):
            continue
        found = []
        for first in pairs:
            if motion == "spin" and SHAPES[first[1]] in ROUND:
                continue
            hidden = hidden_pair[first] or (SHAPES[first[1]], motion) in HELD_OUT_SHAPE_MOTION
            for second in pairs if count == 2 else pairs[:1]:
                if count == 2 and first[0] == second[0]:
                    continue
                unseen = hidden or (count == 2 and hidden_pair[second])
                if split == "all" or unseen == (split == "held_out"):
                    found.append((m, *first, *second))
        rows += found
        shares = np.asarray([1 + often.count(SHAPES[row[2]]) for row in found], np.float32)
        weights += [(1 + often.count(motion)) * shares / shares.sum()]
    weights = np.concatenate(weights)
    return np.asarray(rows, np.int32), weights / weights.sum()


def sample(key, *, split: str = "train", objects: int | None = None, often: tuple[str, ...] = ()) -> Scene:
    """Draws a scene; jit- and vmap-able over `key`.

    Args:
      key: PRNG key.
      split: "train" never gives held-out combinations, "held_out" gives only those, "all" gives any.
      objects: 1, 2, or None for both. Motions are equally likely in any case, and so are the allowed combinations of
        shapes and colors for each, save for `often`.
      often: motions, shapes of the first object, and sizes that weigh twice as much; thrice if named twice, and so on.

    Raises ValueError for an unknown split, motion, shape or size.
    """
    keys = jax.random.split(key, 11)
    rows, weights = _table(split, objects, often)
    motion, c0, s0, c1, s1 = jax.random.choice(keys[0], jnp.asarray(rows), p=jnp.asarray(weights))
    pair = motion >= len(SINGLE_MOTIONS)
    # Two large objects do not fit side by side.
    size = jax.random.randint(keys[1], (2,), 0, jnp.where(pair, 2, 3))
    if set(often) & set(SIZES):
        weights = np.log([1 + often.count(name) for name in SIZES])
        size = jax.random.categorical(keys[1], jnp.where(pair, weights - [0, 0, np.inf], weights), shape=(2,))
    margin = _REACH * jnp.asarray(list(SIZES.values()))[size].max()
    start = margin + jax.random.uniform(keys[2], (2,)) * (1 - 2 * margin)
    quarter = jnp.pi / 2 * jax.random.randint(keys[3], (), 0, 4)
    slanted = quarter + jnp.radians(jax.random.uniform(keys[4], minval=25.0, maxval=65.0))
    straight = {"right": 0.0, "down": 0.5, "left": 1.0, "up": 1.5}
    heading = jnp.select([motion == MOTIONS.index(m) for m in straight],
                         [jnp.pi * v for v in straight.values()], quarter)  # fmt: skip
    heading = jnp.where(motion == MOTIONS.index("bounce"), slanted, heading)
    # Shortest and longest period for each motion; the others are on the move and do not use it.
    periods = {"orbit": (2.5, 5), "circle": (2.5, 5), "spin": (2, 4), "pulse": (1.5, 2.5), "blink": (1.25, 2)}
    low, high = jnp.asarray([periods.get(m, (2, 4)) for m in MOTIONS], jnp.float32)[motion]
    fast = jax.random.uniform(keys[5], minval=0.25, maxval=0.5)
    slow = jax.random.uniform(keys[6], minval=0.15, maxval=0.25)
    return Scene(
        background=jax.random.randint(keys[7], (), 0, len(BACKGROUNDS)),
        motion=motion,
        shape=jnp.stack([s0, s1]),
        color=jnp.stack([c0, c1]),
        size=size,
        start=start,
        speed=jnp.where(motion == MOTIONS.index("collide"), slow, fast),
        heading=heading,
        turn=jax.random.rademacher(keys[8], (), jnp.float32),
        period=low + jax.random.uniform(keys[9]) * (high - low),
        phase=jax.random.uniform(keys[10]),
    )


def frame_times(num_frames: int, start: int = 0, fps: float = FPS) -> np.ndarray:
    """fp32 [num_frames] seconds of the frames `start`, `start + 1`, ..."""
    return ((start + np.arange(num_frames)) / fps).astype(np.float32)


class Pose(NamedTuple):
    """Of both objects over time: position [T, 2, 2] in sides, scale, angle (radians), opacity, all [T, 2]."""

    position: jax.Array
    scale: jax.Array
    angle: jax.Array
    opacity: jax.Array


def poses(scene: Scene, times) -> Pose:
    """Where the objects are at `times` (seconds [T])."""
    t = jnp.asarray(times, jnp.float32)
    radius = jnp.asarray(list(SIZES.values()))[scene.size]
    direction = jnp.stack([jnp.cos(scene.heading), jnp.sin(scene.heading)])
    across = jnp.stack([-direction[1], direction[0]])
    cycle = t / scene.period + scene.phase
    wave = jnp.cos(2 * jnp.pi * cycle)
    around = jnp.stack(
        [jnp.cos(2 * jnp.pi * cycle * scene.turn), jnp.sin(2 * jnp.pi * cycle * scene.turn)], -1
    )
    is_ = {m: scene.motion == i for i, m in enumerate(MOTIONS)}

    along = (scene.speed * t)[:, None] * direction
    margin = _REACH * radius[0]
    # Bouncing is straight motion seen in mirrors: a triangle wave of the free path.
    bounced = margin + jnp.abs(
        (scene.start - margin + along + 1 - 2 * margin) % (2 - 4 * margin) - (1 - 2 * margin)
    )
    moves = is_["left"] | is_["right"] | is_["up"] | is_["down"]
    first = jnp.select(
        [moves, is_["bounce"], is_["orbit"]],
        [scene.start + along, bounced, 0.5 + 0.25 * around],
        jnp.broadcast_to(scene.start, along.shape),
    )
    second = first

    passing = 0.5 - 0.25 * across + along, 0.5 + 0.25 * across - along + scene.phase * direction
    gap = 0.36 + 0.08 * scene.phase
    chasing = scene.start + along, scene.start + gap * direction + along
    # A collision: the first runs up to the second, stops at touch, and the second runs on to the border.
    touch = 0.6 - 0.92 * radius.sum()
    run_up = scene.speed * t + _REACH * radius[0]
    run_on = jnp.maximum(run_up - touch, 0)
    hit = jnp.minimum(run_up, touch), jnp.minimum(0.6 + run_on, 1 - _REACH * radius[1])
    colliding = tuple(0.5 + (x - 0.5)[:, None] * direction for x in hit)
    circling = 0.5 + 0.25 * around, 0.5 - 0.25 * around
    which = [is_["pass"], is_["chase"], is_["collide"], is_["circle"]]
    paths = [passing, chasing, colliding, circling]
    position = (
        jnp.stack([jnp.select(which, [p[i] for p in paths], (first, second)[i]) for i in range(2)], 1) % 1
    )

    change = jnp.clip((t - 0.5 * scene.phase) / 3.5, 0, 1)
    scale = jnp.select(
        [is_["grow"], is_["shrink"], is_["pulse"]],
        [SMALLEST + (1 - SMALLEST) * change, 1 - (1 - SMALLEST) * change, 0.775 + 0.225 * wave],
        jnp.ones_like(t),
    )
    angle = jnp.where(is_["spin"], 2 * jnp.pi * scene.turn * cycle, 0)
    shown = jnp.clip((t - 1 - 2.5 * scene.phase) / FADE, 0, 1)
    saw = jnp.abs((cycle % 1) - 0.5) * scene.period  # seconds from the middle of the visible half
    blinking = jnp.clip(0.5 + (0.25 * scene.period - saw) / FADE, 0, 1)
    opacity = jnp.select([is_["appear"], is_["disappear"], is_["blink"]], [shown, 1 - shown, blinking], 1.0)
    second_there = (scene.motion >= len(SINGLE_MOTIONS)).astype(jnp.float32)
    both = jnp.ones((1, 2))
    return Pose(
        position,
        scale[:, None] * both,
        angle[:, None] * both,
        opacity[:, None] * jnp.stack([jnp.ones(()), second_there]),
    )


def _distance(shape, x, y):
    """Signed distance to a shape of circumradius 1, negative inside; `shape` is an index of SHAPES."""
    radius, theta = jnp.hypot(x, y), jnp.arctan2(y, x)
    tips = jnp.asarray([TIPS.get(s, 4) for s in SHAPES], jnp.float32)[shape]
    inner = jnp.asarray([STAR_INNER if s == "star" else np.cos(np.pi / TIPS.get(s, 4)) for s in SHAPES])[
        shape
    ]
    # A polygon or star is one edge, from a tip to an inner corner, seen in mirrors; a tip points up.
    sector = 2 * jnp.pi / tips
    offset = jnp.where(shape == SHAPES.index("square"), sector / 2, 0)
    folded = jnp.abs((theta + jnp.pi / 2 + offset + sector / 2) % sector - sector / 2)
    edge = jnp.stack([inner * jnp.cos(sector / 2) - 1, inner * jnp.sin(sector / 2)])
    normal = jnp.stack([edge[1], -edge[0]]) / jnp.hypot(edge[0], edge[1])
    polygon = normal[0] * (radius * jnp.cos(folded) - 1) + normal[1] * radius * jnp.sin(folded)
    long, short = jnp.maximum(jnp.abs(x), jnp.abs(y)), jnp.minimum(jnp.abs(x), jnp.abs(y))
    cross = jnp.maximum(long - 1, short - CROSS_ARM)
    ring = jnp.abs(radius - (1 + RING_HOLE) / 2) - (1 - RING_HOLE) / 2
    special = {"circle": radius - 1, "cross": cross, "ring": ring}
    return jnp.select([shape == SHAPES.index(s) for s in special], list(special.values()), polygon)


def render(scene: Scene, times, size: int = 96) -> jax.Array:
    """Draws `scene` at `times` (seconds [T]): fp32 [T, size, size, 3] in [-1, 1]; jit- and vmap-able."""
    pose = poses(scene, times)
    grid = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    circumradius = (
        jnp.asarray(list(SIZES.values()))[scene.size]
        * jnp.asarray([CIRCUMRADIUS[s] for s in SHAPES])[scene.shape]
    )
    colors = jnp.asarray(list(COLORS.values()), jnp.float32) / 127.5 - 1
    background = (jnp.asarray(list(BACKGROUNDS.values()), jnp.float32) / 127.5 - 1)[scene.background]
    frames = jnp.broadcast_to(background, (pose.position.shape[0], size, size, 3))
    for i in range(2):
        # Offsets to the nearest copy of the object on the torus.
        x, y = (
            (grid - pose.position[:, i, axis, None] + 0.5) % 1 - 0.5 for axis in range(2)
        )  # each [T, size]
        x, y = x[:, None, :], y[:, :, None]
        cos, sin = (f(pose.angle[:, i])[:, None, None] for f in (jnp.cos, jnp.sin))
        unit = (circumradius[i] * pose.scale[:, i])[:, None, None]
        distance = _distance(scene.shape[i], (x * cos + y * sin) / unit, (y * cos - x * sin) / unit) * unit
        cover = jnp.clip(0.5 - distance * size, 0, 1) * pose.opacity[:, i, None, None]
        frames = frames + cover[..., None] * (colors[scene.color[i]] - frames)
    return frames


def attributes(scene: Scene) -> Attributes:
    """The words for one scene (not a batch); on the host."""
    motion = MOTIONS[int(scene.motion)]
    count = 2 if motion in PAIR_MOTIONS else 1
    shape, color, size = (np.asarray(v) for v in (scene.shape, scene.color, scene.size))
    return Attributes(
        background=tuple(BACKGROUNDS)[int(scene.background)],
        motion=motion,
        objects=tuple(
            Object(tuple(COLORS)[color[i]], SHAPES[shape[i]], tuple(SIZES)[size[i]]) for i in range(count)
        ),
    )
