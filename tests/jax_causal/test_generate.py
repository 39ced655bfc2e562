"""`jax-causal generate`: what it makes, what an interruption leaves, what it warns about.

Run in this process, on one small model folder, so that programs are compiled once.
"""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_causal import Pipeline, checkpoint, cli, environment, estimate, generate, modules
from jax_causal.components import COMPONENTS
from jax_causal.config import PRESETS, TokenizerConfig
from jax_causal.timings import Timings
from jax_causal.video import VideoWriter, read_video
from tests import quick
from tests.models import SMALL

PROMPT = "a red ball rolls to the right"
KEYS = {
    "first_frame_s", "denoise_s", "context_s", "decode_s", "text_s", "compile_s", "total_s", "frames", "fps",
    "devices", "strategy", "model", "jax", "device_kind", "height", "width", "seed", "precision", "out",
}  # fmt: skip


def _save(folder, config, *components):
    rng = np.random.default_rng(0)
    for component in components:
        shapes = modules.abstract(COMPONENTS[component], getattr(config, component))
        params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
        checkpoint.save(folder / component, params)
    (folder / "config.json").write_text(config.to_json())
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(_save(tmp_path_factory.mktemp("model"), SMALL, *COMPONENTS))


@functools.cache
def _pipe(model):
    return Pipeline.from_pretrained(model, dtype="float32")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test in its own folder, with an environment that stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)


def run(*argv) -> int:
    """The exit status of `jax-causal ARGV...`."""
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code


def files(folder="."):
    """Everything in a folder, hidden files included."""
    return sorted(os.listdir(folder))


# What it makes.


def test_one_prompt_to_one_video(model, capsys):
    assert (
        run("generate", PROMPT, "--out", "ball.mp4", "--model", model, "--seed", 3, "--json", "t.json") == 0
    )
    assert files() == ["ball.mp4", "t.json"]
    _pipe(model)(PROMPT, seed=3).save("expected.mp4")
    assert same_video("ball.mp4", "expected.mp4")

    record = json.loads(read("t.json"))
    assert set(record) == KEYS
    assert [len(record[key]) for key in ("denoise_s", "context_s", "decode_s")] == [2, 1, 2]
    phases = [record["text_s"], *record["denoise_s"], *record["context_s"], *record["decode_s"]]
    assert all(seconds >= 0 for seconds in phases)
    assert sum(phases) < record["total_s"]
    assert 0 < record["first_frame_s"] < record["total_s"]
    assert record["fps"] == pytest.approx(13 / record["total_s"], rel=1e-3)
    del record["fps"]
    expected = {"frames": 13, "height": 16, "width": 24, "seed": 3, "precision": "float32", "model": "small"}
    expected |= {"devices": 1, "strategy": "single", "jax": jax.__version__, "out": "ball.mp4"}
    assert record.items() >= expected.items()

    captured = capsys.readouterr()
    assert captured.out == ""
    for shown in (
        "small · 13 frames of 24 x 16",
        "memory",
        "KV cache",
        "block 2",
        "decode",
        "ball.mp4  13 frames",
    ):
        assert shown in captured.err
    assert "\x1b" not in captured.err


def read(path):
    with open(path, "rb") as file:
        return file.read()


def same_video(a, b) -> bool:
    """Whether two mp4s show the same: the encoder's threads may round differently from run to run."""
    first, second = (read_video(path)[0].astype(int) for path in (a, b))
    return first.shape == second.shape and np.abs(first - second).mean() < 4


def test_several_devices(model, capsys):
    options = ["--model", model, "--json", "-", "--seed", 3]
    assert run("generate", PROMPT, "--out", "one.gif", *options) == 0
    assert run("generate", PROMPT, "--out", "four.gif", *options, "--devices", 4, "--strategy", "hybrid") == 0
    captured = capsys.readouterr()
    one, four = (json.loads(line) for line in captured.out.splitlines())
    assert (one["devices"], one["strategy"]) == (1, "single")
    assert (four["devices"], four["strategy"]) == (4, "hybrid")
    assert "4 x cpu, hybrid" in captured.err
    first, second = (read_video(path)[0].astype(int) for path in ("one.gif", "four.gif"))
    assert np.abs(first - second).mean() < 4  # of a palette's colours, chosen anew for every file
    assert run("generate", PROMPT, "--out", "a.gif", *options, "--devices", 3, "--strategy", "ulysses") == 2
    assert "use gather or ring" in capsys.readouterr().err


