"""`gather` without a collective for keys: the kernel that rotates them writes them to the caches of all devices.

Between two devices the values go by a copy engine, while queries and keys are multiplied, and to their places while
keys travel. `environment` sets the flag that makes it an engine; without, it is NCCL. The functions here are bodies of
a `shard_map`, or what it needs.

See `jax_causal.fused_rotation` and `fused_values` for the kernels, and `peer_memory` for where they write. They are
imported on demand, for importing Pallas takes its time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
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
    sent = () if peers.values_apart else values
    keys, sent, reach = peer_memory.reach(peers, keys, sent, jnp.full(len(keys), zero))
    return keys, sent or values, reach


@functools.partial(jax.jit, static_argnames="peers")
def _exchange_values(v, values, slots, me, *, peers):
    """A layer's values in the cache, with those of a block: `v` of this device, and its peer's."""
    from jax_causal import fused_values

    received = lax.ppermute(v, peers.axis, [(0, 1), (1, 0)])
    return fused_values.write_values(v, received, values, slots, me, peers=peers)


def rotate_into_caches(qk, v, scales, table, keys, values, reach, slots, *, peers, eps, layer):
    """`fused_rotation.rotate_into_cache`, with what it takes and gives, on all devices."""
    from jax_causal import fused_rotation

    rotate = functools.partial(
        fused_rotation.rotate_into_cache, eps=eps, peers=peers, reach=reach, layer=layer
    )
    if not peers.values_apart:
        return rotate(qk, v, scales, table, keys, values, slots)
    # On a stream of its own: XLA makes a call with these attributes asynchronous. There are no calls in it, which would
    # be made so too, and all that the permute does not need comes before: XLA (of jax 0.11.2) takes no permute in there
    # between whose beginning and end something else has its place.
    with set_xla_metadata(_xla_stream_annotation="1", inlineable="false"):
        values = _exchange_values(v, values, slots, lax.axis_index(peers.axis)[None], peers=peers)
    q, keys, _, reach = rotate(qk, None, scales, table, keys, None, slots)
    return q, keys, values, reach


def attend(qk, v, scales, table, keys, values, reach, slots, held, *, layout, last, backend, **how):
    """Attention of a block against the cache of a layer, with the block in it.

    Arguments are those of `rotate_into_caches`; `held` frames are attended to.

    Returns:
      [B, F, m, N, D], keys and values of the cache, and `reach` if layers follow that need it.
    """
    q, keys, values, reach = rotate_into_caches(qk, v, scales, table, keys, values, reach, slots, **how)
    out = causal_rope_sp.attend_held(q, keys, values, layout.part_length(held), backend)
    return out, keys, values, None if last else reach
