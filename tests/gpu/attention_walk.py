"""The Hopper kernel in jax's interpreter: tiles, steps, barriers and what is written where, its products replaced.

    PYTHONPATH=. NPROC=32 python tests/gpu/attention_walk.py   # jax 0.11 or newer, on a CPU; 15 seconds

The interpreter, which is no public part of jax, runs all threads of a kernel beside each other (with `NPROC`, or some
find no processor to wait on): threads that wait for each other for ever show. It does not know how accumulators are
rescaled or loaded while a product goes on, so what a warpgroup does with a tile is a plain form here. Prints a line for
each case, and exits with 1 if one is wrong.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import attention, attention_hopper, attention_tile, mosaic
from jax_causal.attention_plan import Plan

# queries, heads, keys, how many of these are valid or distinct and of queries wanted, and the plan
CASES = [
    (320, 3, 640, {"length": 600}, Plan(tiles=3, heads=3, shared=3, clusters=2)),
    (600, 3, 768, {"length": 700}, Plan(tiles=5, heads=3, shared=2, clusters=3)),
    (384, 2, 512, {"length": 300}, Plan(tiles=3, heads=2, shared=0, clusters=2)),
    (384, 2, 512, {"distinct": 100}, Plan(tiles=3, heads=2, shared=0, clusters=2)),
    (320, 3, 640, {"distinct": 300}, Plan(tiles=3, heads=3, shared=3, clusters=2)),
    (320, 3, 640, {"length": 600, "queries": 256}, Plan(3, heads=3, shared=3, clusters=2, may_be_short=True)),
    (320, 3, 640, {"length": 600, "queries": 257}, Plan(3, heads=3, shared=3, clusters=2, may_be_short=True)),
    (600, 3, 768, {"length": 700, "queries": 500}, Plan(5, heads=3, shared=2, clusters=3, may_be_short=True)),
]


def attend_tile(q, keys, values, done, count, valid, repeated, no_keys, ahead, out_acc):
    """`attention_tile.attend`, one product after another."""
    (k_smem, k_ready, k_free), (v_smem, v_ready, v_free) = keys, values

    def step(i, carry):
        out, peak, total = carry
        slot = lax.rem(done + i, attention_hopper.STAGES)
        plgpu.barrier_wait(k_ready.at[slot])
        scores = q[...].astype(jnp.float32) @ k_smem[slot].astype(jnp.float32).T / np.sqrt(q.shape[1])
        plgpu.barrier_arrive(k_free.at[slot])
        column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where((column < valid) | (i > 0), scores, no_keys)
        if repeated is not None:
            key, log_times = repeated
            scores = jnp.where((column == key) & (i == 0), scores + log_times, scores)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights, shrink = jnp.exp(scores - new_peak[:, None]), jnp.exp(peak - new_peak)
        plgpu.barrier_wait(v_ready.at[slot])
        out = out * shrink[:, None] + weights @ v_smem[slot].astype(jnp.float32)
        plgpu.barrier_arrive(v_free.at[slot])
        return out, new_peak, total * shrink + weights.sum(axis=1)

    rows = q.shape[:1]
    start = jnp.zeros(q.shape, jnp.float32), jnp.full(rows, -1e30), jnp.zeros(rows)
    out, peak, total = lax.fori_loop(0, count, step, start)
    ahead()
    total = jnp.maximum(total, 1e-30)
    return out / total[:, None], jnp.where(valid > 0, peak + jnp.log(total), no_keys)


def load(source, smem, ready, free, step, together):
    """`attention_hopper.load`, each block of a cluster for itself: the interpreter has no copies to both."""
    slot = lax.rem(step, attention_hopper.STAGES)
    pl.when(step >= attention_hopper.STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
    plgpu.copy_gmem_to_smem(source, smem.at[slot], ready.at[slot])


def check(queries, heads, keys, limit, plan) -> bool:
    attention_hopper.load, attention_tile.attend = load, attend_tile
    attention_tile.gather_warps = lambda: None  # here a warpgroup is one thread
    plgpu.set_max_registers = lambda *args, **kwargs: None
    mosaic.named = lambda kernel, name: kernel  # a name is for compilers
    Plan.cheapest = lambda *args, may_be_short: plan
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, n, heads, 64), jnp.bfloat16)
        for i, n in enumerate((queries, keys, keys))
    )
    limit = {name: jnp.int32(number) for name, number in limit.items()}
    if "distinct" in limit:
        k, v = (x[:, jnp.minimum(jnp.arange(keys), limit["distinct"])] for x in (k, v))

    def attend(q, k, v, length=None, **more):
        how = {"no_keys": attention.NO_KEYS, "merge": attention.merge, "processors": 132}
        return attention_hopper.attend(q, k, v, length, **more, **how)

    # As one program: what is dispatched beside it can take the last thread that it waits for.
    with interpreter.force_gpu_interpret_mode(interpreter.InterpretGPUParams()):
        out, lse = jax.block_until_ready(jax.jit(attend)(q, k, v, **limit))
    right, right_lse = attention.attention_with_lse(
        *(x.astype(jnp.float32) for x in (q, k, v)), length=limit.get("length"), backend="xla"
    )
    wanted = int(limit.get("queries", queries))
    assert np.isfinite(np.float32(out)).all()
    out, right, lse, right_lse = (
        out[:, :wanted],
        right[:, :wanted],
        lse[:, :, :wanted],
        right_lse[:, :, :wanted],
    )
    error = np.linalg.norm(np.float32(out) - right) / np.linalg.norm(right)
    lse_error = np.abs(lse - right_lse).max()
    ok = error < 4e-3 and lse_error < 1e-4
    print(
        f"{'ok  ' if ok else 'FAIL'} {plan}, {wanted} queries: error {error:.1e}, of the statistic {lse_error:.1e}",
        flush=True,
    )
    return ok


if __name__ == "__main__":
    sys.exit(sum(not check(*case) for case in CASES) > 0)
