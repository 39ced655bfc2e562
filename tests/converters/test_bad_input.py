"""Bad input to a conversion: a clear error that names the mend, and a destination that is as it was."""

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import torch_writer
from tests.converters import checkpoints
from tests.converters.checkpoints import convert

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.golden


@pytest.fixture(params=["new", "existing"])
def out(request, tmp_path, self_forcing):
    """A destination that must look the same after a failed conversion: absent, or a model with a transformer."""
    folder = tmp_path / "out"
    if request.param == "existing":
        convert(self_forcing, folder)
    before = checkpoints.contents(folder)
    yield folder
    assert checkpoints.contents(folder) == before
    assert folder.exists() == (request.param == "existing")


def refused(source, out, match, **options):
    with pytest.raises((ValueError, OSError), match=match):
        convert(source, out, overwrite=True, **options)


def damaged(component, change):
    weights = dict(checkpoints.original(component))
    change(weights)
    return weights


def test_nan_weights(tmp_path, out):
    weights = damaged(
        "vae", lambda w: w.update({"decoder.head.2.bias": np.array([0, np.nan, 0], np.float32)})
    )
    torch_writer.save(tmp_path / "vae.pth", weights)
    refused(tmp_path / "vae.pth", out, r"decoder\.head\.2\.bias holds NaN or infinity")


def test_values_too_large_for_the_chosen_dtype(tmp_path, out):
    weights = damaged("transformer", lambda w: w.update({"head.head.bias": w["head.head.bias"] + 1e6}))
    save_file(weights, tmp_path / "dit.safetensors")
    refused(
        tmp_path / "dit.safetensors",
        out,
        r"head\.head\.bias holds NaN or infinity in float16",
        dtype="float16",
    )


def test_missing_unexpected_and_misshapen_tensors(tmp_path, out):
    def change(weights):
        del weights["norm.weight"]
        weights["extra.weight"] = np.zeros(3, np.float32)
        weights["blocks.0.norm1.weight"] = np.zeros(3, np.float32)

    torch_writer.save(tmp_path / "t5.pth", damaged("text_encoder", change))
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "t5.pth", out)
    for part in (
        "t5.pth",
        "1 missing: norm.weight",
        "1 unexpected: extra.weight",
        "blocks.0.norm1.weight is (3,)",
    ):
        assert part in str(error.value)


def test_wrong_family(tmp_path, out):
    torch_writer.save(tmp_path / "taew2_1.pth", {"encoder.2.conv.weight": np.zeros((4, 4, 1, 1), np.float32)})
    refused(tmp_path / "taew2_1.pth", out, r"taew2_1\.pth: wrong family: this is a tiny preview autoencoder")


def test_truncated_file(tmp_path, out, self_forcing):
    (tmp_path / "cut.pt").write_bytes(self_forcing.read_bytes()[:-1000])
    refused(tmp_path / "cut.pt", out, r"cut\.pt is truncated or damaged: download or copy it again")


def test_missing_file(tmp_path, out):
    refused(tmp_path / "absent.pt", out, "does not exist")


