"""Times attention that sends behind it, in variants, on two H100s or H200s, beside attention alone:

    PYTHONPATH=. timeout 120 python tests/gpu/peers_trials.py            # all variants
    PYTHONPATH=. timeout 60 python tests/gpu/peers_trials.py alone full  # these
    PYTHONPATH=. python tests/gpu/peers_trials.py --compile              # only compiles, for described H200s

A line for each variant and number of keys: microseconds of the kernel on either device, median and mean by a profile of
dependent calls. "full" is the kernel as it is and its results are checked; the others that send leave something out.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_causal import attention_hopper, attention_peers, bench_profile, environment
from jax_causal.attention import NO_KEYS, attention, merge
from jax_causal.fused_rotation import Peers
from tests.gpu import compiled_for

F, S, ROWS, N, D, K = 3, 1560, 784, 12, 128, 32760
CALLS = 12
PEERS = Peers(2, S, "seq", True)
TOKENS = P(None, None, "seq")
STARTS = (0, 3, 12, 18)  # first slots of the block
# name: processors for attention alone; or what is replaced in `attention_peers`
NOTHING = lambda *args, **kwargs: None  # noqa: E731
VARIANTS = {
    "alone": 132,
    "full": {},
    "at once": {"SLOWEST": 1},
    "slower": {"SLOWEST": 32},
    "no sending": {"act": NOTHING, "wait": NOTHING, "release": NOTHING},
    "no waiting": {"wait": NOTHING},
    "130 processors": {"SPARE": 2},
    "alone again": 132,
}


@contextlib.contextmanager
def replaced(parts: dict):
    places = {
        "act": (attention_peers.Sender, "act"),
        "release": (attention_peers.Arrivals, "release"),
        "wait": (pl, "semaphore_wait"),
    }
    before = []
    for name, value in parts.items():
        place, attribute = places.get(name, (attention_peers, name))
        before.append((place, attribute, getattr(place, attribute)))
        setattr(place, attribute, value)
    try:
        yield
    finally:
        for place, attribute, value in before:
            setattr(place, attribute, value)


def call(variant, q, keys, values, slots):
    """One attention of a device's queries; out, keys and values."""
    length = (slots[-1] + 1) * S
    if isinstance(VARIANTS[variant], int):
        out, _ = attention_hopper.attend(
            q.reshape(1, F * ROWS, N, D), keys[:, 0], values[:, 0], length,
            no_keys=NO_KEYS, merge=merge, processors=VARIANTS[variant],
        )  # fmt: skip
        return out.reshape(q.shape), keys, values
    return attention_peers.attend(q, keys, values, slots, length, slots[0] * S, peers=PEERS)


def program(variant, mesh, calls):
    def body(q, keys, values, slots):
        def step(_, carry):
            q, keys, values, _ = carry
            out, keys, values = call(variant, q, keys, values, slots)
            return q + out * jnp.bfloat16(1e-3), keys, values, out

        return lax.fori_loop(0, calls, step, (q, keys, values, q))

    specs = (TOKENS, P(), P())
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(*specs, P()), out_specs=(*specs, TOKENS), check_vma=False
    )
    return jax.jit(mapped, donate_argnums=(0, 1, 2))


def arrays(mesh, start):
    """Queries, and a cache of which each device holds its own rows of the block alone; and all of it."""
    rng = np.random.default_rng(start)
    q = jnp.asarray(rng.standard_normal((1, F, 2 * ROWS, N, D), np.float32), jnp.bfloat16)
    whole = [jnp.asarray(rng.standard_normal((1, 1, K, N, D), np.float32), jnp.bfloat16) for _ in "kv"]

    def cache(x):
        parts = []
        for i, device in enumerate(mesh.devices.ravel()):
            part = np.array(x)
            for slot in range(start, start + F):
                other = np.ones(S, bool)
                other[i * ROWS : (i + 1) * ROWS] = False
                part[:, :, slot * S : (slot + 1) * S][:, :, other] = 0
            parts.append(jax.device_put(part, device))
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, P()), parts)

    queries = jax.device_put(q, NamedSharding(mesh, TOKENS))
    return queries, *map(cache, whole), q, whole


def check(mesh, start) -> bool:
    queries, keys, values, q, whole = arrays(mesh, start)
    slots = jnp.arange(start, start + F, dtype=jnp.int32)
    _, keys, values, out = program("full", mesh, 1)(queries, keys, values, slots)
    length = (start + F) * S
    right = attention(q.reshape(1, -1, N, D), *whole, length=jnp.int32(length))
    right = np.asarray(right, np.float32).reshape(q.shape)[:, :, :S]
    error = np.linalg.norm(np.asarray(out, np.float32)[:, :, :S] - right) / np.linalg.norm(right)
    same = all(
        np.array_equal(np.asarray(shard.data[:, :, :length]), np.asarray(x[:, :, :length]))
        for found, x in zip((keys, values), whole, strict=True)
        for shard in found.addressable_shards
    )
    ok = bool(same and error < 4e-3)
    print(f"{'ok  ' if ok else 'FAIL'} from slot {start}: error {error:.2e}, caches {same}", flush=True)
    return ok


def measure(variant, mesh, start):
    queries, keys, values, *_ = arrays(mesh, start)
    slots = jnp.arange(start, start + F, dtype=jnp.int32)
    run, state = program(variant, mesh, CALLS), [queries, keys, values]

    def once():
        state[:3] = run(*state, slots)[:3]
        jax.block_until_ready(state)

    once()
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.3:  # the clock falls under load
        once()
    found = []
    for kernels in bench_profile.gpu_kernels(bench_profile._profile(once)):
        times = [seconds * 1e6 for name, _, seconds in kernels if "flash_attention" in name]
        found.append(f"{statistics.median(times):7.1f} {statistics.mean(times):7.1f}")
    began = time.perf_counter()
    once()
    each = (time.perf_counter() - began) / CALLS * 1e6
    print(f"{variant:16} {(start + F) * S:6} keys   {'   '.join(found)}   in all {each:7.1f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.compile:
        jax.config.update("jax_num_cpu_devices", 2)
        devices = compiled_for.described_cards(2)
    else:
        environment.apply(devices=2, reserve=False)
        devices = jax.devices()[:2]
    mesh = Mesh(np.array(devices).reshape(1, 2, 1), ("data", "seq", "heads"), axis_types=(AxisType.Auto,) * 3)
    ok = args.compile or (check(mesh, 0) and check(mesh, 12))
    for variant in args.variants or VARIANTS:
        parts = VARIANTS[variant]
        jax.clear_caches()
        with replaced({} if isinstance(parts, int) else parts):
            if args.compile:
                like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
                put = functools.partial(NamedSharding, mesh)
                cache = like((1, 1, K, N, D), sharding=put(P()))
                queries = like((1, F, 2 * ROWS, N, D), sharding=put(TOKENS))
                slots = jax.ShapeDtypeStruct((F,), jnp.int32, sharding=put(P()))
                compiled_for.compiled_text(program(variant, mesh, 2).lower(queries, cache, cache, slots))
                print(variant, "compiles", flush=True)
            else:
                for start in STARTS:
                    measure(variant, mesh, start)
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
