"""Several processes, on one host or several, as one JAX runtime: start, agreement, and the loss of a peer.

with distributed.session(coordinator="10.0.0.1:9876", num_processes=2, process_id=0) as session:
    session.check_agreement({"model": "wan-1.3b", "seed": 0})
    ...  # every process runs the same program over `jax.devices()`, the devices of all

A collective waits for ever for a process that is gone. So every process counts a beat up in the key-value store of
JAX's coordination service and watches everybody else's; one that stands still ends all the others, by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping

import jax
from jax._src import distributed as jax_distributed

from sharding.processes import Place, find_place, share_of

BEAT_S, SILENCE_S = 1.0, 10.0  # between beats; after so long without one a process is lost
_PREFIX = "jax_causal"


def initialize(place: Place, *, timeout: float = 60) -> Session:
    """Joins the processes into one runtime; call it before anything touches a device.

    Args:
      place: of this process.
      timeout: seconds to wait for the others.

    Raises:
      ConnectionError: the coordinator does not answer, or peers do not come, in time.
    """
    # Loopback and Ethernet; accelerators bring their own collectives.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It catches SIGTERM and does nothing with it: launchers and Ctrl-C could not end a run.
    jax.config.update("jax_enable_preemption_service", False)
    began = time.monotonic()
    if place.process_id == 0:
        _check_port(place)
    else:
        # JAX ends the process when its own attempts run out, so whether anybody answers is found out before.
        _wait_for(place, timeout)
    # JAX aborts where peers do not come within its own limit: it gets none, and is left behind at ours.
    options = {"local_device_ids": place.local_devices, "cluster_detection_method": "deactivate"}
    options |= {"initialization_timeout": 24 * 3600, "shutdown_timeout_seconds": 10}
    raised = []

    def join():
        try:
            jax.distributed.initialize(place.coordinator, place.num_processes, place.process_id, **options)
        except Exception as error:  # handed over
            raised.append(error)

    joining = threading.Thread(target=join, name="distributed_join", daemon=True)
    joining.start()
    joining.join(max(1, timeout - (time.monotonic() - began)))
    if joining.is_alive():
        raise ConnectionError(
            f"process {place.process_id} of {place.num_processes}: not all processes came to {place.coordinator} "
            f"within {timeout:g} s: start all {place.num_processes}, each with its own --process-id, or allow more "
            "with --timeout"
        )
    if raised:
        raise raised[0]
    return Session(place, jax_distributed.global_state.client, timeout)


@contextlib.contextmanager
def session(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 60,
    devices: int | None = None,
) -> Iterator[Session]:
    """`find_place` and `initialize`, with the watch kept until the block ends; a clean end waits for all.

    A CPU offers this process's share of `devices` virtual ones, unless the environment says how many.
    """
    place = find_place(coordinator, num_processes, process_id, timeout=timeout)
    if devices is not None:
        _offer_cpus(share_of(devices, place.num_processes))
    joined = initialize(place, timeout=timeout)
    joined.watch()
    try:
        yield joined
    except BaseException as error:
        joined.leave(error)
        raise
    joined.finish()


class Session:
    """A process's view of its peers. Made by `initialize`."""

    def __init__(self, place: Place, client, timeout: float):
        self.place, self._client, self._timeout = place, client, timeout
        self._stop, self._agreed = threading.Event(), True
        self._telling = threading.Lock()  # so that no beat follows a last word
        self._hosts = {}
        self._heard = time.monotonic()
        self._abort = None
        self._rounds = 0
        self._set(f"host/{place.process_id}", socket.gethostname())
        for peer in range(place.num_processes):
            self._hosts[peer] = self._get(f"host/{peer}")

    @property
    def first(self) -> bool:
        """Whether this is process 0: the one that writes files and shows progress."""
        return self.place.process_id == 0

    # Agreement.

    def check_agreement(self, config: Mapping) -> None:
        """Compares `config`, a flat mapping of JSON values, over all processes.

        Raises ValueError, in all of them alike, that names every key in which they differ.
        """
        found = [json.loads(text) for text in self._exchange(json.dumps(dict(config), default=str))]
        lines = []
        for key in sorted(set().union(*found)):
            values = [json.dumps(one[key]) if key in one else "not given" for one in found]
            if len(set(values)) > 1:
                each = ", ".join(f"{value} in process {i}" for i, value in enumerate(values))
                lines.append(f"{key}: {each}")
        if lines:
            self._agreed = False
            raise ValueError(
                f"the processes were not started alike: {'; '.join(lines)}: start all with the same"
            )

    def broadcast(self, value=None):
        """Process 0's `value`, of JSON types, in every process."""
        return json.loads(self._exchange(json.dumps(value))[0])

    def _exchange(self, text: str) -> list[str]:
        self._rounds += 1
        key = f"exchange/{self._rounds}"
        self._set(f"{key}/{self.place.process_id}", text)
        return [self._get(f"{key}/{peer}") for peer in range(self.place.num_processes)]

    # The watch.

    def watch(self) -> None:
        """Starts to beat and to listen, in daemon threads. A lost peer ends this process with status 1."""
        for body in (self._beat, self._judge):
            threading.Thread(target=body, name=f"distributed{body.__name__}", daemon=True).start()
        if not self.first:
            # JAX aborts the moment the coordinator is gone, with a stack trace; this adds what that means.
            self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._abort)

    def finish(self) -> None:
        """Waits for all processes to come here, then parts."""
        self._client.wait_at_barrier(f"{_PREFIX}/end", 24 * 3600 * 1000)
        self._part()

    def leave(self, error: BaseException) -> None:
        """Tells the others why this process ends. A failure that a lost peer caused is left to the watch."""
        if self._agreed and isinstance(error, RuntimeError):
            # A broken collective is noticed before the silence is.
            time.sleep(SILENCE_S + 3 * BEAT_S)
        if self._agreed:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            with self._telling, contextlib.suppress(Exception):
                self._stop.set()
                self._set(f"beat/{self.place.process_id}", f"it ended with {reason}")
        self._part()  # the others come to it when they have read that

    def _part(self) -> None:
        self._stop.set()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()

    def _beat(self) -> None:
        count, seen = 0, {}
        while not self._stop.wait(BEAT_S):
            count += 1
            try:
                with self._telling:
                    if self._stop.is_set():
                        return
                    self._set(f"beat/{self.place.process_id}", str(count))
                beats = dict(self._client.key_value_dir_get(f"{_PREFIX}/beat"))
            except Exception:  # whatever a client raises that cannot reach its service
                continue
            now = self._heard = time.monotonic()
            beats = {int(key.rsplit("/", 1)[1]): value for key, value in beats.items()}
            for peer in self._hosts:
                beat = beats.get(peer, "0")
                if not beat.isdecimal():
                    self._lost(peer, beat, told=True)
                if seen.get(peer, (None,))[0] != beat:
                    seen[peer] = beat, now
                elif now - seen[peer][1] > SILENCE_S and peer != self.place.process_id:
                    self._lost(peer, f"no sign of life for {SILENCE_S:g} s; its own output says more")

    def _judge(self) -> None:
        """Apart from the beat, whose calls may hang."""
        while not self._stop.wait(BEAT_S):
            if time.monotonic() - self._heard > SILENCE_S:
                self._lost(0, f"the coordinator at {self.place.coordinator} cannot be reached any more")

    def _on_abort(self, _signal) -> None:
        if not self._stop.is_set() and not _answers(self.place, 1):
            self._lost(0, f"the coordinator at {self.place.coordinator} is gone; its own output says more")
        os._exit(1)

    def _lost(self, peer: int, why: str, *, told: bool = False) -> None:
        """Ends this process. A peer that has `told` so itself waits for the others to part."""
        if self._stop.is_set():
            return
        self._stop.set()
        # Straight to the file: other threads may hold Python's streams.
        os.write(2, f"error: lost process {peer} ({self._hosts.get(peer)}): {why}\n".encode())
        if told:
            # The peer's end may overtake the parting. JAX's threads abort then, several at once, and what handles the
            # signal crashes: let them stand still instead, and part no longer than a moment.
            libc = ctypes.CDLL(None)
            libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
            end = threading.Timer(SILENCE_S, os._exit, (1,))
            end.daemon = True
            end.start()
            self._part()
        os._exit(1)

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=True)

    def _get(self, key: str) -> str:
        try:
            return self._client.blocking_key_value_get(f"{_PREFIX}/{key}", int(self._timeout * 1000))
        except Exception as error:
            peer = int(key.rsplit("/", 1)[1])
            raise ConnectionError(
                f"process {peer} ({self._hosts.get(peer, 'host unknown')}) said nothing within {self._timeout:g} s: "
                "see its own output, or allow more with --timeout"
            ) from error


def _offer_cpus(count: int) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", count)
        os.environ.setdefault("NPROC", str(2 * count))  # fewer threads could deadlock collectives


def _check_port(place: Place) -> None:
    """Raises ConnectionError where process 0 cannot listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.address[1]))
        except OSError as error:
            raise ConnectionError(
                f"process 0 cannot listen on port {place.address[1]} ({error.strerror}): choose another --coordinator"
            ) from error


def _wait_for(place: Place, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not _answers(place, min(5, timeout)):
        if time.monotonic() > end:
            raise ConnectionError(
                f"no coordinator answers at {place.coordinator} after {timeout:g} s: check that process 0 runs and "
                "was given the same address, that this host can reach it, and that no firewall closes the port"
            )
        time.sleep(0.2)


def _answers(place: Place, timeout: float) -> bool:
    try:
        socket.create_connection(place.address, timeout).close()
    except OSError:
        return False
    return True
