"""Which processes make up a run, where this one stands among them, and which devices each contributes."""

from __future__ import annotations

import dataclasses
import os
import re

import jax
from jax._src import clusters

OPTIONS = {"coordinator": "--coordinator", "num_processes": "--num-processes", "process_id": "--process-id"}
_NOBODY = "nothing says which processes there are"
# An indexed job of Kubernetes numbers its pods itself.
_INDEX = "JOB_COMPLETION_INDEX"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among its peers.

    Attributes:
      coordinator: HOST:PORT that process 0 listens on.
      num_processes: of the run.
      process_id: 0 to num_processes - 1.
      local_devices: indices of the devices to use, where a launcher says so; None: all that the process sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"the coordinator {self.coordinator!r} must be HOST:PORT, like 10.0.0.1:9876")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process {self.process_id} of {self.num_processes}: number them 0 to {self.num_processes - 1}"
            )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 60,
) -> Place:
    """The place that the arguments give; without any, the one that the environment gives.

    Variables are read in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or, in an indexed
    job of Kubernetes, its JOB_COMPLETION_INDEX); MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK; then whatever JAX
    itself detects (SLURM, Open MPI, TPU pods, ...).

    Raises:
      ValueError: some of them are given and others not, or nothing is found.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        missing = [OPTIONS[name] for name, value in given.items() if value is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} must be given as well: all three, or none to detect them"
            )
        return Place(coordinator, num_processes, process_id)
    for names in (
        ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"),
    ):
        if any(os.environ.get(name) for name in names):
            return _from_variables(names)
    return _from_launcher(timeout)


def _from_variables(names: tuple[str, ...]) -> Place:
    if names[-1] == "JAX_PROCESS_ID" and not os.environ.get("JAX_PROCESS_ID") and os.environ.get(_INDEX):
        names = (*names[:-1], _INDEX)
    if missing := [name for name in names if not os.environ.get(name)]:
        present = [name for name in names if os.environ.get(name)]
        raise ValueError(
            f"the environment has {' and '.join(present)} without {' and '.join(missing)}: set all"
        )
    *address, total, rank = (os.environ[name] for name in names)
    if not (total.isdecimal() and rank.isdecimal()):
        raise ValueError(f"{names[-2]}={total} and {names[-1]}={rank} must be whole numbers")
    return Place(":".join(address), int(total), int(rank))


def _from_launcher(timeout: float) -> Place:
    try:
        address, total, rank, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{_NOBODY} ({error}): give {', '.join(OPTIONS.values())}") from error
    if address is None or total is None or rank is None:
        raise ValueError(
            f"{_NOBODY}: give {', '.join(OPTIONS.values())}, or start it with srun, mpirun or torchrun's variables"
        )
    # JAX takes one device for each process. That is right only where several of them see the same devices.
    if devices is None or _has_own_devices():
        return Place(address, total, rank)
    return Place(address, total, rank, tuple(devices))


def _has_own_devices() -> bool:
    """Whether the launcher started a single process on each host, or showed each process one device only."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # like 1(x2)
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(alone or (shown and "," not in shown))


def share_of(devices: int, num_processes: int) -> int:
    """Devices of each process. Raises ValueError unless all get the same number."""
    if devices % num_processes:
        low = devices // num_processes * num_processes
        near = f"{low} or {low + num_processes}" if low else str(num_processes)
        raise ValueError(
            f"{devices} devices cannot be shared evenly by {num_processes} processes (--devices counts those of all): "
            f"use {near}"
        )
    return devices // num_processes


def pick_devices(devices: int | None) -> list[jax.Device]:
    """`devices` of all processes' devices, as many of each: neighbours in the list share a process where they can.

    Raises ValueError where a process has too few.
    """
    if devices is None:
        return jax.devices()
    share = share_of(devices, jax.process_count())
    by_process = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    for process, held in sorted(by_process.items()):
        if len(held) < share:
            raise ValueError(
                f"process {process} has {len(held)} devices, {devices} in all need {share} of each"
            )
    return [device for _, held in sorted(by_process.items()) for device in held[:share]]
