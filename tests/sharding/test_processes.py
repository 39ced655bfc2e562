"""Where a process stands among its peers: from arguments, from variables, from launchers."""

import os

import pytest

from sharding import processes
from sharding.processes import Place, find_place

pytestmark = pytest.mark.sp

SLURM = {
    "SLURM_JOB_ID": "8193",  # 2 x 4096 + 1: the second port of the range that JAX takes
    "SLURM_STEP_NODELIST": "gpu[017-018]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
KUBERNETES = {"JAX_COORDINATOR_ADDRESS": "video-0.video:12", "JAX_NUM_PROCESSES": "3"}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    prefixes = ("JAX_", "SLURM_", "OMPI_", "MASTER_", "KUBERNETES_")
    for name in os.environ:
        if name.startswith(prefixes) or name in ("WORLD_SIZE", "RANK", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "h:12", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            Place("h:12", 3, 2),
        ),
        ({"MASTER_ADDR": "h", "MASTER_PORT": "12", "WORLD_SIZE": "3", "RANK": "2"}, Place("h:12", 3, 2)),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "2"}, Place("video-0.video:12", 3, 2)),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "2", "JAX_PROCESS_ID": "1"}, Place("video-0.video:12", 3, 1)),
        (SLURM, Place("gpu017:61441", 16, 11, (3,))),
        (OPEN_MPI, Place(f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 3, (1,))),
    ],
)
def test_environment_is_read(variables, place, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place() == place
    assert find_place("other:9", 2, 1) == Place("other:9", 2, 1)


@pytest.mark.parametrize(
    "variables",
    [
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0"},
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0"},
        SLURM | {"CUDA_VISIBLE_DEVICES": "3"},
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    ],
)
def test_a_process_takes_all_devices_that_are_its_own(variables, monkeypatch):
    """Where it is alone on its host, or sees one device only: there is no device 3 for it then."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place().local_devices is None


@pytest.mark.parametrize(
    ("given", "variables", "message"),
    [
        (("h:12",), {}, "--num-processes and --process-id must be given"),
        ((None, 2, 0), {}, "--coordinator must be given"),
        (("h", 2, 0), {}, "must be HOST:PORT"),
        (("h:12", 2, 2), {}, "number them 0 to 1"),
        ((), {"MASTER_ADDR": "h", "RANK": "0"}, "without MASTER_PORT and WORLD_SIZE"),
        ((), {"JAX_PROCESS_ID": "0"}, "without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
        ((), KUBERNETES, "without JAX_PROCESS_ID"),
        ((), KUBERNETES | {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX=x must be whole numbers"),
        ((), {"JOB_COMPLETION_INDEX": "0"}, "nothing says which processes there are: give --coordinator"),
        ((), {}, "nothing says which processes there are: give --coordinator"),
    ],
)
def test_incomplete_places(given, variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        find_place(*given)


def test_devices_are_shared_evenly():
    assert processes.share_of(8, 2) == 4
    with pytest.raises(ValueError, match="use 8 or 10"):
        processes.share_of(9, 2)
