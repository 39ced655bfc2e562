"""How fast the devices that are there reach each other: latency and bandwidth of a collective, measured."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.mesh import SEQ, make_mesh
from sharding.strategies import Link


def measure_link(devices: Sequence[jax.Device], dtype, repeats: int = 5) -> Link:
    """All-gathers in a loop on the devices, so that no launch is in the time: tiny ones for the latency, large ones
    for the bandwidth. Medians of `repeats` loops.

    Raises ValueError for fewer than two devices.
    """
    if len(devices) < 2:
        raise ValueError("a link needs two devices")
    cpu = devices[0].platform == "cpu"
    calls, tiny, much = (3, 2**10, 2**20) if cpu else (100, 2**10, 2**25)  # bytes of a device
    mesh = make_mesh(devices, len(devices), 1)

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(SEQ), out_specs=P(SEQ))
    def gather(x):
        def body(i, x):
            everything = lax.all_gather(x, SEQ, tiled=True)
            # A number of another device's each time: none can be left out, and next to nothing is copied.
            start = (i + lax.axis_index(SEQ)) % len(devices) * x.size
            return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(everything, start, 1), 0, 0)

        return lax.fori_loop(0, calls, body, x)

    def seconds(size):
        elements = len(devices) * size // jnp.dtype(dtype).itemsize
        # A device draws less power, and runs faster, on constant data.
        x = jax.random.normal(jax.random.key(0, impl="rbg"), (elements,), dtype)
        x = jax.block_until_ready(gather(jax.device_put(x, NamedSharding(mesh, P(SEQ)))))
        found = []
        for _ in range(repeats):
            begin = time.perf_counter()
            x = jax.block_until_ready(gather(x))
            found.append((time.perf_counter() - begin) / calls)
        return statistics.median(found)

    latency = seconds(tiny)
    return Link(latency, (len(devices) - 1) * (much - tiny) / max(seconds(much) - latency, 1e-9))
