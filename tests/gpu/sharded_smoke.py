"""Every way to share a model over the GPUs of this host: the same video as one of them makes, in time.

    PYTHONPATH=. python tests/gpu/sharded_smoke.py            # two GPUs or more, one to two minutes a way
    PYTHONPATH=. python tests/gpu/sharded_smoke.py gather ring   # these ways
    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/gpu/sharded_smoke.py --preset tiny gather   # anywhere, to try it

A small part of the 1.3B preset with random weights: two layers, 240 x 448, three blocks, decoder included. Every way
runs in a process of its own that is ended after --limit seconds, because devices that wait for each other for ever are
what this looks for; it then says so with the stacks of all threads. Prints a line for each, with "direct" where a
kernel sends by itself, and exits with 1 if any fails.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

WAYS = {
    "single": None,
    "gather": {},
    "gather-collective": {"direct": False},
    "gather-serial": {"direct": False, "overlap": False},
    "ulysses": {},
    "ring": {},
    "hybrid": {},
}
RUNS = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--preset", default="wan-1.3b")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument(
        "--limit", type=int, default=150, help="seconds for a way; the first compiles for most"
    )
    parser.add_argument("--out", type=Path, help="used by the script itself")
    args = parser.parse_args()
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"there is no way {min(unknown)!r}: the ways are {', '.join(WAYS)}")
    if args.out:
        return run(args.ways[0], args)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        cached = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"}  # the same programs are in several ways
        for way in dict.fromkeys(["single", *(args.ways or WAYS)]):
            command = [sys.executable, __file__, way, "--preset", args.preset, "--devices", str(args.devices)]
            command += ["--limit", str(args.limit), "--out", folder]
            try:
                code = subprocess.run(command, env=cached | os.environ, timeout=args.limit + 5).returncode
            except subprocess.TimeoutExpired:
                code = 1
            if code:
                print(f"FAIL {way}: status {code}", flush=True)
            failed |= code != 0
    return int(failed)


def give_up():
    """Ends the process with the stacks of all threads. Not by `faulthandler`, which crashes where Python runs on."""
    for frame in sys._current_frames().values():
        traceback.print_stack(frame)
    sys.stderr.flush()
    os._exit(1)


def run(way: str, args) -> int:
    timer = threading.Timer(args.limit - 2, give_up)
    timer.daemon = True
    timer.start()
    from jax_causal import environment

    environment.apply(devices=args.devices, reserve=False)
    import jax.numpy as jnp
    import numpy as np

    from jax_causal import Pipeline
    from jax_causal.config import PRESETS
    from jax_causal.parallel import SingleDevice
    from sharding import SequenceParallel
    from sharding.strategies import fitting

    config = dataclasses.replace(PRESETS[args.preset], text_encoder=None, tokenizer=None)
    network = config.transformer
    size = {}
    if args.preset != "tiny":
        network = dataclasses.replace(network, num_layers=2)
        size = {"height": 240, "width": 448}  # 420 tokens: shares of 2 devices suit a kernel that sends
    config = dataclasses.replace(config, transformer=network)
    strategy = way.split("-")[0]
    if way != "single" and strategy not in fitting(args.devices, network.num_heads):
        print(f"-    {way}: not for {network.num_heads} heads on {args.devices} devices")
        return 0
    options = WAYS[way]
    parallel = SingleDevice() if options is None else SequenceParallel(args.devices, strategy, **options)
    began = time.perf_counter()
    pipe = Pipeline.random(config, dtype="bfloat16", parallel=parallel)
    text = np.random.default_rng(0).normal(size=(1, network.text_length, network.text_dim)).astype(np.float32)
    frames = 4 * 3 * config.sampler.frames_per_block - 3
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        video = pipe(prompt_embeds=text, num_frames=frames, seed=0, **size).frames.astype(np.int16)
        seconds.append(time.perf_counter() - start)
    file = args.out / "single.npy"
    if way == "single":
        np.save(file, video)
    difference = np.abs(video - np.load(file))
    tokens = (size.get("height", config.height) // 16) * (size.get("width", config.width) // 16)
    direct = options is not None and pipe.parallel.writes_directly(tokens, network, jnp.bfloat16)
    # Of 255: bfloat16 rounds differently, and passes feed each other.
    ok = video.std() > 1 and difference.mean() < 3
    print(f"{'ok  ' if ok else 'FAIL'} {way}: {difference.mean():.2f} levels apart, at most {difference.max()}; "
          f"{seconds[0]:.1f} s cold, {min(seconds[1:]):.3f} s warm, {time.perf_counter() - began:.0f} s in all"
          f"{', direct' if direct else ''}",
          flush=True)  # fmt: skip
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
