"""Several processes over loopback: the video of one process, and clear ends to what cannot go on."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_causal import Pipeline, cli
from sharding import SequenceParallel
from tests import quick
from tests.sharding.distributed_worker import PROMPT, SEED, SMALL, STRATEGY

pytestmark = pytest.mark.sp

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
LIMIT_S = 180


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _workers(*argvs):
    """One process for each list of arguments, with four devices; none outlives the block."""
    environ = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"} | {
        "NPROC": "16",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {quick.FLAGS}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    running = []
    try:
        for argv in argvs:
            command = [sys.executable, str(WORKER), *map(str, argv)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(subprocess.Popen(command, env=environ, **pipes))
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdout.close()


def _options(port, process):
    place = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", process)
    sizes = ("--preset", "small", "--precision", "float32", "--strategy", STRATEGY, "--devices", 8)
    return ["--distributed", *place, *sizes]


def _generate(out, port, process, *more, prompt=PROMPT):
    return ["generate", prompt, "--out", out, *_options(port, process), *more]


def test_same_video_as_one_process(tmp_path):
    out, port = tmp_path / "video.npy", _free_port()
    with _workers(*[("frames", out, i, port) for i in range(2)]) as workers:
        said = [worker.communicate(timeout=LIMIT_S)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "holds frames True" in said[0]
    assert "chunks [(1, 8, 32, 3), (2, 8, 32, 3), (4, 8, 32, 3)]" in said[0]
    assert "holds frames False" in said[1]
    assert "chunks [(0, 8, 32, 3), (0, 8, 32, 3), (0, 8, 32, 3)]" in said[1]
    alone = Pipeline.random(SMALL, dtype="float32", parallel=SequenceParallel(8, STRATEGY))
    expected = alone(PROMPT, seed=SEED).frames
    frames = np.load(out)
    assert frames.shape == expected.shape == (7, 8, 32, 3)
    assert expected.std() > 5
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1


def test_measured_together(tmp_path):
    """The first process tells."""
    port, out = _free_port(), tmp_path / "rows.json"
    rows = ("--only", "rollout,first_frame,decode", "--repeats", 1, "--json", out)
    with _workers(*[["bench", *_options(port, i), *rows] for i in range(2)]) as workers:
        said = [worker.communicate(timeout=LIMIT_S)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    record = json.loads(out.read_text())
    assert {row["name"] for row in record["rows"]} == {"rollout", "first_frame", "decode"}
    assert (record["devices"], record["strategy"]) == (8, STRATEGY)
    assert "rollout" in said[0]
    assert "rollout" not in said[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--scaling"], "--scaling is for the devices of one process"),
        (["--only", "start_cold"], "start_cold is of a process alone"),
    ],
)
def test_what_processes_cannot_measure_together(capsys, option, message):
    assert cli.main(["bench", "--distributed", "--preset", "tiny", *option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other(tmp_path, victim):
    """Whichever dies, in the middle of a video too long to finish."""
    port = _free_port()
    argvs = [_generate(tmp_path / "out.mp4", port, i, "--frames", 40_003, "--window", 4) for i in range(2)]
    with _workers(*argvs) as workers:
        _wait_for_video(tmp_path, workers)
        workers[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        said, _ = workers[1 - victim].communicate(timeout=LIMIT_S)
    assert time.monotonic() - killed < 30
    assert workers[1 - victim].returncode not in (0, None)
    assert f"lost process {victim} ({socket.gethostname()})" in said


def _wait_for_video(folder, workers):
    """Until process 0 writes the first frames, under a temporary name."""
    end = time.monotonic() + LIMIT_S
    while not any(folder.iterdir()):
        gone = [worker for worker in workers if worker.poll() is not None]
        assert not gone, gone[0].stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)


def test_different_configurations_are_named(tmp_path):
    port = _free_port()
    argvs = [_generate(tmp_path / "out.mp4", port, i, "--seed", i) for i in range(2)]
    with _workers(*argvs) as workers:
        said = [worker.communicate(timeout=LIMIT_S)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, 2], said
    for text in said:
        assert re.search(r"seed: 0 in process 0, 1 in process 1", text)
        assert "height" not in text
    assert not any(tmp_path.iterdir())


def test_why_a_process_ended_is_told_to_the_others(tmp_path):
    """Only process 0 looks at the output, and there is a file already."""
    out, port = tmp_path / "out.mp4", _free_port()
    out.write_bytes(b"kept")
    with _workers(*[_generate(out, port, i) for i in range(2)]) as workers:
        said = [worker.communicate(timeout=LIMIT_S)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, 1], said
    assert f"lost process 0 ({socket.gethostname()}): it ended with FileExistsError" in said[1]
    assert out.read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (0, "process 0 of 2: not all processes came to {place} within 1 s: start all 2"),
        (1, "no coordinator answers at {place} after 1 s"),
    ],
)
def test_peers_that_do_not_come(tmp_path, process, message):
    port = _free_port()
    with _workers(_generate(tmp_path / "out.mp4", port, process, "--timeout", 1)) as (worker,):
        said, _ = worker.communicate(timeout=LIMIT_S)
    assert worker.returncode == 1
    assert message.format(place=f"127.0.0.1:{port}") in said


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with _workers(_generate(tmp_path / "out.mp4", port, 0)) as (worker,):
            said, _ = worker.communicate(timeout=LIMIT_S)
    assert worker.returncode == 1
    assert f"process 0 cannot listen on port {port}" in said


@pytest.mark.parametrize(
    "option", [("--coordinator", "h:12"), ("--num-processes", "2"), ("--process-id", "0")]
)
@pytest.mark.parametrize("verb", [("generate", "x", "--out", "x.mp4"), ("bench",), ("bench", "--scaling")])
def test_options_need_distributed(verb, option, capsys):
    assert cli.main([*verb, *option]) == 2
    assert f"{option[0]} is for several processes: add --distributed" in capsys.readouterr().err