def test_sizes_window_and_precision_reach_the_model(model, capsys):
    settings = [
        "--frames",
        21,
        "--height",
        24,
        "--width",
        16,
        "--window",
        4,
        "--sink",
        2,
        "--precision",
        "bfloat16",
    ]
    assert run("generate", PROMPT, "--out", "a.gif", "--model", model, "--json", "-", *settings) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["precision"] == "bfloat16"
    pipe = Pipeline.from_pretrained(model, dtype="bfloat16", window=4, sink=2)
    pipe(PROMPT, num_frames=21, height=24, width=16).save("expected.gif")
    assert read("a.gif") == read("expected.gif")


def test_quiet_is_silent_and_json_owns_standard_output(model, capsys):
    command = ["generate", PROMPT, "--out", "a.mp4", "--model", model, "--frames", 5]
    assert run(*command, "--quiet", "--json", "-") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert set(json.loads(captured.out)) == KEYS


def test_an_existing_video_is_replaced_on_request_only(model, capsys):
    command = ["generate", PROMPT, "--out", "a.mp4", "--model", model, "--frames", 5, "--quiet"]
    assert run(*command) == 0
    old = read("a.mp4")
    assert run(*command, "--seed", 1) == 2
    assert "a.mp4 exists: pass --overwrite" in capsys.readouterr().err
    assert read("a.mp4") == old
    assert run(*command, "--seed", 1, "--overwrite") == 0
    assert read("a.mp4") != old


def test_extending_a_clip(model, capsys):
    command = ["generate", PROMPT, "--model", model, "--quiet", "--json", "-"]
    assert run(*command, "--out", "short.mp4", "--frames", 5) == 0
    capsys.readouterr()
    assert run(*command, "--out", "long.mp4", "--video", "short.mp4") == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == KEYS | {"encode_s"}
    assert [len(record[key]) for key in ("denoise_s", "context_s", "decode_s")] == [1, 1, 2]
    assert read_video("long.mp4")[0].shape == (13, 16, 24, 3)


def test_warm_up_comes_before_the_clock(model, monkeypatch):
    events = []
    monkeypatch.setattr(Pipeline, "warmup", lambda self, **inputs: events.append(inputs))
    report = Timings.report
    monkeypatch.setattr(Timings, "report", lambda *args: (events.append("run"), report(*args)))
    assert run("generate", PROMPT, "--out", "a.mp4", "--model", model, "--frames", 5, "--warmup") == 0
    assert events[0] == {"num_frames": 5, "height": 16, "width": 24, "image": None, "video": None}
    assert "run" in events[1:]


# A file of prompts.


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\na red ball\n\n  a blue [square]  \na cat\n")
    return path


def _folder_command(model, prompts, *more):
    return ["generate", "--prompts", prompts, "--out", "videos", "--model", model, "--frames", 5, *more]


def test_a_prompts_file_makes_numbered_videos(model, prompts, capsys):
    assert run(*_folder_command(model, prompts, "--json", "-")) == 0
    assert files("videos") == ["0001.mp4", "0002.mp4", "0003.mp4", "prompts.json"]
    record = json.loads(read("videos/prompts.json"))
    assert record["prompts"] == ["a red ball", "a blue [square]", "a cat"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["out"] for line in lines] == [f"videos/000{i}.mp4" for i in (1, 2, 3)]
    assert all(set(line) == KEYS for line in lines)
    # Each is what its prompt and the seed make alone.
    assert run("generate", "a cat", "--out", "cat.mp4", "--model", model, "--frames", 5, "--quiet") == 0
    assert same_video("cat.mp4", "videos/0003.mp4")


