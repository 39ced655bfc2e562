"""The fused kernels between products against what XLA makes of the same: time, bytes a second, error.

    PYTHONPATH=. python tests/gpu/norm_trials.py             # on a Hopper GPU, half a minute
    PYTHONPATH=. python tests/gpu/norm_trials.py --described  # compiles only, for the H200 described in compiled_for.py

Times are those of a call within a program of many calls on more memory than a cache holds, each behind a barrier as
behind the products of the model: the difference between programs of 60 and of 20 calls, the median of five.
"""

import argparse
import functools
import statistics
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import fused_norm, fused_rotation, rope
from jax_causal.fused_norm import Rows
from jax_causal.transformer_layers import inverse_rms, layer_norm
from tests.gpu import compiled_for

B, F, S, N, D, ROOM = 1, 3, 1560, 12, 128, 32760
E, EPS = N * D, 1e-6
ACTIVATION = B * F * S * E * 2  # bytes
FEW, MANY, REPEATS = 20, 60, 5
BUFFERS = 8


def row(param, vectors, i):
    return (param[i] + vectors["time"][:, :, i])[:, :, None]


def modulated(x, vectors, scale, shift):
    param = vectors["param"]
    return layer_norm(x, EPS) * (1 + row(param, vectors, scale)) + row(param, vectors, shift)


def affine(x, vectors):
    return layer_norm(x, EPS) * vectors["scale"] + vectors["bias"]


# Each pair: by XLA and by the kernels. Buffers are x, an output of a product, and two that are only written.


def norm_plain(vectors, x, out, p, q):
    return modulated(x, vectors, 4, 3), out, p, q


def norm_fused(vectors, x, out, p, q):
    param, time = vectors["param"], vectors["time"]
    return fused_norm.add_norm(x, None, None, param, time, Rows(4, 3), eps=EPS)[1], out, p, q


def add_norm_plain(vectors, x, out, p, q):
    x = x + row(vectors["gate"], vectors, 5) * out
    return x, modulated(x, vectors, 1, 0), p, q


def add_norm_fused(vectors, x, out, p, q):
    gate, param, time = (vectors[name] for name in ("gate", "param", "time"))
    return *fused_norm.add_norm(x, out, (gate, 5), param, time, Rows(1, 0), eps=EPS), p, q


def add_affine_plain(vectors, x, out, p, q):
    x = x + row(vectors["param"], vectors, 2) * out
    return x, affine(x, vectors), p, q


def add_affine_fused(vectors, x, out, p, q):
    param, time, norm = vectors["param"], vectors["time"], (vectors["scale"], vectors["bias"])
    return *fused_norm.add_norm(x, out, (param, 2), norm, time, None, eps=EPS), p, q


def layer_plain(vectors, x, out, p, q):
    """All three of a layer, with barriers where the products are. XLA chooses where it adds."""
    x = x + row(vectors["gate"], vectors, 5) * out
    y, p = jax.lax.optimization_barrier((modulated(x, vectors, 1, 0), p))
    x = x + row(vectors["param"], vectors, 2) * p
    x, z = jax.lax.optimization_barrier((x, affine(x, vectors)))
    return x, modulated(x, vectors, 4, 3), y, z


def layer_fused(vectors, x, out, p, q):
    x, y, p, q = add_norm_fused(vectors, x, out, p, q)
    x, y, p = jax.lax.optimization_barrier((x, y, p))
    x, z, _, _ = jax.lax.optimization_barrier(add_affine_fused(vectors, x, p, y, q))
    return x, norm_fused(vectors, x, p, y, z)[0], y, z


def rotate_plain(vectors, qkv, keys, values, slots):
    qk, v = qkv[0].reshape(B, F, S, 2, E), qkv[1]
    inverse = jnp.unstack(inverse_rms(qk, EPS), axis=-2)
    q, k = jnp.unstack(qk, axis=-2)
    rotated = []
    for x, scale, factor in zip(
        (q, k), vectors["scales"], jax.lax.optimization_barrier(inverse), strict=True
    ):
        x = (x.astype(jnp.float32) * factor).astype(x.dtype) * scale
        rotated.append(rope.rotate(x.reshape(B, F, S, N, D), vectors["table"]))
    start = (0, 0, slots[0] * S, 0, 0)
    keys = jax.lax.dynamic_update_slice(keys, rotated[1].reshape(B, 1, F * S, N, D), start)
    return rotated[0], keys, jax.lax.dynamic_update_slice(values, v.reshape(B, 1, F * S, N, D), start)


def rotate_fused(vectors, qkv, keys, values, slots):
    qk, v = qkv[0].reshape(B, F, S, 2, N, D), qkv[1].reshape(B, F, S, N, D)
    return fused_rotation.rotate_into_cache(
        qk, v, vectors["scales"], vectors["table"], keys, values, slots, eps=EPS
    )[:3]


# name: the two, and the activations that are read and written by the kernels
NORMS = {
    "norm": (norm_plain, norm_fused, 2),
    "add and norm": (add_norm_plain, add_norm_fused, 4),
    "add and affine norm": (add_affine_plain, add_affine_fused, 4),
    "three of a layer": (layer_plain, layer_fused, 10),
}


def norm_program(step, calls, vectors, buffers):
    """`calls` steps, each on the next of the buffers."""
    buffers = list(buffers)
    for i in range(calls):
        here, after = i % BUFFERS, (i + 1) % BUFFERS
        results = step(vectors, *buffers[here])
        # What comes next waits: neighbours are not to be computed together.
        buffers[here], buffers[after] = jax.lax.optimization_barrier((results, buffers[after]))
    return buffers


