"""From logical axis names to `PartitionSpec`: one dataclass of rules for weights, caches and activations alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.mesh import HEADS, SEQ, TOKENS

Axes = str | tuple[str, ...] | None

CACHE = ("layers", "batch", "parts", "keys", "heads", "head_dim")
QKV = ("batch", "frames", "tokens", None, None)  # heads stay whole outside attention
TABLE = (None, "frames", "tokens", None)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes each logical axis is sharded over; names that are not here are not sharded.

    Attributes:
      batch: videos of a batch.
      tokens: tokens of one frame.
      width: of the VAE's activations.
      parts, heads: of the key/value cache.
    """

    batch: Axes = "data"
    tokens: Axes = TOKENS
    width: Axes = TOKENS
    parts: Axes = SEQ
    heads: Axes = HEADS

    def spec(self, names) -> P:
        """The spec of an array whose axes have these logical names (None: not sharded).

        Raises:
          ValueError: two axes of the array land on one mesh axis.
        """
        entries = [getattr(self, name, None) if name else None for name in names]
        used = [
            axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)
        ]
        if twice := {axis for axis in used if used.count(axis) > 1}:
            raise ValueError(f"the logical axes {names} use the mesh axis {min(twice)!r} twice")
        return P(*entries)

    def sharding(self, names, mesh: Mesh) -> NamedSharding:
        """`spec` on the mesh, in the one form that equal layouts share: without mesh axes of size one."""
        entries = []
        for entry in self.spec(names):
            axes = tuple(
                axis for axis in ([entry] if isinstance(entry, str) else entry or ()) if mesh.shape[axis] > 1
            )
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(mesh, P(*entries))


def replicated(abstract: Mapping, mesh: Mesh):
    """A sharding for every leaf: a whole copy on each device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), abstract)


def batched(abstract: Mapping, mesh: Mesh, rules: Rules):
    """A sharding for every leaf that cuts its first axis as a batch; whole copies of leaves where that is not even."""

    def leaf(x):
        even = x.ndim > 0 and x.shape[0] % mesh.shape[rules.batch] == 0
        return rules.sharding(("batch",) if even else (), mesh)

    return jax.tree.map(leaf, abstract)


def fully_sharded(abstract: Mapping, mesh: Mesh):
    """A sharding for every leaf that cuts its largest divisible axis over all devices of the mesh.

    The axis of stacked layers stays whole, because a scan reads it one layer at a time. Leaves without a
    divisible axis (biases of odd length, say) are replicated: they are small.
    """
    axes, count = mesh.axis_names, mesh.size

    def leaf(path, x):
        stacked = any(getattr(key, "key", None) == "blocks" for key in path) and not any(
            isinstance(getattr(key, "key", None), int) for key in path
        )
        candidates = [axis for axis in range(int(stacked), x.ndim) if x.shape[axis] % count == 0]
        if not candidates:
            return NamedSharding(mesh, P())
        chosen = max(candidates, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, P(*(axes if axis == chosen else None for axis in range(chosen + 1))))

    return jax.tree_util.tree_map_with_path(leaf, abstract)