def test_only_what_is_missing_is_made(model, prompts, monkeypatch, capsys):
    command = _folder_command(model, prompts)
    assert run(*command) == 0
    made = {name: os.stat(f"videos/{name}").st_mtime_ns for name in files("videos") if name.endswith("mp4")}
    os.remove("videos/0002.mp4")
    assert run(*command) == 0
    again = {name: os.stat(f"videos/{name}").st_mtime_ns for name in made}
    assert [name for name in made if again[name] != made[name]] == ["0002.mp4"]

    monkeypatch.setattr(Pipeline, "from_pretrained", None)  # with nothing to do, nothing is loaded
    capsys.readouterr()
    assert run(*command) == 0
    assert "3 prompts, 3 of them finished in videos" in capsys.readouterr().err


def test_an_interrupted_overwrite_leaves_no_old_videos(model, prompts, monkeypatch, capsys):
    assert run(*_folder_command(model, prompts, "--quiet")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "stream", _interrupted(at_video=2))
        assert run(*_folder_command(model, prompts, "--seed", 1, "--overwrite")) == 130
    assert "same command without --overwrite continues" in capsys.readouterr().err
    assert files("videos") == ["0001.mp4", "prompts.json"]
    assert run(*_folder_command(model, prompts, "--seed", 1)) == 0
    assert files("videos") == ["0001.mp4", "0002.mp4", "0003.mp4", "prompts.json"]


# Interruption and failure.


def _interrupted(at_video=1, error=KeyboardInterrupt):
    """A `Pipeline.stream` whose `at_video`-th video ends in an error after its first frame."""
    stream, videos = Pipeline.stream, []

    def interrupted(self, *args, **kwargs):
        videos.append(args)
        chunks = stream(self, *args, **kwargs)
        if len(videos) < at_video:
            yield from chunks
        else:
            yield next(chunks)
            raise error

    return interrupted


def test_ctrl_c_leaves_no_half_video(model, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "stream", _interrupted())
    assert run("generate", PROMPT, "--out", "a.mp4", "--model", model, "--json", "t.json") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: nothing half-written was left"
    assert files() == []


def test_an_interrupted_prompts_file_continues(model, prompts, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "stream", _interrupted(at_video=2))
        assert run(*_folder_command(model, prompts)) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert files("videos") == ["0001.mp4", "prompts.json"]
    first = os.stat("videos/0001.mp4").st_mtime_ns
    assert run(*_folder_command(model, prompts)) == 0
    assert files("videos") == ["0001.mp4", "0002.mp4", "0003.mp4", "prompts.json"]
    assert os.stat("videos/0001.mp4").st_mtime_ns == first


