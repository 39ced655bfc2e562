"""Motion of one or two tracked objects, by plain rules on place, area, orientation and visibility over time.

Lengths are in frame sides and space is a torus: places are unwrapped before anything is said of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

UNKNOWN = "unknown"
_MOVING = 0.06  # extent of a path, in sides, below which an object stands
_STAIRS = 0.3  # radians that a heading strays from turning evenly; four corners a turn give 0.45, a circle 0
_STEP = 0.004  # sides per frame above which an object is on the move


@dataclasses.dataclass(frozen=True)
class Track:
    """One object over T frames. Only visible frames are meant in `position`, `area` and `turn`."""

    position: np.ndarray  # [T, 2] centroid, x and y in [0, 1)
    area: np.ndarray  # [T] share of the frame
    turn: np.ndarray  # [T] orientation in radians
    symmetry: int  # how often the shape looks the same in a full turn; 0 for round shapes
    visible: np.ndarray  # bool [T]

    @property
    def path(self) -> np.ndarray:
        """[visible frames, 2] unwrapped positions, smoothed over 3 frames."""
        steps = np.diff(self.position[self.visible], axis=0, prepend=self.position[self.visible][:1])
        path = self.position[self.visible][:1] + np.cumsum((steps + 0.5) % 1 - 0.5, axis=0)
        return ndimage.uniform_filter1d(path, 3, axis=0, mode="nearest")


def _straight(path: np.ndarray) -> np.ndarray | None:
    """Displacement if the path is straight and never turns back, else None."""
    net = path[-1] - path[0]
    length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
    return net if length > _MOVING and np.linalg.norm(net) > 0.9 * length else None


def _heading(net: np.ndarray) -> str:
    major = int(abs(net[1]) > abs(net[0]))
    if abs(net[1 - major]) > 0.3 * abs(net[major]):
        return UNKNOWN
    return (("left", "right"), ("up", "down"))[major][int(net[major] > 0)]


def _circles(path: np.ndarray) -> bool:
    """Whether the path goes round the middle of the frame at a steady distance, more than a third of a turn, and
    bends steadily: a bounce off all four borders is a diamond round the middle."""
    arm = path - path[0] + (path[0] % 1) - 0.5
    radius = np.hypot(*arm.T)
    angle = np.unwrap(np.arctan2(arm[:, 1], arm[:, 0]))
    steady = radius.std() < 0.15 * radius.mean() and radius.mean() > 0.1
    round_ = steady and abs(angle[-1] - angle[0]) > max(2.0, 0.85 * np.abs(np.diff(angle)).sum())
    if not round_:
        return False
    steps = path[5:] - path[:-5]
    heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
    time = np.arange(len(heading))
    return bool((heading - np.polyval(np.polyfit(time, heading, 1), time)).std() < _STAIRS)


def _bounces(path: np.ndarray) -> bool:
    """Whether the object moves straight most of the time and turns back sharply in x or y."""
    steps = path[5:] - path[:-5]
    speed = np.linalg.norm(steps, axis=1)
    back = [(np.diff(np.sign(steps[np.abs(s) > 2 * _STEP, i])) != 0).any() for i, s in enumerate(steps.T)]
    # Away from the borders the direction does not change.
    bend = np.abs(steps[5:] - steps[:-5]).max(1) > 0.25 * np.median(speed)
    return any(back) and np.median(speed) > 5 * _STEP and bend.mean() < 0.85


def _visibility(visible: np.ndarray) -> str | None:
    changes = int((visible[1:] != visible[:-1]).sum())
    if changes == 0:
        return None
    return "blink" if changes > 1 else ("appear" if visible[-1] else "disappear")


def _scaling(scale: np.ndarray) -> str | None:
    low, high = np.percentile(scale, [3, 97])
    if high < 1.25 * low:
        return None
    smooth = ndimage.uniform_filter1d(scale, 3, mode="nearest")
    reach = smooth.max() - smooth.min()
    net = smooth[-1] - smooth[0]
    if abs(net) < 0.7 * reach or np.abs(np.diff(smooth)).sum() > 1.7 * reach:
        return "pulse"
    return "grow" if net > 0 else "shrink"


def _spins(track: Track) -> bool:
    if track.symmetry == 0:
        return False
    turn = np.unwrap(track.turn[track.visible] * track.symmetry) / track.symmetry
    turn = ndimage.uniform_filter1d(turn, 5, mode="nearest")
    net = turn[-1] - turn[0]
    return abs(net) > max(0.8, 0.7 * np.abs(np.diff(turn)).sum())


def single(track: Track) -> str:
    """Motion of one object: one of `world.SINGLE_MOTIONS` or "unknown"."""
    if track.visible.sum() < 5:
        return UNKNOWN
    seen = _visibility(track.visible)
    path = track.path
    if np.ptp(path, axis=0).max() > _MOVING:
        if seen:
            return UNKNOWN
        if (net := _straight(path)) is not None:
            return _heading(net)
        return "orbit" if _circles(path) else "bounce" if _bounces(path) else UNKNOWN
    if seen:
        return seen
    return _scaling(np.sqrt(track.area)) or ("spin" if _spins(track) else "still")


def pair(a: Track, b: Track) -> tuple[str, bool]:
    """Motion of two objects, and whether `b` is the one that acts (chases, collides) rather than `a`."""
    if not (a.visible.mean() > 0.8 and b.visible.mean() > 0.8):
        return UNKNOWN, False
    paths = a.path, b.path
    if all(_circles(p) for p in paths):
        return "circle", False
    nets = [_straight(p) for p in paths]
    if any(n is None for n in nets):
        return UNKNOWN, False
    along = nets[0] @ nets[1] / np.linalg.norm(nets[0]) / np.linalg.norm(nets[1])
    if along < -0.9:
        return "pass", False
    if along < 0.9:
        return UNKNOWN, False
    moving = [np.linalg.norm(np.diff(p, axis=0), axis=1) > _STEP for p in paths]
    when = [np.flatnonzero(m).mean() if m.any() else 0 for m in moving]
    if all(m.mean() < 0.9 for m in moving):
        return ("collide", bool(when[1] < when[0])) if abs(when[0] - when[1]) > 5 else (UNKNOWN, False)
    if all(m.mean() > 0.9 for m in moving):
        both = a.visible & b.visible
        gap = ((b.position - a.position)[both] + 0.5) % 1 - 0.5
        return "chase", bool(np.median(gap @ nets[0]) < 0)
    return UNKNOWN, False
