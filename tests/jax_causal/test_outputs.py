"""Folders of numbered videos and JSON records; the videos here are text files."""

import json
import os

import pytest

from jax_causal.outputs import VideoFolder, json_writer

PROMPTS = ["a red ball", "a blue square", "a cat"]
SETTINGS = {"seed": 0, "window": None, "model": "tiny"}


@pytest.fixture
def folder(tmp_path):
    """Two of three videos made."""
    videos = VideoFolder(tmp_path / "videos", PROMPTS, SETTINGS)
    assert videos.unfinished() == [(tmp_path / "videos" / f"000{i}.mp4", p) for i, p in enumerate(PROMPTS, 1)]
    assert os.listdir(tmp_path) == []  # looking changes nothing
    videos.begin()
    for path, prompt in videos.unfinished()[:2]:
        path.write_text(prompt)
    return tmp_path / "videos"


def _content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_same_again_continues(folder):
    before = _content(folder)
    videos = VideoFolder(folder, PROMPTS, SETTINGS)
    videos.begin()
    assert videos.unfinished() == [(folder / "0003.mp4", "a cat")]
    assert _content(folder) == before
    record = json.loads(before["prompts.json"])
    assert record == {"settings": SETTINGS, "prompts": PROMPTS}


def test_other_prompts_or_settings_are_refused(folder):
    before = _content(folder)
    with pytest.raises(
        FileExistsError, match=r"seed was 0, is 1; window was None, is 4\. Pass --overwrite .* another"
    ):
        VideoFolder(folder, PROMPTS, {**SETTINGS, "seed": 1, "window": 4})
    with pytest.raises(
        FileExistsError, match=r"there were 3 prompts, are 2; prompt 2 was 'a blue square', is 'a dog'"
    ):
        VideoFolder(folder, ["a red ball", "a dog"], SETTINGS)
    with pytest.raises(FileExistsError, match="image was None, is a"):
        VideoFolder(folder, PROMPTS, {**SETTINGS, "image": "a.png"})
    assert _content(folder) == before


def test_overwriting_removes_what_was_made_before(folder):
    (folder / "0007.mp4").write_text("somebody else's")
    videos = VideoFolder(folder, ["a dog"], SETTINGS, overwrite=True)
    assert "0002.mp4" in _content(folder)
    videos.begin()
    assert set(_content(folder)) == {"prompts.json", "0007.mp4"}
    assert videos.unfinished() == [(folder / "0001.mp4", "a dog")]
    assert VideoFolder(folder, ["a dog"], SETTINGS).unfinished() == videos.unfinished()


def test_videos_of_somebody_else_are_refused(tmp_path):
    (tmp_path / "0002.mp4").touch()
    with pytest.raises(FileExistsError, match=r"0002\.mp4 exists, and no prompts\.json says what from"):
        VideoFolder(tmp_path, PROMPTS, SETTINGS)
    assert len(VideoFolder(tmp_path, PROMPTS[:1], SETTINGS).unfinished()) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"prompts": ["a"]}', '{"prompts": 3, "settings": {}}'])
def test_a_damaged_record_is_no_licence(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match=r"prompts\.json is damaged: choose another folder, or delete it"):
        VideoFolder(tmp_path, PROMPTS, SETTINGS)


def test_more_than_four_digits(tmp_path):
    videos = VideoFolder(tmp_path / "v", ["x"] * 10_001, SETTINGS).unfinished()
    assert [path.name for path, _ in (videos[0], videos[9999], videos[10_000])] == [
        "0001.mp4",
        "10000.mp4",
        "10001.mp4",
    ]


def test_records_are_lines(tmp_path, capsys):
    path = tmp_path / "t.json"
    path.write_text("old")
    write = json_writer(str(path))
    assert path.read_text() == "old"
    for record in ({"a": 1}, {"a": [2.5, 3]}):
        write(record)
    assert path.read_text() == '{"a": 1}\n{"a": [2.5, 3]}\n'
    json_writer("-")({"b": 1})
    json_writer(None)({"c": 1})
    assert capsys.readouterr().out == '{"b": 1}\n'
