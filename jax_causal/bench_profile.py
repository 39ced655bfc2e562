"""Where a device spends the time of a run: the profiler's kernels, added up by what they compute, and how much of the
communication they hide.

Kernels are told apart by their names, which libraries choose; one that nothing matches counts as elementwise, which is
what XLA's own fusions are (norms, activations, rotations, modulation, sums).
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.profiler import ProfileData

# The first that matches counts: cuDNN's attention kernels have "fprop" in their names, its convolutions "gemm". The
# kernel that writes to the caches of other devices is a collective, whatever else it computes, and so are a copy to one
# and the kernel that takes what has come to its place.
COMPONENTS = {
    "attention": r"attention|sdpa|fmha",
    "convolutions": r"fprop|conv(?!ert)|winograd",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|dot|ynn|matmul|splitk",
    "collectives": r"nccl|all-|all_|collective|reduce-scatter|permute|multigpubarrier|memcpyp2p|into_caches|write_val",
    "copies": r"memcpy|memset|^copy|transpose_copy",
    "elementwise": "",
}
CONTAINERS = re.compile(r"^(while|call|conditional)[.\d]*$")

Kernel = tuple[str, float, float]  # name, start and duration in seconds


def breakdown(run: Callable[[], object]) -> tuple[dict[str, float], dict[str, float]]:
    """Profiles one call of `run`, which must end with nothing left to do on the device.

    Returns:
      Seconds of the first device by component, "gaps" being what lies between its first and last kernel and belongs to
      none; and seconds by kernel name. Kernels that overlap (copies beside computation) count each in full. Both empty
      where the profiler shows no kernels.
    """
    planes = _profile(run)
    gpus = gpu_kernels(planes)
    return add_up(gpus[0] if gpus else _cpu_operations(planes))


def communication(run: Callable[[], object]) -> list[tuple[float, float]]:
    """`exposed` of every GPU of this process, from a profile of one call of `run`, which must end with nothing left to
    do on them. Empty where the profiler shows no GPU."""
    return [exposed(kernels) for kernels in gpu_kernels(_profile(run))]


def add_up(kernels: Sequence[Kernel]) -> tuple[dict[str, float], dict[str, float]]:
    """`breakdown` of these kernels."""
    if not kernels:
        return {}, {}
    parts, names = dict.fromkeys(COMPONENTS, 0.0), Counter()
    for name, _, duration in kernels:
        parts[component(name)] += duration
        names[name] += duration
    whole = max(start + duration for _, start, duration in kernels) - min(start for _, start, _ in kernels)
    return parts | {"gaps": max(whole - busy(kernels), 0.0)}, dict(names.most_common())


def exposed(kernels: Sequence[Kernel]) -> tuple[float, float]:
    """Seconds in which a collective runs, and those of them in which nothing computes beside it.

    `kernels` are one device's, of all its streams. A collective runs while it waits for other devices, too. Copies do
    not count as computing.
    """
    collectives = [kernel for kernel in kernels if component(kernel[0]) == "collectives"]
    computing = [kernel for kernel in kernels if component(kernel[0]) not in ("collectives", "copies")]
    # What collectives add to the time in which something computes.
    return busy(collectives), max(busy([*collectives, *computing]) - busy(computing), 0.0)


def busy(kernels: Sequence[Kernel]) -> float:
    """Seconds in which at least one of the kernels runs."""
    total, until = 0.0, -math.inf
    for _, start, duration in sorted(kernels, key=lambda kernel: kernel[1]):
        end = start + duration
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def component(name: str) -> str:
    """Which of `COMPONENTS` a kernel belongs to."""
    return next(part for part, pattern in COMPONENTS.items() if re.search(pattern, name, re.IGNORECASE))


def _profile(run: Callable[[], object]) -> dict:
    """The profiler's planes by name, of one call of `run`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        return {plane.name: plane for plane in ProfileData.from_file(str(files[0])).planes} if files else {}


def gpu_kernels(planes: dict) -> list[list[Kernel]]:
    """Kernels of every GPU that ran any, all streams together; `planes` are those of a `ProfileData` by name."""
    gpus = [planes[name] for name in sorted(planes) if name.startswith("/device:GPU")]
    found = [
        [_kernel(event) for line in gpu.lines if line.name.startswith("Stream") for event in line.events]
        for gpu in gpus
    ]
    return [kernels for kernels in found if kernels]


def _cpu_operations(planes: dict) -> list[Kernel]:
    """Operations of the first CPU device."""
    host = planes.get("/host:CPU")
    events = [event for line in host.lines for event in line.events] if host else []
    with warnings.catch_warnings():
        # Newer versions of jaxlib make the type of the statistics in a way that Python deprecates; where warnings are
        # errors, that ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        return [_kernel(event) for event in events if _is_operation(event)]


def _kernel(event) -> Kernel:
    return event.name, event.start_ns / 1e9, event.duration_ns / 1e9


def _is_operation(event) -> bool:
    """Whether an event of a CPU is an operation of a program, and not a loop that holds others."""
    if event.name.startswith(("end: ", "$")) or CONTAINERS.match(event.name):
        return False
    stats = dict(event.stats)
    return "hlo_op" in stats and stats.get("device_ordinal", 0) == 0
