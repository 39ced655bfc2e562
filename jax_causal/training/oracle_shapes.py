"""Shape and orientation of a mask, by comparison with turned templates in polar coordinates.

A mask is sampled on circles around its centroid with radii in units of the square root of its area, which takes
out place and scale; turning it is then a circular shift, and all turns are compared at once by FFT.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

from jax_causal.training import world

_RINGS, _ANGLES = 24, 120
_RADII = (np.arange(_RINGS) + 0.5) / _RINGS * 1.15  # in units of sqrt(area); the farthest tip is at 1.0
_THETA = np.arange(_ANGLES) / _ANGLES * 2 * np.pi
SYMMETRY = {"square": 4, "triangle": 3, "star": 5, "cross": 4}  # turns after which a shape looks the same


def _inside(shape: str, rho, theta) -> np.ndarray:
    """Whether points are inside `shape` of circumradius 1, first tip or arm at angle 0."""
    if shape == "circle":
        return rho <= 1
    if shape == "ring":
        return (rho <= 1) & (rho >= world.RING_HOLE)
    if shape == "cross":
        x, y = np.abs(rho * np.cos(theta)), np.abs(rho * np.sin(theta))
        return (np.maximum(x, y) <= 1) & (np.minimum(x, y) <= world.CROSS_ARM)
    half = np.pi / SYMMETRY[shape]
    inner = world.STAR_INNER if shape == "star" else np.cos(half)
    folded = np.abs((theta + half) % (2 * half) - half)
    # Along the edge from (1, 0) to the inner corner, in polar form.
    return rho * (inner * np.sin(half) * np.cos(folded) + (1 - inner * np.cos(half)) * np.sin(folded)) <= (
        inner * np.sin(half)
    )


@functools.cache
def unit_area(shape: str) -> float:
    """Area of `shape` of circumradius 1."""
    grid = (np.arange(800) + 0.5) / 400 - 1
    x, y = np.meshgrid(grid, grid)
    return float(_inside(shape, np.hypot(x, y), np.arctan2(y, x)).mean() * 4)


@functools.cache
def _templates() -> np.ndarray:
    """bool [shapes, rings, angles]"""
    radii, theta = np.meshgrid(_RADII, _THETA, indexing="ij")
    return np.stack([_inside(s, radii * np.sqrt(unit_area(s)), theta) for s in world.SHAPES])


def match(cover: np.ndarray, centroids: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compares masks with all shapes at all turns.

    Args:
      cover: [T, H, W] how much of each pixel the object covers, 0 to 1; space is a torus.
      centroids: [T, 2] x and y in pixels.
      areas: [T] in pixels.

    Returns:
      Intersection over union at the best turn [T, shapes], and that turn in radians [T, shapes].
    """
    reach = np.sqrt(areas)[:, None, None] * _RADII[:, None]
    x = centroids[:, 0, None, None] + reach * np.cos(_THETA)
    y = centroids[:, 1, None, None] + reach * np.sin(_THETA)
    frame = np.broadcast_to(np.arange(len(cover))[:, None, None], x.shape)
    polar = ndimage.map_coordinates(cover, [frame, y, x], order=1, mode="grid-wrap") > 0.5
    weight = (_RADII / _ANGLES)[:, None]  # area of a polar cell, up to a factor
    templates = _templates()
    spectrum = np.einsum("trk,srk->tsk", np.fft.rfft(polar * weight), np.conj(np.fft.rfft(templates)))
    overlap = np.fft.irfft(spectrum, _ANGLES)
    both = (polar * weight).sum((-2, -1))[:, None] + (templates * weight).sum((-2, -1))[None]
    iou = overlap / (both[..., None] - overlap)
    return iou.max(-1), _THETA[iou.argmax(-1)]
