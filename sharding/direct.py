"""`gather` without a collective for keys: the kernel that rotates them writes them to the caches of all devices.

Between two devices the values go first, by a copy engine, while queries and keys are multiplied. `environment` sets the
flag that makes it an engine; without, it is NCCL. The functions here are bodies of a `shard_map`, or what it needs.

See `jax_causal.fused_rotation` for the kernel, and `jax_causal.peer_memory` for where it writes. They are imported on
demand, for importing Pallas takes its time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from sharding import causal_rope_sp
from sharding.mesh import SEQ


def peers(mesh: Mesh, count: int, tokens: int, rows: int):
    """A `peer_memory.Peers` for the devices of a mesh that share frames of so many tokens, `rows` on each; None
    where a kernel cannot write to their memory, or not such shares."""
    from jax_causal import peer_memory

    # What such kernels ask for.
    alone = jax.process_count() == 1 and [d.id for d in mesh.devices.ravel()] == list(range(mesh.size))
    found = peer_memory.Peers(count, tokens, SEQ)
    return found if alone and peer_memory.can_reach_peers() and found.suit(rows) else None


def normalise(qk, scales, eps: float):
    """Queries and keys normalised, to be rotated."""
    from jax_causal import fused_rotation

    return fused_rotation.normalise(qk, scales, eps)


def begin_pass(keys, values, *, peers):
    """`peer_memory.reach`, once the host's threads of all devices have met: in a permute by copy engines, which each of
    them has to begin."""
    from jax_causal import peer_memory

    me = lax.axis_index(peers.axis)
    met = lax.ppermute(me, peers.axis, [(i, (i + 1) % peers.count) for i in range(peers.count)])
    zero = met - lax.rem(me + peers.count - 1, peers.count)  # the number of the device before, less just that
    return peer_memory.reach(peers, keys, values, jnp.full(len(keys), zero))


def attend(
    qk, v, scales, table, keys, values, reach, layer, slots, held, *, peers, eps, layout, shares, backend
):
    """Attention of a block against the cache of a layer, with the block in it.

    Arguments are those of `fused_rotation.rotate_into_cache`; `held` frames are attended to.

    Returns:
      [B, m, F, N, D], keys and values of the cache, and `reach` for the next layer.
    """
    from jax_causal import fused_rotation

    received = None
    if peers.axis is not None and peers.count == 2:
        # Or XLA makes one permute of the first layer's and that before the pass.
        v, counts = lax.optimization_barrier((v, reach.counts))
        reach = reach._replace(counts=counts)
        received = lax.ppermute(v, peers.axis, [(0, 1), (1, 0)])
    q, keys, values, reach = fused_rotation.rotate_into_cache(
        qk, v, scales, table, keys, values, slots,
        eps=eps, peers=peers, received=received, reach=reach, layer=layer,
    )  # fmt: skip
    valid, queries = shares.valid(), None
    if not isinstance(valid, int):
        queries = valid * q.shape[2]  # tokens come before frames, and padding last
    out = causal_rope_sp.attend_held(q, keys, values, layout.part_length(held), backend, queries=queries)
    return out, keys, values, reach
