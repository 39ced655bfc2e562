"""Sample videos of a training run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from jax_causal.video import Video

_COLUMNS = 4


def save_samples(path: Path, videos: np.ndarray, fps: int) -> Path:
    """Writes videos uint8 [n, T, H, W, 3] side by side: an mp4, or a png where T is 1.

    Args:
      path: without suffix; its folder is made.

    Returns:
      The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = tiled(videos)
    target = path.with_name(path.name + (".mp4" if len(frames) > 1 else ".png"))
    return Video(frames, fps).save(target, overwrite=True)


def tiled(videos: np.ndarray) -> np.ndarray:
    """Videos [n, T, H, W, 3] in rows of up to four: [T, rows H, columns W, 3], black where there is none, and to even
    sides, which mp4 needs."""
    n, t, h, w, _ = videos.shape
    columns = min(n, _COLUMNS)
    rows = math.ceil(n / columns)
    sheet = np.zeros((t, rows * h + rows * h % 2, columns * w + columns * w % 2, 3), np.uint8)
    for i, video in enumerate(videos):
        top, left = i // columns * h, i % columns * w
        sheet[:, top : top + h, left : left + w] = video
    return sheet
