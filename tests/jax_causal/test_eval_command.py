"""`jax-causal eval` from end to end, with stand-ins for a trained model on a folder that looks like one."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_causal import cli, environment, eval_command
from jax_causal.evaluation import ATTRIBUTES
from jax_causal.generate import Job
from jax_causal.video import read_video
from tests.jax_causal.evaluation_stubs import CONFIG, Stub

LIMIT = 6


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test in its own folder, with an environment that stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)


@pytest.fixture
def model(tmp_path_factory):
    """A model folder that looks complete; stand-ins are loaded in place of its weights."""
    folder = tmp_path_factory.mktemp("model")
    for part in ("transformer", "vae", "text_encoder"):
        (folder / part).mkdir()
    (folder / "config.json").write_text(CONFIG.to_json())
    return str(folder)


@pytest.fixture
def pipes(monkeypatch):
    """[(job, stand-in)] of everything that was loaded; `sets` and `shift` go to the stand-ins."""
    loaded = []

    def put(shift=0, sets=("held-out",), limit=LIMIT):
        def load(job):
            loaded.append((job, Stub(limit, sets, shift)))
            return loaded[-1][1]

        monkeypatch.setattr(Job, "load", load)
        return loaded

    return put


def run(*argv) -> int:
    """The exit status of `jax-causal eval ARGV...`."""
    try:
        return cli.main(["eval", *map(str, argv)])
    except SystemExit as end:
        return end.code


def _values(record, variant, set_name="held-out", window=0):
    return {
        row["attribute"]: row["value"]
        for row in record["scores"]
        if (row["variant"], row["set"], row["window"]) == (variant, set_name, window)
    }


def test_a_right_model(model, pipes, capsys):
    pipes()
    options = ["--limit", LIMIT, "--json", "s.json", "--sheet", "s.png", "--variants", "model,truth"]
    assert run("--model", model, *options) == 0
    record = json.loads(Path("s.json").read_text())
    assert _values(record, "model") == dict.fromkeys(ATTRIBUTES, 1.0)
    assert _values(record, "truth") == dict.fromkeys(ATTRIBUTES, 1.0)
    (row,) = (r for r in record["scores"] if r["variant"] == "model" and r["attribute"] == "all")
    assert (row["prompts"], row["clips"], row["high"]) == (LIMIT, LIMIT, 1.0)
    assert row["low"] == pytest.approx(0.6097, abs=1e-3)  # Wilson, 6 of 6
    assert (
        record.items() >= {"model": "stub", "prompts": LIMIT, "seeds": 1, "frames": 81, "devices": 1}.items()
    )
    assert record["complete"] is True
    assert len(record["clips"]) == 2 * LIMIT
    assert all(clip["all"] is True for clip in record["clips"])
    assert {row["kind"] for row in record["differences"]} == {"variant"}
    assert record["frame_differences"] == []

    with Image.open("s.png") as image:
        assert image.size == (10 * (CONFIG.width + 2), LIMIT * (CONFIG.height + 38))
    out = capsys.readouterr().out
    assert "held-out" in out
    assert "100.0 61-100" in out
    assert "truth - model" in out
    assert "+0.0 -24 to +24" in out  # 1.96 / 8, of two disagreements of opposite sides more in 8


def test_a_run_that_ends_early_leaves_what_it_found(model, monkeypatch):
    def load(job):
        if job.limits["window"]:
            raise OSError("no power")
        return Stub(2, ("held-out",), 0)

    monkeypatch.setattr(Job, "load", load)
    assert run("--model", model, "--limit", 2, "--json", "s.json", "--variants", "model,windowed") != 0
    record = json.loads(Path("s.json").read_text())
    assert record["complete"] is False
    assert _values(record, "model")["all"] == 1.0
    assert _values(record, "windowed") == {}


def test_a_model_that_does_not_listen(model, pipes):
    pipes(shift=3, limit=12)
    assert run("--model", model, "--limit", 12, "--json", "s.json") == 0
    found = _values(json.loads(Path("s.json").read_text()), "model")
    assert found["all"] < 0.1
    assert all(found[name] < 0.6 for name in ("background", "color", "shape", "motion"))
    assert found["smooth"] > 0.9  # which no caption says


def test_variants_differ_in_what_they_say(model, pipes):
    loaded = pipes()
    names = "model,single,windowed,bfloat16,ring,ulysses,windowed-2x"
    assert run("--model", model, "--limit", 2, "--variants", names, "--json", "s.json", "--seeds", 2) == 0
    jobs = dict(zip(names.split(","), [job for job, _ in loaded], strict=True))
    assert [jobs[n].parallel.num_devices for n in ("model", "single", "ring", "ulysses")] == [1, 1, 8, 8]
    assert "ring" in jobs["ring"].parallel.name
    assert "ulysses" in jobs["ulysses"].parallel.name
    assert (jobs["model"].precision, jobs["bfloat16"].precision) == ("float32", "bfloat16")
    assert jobs["model"].limits == {"window": None, "sink": 0}
    assert jobs["windowed"].limits == jobs["windowed-2x"].limits == {"window": 12, "sink": 3}
    stubs = [stub for _, stub in loaded]
    assert stubs[0].calls == stubs[4].calls  # the same prompts with the same seeds
    assert [seed for _, seeds in stubs[0].calls for seed in seeds] == [0, 2**16, 1, 2**16 + 1]
    record = json.loads(Path("s.json").read_text())
    assert {row["window"] for row in record["scores"] if row["variant"] == "windowed-2x"} == {0, 1}
    assert {row["kind"] for row in record["differences"]} == {"variant", "drift"}
    compared = {row["variant"]: row["max_difference"] for row in record["frame_differences"]}
    assert compared == dict.fromkeys(("single", "bfloat16", "ring", "ulysses"), 0)


def test_sets_apart(model, pipes):
    sets = ("held-out", "seen", "held-out-pairs")
    pipes(sets=sets, limit=2)
    assert run("--model", model, "--limit", 2, "--sets", ",".join(sets), "--json", "s.json") == 0
    record = json.loads(Path("s.json").read_text())
    assert all(_values(record, "model", name)["all"] == 1 for name in sets)
    assert {(row["kind"], row["set"]) for row in record["differences"]} == {("split", "held-out")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "rings"], "unknown variant 'rings'; choose from model, single"),
        (["--variants", "vae-2x"], "unknown variant 'vae-2x'"),
        (["--variants", "teacher"], "needs --teacher FOLDER"),
        (["--sets", "unseen"], "unknown set 'unseen'; choose from held-out"),
        (["--sheet", "a.jpg"], "must end in .png"),
        (["--sheet", "no/a.png"], "the folder no does not exist"),
        (["--json", "no/a.json"], "the folder no does not exist"),
        (["--vbench", "out"], "--vbench OUT and --prompts FILE go together"),
        (["--limit", "0"], "must be a whole number, 1 or more"),
    ],
)
def test_bad_input_is_found_before_anything_is_loaded(model, pipes, capsys, options, message):
    loaded = pipes()
    assert run("--model", model, *options) == 2
    assert message in capsys.readouterr().err
    assert not loaded


def test_a_few_step_model_is_no_teacher(model, pipes, capsys):
    pipes()
    assert run("--model", model, "--teacher", model, "--limit", 1) == 2
    assert "holds a few-step causal model" in capsys.readouterr().err


# VBench.


def test_videos_for_vbench(model, pipes, tmp_path, capsys):
    loaded = pipes()
    (tmp_path / "scene.txt").write_text("a cat\na dog\n")
    command = ["--model", model, "--vbench", "out", "--prompts", "scene.txt", "--seeds", 2, "--seed", 5]
    command += ["--frames", 9]
    assert run(*command, "--json", "t.json") == 0
    names = ["a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4", "a dog-1.mp4"]
    assert sorted(p.name for p in (tmp_path / "out/scene").iterdir()) == names
    assert loaded[0][1].calls == [("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6)]
    assert [json.loads(line)["seed"] for line in Path("t.json").read_text().splitlines()] == [5, 6, 5, 6]
    frames, fps = read_video(tmp_path / "out/scene/a dog-1.mp4")
    assert (len(frames), fps) == (9, 16)
    assert abs(int(np.median(frames)) - 6) <= 2

    (tmp_path / "out/scene/a dog-0.mp4").unlink()
    assert run(*command) == 0
    assert loaded[1][1].calls == [("a dog", 5)]
    assert run(*command) == 0
    assert len(loaded) == 2  # nothing left to do
    assert run(*command[:-1], 21) == 2
    assert "frames was 9, is 21" in capsys.readouterr().err


def test_variant_names():
    assert eval_command.parse_variant("windowed-4x") == ("windowed", 4)
    assert eval_command.parse_variant("model") == ("model", 1)
    for name in ("model-0x", "model-x", "", "-2x"):
        with pytest.raises(ValueError, match="unknown variant"):
            eval_command.parse_variant(name)
