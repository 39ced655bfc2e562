"""Reads a clip of the procedural world back into attributes, by classical vision.

No network is involved: colors are compared with the palette, shapes with turned templates, motions with rules
over tracks. A little blur and noise, as of a VAE, are tolerated. `score` says which attributes of a prompt a
generated clip shows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from jax_causal.training import oracle_motion, oracle_shapes, world

_BACKGROUNDS = np.asarray(list(world.BACKGROUNDS.values()), np.float32)
_COLORS = np.asarray(list(world.COLORS.values()), np.float32)
_FEWEST = 0.004  # share of a frame below which an object is not visible
_FAR = 90.0  # RGB distance to the nearest palette entry beyond which a color has no name
_NEAR = 70.0  # the same for a pixel and the nearest mixture of a color with the background
_LIKE = 0.6  # intersection over union below which a shape has no name
_JUMP = 0.08  # sides per frame; the fastest object moves 0.032


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clip shows; "unknown" where nothing fits. Of two objects the first is the one that acts."""

    background: str
    motion: str
    objects: tuple[world.Object, ...]
    smooth: bool


def _background(frames: np.ndarray) -> tuple[str, np.ndarray]:
    """Name, and color as shown, of what fills most of the clip."""
    some = frames[::4, ::2, ::2]
    nearest = np.stack([np.square(some - c).sum(-1) for c in _BACKGROUNDS]).argmin(0)
    index = int(np.bincount(nearest.ravel(), minlength=len(_BACKGROUNDS)).argmax())
    color = np.median(some[nearest == index], axis=0)
    known = np.linalg.norm(color - _BACKGROUNDS[index]) < _FAR
    return tuple(world.BACKGROUNDS)[index] if known else oracle_motion.UNKNOWN, color


def _object_colors(frames: np.ndarray, background: np.ndarray) -> list[int]:
    """Indices of the one or two object colors, the most seen first; empty if there is no object."""
    mask = np.linalg.norm(frames - background, axis=-1) > 60
    core = ndimage.binary_erosion(mask, np.ones((1, 3, 3)))
    if core.sum() < 30:
        return []
    pixels = frames[core]
    # Edges and fading objects are mixtures with the background, which may look like other colors: a pixel is compared
    # with what is mostly ink on the way from the background to each.
    lines = _COLORS - background
    shares = (pixels - background) @ lines.T / np.square(lines).sum(-1)
    mixed = np.clip(shares, 0.6, 1)[..., None] * lines + background
    distance = np.linalg.norm(pixels[:, None] - mixed, axis=-1).T
    nearest = np.where(distance.min(0) < _NEAR, distance.argmin(0), len(_COLORS))
    votes = np.zeros((len(frames), len(_COLORS) + 1), np.int64)
    np.add.at(votes, (np.nonzero(core)[0], nearest), 1)
    votes = votes[:, : len(_COLORS)]
    order = np.argsort(-votes.sum(0))[:2]
    first, second = (votes[:, i] for i in order)
    # While it fades, an object takes on other colors: a second object is there most of the time.
    two = second.sum() > 0.05 * first.sum() and (second > 3).mean() > 0.6
    return [int(i) for i in order[: 1 + two]] if first.sum() > 30 else []


def _cover(frames: np.ndarray, background: np.ndarray, colors: list[int]) -> list[np.ndarray]:
    """How much of each pixel each object covers, fp32 [T, H, W] in [0, 1]."""
    inks = _COLORS[colors]
    covers = []
    for ink in inks:
        line = ink - background
        covers.append(np.clip((frames - background) @ line / (line @ line), 0, 1))
    if len(inks) == 2:
        # A pixel belongs to the ink on whose mixture line with the background it lies. At the edges the lines
        # meet, so ownership is decided by the nearest pixel whose color is pure.
        off = np.stack([np.linalg.norm(frames - ink, axis=-1) for ink in inks])
        pure = (off.min(0) < 0.4 * np.linalg.norm(frames - background, axis=-1)) & (off.min(0) < _FAR)
        solid = ndimage.binary_erosion(pure, np.ones((1, 3, 3)))
        owner = off.argmin(0)
        for t in range(len(frames)):
            if solid[t].any():
                where = ndimage.distance_transform_edt(~solid[t], return_distances=False, return_indices=True)
                owner[t] = owner[t][tuple(where)]
        covers = [np.where(owner == i, c, 0) for i, c in enumerate(covers)]
    return [c.astype(np.float32) for c in covers]


