"""The 1.3B preset with random weights on one GPU: finite frames, and every attention back end against the plain one.

    PYTHONPATH=. python tests/gpu/model_smoke.py            # a GPU with 40 GB or more
    PYTHONPATH=. python tests/gpu/model_smoke.py --preset tiny   # anywhere, to try the script
    PYTHONPATH=. python tests/gpu/model_smoke.py backends        # one check of: video, backends, scanned

Prints one line per check and exits with 1 if any fails. Run by hand; pytest does not collect it.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import Pipeline, environment, rollout, transformer
from jax_causal.attention import choose_backend
from jax_causal.parallel import SingleDevice
from jax_causal.rollout import RolloutSpec

BLOCKS = 3


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="wan-1.3b")
    checks = {"video": _video, "backends": _backends, "scanned": _scanned}
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(checks)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.checks) - set(checks):
        parser.error(f"no check {min(unknown)}: they are {', '.join(checks)}")
    environment.apply()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}, preset {args.preset}, random weights")
    # Layers are unrolled on GPUs: here they are wherever this runs.
    pipe = Pipeline.random(args.preset, parallel=SingleDevice(unroll=True))
    passed = [ok for name in args.checks or checks for ok in checks[name](pipe)]
    return int(not all(passed))


def _embeds(config):
    rng = np.random.default_rng(0)
    return rng.normal(size=(1, config.text_length, config.text_dim)).astype(np.float32)


def _video(pipe):
    """A whole clip, twice: finite (uint8 hides NaN, so the latents are looked at below), the same, and how fast."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        video = pipe(prompt_embeds=_embeds(pipe.config.transformer), num_frames=81)
        seconds.append(time.perf_counter() - began)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    ok = video.frames.shape[0] == 81 and video.frames.std() > 1
    print(f"{_mark(ok)} 81 frames {video.frames.shape[1:3]}: {seconds[0]:.1f} s cold, {seconds[1]:.2f} s warm, "
          f"peak {peak / 2**30:.1f} GiB")  # fmt: skip
    yield ok


def _latents(pipe, parallel, stacked=False):
    """Three blocks under one way of running, as float32."""
    config = pipe.config
    step = config.vae.spatial_factor * config.transformer.patch_size
    grid = (config.height // step, config.width // step)
    spec = RolloutSpec.create(
        config.transformer, config.sampler, grid, 3 * BLOCKS, parallel=parallel.for_model(config)
    )
    params = pipe.params["transformer"]
    if stacked:
        params = _stacked(params)
    cache = rollout.init_cache(spec, 1, jnp.bfloat16, stacked=not transformer.is_unrolled(params))
    text = rollout.embed_text(spec, params, _embeds(config.transformer))
    keys = jax.random.split(jax.random.key(0), 1)
    out = []
    for start, size in rollout.block_sizes(3 * BLOCKS, config.sampler):
        noise, renoise = rollout.draw_noise(spec, keys, np.int32(start), size, jnp.bfloat16)
        place = spec.place(start, size)
        x0, cache = rollout.denoise_block(spec, params, cache, text, noise, renoise, place)
        cache = rollout.write_context(spec, params, cache, text, x0, place, np.float32(0))
        out.append(np.asarray(rollout.from_tokens(spec, x0), np.float32))
    return np.concatenate(out, axis=1)


def _stacked(params):
    """The inverse of `transformer.unroll`."""
    layers = []
    for i in range(len(params["blocks"])):
        own = dict(params["blocks"][i]["self_attn"])
        (names,) = {"qk", "qkv"} & own.keys()
        joined = jax.tree.map(
            lambda x, names=names: dict(zip(names, jnp.split(x, len(names), axis=-1), strict=True)),
            own.pop(names),
        )
        own |= {name: {kind: parts[name] for kind, parts in joined.items()} for name in names}
        layers.append(params["blocks"][i] | {"self_attn": own})
    return params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def _backends(pipe):
    # Layers are scanned here, which compiles several times as fast; `_scanned` holds that against layers in a row.
    plain = _latents(pipe, SingleDevice(backend="xla"), stacked=True)
    yield _report("xla finite", np.isfinite(plain).all(), "")
    probe = jax.ShapeDtypeStruct((1, 8, 1, pipe.config.transformer.head_dim), jnp.bfloat16)
    for backend in ("hopper", "cudnn", "pallas"):
        for parts in (1, 2):
            try:
                choose_backend(backend, probe, lse=parts > 1)
            except ValueError as error:
                print(f"-    {backend}: {error}")
                break
            yield _compare(
                f"{backend}, keys in {parts}",
                _latents(pipe, SingleDevice(backend, parts), stacked=True),
                plain,
            )


def _scanned(pipe):
    yield _compare(
        "layers scanned", _latents(pipe, SingleDevice(), stacked=True), _latents(pipe, SingleDevice())
    )


def _compare(name, ours, plain) -> bool:
    error = np.linalg.norm(ours - plain) / np.linalg.norm(plain)
    # Two bf16 rollouts that round differently: 30 layers, 15 passes, each fed the one before.
    return _report(name, np.isfinite(ours).all() and error < 0.05, f"relative difference {error:.4f}")


def _report(name, ok, text) -> bool:
    print(f"{_mark(ok)} {name}: {text or ok}")
    return ok


def _mark(ok) -> str:
    return "ok  " if ok else "FAIL"


if __name__ == "__main__":
    sys.exit(main())
