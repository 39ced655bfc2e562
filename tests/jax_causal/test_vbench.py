"""VBench: file names, counts, records, and prompts that cannot be."""

import json

import pytest

from jax_causal.vbench import Suite

PROMPTS = ["A 3D model of a 1800s victorian house.", "a person, by Hokusai", "#1 of cats"]


@pytest.fixture
def suite(tmp_path):
    def make(name="scene", lines=PROMPTS, **options):
        (tmp_path / f"{name}.txt").write_text("\r\n".join([*lines, "", ""]), encoding="utf-8")
        return Suite(tmp_path, tmp_path / f"{name}.txt", **{"settings": {"model": "m"}} | options)

    return make


def test_names_are_those_of_vbench(suite, tmp_path):
    jobs = suite().unfinished()
    names = [f"A 3D model of a 1800s victorian house.-{i}.mp4" for i in range(5)]
    names.append("a person, by Hokusai-0.mp4")
    assert [job.path for job in jobs[:6]] == [tmp_path / "scene" / name for name in names]
    assert [(job.text, job.seed) for job in jobs[4:7]] == [(PROMPTS[0], 4), (PROMPTS[1], 0), (PROMPTS[1], 1)]
    assert len(jobs) == 15


def test_temporal_flickering_has_25(suite):
    assert [job.seed for job in suite("temporal_flickering").unfinished()] == [*range(25)] * 3
    assert len(suite("temporal_flickering", videos=2, seed=9).unfinished()) == 6
    assert suite("human_action", videos=2, seed=9).unfinished()[1].seed == 10


def test_extended_prompts_are_for_the_model_only(suite, tmp_path):
    longer = tmp_path / "longer.txt"
    longer.write_text("".join(f"{prompt} and much more\n" for prompt in PROMPTS))
    job = suite(extended=longer).unfinished()[5]
    assert job.text == "a person, by Hokusai and much more"
    assert job.path.name == "a person, by Hokusai-0.mp4"
    longer.write_text("only one")
    with pytest.raises(ValueError, match=r"has 1 prompts and .* 3: they go line by line"):
        suite(extended=longer)


def test_the_folder_holds_videos_only_and_continues(suite, tmp_path):
    first = suite(videos=2)
    first.begin()
    assert list((tmp_path / "scene").iterdir()) == []
    first.unfinished()[0].path.touch()
    first.unfinished()[2].path.touch()
    assert [job.path.name[-5] for job in suite(videos=2).unfinished()] == ["1", "0", "0", "1"]
    assert json.loads((tmp_path / "scene.json").read_text())["settings"] == {"model": "m", "seed": 0}
    with pytest.raises(FileExistsError, match=r"model was m, is other.*--overwrite"):
        suite(videos=2, settings={"model": "other"})
    again = suite(videos=1, settings={"model": "other"}, overwrite=True)
    again.begin()
    assert list((tmp_path / "scene").iterdir()) == []
    assert len(again.unfinished()) == 3


def test_a_prompt_that_comes_twice_is_made_once(suite):
    assert len(suite(lines=["a cat", "a dog", "a cat"], videos=1).unfinished()) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a/b"], "no file can be named after 'a/b'"),
        (["é" * 150], "longer than a file's name can be"),
        ([], "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be(suite, lines, message):
    with pytest.raises(ValueError, match=message):
        suite(lines=lines)


def test_a_prompts_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Suite(tmp_path, tmp_path / "no.txt", settings={})
