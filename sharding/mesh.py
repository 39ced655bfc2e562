"""Device meshes for sequence-parallel generation.

One mesh serves everything: `data` for the batch, and `seq` x `heads`, over which the tokens of every frame are
sharded. Attention alone tells the last two apart: it trades tokens for heads over `heads`, and never trades
anything but queries and outputs over `seq`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_causal.attention_plan import TILE

SEQ, HEADS = "seq", "heads"
TOKENS = (SEQ, HEADS)  # the axes that a frame's tokens are sharded over, major first

# Rows in eights suit tensor cores: others XLA copies into eights before every product.
ROW_MULTIPLE, MOST_PADDING = 8, 0.03


def rows_of_share(tokens: int, devices: int, *, short_last: bool = False) -> int:
    """Rows of each frame on one of so many devices, padding included; in eights where that adds 3 % at most.

    Attention takes as long with a few queries of a tile as with all. With `short_last`, and where that adds no more
    either, the last device has whole tiles, and what is left of one is the others'.
    """
    rows = -(-tokens // devices)
    rounded = _rounded(rows)
    choices = [rounded, rows]
    last = (tokens - (devices - 1) * rounded) // TILE * TILE
    if short_last and devices > 1 and last > 0:
        choices.insert(0, _rounded(-(-(tokens - last) // (devices - 1))))
    return next(choice for choice in choices if choice <= (1 + MOST_PADDING) * rows)


def _rounded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def pick_devices(devices: int | Sequence[jax.Device] | None) -> list[jax.Device]:
    """The devices to use: all, the first so many, or those given.

    Raises:
      ValueError: more than there are; the message says how to get virtual ones for a trial.
    """
    if devices is not None and not isinstance(devices, int):
        return list(devices)
    present = jax.devices()
    count = len(present) if devices is None else devices
    if not 1 <= count <= len(present):
        raise ValueError(
            f"devices={count}, but there are {len(present)} {present[0].platform} devices: use 1 to {len(present)} "
            f"(to try more on a CPU, set JAX_NUM_CPU_DEVICES={count} before starting, or pass --devices)"
        )
    return present[:count]


def make_mesh(devices: Sequence[jax.Device], seq: int, heads: int, *, batch_axis: str = "data") -> Mesh:
    """A mesh (batch, seq, heads) over `devices`; what `seq` x `heads` leaves over is the batch axis.

    Neighbours in the list are neighbours along `heads`, which communicates most.
    """
    grid = np.asarray(devices).reshape(-1, seq, heads)
    return Mesh(grid, (batch_axis, SEQ, HEADS), axis_types=(AxisType.Auto,) * 3)
