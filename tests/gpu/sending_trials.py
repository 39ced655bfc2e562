"""What it costs two GPUs to have each other's keys and values of a block, by collectives and by our kernel:

    PYTHONPATH=. python tests/gpu/sending_trials.py              # two Hopper GPUs, a minute and a half
    PYTHONPATH=. python tests/gpu/sending_trials.py gather kernel   # these
    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/gpu/sending_trials.py gather   # anywhere, to try the script

Every case runs in a process of its own, for flags of XLA are read once, and is ended after 45 s. Each is a layer's
share of the 1.3B shape, 792 rows of 3 frames a device: "gather" packs keys and values, gathers them and writes them to
the cache; "all-to-all" trades tokens for heads and back; "-in-graphs" has the collectives in CUDA graphs; "kernel"
begins a pass, then norms, rotates and writes to both caches at once; "ahead" does that when the copy engine has brought
the values, which nothing is computed beside here. Printed are microseconds of a call in a row of dependent calls, and
from a profile those of its kernels; of the last two the error against the plain form too.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time

GRAPHS = "--xla_gpu_enable_command_buffer=+COLLECTIVES"
CASES = {
    "gather": "",
    "gather-in-graphs": GRAPHS,
    "all-to-all": "",
    "all-to-all-in-graphs": GRAPHS,
    "kernel": "",
    "ahead": "",
}
LIMIT_S = 45
CALLS, REPEATS = 30, 5
B, F, S, N, D, ROOM = 1, 3, 1560, 12, 128, 32760
EPS = 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE")
    parser.add_argument("--here", action="store_true", help="used by the script itself")
    args = parser.parse_args()
    if args.here:
        return run(args.cases[0])
    failed = 0
    for case in args.cases or CASES:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {CASES[case]}".strip()
        command = [sys.executable, __file__, case, "--here"]
        try:
            failed |= subprocess.run(
                command, env=os.environ | {"XLA_FLAGS": flags}, timeout=LIMIT_S
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{case}: not done after {LIMIT_S} s")
            failed = 1
    return failed


def run(case: str) -> int:
    from jax_causal import environment

    environment.apply(devices=2)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jax_causal import bench_profile, fused_rotation, rope
    from jax_causal.peer_memory import Peers
    from sharding import direct
    from sharding.mesh import HEADS, SEQ, make_mesh, pick_devices, rows_of_share

    trades = case.startswith("all-to-all")
    mesh = make_mesh(pick_devices(2), *((1, 2) if trades else (2, 1)))
    rows = rows_of_share(S, 2, short_last=True)

    def gather(qk, v, scales, table, keys, values, slots):
        q, k = jnp.unstack(qk, axis=3)
        block = lax.all_gather(jnp.stack([k, v]), SEQ, axis=3, tiled=True)[:, :, :, :S]
        start = (0, 0, slots[0] * S, 0, 0)
        keys, values = (
            lax.dynamic_update_slice(cache, x.reshape(B, 1, F * S, N, D), start)
            for cache, x in ((keys, block[0]), (values, block[1]))
        )
        return q, keys, values

    def trade(qk, v, scales, table, keys, values, slots):
        traded = lax.all_to_all(jnp.stack([*jnp.unstack(qk, axis=3), v]), HEADS, 4, 3, tiled=True)
        return lax.all_to_all(traded[0] + traded[1] * traded[2], HEADS, 2, 3, tiled=True), keys, values

    peers = Peers(2, S, SEQ)

    def kernel(qk, v, scales, table, keys, values, slots, received=None):
        (keys,), (values,), reach = direct.begin_pass((keys,), (values,), peers=peers)  # a pass of one layer
        return fused_rotation.rotate_into_cache(
            qk, v, scales, table, keys, values, slots, eps=EPS, peers=peers, received=received, reach=reach
        )[:3]

    def ahead(qk, v, *rest):
        return kernel(qk, v, *rest, received=lax.ppermute(v, SEQ, [(0, 1), (1, 0)]))

    layer = trade if trades else {"kernel": kernel, "ahead": ahead}.get(case, gather)

    def chain(layer, qk, v, scales, table, keys, values, slots):
        def step(_, carry):
            qk, v, keys, values = carry
            q, keys, values = layer(qk, v, scales, table, keys, values, slots)
            change = q * jnp.bfloat16(1e-3)
            return qk.at[:, :, :, 0].add(change), v + change, keys, values

        return lax.fori_loop(0, CALLS, step, (qk, v, keys, values))

    tokens = P(None, None, HEADS if trades else SEQ)
    specs = (tokens, tokens, P(), tokens, P(), P(), P())

    def compiled(function, donate=()):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=(tokens, tokens, P(), P()), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate)

    rng = np.random.default_rng(0)
    spatial = rope.spatial_factors(30, 52, D)
    table = np.asarray(rope.tables(jnp.asarray(rope.frame_factors(12, F, D)), spatial))
    padding = ((0, 0), (0, 0), (0, 2 * rows - S), (0, 0))
    arrays = [
        *(
            jnp.asarray(rng.standard_normal((B, F, 2 * rows, *shape), np.float32), jnp.bfloat16)
            for shape in ((2, N, D), (N, D))
        ),
        tuple(jnp.asarray(rng.standard_normal(N * D), jnp.bfloat16) for _ in "qk"),
        jnp.asarray(np.pad(table, padding, mode="edge")),
        *(jnp.asarray(rng.standard_normal((B, 1, ROOM, N, D), np.float32), jnp.bfloat16) for _ in "kv"),
        jnp.arange(12, 12 + F, dtype=jnp.int32),
    ]
    inputs = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    failed = False
    if layer in (kernel, ahead):

        def plain(qk, v, scales, table, *rest):
            factors = fused_rotation._factors(table)
            return fused_rotation.plain_rotate(EPS, peers, (qk, v, None), scales, factors, *rest)

        # All calls, for a device that is ahead could write where another still reads.
        found, right = (compiled(functools.partial(chain, run))(*inputs) for run in (layer, plain))
        for name, ours, theirs in zip(("q", "v", "keys", "values"), found, right, strict=True):
            for x, y in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
                x, y = (np.asarray(a.data, np.float32) for a in (x, y))
                error = np.linalg.norm(x - y) / np.linalg.norm(y)
                failed |= not error < 1e-2
                print(f"{case}: {name}, relative difference {error:.1e}")
    function, times = compiled(functools.partial(chain, layer), donate=(0, 1, 4, 5)), []
    for _ in range(1 + REPEATS):
        jax.block_until_ready(inputs)
        began = time.perf_counter()
        inputs[0], inputs[1], inputs[4], inputs[5] = jax.block_until_ready(function(*inputs))
        times.append((time.perf_counter() - began) / CALLS * 1e6)
    print(f"{case}: {statistics.median(times[1:]):.1f} us a call, the sum with q included", flush=True)
    planes = bench_profile._profile(lambda: jax.block_until_ready(function(*inputs)))
    for kernels in bench_profile.gpu_kernels(planes)[:1]:
        by_name = {}
        for name, _, seconds in kernels:
            by_name.setdefault(name[:60], []).append(seconds * 1e6)
        for name, micros in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:8]:
            print(f"    {name:60} {len(micros):4} x {statistics.median(micros):6.1f} us")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
