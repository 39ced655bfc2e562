"""What JAX must know before it starts. The command line applies it; the library itself sets nothing.

Everything here is a default: whatever the environment says already, wins.

* Compiled programs are kept in `jax_causal/xla` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`), the
  small ones too, so that the second run of a model starts without compiling. `JAX_COMPILATION_CACHE_DIR` names
  another folder; set but empty, it turns this off.
* `XLA_FLAGS` gains the flags of `GPU_FLAGS` that it does not mention. Other platforms ignore them.
* With several devices asked for, a CPU offers that many virtual ones, and threads enough that their collectives cannot
  wait for each other for ever. Where there are accelerators this changes nothing.
* On a GPU, JAX reserves 90 % of the memory instead of 75 %, or nothing in advance where other processes need room.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

# An unknown flag ends the process: only those that every supported jaxlib accepts.
GPU_FLAGS = {
    "xla_gpu_enable_triton_gemm": "false",  # cuBLAS for every product: 5-10 % of a denoising pass on an H200
    "xla_gpu_enable_latency_hiding_scheduler": "true",  # overlaps collectives with computation
    "xla_gpu_collective_permute_mode": "peer",  # one GPU to one other of its process: by the copy engine
}


def apply(
    environ: MutableMapping[str, str] = os.environ,
    *,
    platform: str | None = None,
    devices: int | None = None,
    reserve: bool = True,
) -> None:
    """Sets the defaults in `environ`; call it before jax is imported. `platform` is where to run unless the user says
    otherwise (None: JAX's own choice), `devices` how many the command asked for, `reserve` whether to take the
    memory of a GPU in advance."""
    if cache := _cache_folder(environ):
        environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environ:  # the old name; JAX refuses both at once
        environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")
    if not reserve:
        environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environ["XLA_FLAGS"] = _with_defaults(environ.get("XLA_FLAGS", ""), GPU_FLAGS)
    if devices and devices > 1:
        environ.setdefault("JAX_NUM_CPU_DEVICES", str(devices))
        environ.setdefault("NPROC", str(2 * devices))
    if platform:
        environ.setdefault("JAX_PLATFORMS", platform)


def _cache_folder(environ) -> Path | None:
    """Where compiled programs are kept, made if need be; None where that is impossible, or decided already."""
    if "JAX_COMPILATION_CACHE_DIR" in environ:
        return None
    try:
        folder = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_causal" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all: JAX would warn about every program
        return None
    return folder if os.access(folder, os.W_OK) else None


def _with_defaults(flags: str, defaults: dict[str, str]) -> str:
    given = {flag.lstrip("-").split("=")[0] for flag in flags.split()}
    added = [f"--{name}={value}" for name, value in defaults.items() if name not in given]
    return " ".join([*flags.split(), *added])