def rotate_program(step, calls, vectors, products, keys, values, slots):
    products, queries = list(products), []
    for i in range(calls):
        after = (i + 1) % len(products)
        results = step(vectors, products[i % len(products)], keys, values, (slots + 3 * i) % 21)
        (q, keys, values), products[after] = jax.lax.optimization_barrier((results, products[after]))
        queries.append(q)
    return queries, keys, values


def shapes():
    bf16, f32 = jnp.bfloat16, jnp.float32
    x = jax.ShapeDtypeStruct((B, F, S, E), bf16)
    vectors = {
        name: jax.ShapeDtypeStruct(shape, bf16)
        for name, shape in {
            "gate": (6, E), "param": (6, E), "time": (B, F, 6, E), "scale": (E,), "bias": (E,)
        }.items()
    }  # fmt: skip
    norms = (vectors, [(x,) * 4] * BUFFERS)
    cache = jax.ShapeDtypeStruct((B, 1, ROOM, N, D), bf16)
    turning = {"scales": [vectors["scale"]] * 2, "table": jax.ShapeDtypeStruct((2, F, S, D // 2), f32)}
    products = tuple(jax.ShapeDtypeStruct((B, F, S, width), bf16) for width in (2 * E, E))
    return norms, (turning, [products] * 4, cache, cache, jax.ShapeDtypeStruct((F,), jnp.int32))


def draw(tree):
    """Normal numbers, a tenth of the size where they are not activations, and slots 0, 1, 2; each leaf its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def one(key, x):
        if x.dtype == jnp.int32:
            return jnp.arange(F, dtype=jnp.int32)
        return (jax.random.normal(key, x.shape) * (1 if x.size > 10**6 else 0.1)).astype(x.dtype)

    return structure.unflatten(
        jax.jit(lambda keys: [one(k, x) for k, x in zip(keys, leaves, strict=True)])(keys)
    )


def compiled(program, step, calls, arguments, donated):
    options = compiled_for.compiler_options()
    run = jax.jit(functools.partial(program, step, calls), donate_argnums=donated)
    return run.lower(*arguments).compile(options)


def seconds(run, arguments, donated):
    """The median of a few runs, each on copies of what it consumes."""
    times = []
    for _ in range(REPEATS + 1):
        fresh = [jax.tree.map(jnp.copy, x) if i in donated else x for i, x in enumerate(arguments)]
        jax.block_until_ready(fresh)
        start = time.perf_counter()
        jax.block_until_ready(run(*fresh))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def errors(step, plain, arguments):
    """Of each result, relative in the Euclidean norm and largest of all, against the plain form in fp32."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    found = []
    for a, b in zip(jax.jit(step)(*arguments), jax.jit(plain)(*exact), strict=True):
        difference = np.asarray(a, np.float32) - np.asarray(b)
        found.append(f"{np.linalg.norm(difference) / np.linalg.norm(b):.1e} ({np.abs(difference).max():.1e})")
    return ", ".join(found)


def trial(name, program, step, plain, bytes_moved, arguments, donated, check):
    """One line; `check` are the arguments of a single step."""
    try:
        took = [
            seconds(compiled(program, step, calls, arguments, donated), arguments, donated)
            for calls in (FEW, MANY)
        ]
        call = (took[1] - took[0]) / (MANY - FEW)
        rate = f"{1e6 * call:6.1f} us  {bytes_moved / 1e6:6.1f} MB  {bytes_moved / call / 1e12:5.2f} TB/s"
        print(f"{name:30} {rate}  errors {errors(step, plain, check)}", flush=True)
    except Exception:
        print(f"{name:30} FAILED\n{traceback.format_exc(limit=-4)}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--described", action="store_true")
    args = parser.parse_args()
    norms, rotation = shapes()
    jobs = [
        (f"{name}, {how}", norm_program, step, pair[0], count * ACTIVATION, (1,))
        for name, pair in ((name, pair) for name, pair in NORMS.items())
        for count in [pair[2]]
        for how, step in zip(("XLA", "fused"), pair, strict=False)
    ]
    jobs += [
        (f"rotate into cache, {how}", rotate_program, step, rotate_plain, 6 * ACTIVATION, (2, 3))
        for how, step in (("XLA", rotate_plain), ("fused", rotate_fused))
    ]
    if args.described:
        where = jax.sharding.SingleDeviceSharding(compiled_for.described_cards(1)[0])
        place = functools.partial(
            jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        )
        for name, program, step, _, _, donated in jobs:
            arguments = place(norms if program is norm_program else rotation)
            run = jax.jit(functools.partial(program, step, FEW), donate_argnums=donated)
            start = time.perf_counter()
            text = compiled_for.compiled_text(run.lower(*arguments))
            program = compiled_for.Program(text)
            kinds = [kernel.name for kernel in compiled_for.kernels(program)]
            print(f"{name:30} {time.perf_counter() - start:5.1f} s  {len(kinds)} kernels: {kinds[:4]} ..")
        return
    start = time.perf_counter()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
    vectors, buffers = draw(norms)
    for job in jobs[:-2]:
        trial(*job[:5], (vectors, buffers), job[5], (vectors, *buffers[0]))
    del buffers
    turning, products, *rest = draw(rotation)
    for job in jobs[-2:]:
        trial(*job[:5], (turning, products, *rest), job[5], (turning, products[0], *rest))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
