"""What only a fresh process can show: how long it takes to its first frame, and the memory of denoising and decoding.

The command line starts itself again (`measure`), once with nothing compiled before and then with everything, and the
process that was started says what it saw (`report`). There is no text encoder in it: prompts come as embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from jax_causal.bench_rows import Row
from jax_causal.generate import Job
from jax_causal.pipeline import Pipeline

ROWS = ("start_cold", "start_warm", "start_loading", "peak_memory")
# Options that a started process is given as this one was.
_SAME = (
    "preset",
    "model",
    "precision",
    "window",
    "sink",
    "devices",
    "strategy",
    "frames",
    "height",
    "width",
    "seed",
)


def measure(args: argparse.Namespace) -> list[Row]:
    """Starts two processes with the options of `args`, one after the other. Returns the rows of `ROWS`.

    The device must have room for them beside this process.

    Raises RuntimeError, with what it said, if one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_start(args, folder) for _ in range(2))
    single = {
        "start_cold": (cold["start"], "s"),
        "start_warm": (warm["start"], "s"),
        "start_loading": (warm["loading"], "s"),
        "peak_memory": (warm["peak"], "GiB"),
    }
    return [Row(name, *[value] * 3, unit) for name, (value, unit) in single.items() if value is not None]


def _start(args, folder) -> dict:
    given = {name: getattr(args, name) for name in _SAME}
    if given["preset"]:
        del given["model"]
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    command = [sys.executable, "-m", "jax_causal", "bench", *options, f"--since={time.time()!r}"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
    environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)  # as it would run by itself
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a process started to be measured failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(job: Job, since: float) -> None:
    """Makes one video as a fresh process that was started at `since` (`time.time`), and prints what it saw as JSON."""
    begin = time.time()
    pipe = job.load(text_encoder=False)
    jax.block_until_ready(pipe.params)
    loading = time.time() - begin
    first = None
    for _ in _stream(pipe, job):
        first = first or time.time()
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    seen = {"start": first - since - loading, "loading": loading, "peak": peak and peak / 2**30}
    print(json.dumps(seen))


def _stream(pipe: Pipeline, job: Job):
    dit = job.config.transformer
    embeds = np.random.default_rng(0).standard_normal((1, dit.text_length, dit.text_dim), np.float32)
    size = {name: job.inputs[name] for name in ("num_frames", "height", "width", "seed")}
    return pipe.stream(prompt_embeds=embeds, **size)
