"""`gather` without a collective for keys: the kernel that rotates them writes them to the caches of all devices.

Between two devices the values go first, by a copy engine, while queries and keys are multiplied. `environment` sets the
flag that makes it an engine; without, it is NCCL. The functions here are bodies of a `shard_map`, or what it needs.

See `jax_causal.fused_rotation` for the kernel. It is imported on demand, for importing Pallas takes its time.
"""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import Mesh

from sharding import causal_rope_sp
from sharding.mesh import SEQ


def peers(mesh: Mesh, count: int, tokens: int, rows: int):
    """A `fused_rotation.Peers` for the devices of a mesh that share frames of so many tokens, `rows` on each; None
    where a kernel cannot write to their memory, or not such shares."""
    from jax_causal import fused_rotation

    # What such kernels ask for.
    alone = jax.process_count() == 1 and [d.id for d in mesh.devices.ravel()] == list(range(mesh.size))
    found = fused_rotation.Peers(count, tokens, SEQ)
    return found if alone and fused_rotation.can_reach_peers() and found.suit(rows) else None


def normalise(qk, scales, eps: float):
    """Queries and keys normalised, to be rotated."""
    from jax_causal import fused_rotation

    return fused_rotation.normalise(qk, scales, eps)


def attend(
    qk, v, scales, table, keys, values, counts, slots, held, *, peers, eps, layout, layer, last, backend
):
    """Attention of a block against the cache of a layer, with the block in it.

    Arguments are those of `fused_rotation.rotate_into_cache`, and `counts` of what has arrived in a pass that owns the
    cache, else None; `held` frames are attended to.

    Returns:
      [B, F, m, N, D], keys and values of the cache, and the counts if layers follow that need them.
    """
    from jax_causal import fused_rotation

    received = arrivals = None
    # A permute, at which the host's threads of all devices meet, is before the first kernel that waits for others.
    # Without it two H200s stopped. XLA allocates and frees memory for such kernels at the start of a run, and a thread
    # that frees probably waits for a device that waits in the kernel already.
    ring = [(i, (i + 1) % peers.count) for i in range(peers.count)]
    if peers.axis is not None and peers.count == 2:
        received = lax.ppermute(v, peers.axis, ring)
    elif peers.axis is not None and peers.count > 2 and layer == 0:
        slots = lax.ppermute(slots, peers.axis, ring)  # all have the same
    if counts is not None:
        arrivals = fused_rotation.Arrivals(counts, layer)
    q, keys, values, now = fused_rotation.rotate_into_cache(
        qk, v, scales, table, keys, values, slots,
        eps=eps, peers=peers, received=received, arrivals=arrivals,
    )  # fmt: skip
    out = causal_rope_sp.attend_held(q, keys, values, layout.part_length(held), backend)
    return out, keys, values, None if counts is None or last else now