def test_missing_shard(tmp_path, out):
    checkpoints.write_diffusers(tmp_path / "pipeline")
    (tmp_path / "pipeline/transformer/diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    refused(tmp_path / "pipeline", out, "which is missing")


def test_quantised_weights(tmp_path, out):
    weights = damaged("text_encoder", lambda w: w.update({"norm.weight": w["norm.weight"].astype(np.uint8)}))
    torch_writer.save(tmp_path / "t5.pth", weights)
    refused(tmp_path / "t5.pth", out, r"norm\.weight is stored as uint8: weights must be floats")


def test_entries_that_do_not_exist(tmp_path, out, self_forcing):
    refused(
        self_forcing,
        out,
        r"no entry 'ema': choose one with --entry generator \| generator_ema \| critic",
        entry="ema",
    )
    torch_writer.save(tmp_path / "vae.pth", checkpoints.original("vae"))
    refused(
        tmp_path / "vae.pth", out, "no entries to choose from: leave --entry generator out", entry="generator"
    )
    torch_writer.save(tmp_path / "two.pt", dict.fromkeys(("model", "ema"), checkpoints.original("vae")))
    refused(tmp_path / "two.pt", out, r"several entries: choose one with --entry model \| ema")


def test_files_without_tensors(tmp_path, out):
    torch_writer.save(tmp_path / "list.pt", (1, 2))
    refused(tmp_path / "list.pt", out, "holds a tuple, not a dict of tensors")
    torch_writer.save(tmp_path / "empty.pt", {"step": 3})
    refused(tmp_path / "empty.pt", out, "no tensors at all")


def test_unknown_heads_and_dtypes(out, self_forcing):
    refused(self_forcing, out, "--num-heads N", num_heads=None)
    refused(self_forcing, out, "unknown dtype 'int4'; known are float32", dtype="int4")


def test_two_checkpoints_of_one_component(tmp_path, out, self_forcing):
    for name in ("a.pt", "b.pt"):
        (tmp_path / "two").mkdir(exist_ok=True)
        shutil.copy(self_forcing, tmp_path / "two" / name)
    refused(
        tmp_path / "two",
        out,
        r"several checkpoints of the transformer: name one of .*a\.pt, .*b\.pt",
    )


def test_a_destination_that_is_something_else(tmp_path, self_forcing):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"architectures": ["Llama"]}')
    with pytest.raises(ValueError, match=r"config\.json is not a model folder's.*choose another DEST"):
        convert(self_forcing, tmp_path / "out")
    with pytest.raises(OSError, match="Not a directory"):
        convert(self_forcing, self_forcing / "out")


def test_too_small_a_disk_is_noticed_first(out, self_forcing, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 1000))
    refused(self_forcing, out, r"needs 0\.0 GB while converting \(twice the component\).*make room")


def run(code, *args):
    """Runs `code` and then the command, in a process of its own."""
    program = f"import sys\n{code}\nfrom converters.convert import main\nsys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        program,
        *map(str, args),
        "--num-heads",
        str(checkpoints.num_heads()),
        "--overwrite",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_disk_that_fills_up(out, self_forcing):
    """No file may grow beyond 20 kB: some tensors fit, the next does not."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    result = run(limit, self_forcing, out)
    assert result.returncode == 1
    assert re.search(r"error: cannot write to .*out .*: is its disk full\?", result.stderr)
    assert "Traceback" not in result.stderr


INTERRUPT_WHILE_READING = """
import signal
from converters import names
parts, seen = names.Leaf.parts, []
def interrupted(leaf, tensors):
    seen.append(leaf)
    if len(seen) == 5:
        signal.raise_signal(signal.SIGINT)
    return parts(leaf, tensors)
names.Leaf.parts = interrupted
"""
INTERRUPT_WHILE_STORING = """
import signal, threading, time
from jax_causal import checkpoint
def interrupted(path, params):
    time.sleep(0.3)  # until the main thread waits
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.3)  # until it has heard; then write on, as orbax's threads do
    path.with_name(path.name + ".orbax-checkpoint-tmp").mkdir()
checkpoint._write = interrupted
"""


@pytest.mark.parametrize(
    "when", [INTERRUPT_WHILE_READING, INTERRUPT_WHILE_STORING], ids=["reading", "storing"]
)
def test_ctrl_c(out, self_forcing, when):
    result = run(when, self_forcing, out)
    assert result.returncode == 130, result.stderr
    assert "interrupted: nothing half-written was left" in result.stderr


def test_what_a_killed_run_left_is_cleaned_up(tmp_path, self_forcing):
    """A process that is killed cannot clean up; the next one does."""
    out = tmp_path / "out"
    kill = "from jax_causal import checkpoint\nimport os\ncheckpoint.save = lambda *a, **k: os._exit(9)"
    assert run(kill, self_forcing, out).returncode == 9
    assert [p.name for p in out.iterdir()] == [".transformer.converting"]
    convert(self_forcing, out)
    assert {p.name for p in out.iterdir()} == {"config.json", "transformer"}
    assert json.loads((out / "config.json").read_text())["name"] == "out"
    assert os.listdir(out / "transformer")
