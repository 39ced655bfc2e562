"""Where a device spends the time of a run: the profiler's kernels, added up by what they compute.

Kernels are told apart by their names, which libraries choose; one that nothing matches counts as elementwise, which is
what XLA's own fusions are (norms, activations, rotations, modulation, sums).
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.profiler import ProfileData

# The first that matches counts: cuDNN's attention kernels have "fprop" in their names, its convolutions "gemm".
COMPONENTS = {
    "attention": r"attention|sdpa|fmha",
    "convolutions": r"fprop|conv(?!ert)|winograd",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|dot|ynn|matmul|splitk",
    "collectives": r"nccl|all-|all_|collective|reduce-scatter|permute",
    "copies": r"memcpy|memset|^copy|transpose_copy",
    "elementwise": "",
}
CONTAINERS = re.compile(r"^(while|call|conditional)[.\d]*$")


def breakdown(run: Callable[[], object]) -> tuple[dict[str, float], dict[str, float]]:
    """Profiles one call of `run`, which must end with nothing left to do on the device.

    Returns:
      Seconds of the first device by component, "gaps" being what lies between its first and last kernel and belongs to
      none; and seconds by kernel name. Kernels that overlap (copies beside computation) count each in full. Both empty
      where the profiler shows no kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        return add_up(_kernels(files[0])) if files else ({}, {})


def add_up(kernels: Iterable[tuple[str, float, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """`breakdown` of kernels given as (name, start, duration) in seconds."""
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    if not kernels:
        return {}, {}
    parts, names = dict.fromkeys([*COMPONENTS, "gaps"], 0.0), Counter()
    busy_until = kernels[0][1]
    for name, start, duration in kernels:
        parts[component(name)] += duration
        names[name] += duration
        parts["gaps"] += max(start - busy_until, 0.0)
        busy_until = max(busy_until, start + duration)
    return parts, dict(names.most_common())


def component(name: str) -> str:
    """Which of `COMPONENTS` a kernel belongs to."""
    return next(part for part, pattern in COMPONENTS.items() if re.search(pattern, name, re.IGNORECASE))


def _kernels(file: Path) -> list[tuple[str, float, float]]:
    """Kernels of the first GPU, or operations of the first CPU device where there is none."""
    planes = {plane.name: plane for plane in ProfileData.from_file(str(file)).planes}
    gpu = next((planes[name] for name in sorted(planes) if name.startswith("/device:GPU")), None)
    if gpu is not None:
        events = [event for line in gpu.lines if line.name.startswith("Stream") for event in line.events]
    else:
        host = planes.get("/host:CPU")
        events = [event for line in host.lines for event in line.events] if host else []
        with warnings.catch_warnings():
            # Newer versions of jaxlib make the type of the statistics in a way that Python deprecates; where warnings
            # are errors, that ends the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            events = [event for event in events if _is_operation(event)]
    return [(event.name, event.start_ns / 1e9, event.duration_ns / 1e9) for event in events]


def _is_operation(event) -> bool:
    """Whether an event of a CPU is an operation of a program, and not a loop that holds others."""
    if event.name.startswith(("end: ", "$")) or CONTAINERS.match(event.name):
        return False
    stats = dict(event.stats)
    return "hlo_op" in stats and stats.get("device_ordinal", 0) == 0