_ENDLESS = """
import sys, time
import numpy as np
from jax_causal import cli
from jax_causal.pipeline import Pipeline

def stream(self, prompt, **inputs):
    while True:
        yield np.zeros((1, 16, 24, 3), np.uint8)
        print("frame", flush=True)
        time.sleep(0.02)

Pipeline.stream = stream
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_real_ctrl_c(model, tmp_path):
    command = [sys.executable, "-c", _ENDLESS, "generate", PROMPT, "--out", "a.mp4", "--model", model]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert process.stdout.readline() == "frame\n"
    assert any(name.endswith(".tmp") for name in files(tmp_path))  # it was in the middle of writing
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted: nothing half-written was left"
    assert "Traceback" not in errors
    assert files(tmp_path) == ["cache"]


def _environment(tmp_path):
    root = os.path.dirname(os.path.dirname(cli.__file__))
    # The tests' own cache, which leaves out what compiles quickly: the command has one of its own, and keeps all.
    unwanted = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environ = {key: value for key, value in os.environ.items() if key not in unwanted}
    kept = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XLA_FLAGS": quick.UNOPTIMIZED}
    return environ | kept | {"PYTHONPATH": root}


def test_a_full_disk(model, monkeypatch, capsys):
    def write(self, frames):
        raise OSError(28, "the disk is full", "a.mp4")

    monkeypatch.setattr(VideoWriter, "write", write)
    assert run("generate", PROMPT, "--out", "a.mp4", "--model", model, "--frames", 5) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: a.mp4: the disk is full"
    assert files() == []


def test_full_device_memory_is_explained_and_bugs_are_not_hidden(model, monkeypatch, capsys):
    command = ["generate", PROMPT, "--out", "a.mp4", "--model", model, "--frames", 5]
    full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile allocating\nmany lines")
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "stream", _interrupted(error=full))
        assert run(*command) == 1
    assert re.search("^error: .*memory is full: try .*--window", capsys.readouterr().err, re.MULTILINE)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "stream", _interrupted(error=RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            run(*command)


# What it warns about.


def test_warnings_are_one_line_each(model, capsys):
    assert run("generate", "word " * 100, "--out", "a.mp4", "--model", model, "--frames", 5, "--quiet") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the prompt has ")
    assert "cut off" in line


def test_random_weights_are_called_that(model, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "small", SMALL)
    configs = []

    def random(config, *, dtype, **limits):
        configs.append(config)
        return _pipe(model)

    monkeypatch.setattr(Pipeline, "random", random)
    command = ["generate", PROMPT, "--frames", 5, "--quiet", "--out"]
    assert run(*command, "a.mp4", "--preset", "small") == 0
    assert "small has random, untrained weights" in capsys.readouterr().err
    assert configs[0].tokenizer.kind == "bytes"


def test_words_that_the_world_does_not_have_are_named(capsys):
    config = dataclasses.replace(SMALL, tokenizer=TokenizerConfig(kind="world"))
    generate._warn_of_unknown_words(config, ["a cat plays with a red ball", PROMPT])
    assert "has never seen 'cat', 'plays': it knows" in capsys.readouterr().err
    generate._warn_of_unknown_words(config, [PROMPT])
    generate._warn_of_unknown_words(SMALL, ["a cat"])
    assert capsys.readouterr().err == ""


def test_too_little_memory_is_said_before_loading(model, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "device_memory", lambda: 10_000)
    monkeypatch.setattr(generate.Job, "load", lambda self: pytest.fail("loaded first"))
    with pytest.raises(pytest.fail.Exception):
        run("generate", PROMPT, "--out", "a.mp4", "--model", model, "--frames", 5)
    error = capsys.readouterr().err
    assert re.search(r"warning: this needs about .* the device has 10.0 kB: try --precision bfloat16", error)


def test_more_context_than_was_trained_is_said(model, monkeypatch, capsys):
    monkeypatch.setattr(generate.Job, "load", lambda self: (_ for _ in ()).throw(ValueError("stop")))
    command = ["generate", PROMPT, "--out", "a.mp4", "--model", model]
    assert run(*command, "--frames", 29) == 2
    assert "try --window 6 --sink 2" in " ".join(capsys.readouterr().err.split())
    for within in (["--frames", 21], ["--frames", 29, "--window", 6, "--sink", 2]):
        assert run(*command, *within) == 2
        assert "try --window" not in capsys.readouterr().err


# As a command.


def test_the_command_keeps_what_it_compiled(model, tmp_path):
    """The whole thing in a process of its own, twice: the second one finds its programs in the user's cache."""
    cached = []
    for out in ("a.mp4", "b.mp4"):
        command = [sys.executable, "-m", "jax_causal", "generate", PROMPT, "--out", out, "--model", model]
        done = subprocess.run(
            [*command, "--frames", "5", "--json", "-"],
            cwd=tmp_path,
            env=_environment(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["compile_s"] > 0
        assert done.stderr.count("\n") < 25
        cached.append(files(tmp_path / "cache" / "jax_causal" / "xla"))
    assert read(tmp_path / "a.mp4") == read(tmp_path / "b.mp4")
    assert cached[0] == cached[1] != []
