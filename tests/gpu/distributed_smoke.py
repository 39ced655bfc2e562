"""Two processes with one GPU each against one process with both: the same video, and an end when either is killed.

    PYTHONPATH=. python tests/gpu/distributed_smoke.py             # a host with two GPUs
    PYTHONPATH=. JAX_PLATFORMS=cpu python tests/gpu/distributed_smoke.py   # anywhere, to try the script

Prints one line per check and exits with 1 if any fails. Run by hand; pytest does not collect it.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S = 400


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="gather")
    parser.add_argument(
        "--worker", nargs=3, metavar=("OUT", "PROCESS", "PORT"), help="used by the script itself"
    )
    args = parser.parse_args()
    if args.worker:
        _work(args, *args.worker)
        return 0
    return int(not all([_same_video(args), _end(args, 0), _end(args, 1)]))


def _work(args, out: str, process: str, port: str) -> None:
    """One process: the only one without a port, else one of two. Saves a video, or makes frames until it is ended."""
    from sharding import SequenceParallel, distributed

    place = contextlib.nullcontext()
    if int(port):
        place = distributed.session(f"127.0.0.1:{port}", 2, int(process), devices=2)
    with place:
        from jax_causal import Pipeline

        pipe = Pipeline.random("tiny", parallel=SequenceParallel(2, args.strategy), window=6)
        if out != "endless":
            pipe("a red ball", num_frames=21, seed=3).save(out)
            return
        for _ in pipe.stream("a red ball"):
            print("a chunk", flush=True)


@contextlib.contextmanager
def _processes(args, out, count):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] if count > 1 else 0
    started = []
    for process in range(count):
        environ = dict(os.environ, JAX_NUM_CPU_DEVICES=str(2 // count), NPROC="16")
        if count > 1:
            environ["CUDA_VISIBLE_DEVICES"] = str(process)
        command = [sys.executable, __file__, "--strategy", args.strategy]
        command += ["--worker", str(out), str(process), str(port)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environ, **pipes))
    try:
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait()


def _same_video(args) -> bool:
    import numpy as np

    videos = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            out = Path(folder) / f"{count}.npy"
            with _processes(args, out, count) as started:
                said = [one.communicate(timeout=LIMIT_S)[0] for one in started]
            if any(one.returncode for one in started):
                return _report(f"{count} processes", False, "\n".join(said))
            videos.append(np.load(out).astype(int))
    difference = np.abs(videos[0] - videos[1])
    # The same program on the same cards: only the network differs.
    text = f"{videos[0].shape[0]} frames differ by {difference.max()} levels at most"
    return _report("2 processes x 1 device", difference.max() <= 1 and videos[0].std() > 1, text)


def _end(args, victim: int) -> bool:
    with _processes(args, "endless", 2) as started:
        started[0].stdout.readline()
        while started[0].poll() is None and "a chunk" not in started[0].stdout.readline():
            pass
        started[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        said, _ = started[1 - victim].communicate(timeout=LIMIT_S)
        seconds, status = time.monotonic() - began, started[1 - victim].returncode
    named = f"lost process {victim} ({socket.gethostname()})" in said
    text = f"{seconds:.1f} s after process {victim}, status {status}, {'named' if named else said}"
    return _report("the other ends", named and seconds < 30 and status not in (0, None), text)


def _report(name, ok, text) -> bool:
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)
    return ok


if __name__ == "__main__":
    sys.exit(main())
