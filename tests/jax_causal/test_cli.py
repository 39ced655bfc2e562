"""The command line: verbs, help, and what it refuses, before anything is loaded."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from jax_causal import Pipeline, cli, environment
from jax_causal.config import PRESETS, TokenizerConfig

PROMPT = "a red ball rolls to the right"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test in its own folder, with an environment that stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)


@pytest.fixture
def model(tmp_path_factory):
    """A model folder that looks complete; nothing here gets as far as reading its weights."""
    folder = tmp_path_factory.mktemp("model")
    for part in ("transformer", "vae", "text_encoder"):
        (folder / part).mkdir()
    (folder / "config.json").write_text(PRESETS["tiny"].to_json())
    return str(folder)


def run(*argv) -> int:
    """The exit status of `jax-causal ARGV...`."""
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code


def files(folder="."):
    """Everything in a folder, hidden files included."""
    return sorted(os.listdir(folder))


# Bad input.


BAD = {
    "empty prompt": (["  ", "--out", "a.mp4"], "the prompt is empty"),
    "frames": ([PROMPT, "--out", "a.mp4", "--frames", 12], "use 9 or 21"),
    "height": (
        [PROMPT, "--out", "a.mp4", "--height", 20],
        "height=20 must be a multiple of 16 pixels: use 16 or 32",
    ),
    "window": ([PROMPT, "--out", "a.mp4", "--window", 2], "use window=3 or more"),
    "sink": ([PROMPT, "--out", "a.mp4", "--sink", 2], "window"),
    "no such folder": ([PROMPT, "--out", "no/a.mp4"], "the folder no does not exist"),
    "format": ([PROMPT, "--out", "a.avi"], "use .mp4 or .gif"),
    "whole formats": ([PROMPT, "--out", "a.npy"], "use .mp4 or .gif"),
    "json folder": ([PROMPT, "--out", "a.mp4", "--json", "no/t.json"], "the folder no does not exist"),
    "json is a folder": ([PROMPT, "--out", "a.mp4", "--json", "."], "name a file for --json"),
    "no prompts file": (["--prompts", "no.txt", "--out", "v"], "no.txt: No such file"),
    "no prompts": (["--prompts", "empty.txt", "--out", "v"], "empty.txt holds no prompts"),
    "binary prompts": (["--prompts", "latin.txt", "--out", "v"], "latin.txt is not a text file in UTF-8"),
    "folder is a file": (["--prompts", "good.txt", "--out", "empty.txt"], "empty.txt is a file"),
    "no parent": (["--prompts", "good.txt", "--out", "no/v"], "the folder no does not exist"),
    "image": ([PROMPT, "--out", "a.mp4", "--image", "no.png"], "there is no file no.png"),
    "unreadable clip": ([PROMPT, "--out", "a.mp4", "--video", "good.txt"], "not a readable video"),
    "preset": (
        [PROMPT, "--out", "a.mp4", "--preset", "wan"],
        "unknown preset 'wan'; known presets: wan-1.3b",
    ),
    "unbundled": ([PROMPT, "--out", "a.mp4", "--model", "wan-1.3b"], "--preset wan-1.3b"),
    "no model": ([PROMPT, "--out", "a.mp4", "--model", "./no"], "there is no model folder ./no"),
    "hub id": ([PROMPT, "--out", "a.mp4", "--model", "org/name"], "jax-causal convert org/name FOLDER"),
    "no config": ([PROMPT, "--out", "a.mp4", "--model", "."], "no config.json"),
    "both": ([PROMPT, "--prompts", "good.txt", "--out", "v"], "not allowed with"),
    "neither": (["--out", "v"], "one of the arguments PROMPT --prompts is required"),
    "no out": ([PROMPT], "required: --out"),
    "zero frames": ([PROMPT, "--out", "a.mp4", "--frames", 0], "'0' must be a whole number, 1 or more"),
    "negative sink": ([PROMPT, "--out", "a.mp4", "--sink=-1"], "'-1' must be a whole number, 0 or more"),
    "seed": ([PROMPT, "--out", "a.mp4", "--seed", 2**32], "a whole number, 0 to 4294967295"),
    "option": ([PROMPT, "--out", "a.mp4", "--heigth", 16], "unknown option --heigth: did you mean --height?"),
    "words": (["a", "red", "ball", "--out", "a.mp4"], "a prompt of several words goes in quotes"),
    "model and preset": ([PROMPT, "--out", "a.mp4", "--model", "x", "--preset", "tiny"], "not allowed with"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_loaded(case, model, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    monkeypatch.setattr(Pipeline, "random", None)
    open("empty.txt", "w").close()
    with open("good.txt", "w") as file:
        file.write(PROMPT)
    with open("latin.txt", "wb") as file:
        file.write("Ein Ball im Gehölz\n".encode("latin-1"))
    before = files()
    argv, message = BAD[case]
    if not {"--model", "--preset"} & set(map(str, argv)):
        argv = [*argv, "--model", model]
    assert run("generate", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert files() == before


def test_incomplete_and_undistilled_models_are_refused(model, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    command = ["generate", PROMPT, "--out", "a.mp4", "--model", model]

    def refusal(**changes):
        config = dataclasses.replace(PRESETS["tiny"], **changes)
        with open(os.path.join(model, "config.json"), "w") as file:
            file.write(config.to_json())
        assert run(*command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "bidirectional" in refusal(kind="bidirectional")
    assert "has no tokenizer yet: add it with jax-causal convert" in refusal(
        tokenizer=TokenizerConfig(kind="sentencepiece")
    )
    os.rmdir(os.path.join(model, "text_encoder"))
    assert "has no text encoder yet: add it with jax-causal convert" in refusal()


def test_folders_that_cannot_be_written_to(model, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write to any
    os.mkdir("locked")
    for argv in (["--out", "locked/a.mp4"], ["--out", "locked/a.mp4", "--json", "locked/t.json"]):
        assert run("generate", PROMPT, "--model", model, *argv) == 2
        assert "the folder locked cannot be written to" in capsys.readouterr().err


def test_verbs_are_suggested(capsys):
    assert run("genrate", PROMPT) == 2
    assert "unknown verb 'genrate': did you mean generate?" in capsys.readouterr().err
    assert run("covert", "a", "b") == 2
    assert "did you mean convert?" in capsys.readouterr().err
    assert run("a red ball", "--out", "a.mp4") == 2
    assert 'did you mean jax-causal generate "a red ball"?' in capsys.readouterr().err
    assert run() == 2
    assert "VERB" in capsys.readouterr().err


def test_tracebacks_on_request(model, monkeypatch):
    monkeypatch.setenv("JAX_CAUSAL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="empty"):
        run("generate", "", "--out", "a.mp4", "--model", model)


def test_convert_is_mounted(capsys):
    assert run("convert", "no-such-source", "folder") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "no-such-source" in line
    assert run("convert", "--help") == 0
    assert "--entry" in capsys.readouterr().out
    assert files() == []


def test_help_does_not_import_jax(tmp_path):
    code = """
import sys
from jax_causal import cli
for argv in (["--help"], ["--version"], ["generate", "--help"], ["generate"], ["genrate"]):
    try:
        cli.main(argv)
    except SystemExit:
        pass
assert not {"jax", "numpy", "rich"} & set(sys.modules), "something heavy was imported"
"""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 5
    assert "jax-causal 0." in done.stdout
    assert "examples:" in done.stdout


def _environment(tmp_path):
    root = os.path.dirname(os.path.dirname(cli.__file__))
    return os.environ | {"PYTHONPATH": root, "XDG_CACHE_HOME": str(tmp_path / "cache")}
