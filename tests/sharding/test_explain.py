"""`jax-causal explain`: numbers worked out by hand, wording, refusals."""

import json
import os
import subprocess
import sys

import pytest

from jax_causal import cli, environment
from sharding import explain
from sharding.compiled import CompiledBlock
from sharding.hlo import Program
from sharding.strategies import Strategy

pytestmark = pytest.mark.sp

# 4 x 7 = 28 tokens a frame, 3 frames a block, 8 heads of 24 channels in 8 layers, 6 latent frames.
SMALL = ("--height", 64, "--width", 112, "--frames", 21)


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch):
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)


def run(*argv) -> int:
    """The exit status of `jax-causal explain ARGV...`."""
    try:
        return cli.main(["explain", *map(str, argv)])
    except SystemExit as end:
        return end.code


def test_record(capsys):
    assert run("--preset", "tiny", *SMALL, "--devices", 4, "--strategy", "ring", "--json", "-") == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    record = json.loads(line)
    assert err == ""
    # One number, word or list of them each.
    assert not any(isinstance(value, dict) for value in record.values())
    expected = {
        "model": "tiny",
        "height": 64,
        "width": 112,
        "frames": 21,
        "precision": "bfloat16",
        "devices": 4,
        "strategy": "ring",
        "mesh_data": 1,
        "mesh_seq": 4,
        "mesh_heads": 1,
        "tokens_per_frame": 28,
        "padding_per_frame": 0,
        "rows_per_frame_per_device": 7,
        "rows_per_block_per_device": 21,
        "cached_latent_frames": 6,
        "cache_bytes_per_device": 2 * 8 * (6 * 7 + 6) * 192 * 2,
        "text_kv_bytes_per_device": 2 * 8 * 32 * 192 * 2,
        "collectives_per_layer": 2,
        "collective_kinds": ["all-gather", "all-to-all"],
        "collective_devices": [4, 4],
        "collective_bytes": [84 * 192 * 2, 84 * (192 + 8) * 4],
        "collective_float32_bytes": [84 * 192 * 4, 84 * (192 + 8) * 4],
        "compiled_collective_kinds": ["all-gather", "all-to-all"],
        "compiled_collective_float32_bytes": [84 * 192 * 4, 84 * (192 + 8) * 4],
        "compiled_collectives_outside_layers": 0,
    }
    assert expected == {key: record[key] for key in expected}
    for name in ("gather", "ring", "ulysses", "hybrid"):
        assert record[f"{name}_sending_per_layer_s"] > 0


def test_report(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert run("--devices", 8, "--strategy", "hybrid", "--preset", "wan-1.3b", "--json", path) == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert lines >= {
        "wan-1.3b · 81 frames of 832 x 480 pixels · bfloat16 · 8 devices",
        "strategy hybrid, as asked",
        "mesh data 1 x seq 2 x heads 4",
        "tokens 30 x 52 = 1560 a frame: 200 on each of 7 devices, 160 on the next; 40 rows of padding, never a key",
        "block 3 latent frames: 600 rows on a device",
        "cache 21 latent frames; a device holds 800 of 1560 tokens a frame, 3 of 12 heads",
        "queries, keys, values: tokens for heads all-to-all 4 5.5 MB 11 MB 11 MB",
        "queries, to all keys all-gather 2 3.7 MB 7.4 MB 7.4 MB",
        "outputs and log-sum-exps, back to the queries all-to-all 2 7.4 MB 7.4 MB 7.4 MB",
        "outputs: heads for tokens all-to-all 4 1.8 MB 3.7 MB 3.7 MB",
        "as compiled: these and no others, 4 x 30 layers x 4 passes = 480 in a block",
        "weights of the transformer 2.8 GB",
        "keys and values of the text 94 MB",
        "keys and values of the video 774 MB",
        "ulysses: not for 12 heads on 8 devices",
    }
    assert json.loads(path.read_text())["weights_bytes_per_device"] == 2 * 1_418_996_800


@pytest.mark.parametrize(
    ("devices", "options", "expected"),
    [
        (5, (), "28 a frame: 6 on each of 4 devices, 4 on the next; 2 rows of padding, never a key"),
        (16, (), "28 a frame: 2 on each of 14 devices, none on the last 2; 4 rows of padding, never a key"),
        (7, (), "28 a frame: 4 on each device"),
        (
            2,
            ("--height", 80),
            "35 a frame: 18 on the first device, 17 on the next; 1 row of padding, never a key",
        ),
        (2, ("--window", 3), "3 latent frames; a device holds 14 of 28 tokens a frame"),
    ],
)
def test_shares_in_words(devices, options, expected, monkeypatch, capsys):
    nothing = Program("ENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n")
    block = CompiledBlock(nothing, dict.fromkeys(("weights", "text_kv", "cache"), 0))
    monkeypatch.setattr(explain, "compile_block", lambda *args: block)
    argv = ("--preset", "tiny", *SMALL, "--devices", devices, "--strategy", "ring", *options)
    assert run(*argv) == 0
    assert expected in capsys.readouterr().out


def test_one_device_sends_nothing(capsys):
    assert run("--preset", "tiny", *SMALL, "--devices", 1) == 0
    assert "as compiled: nothing at all" in capsys.readouterr().out


def test_a_formula_that_is_wrong_shows(monkeypatch, capsys):
    right = Strategy.collectives
    monkeypatch.setattr(Strategy, "collectives", lambda self, work: right(self, work)[:1])
    assert run("--preset", "tiny", *SMALL, "--devices", 2, "--strategy", "ring") == 0
    assert "the compiled program differs: it sends 2 in a layer and pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--strategy", "rings"), "unknown strategy 'rings': choose auto, gather, ulysses, ring, hybrid"),
        (("--preset", "wan-1.3b", "--strategy", "ulysses"), "ulysses cannot share 12 heads among 8 devices"),
        (("--devices", 17), "devices=17, but there are 16 cpu devices"),
        (("--devices", 0), "'0' must be a whole number, 1 or more"),
        (("--height", 100), "height=100 must be a multiple of 16 pixels: use 96 or 112"),
        (("--frames", 80), "use 69 or 81"),
        (("--window", 2), "use window=3 or more"),
        (("--preset", "wan"), "unknown preset 'wan'"),
        (("--json", "no/plan.json"), "the folder no does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(explain, "compile_block", None)
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_alone(tmp_path):
    """From a shell, where there is one device until the command asks for more."""
    root = os.path.dirname(os.path.dirname(cli.__file__))
    unset = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "NPROC")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-m", "jax_causal", "explain", "--devices", "3", "--json", "-", *map(str, SMALL)],
        env=inherited | {"PYTHONPATH": root, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["rows_per_frame_per_device"] == 10
