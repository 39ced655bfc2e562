"""`jax-causal train`, with the stage of the tests in the place of a real one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_causal import arguments as command_line
from jax_causal import cli, environment, train_command
from jax_causal.config import preset
from jax_causal.training import checkpoints, stage
from tests import toy_stage

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test in its own folder, with a configuration file and an environment that stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)
    monkeypatch.setitem(stage.STAGES, "teacher", ("tests.toy_stage", "ToyStage"))
    Path("toy.json").write_text(toy_stage.config(model="tiny", num_steps=12).to_json())


def run(*argv) -> int:
    """The exit status of `jax-causal train ARGV...`."""
    try:
        return cli.main(["train", *map(str, argv)])
    except SystemExit as end:
        return end.code


def arguments(*argv):
    return command_line.parse(["train", "--out", "a", *argv], {})


def test_a_run_and_the_next_one_from_its_folder(capsys):
    assert run("--config", "toy.json", "--out", "a", "--json", "-") == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert (record["stage"], record["step"], record["finished"], record["devices"]) == (
        "teacher",
        12,
        True,
        1,
    )
    assert "teacher 12/12  loss " in shown.err
    assert (json.loads(Path("a/config.json").read_text())["kind"]) == "bidirectional"
    assert run("--config", "toy.json", "--out", "a") == 2
    assert "pass --resume" in capsys.readouterr().err
    assert run("--config", "toy.json", "--out", "a", "--resume", "--quiet") == 0
    assert capsys.readouterr().err == ""
    changed = ["--set", "num_steps=15", "log_every=1"]
    assert run("--config", "toy.json", "--out", "a", "--resume", *changed) == 2
    assert "num_steps was 12, is 15" in capsys.readouterr().err
    assert run("--config", "toy.json", "--out", "a", "--resume", "--allow-changes", *changed) == 0
    assert len(Path("a/training/metrics.jsonl").read_text().splitlines()) == 15


@pytest.mark.sp
def test_several_devices(capsys):
    assert run("--config", "toy.json", "--out", "a", "--devices", 8, "--json", "a.json") == 0
    assert "8 x 1 x cpu" in capsys.readouterr().err
    assert (
        run("--config", "toy.json", "--out", "b", "--devices", 4, "--strategy", "ring", "--json", "b.json")
        == 0
    )
    assert "1 x 4 x cpu, ring" in capsys.readouterr().err
    assert json.loads(Path("b.json").read_text())["strategy"] == "ring"


def test_devices_and_strategy():
    toy = ("--config", "toy.json")

    def mesh(*argv):
        return dataclasses.astuple(train_command.configuration(arguments(*toy, *argv)).mesh)

    assert mesh() == (1, 1)
    assert mesh("--devices", "8") == (8, 1)
    assert mesh("--devices", "8", "--strategy", "ring") == (1, 8)
    assert mesh("--devices", "8", "--strategy", "ring", "--set", "mesh.seq=4") == (2, 4)
    assert mesh("--devices", "4", "--set", "mesh.seq=2") == (2, 2)
    assert train_command.configuration(arguments(*toy, "--strategy", "ring")).strategy == "ring"
    with pytest.raises(ValueError, match=r"--devices 6 must be a multiple of mesh\.seq=4"):
        mesh("--devices", "6", "--set", "mesh.seq=4")
    with pytest.raises(
        ValueError, match=r"batch_size=8 must be a multiple of accumulate x mesh\.data = 1 x 3"
    ):
        mesh("--devices", "3")


BAD = {
    "nothing": (["--out", "a"], "say what to train: --stage vae"),
    "stage": (["--stage", "teacher-forcing", "--out", "a"], "invalid choice"),
    "other stage": (
        ["--stage", "vae", "--config", "toy.json", "--out", "a"],
        "is for --stage teacher, not vae",
    ),
    "no such": (["--config", "toi.json", "--out", "a"], "there is no configuration toi.json"),
    "key": (
        ["--config", "toy.json", "--out", "a", "--set", "learning_rat=1"],
        "did you mean 'learning_rate'",
    ),
    "option": (["--config", "toy.json", "--out", "a", "--set", "options.noize=1"], "did you mean 'noise'"),
    "file": (["--config", "toy.json", "--out", "toy.json"], "toy.json is a file: --out names a folder"),
    "start": (["--config", "toy.json", "--out", "a", "--set", "init_from=b"], "b is not a model folder"),
    "preset": (["--config", "toy.json", "--out", "a", "--set", "model=tinny"], "unknown preset 'tinny'"),
    "json": (["--config", "toy.json", "--out", "a", "--json", "b/c.json"], "the folder b does not exist"),
    "unknown": (
        ["--config", "toy.json", "--out", "a", "--resum"],
        "unknown option --resum: did you mean --resume",
    ),
    "heads": (
        [
            "--config",
            "toy.json",
            "--out",
            "a",
            "--devices",
            "3",
            "--strategy",
            "ulysses",
            "--set",
            "batch_size=3",
        ],
        "ulysses cannot share 8 heads among 3 devices",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(capsys, case):
    argv, message = BAD[case]
    assert run(*argv) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["toy.json"]


def test_its_own_start(capsys):
    Path("a").mkdir()
    Path("a/config.json").write_text(preset("tiny").to_json())
    assert run("--config", "toy.json", "--out", "a", "--set", "init_from=./a") == 2
    assert "--out and init_from are both a" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(capsys):
    assert run("--config", "toy.json", "--out", "a", "--set", "options.nan_at=7") == 1
    assert "error: update 7: loss is nan. The last good state is a/training/step_00000007" in (
        capsys.readouterr().err
    )


def test_sigterm_to_the_program():
    code = (
        "import sys; from jax_causal.training import stage; stage.STAGES['teacher'] = ('tests.toy_stage', 'ToyStage')\n"
        "from jax_causal import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["--config", "toy.json", "--out", "a", "--set", "num_steps=1000000"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while checkpoints.latest(Path("a/training")) is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    last = checkpoints.latest(Path("a/training"))
    assert f"interrupted: update {int(last.name[5:])} is saved in {last}; --resume goes on" in shown
    lines = Path("a/training/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == int(last.name[5:]) - 1
