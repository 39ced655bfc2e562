"""Test-wide set-up. Environment variables that JAX reads once are set before it is imported."""

import os
import shutil
import signal
import tempfile

import pytest

from tests import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Fewer threads than virtual devices can deadlock CPU collectives; jaxlib sizes its pool by this.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "16")
os.environ.setdefault("XLA_FLAGS", quick.FLAGS)
# Parity with fp32 goldens needs true fp32 products wherever the tests run.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")

# Started in the background by a shell, processes ignore Ctrl-C, and so do those that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Workers and the processes that tests start compile much of the same.
_PROGRAMS = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="programs-")
if _PROGRAMS:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A program keeps hundreds of memory mappings, and beyond 65,530 in a process Linux lets compiling crash."""
    yield
    import jax  # not before the environment is set

    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too")


_LONG = ("test_whole_pass.py", "test_distributed.py", "test_notebooks.py")


def pytest_collection_modifyitems(config, items):
    # Workers take one file after another: begun last, a long one would keep a single worker busy.
    items.sort(key=lambda item: item.path.name not in _LONG)
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="slow: runs under --full")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_unconfigure(config):
    if _PROGRAMS:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)
