"""Test-wide set-up. Environment variables that JAX reads once are set before it is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Fewer threads than virtual devices can deadlock CPU collectives; jaxlib sizes its pool by this.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "16")
# Tests compile much and compute little: code generation without optimisation is several times faster.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Parity with fp32 goldens needs true fp32 products wherever the tests run.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A program keeps hundreds of memory mappings, and beyond 65,530 in a process Linux lets compiling crash."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="slow: runs under --full")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
