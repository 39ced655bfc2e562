"""A conversion never holds a model in memory: anonymous memory of the converting process, sampled.

The full-size proof is `python -m pytest --full tests/converters/test_convert_memory.py -s`.
"""

import json
import math
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_causal import checkpoint, transformer
from jax_causal.config import ModelConfig, TransformerConfig
from tests import torch_writer
from tests.converters import manifests

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@pytest.fixture
def folder(tmp_path):
    """A temporary folder that is emptied even though pytest would keep it: it holds gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reproducible weights for one tensor, in [-1, 1)."""
    return np.random.default_rng(zlib.crc32(key.encode())).random(shape, np.float32) * 2 - 1


def original_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the 1.3B manifest, resized."""
    full = manifests.load("self_forcing_dmd")
    size = {1536: config.dim, 8960: config.ffn_dim, 9216: 6 * config.dim, 4096: config.text_dim}
    return {
        key: tuple(size.get(n, n) for n in shape)
        for key, shape in full.items()
        if not key.startswith("model.blocks.") or int(key.split(".")[2]) < config.num_layers
    }


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


def convert(source: Path, dest: Path) -> int:
    """Runs the command on its own and returns the peak of its anonymous memory, in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "converters.convert", source, dest], cwd=ROOT)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    assert process.returncode == 0
    return peak


def imports() -> int:
    """What the process takes before it does anything, in bytes."""
    code = "import sys, converters.convert; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        return anonymous_bytes(process.pid)


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A Self-Forcing file, made tensor by tensor."""
    tensors = {
        key: torch_writer.lazy(shape, np.float32, lambda key=key, shape=shape: values(key, shape))
        for key, shape in shapes.items()
    }
    torch_writer.save(path, {"generator_ema": tensors})


def check_values(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor of the file is in the checkpoint, value by value."""
    config = ModelConfig.from_json((folder / "config.json").read_text()).transformer
    params = checkpoint.restore(folder / "transformer", transformer.abstract(config))
    blocks = params["blocks"]
    for key, shape in shapes.items():
        original, value = key.removeprefix("model."), values(key, shape)
        if original == "patch_embedding.weight":
            value = value[:, :, 0].transpose(2, 3, 1, 0).reshape(-1, shape[0])
            ours = params["patch_embedding"]["kernel"]
        elif original.startswith("blocks."):
            layer, name = original.split(".", 2)[1:]
            ours = leaf(blocks, name)[int(layer)]
        else:
            ours = leaf(params, original)
        if value.ndim == 2 and original != "patch_embedding.weight":
            value = value.T
        np.testing.assert_array_equal(ours, value.reshape(ours.shape), err_msg=key)
    assert sum(math.prod(s) for s in shapes.values()) == sum(a.size for a in jax.tree.leaves(params))


def leaf(tree: dict, name: str):
    """The parameter that an original key names, found by names alone."""
    renamed = {
        "text_embedding.0": "text_embedding.fc1",
        "text_embedding.2": "text_embedding.fc2",
        "time_embedding.0": "time_embedding.fc1",
        "time_embedding.2": "time_embedding.fc2",
        "time_projection.1": "time_projection",
        "ffn.0": "ffn.fc1",
        "ffn.2": "ffn.fc2",
        "head.head": "head.linear",
    }
    *path, last = name.split(".")
    if last in ("weight", "bias"):
        path = renamed.get(".".join(path), ".".join(path)).split(".")
        last = last if last == "bias" else ("scale" if path[-1].startswith("norm") else "kernel")
    for part in (*path, last):
        tree = tree[part]
    return tree


def test_a_model_is_never_held_in_memory(folder):
    config = TransformerConfig(dim=512, num_layers=16, num_heads=4, ffn_dim=2048, text_dim=512)
    shapes = original_shapes(config)
    write(folder / "model.pt", shapes)
    size = (folder / "model.pt").stat().st_size
    peak = convert(folder / "model.pt", folder / "model") - imports()
    assert size > 250e6
    assert peak < size * 4e9 / 5.676e9  # as strict as the full size's 4 GB, for which this stands
    check_values(folder / "model", shapes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size(folder):
    shapes = manifests.load("self_forcing_dmd")
    started = time.perf_counter()
    write(folder / "self_forcing_dmd.pt", shapes)
    written = time.perf_counter()
    peak = convert(folder / "self_forcing_dmd.pt", folder / "model")
    converted = time.perf_counter()
    print(
        json.dumps({
            "file_gb": (folder / "self_forcing_dmd.pt").stat().st_size / 1e9,
            "write_s": written - started,
            "convert_s": converted - written,
            "peak_rss_anon_gb": peak / 1e9,
        })
    )  # fmt: skip
    assert peak < 4e9
    (folder / "self_forcing_dmd.pt").unlink()
    check_values(folder / "model", shapes)
