"""Times attention over a text and over the past by the Hopper kernel, in variants, and by cuDNN, on an H100 or H200:

    PYTHONPATH=. python tests/gpu/attention_trials.py                # all variants, less than 150 s
    PYTHONPATH=. python tests/gpu/attention_trials.py present cuDNN  # these, one after another
    PYTHONPATH=. python tests/gpu/attention_trials.py --compile      # only compiles, for the description of an H200

Every variant runs in a process of its own, which is ended after 40 s, and none is begun after 110 s. A line for each
case: microseconds of a call, in a row of dependent calls after a quarter of a second of such load; its speed; the
relative Euclidean error against float32, of every ninth query, of all and of the worst of a head. "present" is the
kernel as it is, "stages3" copies keys and values three steps ahead. "no-copy" is wrong: it shows what the kernel would
take if keys and values were not copied after the first steps.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import attention, attention_hopper, environment
from tests.gpu import compiled_for

PROCESSORS, ROWS, HEADS, HEAD_DIM = 132, 4680, 12, 128
HALF = 2376  # rows of the first of two devices
DTYPE = jnp.bfloat16
SETS = 4  # of keys, which take turns, so that they come from memory as in a model
TOTAL_S, CHILD_S, REFERENCE_S = 150, 40, 40
CHECKED = slice(None, None, 9)  # queries: some of every tile, in every row of one
WARM_S, REPEATS, REPEAT_S = 0.25, 5, 0.02
TEXT = 512  # keys of a text, of which those behind a prompt are equal
# name: queries, keys, how many of these are valid, or distinct in a text; calls in a row
CASES = {
    "text": (ROWS, TEXT, TEXT, 30),
    "text of 200": (ROWS, TEXT, 200, 30),
    "text of 60": (ROWS, TEXT, 60, 30),
    "half, text": (HALF, TEXT, TEXT, 30),
    "half, text 60": (HALF, TEXT, 60, 30),
    "self, block 1": (ROWS, 7 * ROWS, ROWS, 12),
    "self, block 4": (ROWS, 7 * ROWS, 4 * ROWS, 6),
    "self, block 7": (ROWS, 7 * ROWS, 7 * ROWS, 6),
    "half, block 1": (HALF, 7 * ROWS, ROWS, 12),
    "half, block 4": (HALF, 7 * ROWS, 4 * ROWS, 6),
    "half, block 7": (HALF, 7 * ROWS, 7 * ROWS, 6),
}


def hopper(q, k, v, length):
    how = {"no_keys": attention.NO_KEYS, "merge": attention.merge, "processors": PROCESSORS}
    limit = {"distinct": length} if k.shape[1] == TEXT else {}
    return attention_hopper.attend(q, k, v, None if limit else length, **limit, **how)[0]


def cudnn(q, k, v, length):
    return attention._cudnn_plain(q, k, v, None if k.shape[1] == TEXT else length)


def as_it_is():
    pass


def three_stages():
    attention_hopper.STAGES = 3


def without_copies():
    copy = attention_hopper.load

    def load(source, smem, ready, free, step, together):
        pl.when(step < attention_hopper.STAGES)(lambda: copy(source, smem, ready, free, step, together))

        @pl.when(step >= attention_hopper.STAGES)
        def _skip():
            slot = lax.rem(step, attention_hopper.STAGES)
            plgpu.barrier_wait(free.at[slot])
            plgpu.barrier_arrive(ready.at[slot])

    attention_hopper.load = load


# name: what is called, and what is changed in its process before
VARIANTS = {
    "present": (hopper, as_it_is),
    "stages3": (hopper, three_stages),
    "no-copy": (hopper, without_copies),
    "cuDNN": (cudnn, as_it_is),
}


def shapes(case):
    q, k = ((1, rows, HEADS, HEAD_DIM) for rows in CASES[case][:2])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, DTYPE), (q, ((k, k),) * SETS), is_leaf=_is_shape)


def _is_shape(x):
    return isinstance(x, tuple) and isinstance(x[0], int)


def random(case):
    leaves, tree = jax.tree.flatten(shapes(case))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    q, *kv = [jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)]
    if CASES[case][1] == TEXT:
        kv = [x[:, np.minimum(np.arange(TEXT), CASES[case][2])] for x in kv]
    return tree.unflatten([q, *kv])


def chain(call, calls):
    """A row of calls, each of which waits for the one before. All results are kept: XLA would see through the barriers
    of what nobody uses."""

    def run(q, sets, length):
        outs = []
        for i in range(calls):
            if outs:
                q, outs[-1] = lax.optimization_barrier((q, outs[-1]))
            outs.append(call(q, *sets[i % SETS], length))
        return outs

    return jax.jit(run)


@jax.jit
def errors(actual, expected):
    off = jnp.square(actual.astype(jnp.float32) - expected).sum(-1)
    size = jnp.square(expected).sum(-1)
    return jnp.sqrt(off.sum() / size.sum()), jnp.sqrt((off / size).max())


def write_references(folder):
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda q, k, v, n: attention.attention(q, k, v, length=n, backend="xla"))
        for case, (_, keys, valid, _) in CASES.items():
            q, sets = random(case)
            q, k, v = (x.astype(jnp.float32) for x in (q[:, CHECKED], *sets[0]))
            np.save(folder / f"{case}.npy", exact(q, k, v, jnp.int32(TEXT if keys == TEXT else valid)))


def measure(name, case, folder):
    queries, _, valid, calls = CASES[case]
    (q, sets), length = random(case), jnp.int32(valid)
    run = chain(VARIANTS[name][0], calls).lower(q, sets, length).compile()
    outs = run(q, sets, length)
    error, worst = map(float, errors(outs[0][:, CHECKED], np.load(folder / f"{case}.npy")))
    same = all(bool((out == outs[i % SETS]).all()) for i, out in enumerate(outs))
    del outs
    begin, rounds = time.perf_counter(), 0
    while time.perf_counter() - begin < WARM_S:
        jax.block_until_ready([run(q, sets, length) for _ in range(4)])
        rounds += 4
    rounds, times = max(1, round(REPEAT_S * rounds / WARM_S)), []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready([run(q, sets, length) for _ in range(rounds)])
        times.append((time.perf_counter() - begin) / rounds / calls)
    seconds = statistics.median(times)
    print(
        f"{case:14} {name:14} {seconds * 1e6:8.1f} us "
        f"{4e-12 * queries * valid * HEADS * HEAD_DIM / seconds:6.0f} TFLOP/s   "
        f"error {error:.2e} (worst row {worst:.2e})" + ("" if same else "   CALLS DIFFER"),
        flush=True,
    )


def compile_for_card(name, case):
    on_card = jax.sharding.SingleDeviceSharding(compiled_for.described_cards(1)[0])
    arguments = *shapes(case), jax.ShapeDtypeStruct((), jnp.int32)
    arguments = jax.tree.map(lambda x: x.update(sharding=on_card), arguments)
    begin = time.perf_counter()
    text = compiled_for.compiled_text(chain(VARIANTS[name][0], 1).lower(*arguments))
    kernels = list(compiled_for.kernels(compiled_for.Program(text)))
    print(
        f"{case:14} {name:14} {len(kernels)} kernels a call, {time.perf_counter() - begin:.0f} s", flush=True
    )


def child(name, folder, compiles):
    VARIANTS[name][1]()
    for case in CASES:
        try:
            if compiles:
                compile_for_card(name, case)
            else:
                measure(name, case, folder)
        except Exception:
            print(f"{case} {name:14} FAILED\n{traceback.format_exc(limit=-3)}", flush=True)


def registers(dump):
    """Registers and spills as the assembler reports them, each once."""
    return sorted(set(re.findall(r"Used \d+ registers|\d+ bytes spill \w+", dump)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("variants", nargs="*", help=", ".join(VARIANTS), metavar="variant")
    parser.add_argument("--compile", action="store_true", help="for the description of an H200, without one")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, folder = args.child
        if name == "reference":
            return write_references(Path(folder))
        return child(name, Path(folder), args.compile)
    for name in args.variants:
        if name not in VARIANTS:
            parser.error(f"{name} is none of {', '.join(VARIANTS)}")
    chosen = args.variants or list(VARIANTS)
    if args.compile:
        for name in chosen:
            if VARIANTS[name][0] is not cudnn:  # which needs a card
                compile_apart(name)
    else:
        measure_apart(chosen)


COMMAND = sys.executable, __file__


def compile_apart(name):
    ran = subprocess.run(
        [*COMMAND, "--compile", "--child", name, "."],
        env={**os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for line in ran.stdout.splitlines() if name in line or "Error" in line]
    print("\n".join(lines), registers(ran.stdout), flush=True)


def measure_apart(names):
    begin, environ = time.perf_counter(), dict(os.environ)
    environment.apply(environ)
    with tempfile.TemporaryDirectory() as folder:
        for name in ["reference", *names]:
            left = TOTAL_S - (time.perf_counter() - begin)
            limit = min(left, REFERENCE_S if name == "reference" else CHILD_S)
            if limit < CHILD_S:
                print(f"{name}: no time left", flush=True)
                continue
            try:
                ran = subprocess.run([*COMMAND, "--child", name, folder], timeout=limit, env=environ)
                outcome = f"ended with status {ran.returncode}" if ran.returncode else "done"
            except subprocess.TimeoutExpired:
                outcome = f"ENDED after {limit:.0f} s"
            print(f"{name}: {outcome} at {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
