"""Every attention back end on a real GPU: error against float64, time, gradients, shard_map. Run by hand:

    PYTHONPATH=. python tests/gpu/attention_smoke.py
    PYTHONPATH=. python tests/gpu/attention_smoke.py small grad  # cases with one of these words, which a CPU can do too

A back end that does not take a case says why. Exits with status 1 if one fails or errs more than its dtype explains.
"""

import functools
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal.attention import NO_KEYS, attention, attention_with_lse, choose_backend

BACKENDS = ("hopper", "cudnn", "pallas", "xla")
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}  # of the output, in relative Euclidean norm
LSE_TOLERANCE = 1e-4  # absolute; a statistic rounded to bfloat16 would be off by 3e-2

# name, queries, parts, keys of a part, valid keys of a part, heads, head dim, dtype
CASES = [
    ("first block", 4680, 1, 32760, 4680, 12, 128, "bfloat16"),
    ("middle block", 4680, 1, 32760, 18720, 12, 128, "bfloat16"),
    ("middle block", 4680, 2, 16380, 9360, 12, 128, "bfloat16"),
    ("last block", 4680, 1, 32760, 32760, 12, 128, "bfloat16"),
    ("last block", 4680, 2, 16380, 16380, 12, 128, "bfloat16"),
    ("last block", 4680, 4, 8190, 8190, 12, 128, "bfloat16"),
    ("1 of 2 devices", 2352, 1, 32760, 18720, 12, 128, "bfloat16"),
    ("1 of 8 devices", 585, 1, 32760, 32760, 12, 128, "bfloat16"),
    ("1 of 8 devices", 585, 2, 16380, 16380, 12, 128, "bfloat16"),
    ("1 of 8 devices", 585, 4, 8190, 8190, 12, 128, "bfloat16"),
    ("1 of 8 devices", 585, 8, 4095, 4095, 12, 128, "bfloat16"),
    ("text", 4680, 1, 512, None, 12, 128, "bfloat16"),
    ("small model", 108, 2, 378, 300, 8, 24, "bfloat16"),
    ("odd sizes", 777, 1, 1001, 601, 3, 64, "float16"),
    ("odd sizes", 777, 2, 1001, 601, 3, 64, "float32"),
    ("middle block", 4680, 1, 32760, 18720, 12, 128, "float32"),
]
SMALL = (500, 704, 4, 64)  # queries, keys, heads and head dim of what is not timed: every back end takes them
LENGTH = 600  # valid ones of these keys


def shapes(queries, parts, keys, heads, head_dim, dtype):
    """Queries, and keys (or values), which have no axis of parts with 0 of them."""
    split = (parts,) if parts else ()
    q, k = (1, queries, heads, head_dim), (1, *split, keys, heads, head_dim)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k)]


def random(*likes):
    keys = jax.random.split(jax.random.key(0), len(likes))
    return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, likes, strict=True)]


def reference(q, k, v, length):
    """(out, lse) in float64 on the host, for a batch of one; q [1, T, N, D], k and v [1, P, K, N, D]."""
    outs, lses = [], []
    for n in range(q.shape[2]):
        q_n = np.asarray(q[0, :, n], np.float64)
        k_n, v_n = (np.asarray(x[0, :, :length, n], np.float64).reshape(-1, x.shape[-1]) for x in (k, v))
        scores = q_n @ k_n.T / np.sqrt(q.shape[-1])
        lse = np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1)) + scores.max(1)
        outs.append(np.exp(scores - lse[:, None]) @ v_n)
        lses.append(lse)
    return np.stack(outs, axis=1)[None], np.stack(lses)[None]


def relative_norm(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def median_ms(run, *args, calls=10, repeats=5):
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run(*args) for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * float(np.median(times))


def forward(backend, q, k, length):
    """Output and statistic against float64 on some rows, and the time."""
    q, k, v = random(q, k, k)
    rows = np.linspace(0, q.shape[1] - 1, 24).astype(int)
    expected_out, expected_lse = reference(q[:, rows], k, v, length)
    length = None if length is None else jnp.int32(length)
    plain = jax.jit(lambda q, k, v, length: attention(q, k, v, length=length, backend=backend))
    with_lse = jax.jit(lambda q, k, v, length: attention_with_lse(q, k, v, length=length, backend=backend))
    out, lse = with_lse(q, k, v, length)
    error = max(relative_norm(x[:, rows], expected_out) for x in (out, plain(q, k, v, length)))
    lse_error = np.abs(np.asarray(lse)[:, :, rows] - expected_lse).max()
    ms = median_ms(plain, q, k, v, length)
    tflop = 4e-12 * q.size * k.shape[1] * (k.shape[2] if length is None else int(length))
    text = f"error {error:.1e}   lse {lse_error:.1e}   {ms:8.3f} ms   {tflop / ms * 1e3:5.0f} TFLOP/s"
    return text, error < TOLERANCE[q.dtype.name] and lse_error < LSE_TOLERANCE


def gradients(backend, q, k):
    """Of output and statistic, through the merge, against the plain form in float32."""
    q, k, v, d_out = random(q, k, k, q)

    def loss(q, k, v, d_out, backend):
        out = attention(q, k, v, length=jnp.int32(LENGTH), backend=backend)
        _, lse = attention_with_lse(q, k, v, length=jnp.int32(LENGTH), backend=backend)
        return (out * d_out).astype(jnp.float32).sum() + lse.sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=4)
    expected = gradient(*(x.astype(jnp.float32) for x in (q, k, v, d_out)), "xla")
    error = max(map(relative_norm, gradient(q, k, v, d_out, backend), expected))
    return f"error {error:.1e}", error < 4 * TOLERANCE[q.dtype.name]