def _track(cover: np.ndarray) -> tuple[str, float, oracle_motion.Track]:
    """Shape, radius in sides, and track of one object."""
    frames, height, width = cover.shape
    mask = cover * (cover > 0.35)
    area = mask.sum((1, 2))
    solid = (cover > 0.5).sum((1, 2))
    visible = solid > max(_FEWEST * height * width, 0.1 * solid.max())
    mass = np.maximum(area, 1e-6)
    # The centroid on a torus is a mean of angles.
    wave_x = np.exp(2j * np.pi * (np.arange(width) + 0.5) / width)
    wave_y = np.exp(2j * np.pi * (np.arange(height) + 0.5) / height)
    x = np.angle((mask.sum(1) @ wave_x) / mass) / (2 * np.pi) % 1
    y = np.angle((mask.sum(2) @ wave_y) / mass) / (2 * np.pi) % 1
    position = np.stack([x, y], -1)
    turn = np.zeros(frames)
    if not visible.any():
        empty = oracle_motion.Track(position, area, turn, 0, visible)
        return oracle_motion.UNKNOWN, 0.0, empty
    centroids = position[visible] * [width, height] - 0.5
    iou, turns = oracle_shapes.match(cover[visible], centroids, np.maximum(solid[visible], 1))
    # Larger masks are clearer: they weigh more.
    weights = solid[visible] / solid[visible].sum()
    likeness = weights @ iou
    best = int(likeness.argmax())
    shape = world.SHAPES[best] if likeness[best] > _LIKE else oracle_motion.UNKNOWN
    turn[visible] = turns[:, best]
    unit = oracle_shapes.unit_area(world.SHAPES[best]) * world.CIRCUMRADIUS[world.SHAPES[best]] ** 2
    radius = np.sqrt(np.percentile(solid[visible], 95) / (unit * height * width))
    symmetry = oracle_shapes.SYMMETRY.get(shape, 0)
    return (
        shape,
        float(radius),
        oracle_motion.Track(position, solid / (height * width), turn, symmetry, visible),
    )


def _is_smooth(frames: np.ndarray, background: np.ndarray, tracks: list[oracle_motion.Track]) -> bool:
    """No jumps of place or size from frame to frame, and a background that keeps its color."""
    clear = np.median(frames, axis=(1, 2))
    if np.linalg.norm(clear - background, axis=-1).max() > 40:
        return False
    for track in tracks:
        both = track.visible[1:] & track.visible[:-1]
        step = (np.diff(track.position, axis=0) + 0.5) % 1 - 0.5
        if (np.linalg.norm(step, axis=-1)[both] > _JUMP).any():
            return False
        # An object fades within a few frames, during which its area is not meant; it may be fading where a clip begins.
        steady = both
        if not track.visible.all():
            steady = both & (ndimage.minimum_filter1d(track.visible.astype(int), 7, mode="constant")[1:] == 1)
        change = np.abs(np.diff(np.log(np.maximum(track.area, 1e-6))))
        if (change[steady] > 0.4).any():
            return False
    return True


def read(frames: np.ndarray) -> Reading:
    """Attributes of a clip.

    Args:
      frames: uint8 [T, H, W, 3], at 16 frames per second; T is 9 or more, and about 81 to tell all motions.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 9:
        raise ValueError(
            f"frames is {frames.dtype} {list(frames.shape)}; give one clip, uint8 [T, H, W, 3] with T >= 9"
        )
    frames = frames.astype(np.float32)
    name, background = _background(frames)
    colors = _object_colors(frames, background)
    tracked = [_track(c) for c in _cover(frames, background, colors)] if colors else []
    tracks = [t for *_, t in tracked]
    motion, swapped = oracle_motion.UNKNOWN, False
    if len(tracks) == 1:
        motion = oracle_motion.single(tracks[0])
    elif len(tracks) == 2:
        motion, swapped = oracle_motion.pair(*tracks)
    radii = np.asarray(list(world.SIZES.values()))
    objects = [
        world.Object(
            tuple(world.COLORS)[color], shape, tuple(world.SIZES)[int(np.abs(radii - radius).argmin())]
        )
        for color, (shape, radius, _) in zip(colors, tracked, strict=True)
    ]
    if swapped:
        objects.reverse()
    smooth = bool(tracks) and _is_smooth(frames, background, tracks)
    return Reading(name, motion, tuple(objects), smooth)


def score(frames: np.ndarray, attributes: world.Attributes) -> dict[str, bool]:
    """Which of `attributes` a clip shows: `compare` of its reading; takes frames as `read` does."""
    return compare(read(frames), attributes)


def compare(reading: Reading, attributes: world.Attributes) -> dict[str, bool]:
    """Whether background, color, shape, size and motion are as wanted; also "smooth" and "all".

    "all" means background, color, shape and motion. Shapes and sizes belong to their colors: of two objects,
    swapped colors are wrong shapes.
    """
    wanted = {o.color: o for o in attributes.objects}
    found = {o.color: o for o in reading.objects}
    if len(wanted) == len(found) == 1:
        # One object of the wrong color still has a shape.
        pairs = [(attributes.objects[0], reading.objects[0])]
    else:
        pairs = [(o, found.get(o.color, world.Object("", "", ""))) for o in attributes.objects]
    motion = reading.motion == attributes.motion
    if attributes.motion in ("chase", "collide"):
        motion = motion and [o.color for o in reading.objects] == [o.color for o in attributes.objects]
    result = {
        "background": reading.background == attributes.background,
        "color": set(wanted) == set(found),
        "shape": all(w.shape == f.shape for w, f in pairs),
        "size": all(w.size == f.size for w, f in pairs),
        "motion": motion,
        "smooth": reading.smooth,
    }
    return result | {"all": all(result[k] for k in ("background", "color", "shape", "motion"))}