def equal_keys(backend, q, k):
    """All but the first keys are equal, and said to be: every count of them, at the borders of steps too."""
    q, *kv = random(q, k, k)
    run = jax.jit(lambda q, k, v, distinct: attention(q, k, v, distinct=distinct, backend=backend))
    error = 0
    for distinct in (0, 1, 60, 127, 128, 129, k.shape[1] - 1, k.shape[1]):
        k, v = (x[:, np.minimum(np.arange(x.shape[1]), distinct)] for x in kv)
        rows = np.linspace(0, q.shape[1] - 1, 24).astype(int)
        expected, _ = reference(q[:, rows], *(x[:, None] for x in (k, v)), None)
        error = max(error, relative_norm(run(q, k, v, jnp.int32(distinct))[:, rows], expected))
    return f"error {error:.1e}", error < TOLERANCE[q.dtype.name]


def no_keys(backend, q, k):
    """A part without keys must come back finite, with the statistic that gives it no weight."""
    q, k, v = random(q, k, k)
    run = jax.jit(lambda length: attention_with_lse(q, k, v, length=length, backend=backend))
    out, lse = run(jnp.int32(0))
    finite, marked = bool(jnp.isfinite(out).all()), bool((lse == np.float32(NO_KEYS)).all())
    return f"finite: {finite}   marked: {marked}", finite and marked


def inside_shard_map(backend, q, k):
    """Value and gradient with check_vma on, keys sharded and queries not, on a mesh of one device. There jax cannot
    interpret Pallas: on a CPU `pallas` fails."""
    q, k, v = random(q, k, k)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    keys = jax.P(None, None, "x")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), keys, keys, jax.P()), out_specs=jax.P())
    def sharded(q, k, v, length):
        out, lse = attention_with_lse(q, k, v, length=length, backend=backend)
        return jax.lax.psum(out, "x"), jax.lax.psum(lse, "x")

    expected, _ = reference(q, k, v, LENGTH)
    error = relative_norm(jax.jit(sharded)(q, k, v, jnp.int32(LENGTH))[0], expected)
    gradient = jax.jit(jax.grad(lambda *x: sum(y.sum() for y in sharded(*x, jnp.int32(LENGTH))), (0, 1, 2)))
    finite = all(bool(jnp.isfinite(x).all()) for x in gradient(q, k, v))
    return f"error {error:.1e}   gradient finite: {finite}", error < TOLERANCE[q.dtype.name] and finite


def jobs():
    """(label, function, and its arguments after the back end, which begin with queries and keys) of every case."""
    for name, queries, parts, keys, length, heads, head_dim, dtype in CASES:
        label = f"{name}: {heads} x {queries} x {parts} x {length or keys} of {keys}, {head_dim} {dtype}"
        yield label, forward, (*shapes(queries, parts, keys, heads, head_dim, dtype), length)
    queries, *others = SMALL
    for dtype in ("bfloat16", "float32"):
        plain, one, two = (shapes(queries, parts, *others, dtype) for parts in (0, 1, 2))
        yield f"gradients, 1 parts, {dtype}", gradients, one
        yield f"gradients, 2 parts, {dtype}", gradients, two
        yield f"no keys, {dtype}", no_keys, plain
        yield f"equal keys, {dtype}", equal_keys, plain
        yield f"shard_map, {dtype}", inside_shard_map, two


def main():
    words = sys.argv[1:]
    chosen = [job for job in jobs() if not words or any(word in job[0] for word in words)]
    jax.config.update("jax_default_matmul_precision", "float32")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    passed = bool(chosen)
    for label, job, arguments in chosen:
        print(label)
        q, k, *_ = arguments
        auto = choose_backend("auto", q, k, lse=True)
        for backend in BACKENDS:
            try:
                choose_backend(backend, q, k, lse=True)
            except ValueError as error:
                print(f"    {backend:8} --   {error}")
                continue
            try:
                text, good = job(backend, *arguments)
            except Exception:
                text, good = traceback.format_exc(limit=-3), False
            passed &= good
            print(
                f"  {'*' if backend == auto else ' '} {backend:8} {'ok  ' if good else 'FAIL'} {text}",
                flush=True,
            )
    print("all good (* is what auto chooses)" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
