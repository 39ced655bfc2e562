"""Videos for VBench (arXiv:2311.17982): the file names and counts that its evaluation looks for.

Videos lie in FOLDER/SUITE/, where the suite is named like its prompts file, as `PROMPT-INDEX.mp4`: five of each
prompt, and 25 where temporal flickering is measured. VBench takes every file in that folder for a video, so the
record, which an interrupted export continues from, lies beside it: FOLDER/SUITE.json.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax_causal.outputs import VideoFolder

VIDEOS = 5
VIDEOS_BY_SUITE = {"temporal_flickering": 25}
_LONGEST_NAME = 255 - len(".-00.mp4.12345678.tmp")  # bytes; a hidden temporary file has the longer name


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make: `text` is what the model is given."""

    path: Path
    text: str
    seed: int


class Suite:
    """The videos of one prompts file.

    Args:
      folder: exists; the suite's own folder is made in it.
      prompts: file of prompts, one per line, as VBench has them.
      extended: file of longer wordings, line by line, that the model is given in their place.
      videos: of each prompt; None is what VBench asks for.
      seed: of each prompt's first video; the next ones count up from it.
      settings: whatever else the videos depend on, JSON values by name.
      overwrite: make all videos anew.

    Raises:
      ValueError: no prompts, one that no file can be named after, or files of unlike length.
      OSError: as in `VideoFolder`.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Path,
        *,
        extended: Path | None = None,
        videos: int | None = None,
        seed: int = 0,
        settings: dict,
        overwrite: bool = False,
    ):
        lines = read_lines(prompts)
        for line in lines:
            _check_name(line, prompts)
        texts = lines if extended is None else read_lines(extended)
        if len(texts) != len(lines):
            raise ValueError(
                f"{extended} has {len(texts)} prompts and {prompts} {len(lines)}: they go line by line"
            )
        # A prompt that comes twice has one set of videos: they would have the same names.
        lines, texts = zip(
            *{line: (line, text) for line, text in zip(lines, texts, strict=True)}.values(), strict=True
        )
        count = videos or VIDEOS_BY_SUITE.get(prompts.stem, VIDEOS)
        self._videos = VideoFolder(
            folder / prompts.stem,
            [text for text in texts for _ in range(count)],
            settings | {"seed": seed},
            overwrite=overwrite,
            names=[f"{line}-{index}.mp4" for line in lines for index in range(count)],
            record=folder / f"{prompts.stem}.json",
        )
        self.folder = self._videos.folder
        self.prompts, self.count, self._seed = list(lines), len(lines) * count, seed

    def unfinished(self) -> list[Job]:
        """What is left to make."""
        return [
            Job(path, text, self._seed + int(path.stem.rsplit("-", 1)[1]))
            for path, text in self._videos.unfinished()
        ]

    def begin(self) -> None:
        """See `VideoFolder.begin`."""
        self._videos.begin()


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped, empty ones left out: VBench's prompts start with anything, even #.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not UTF-8, or nothing in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8: save it as one") from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{path} holds no prompts: write one per line")
    return found


def _check_name(prompt: str, source: Path) -> None:
    if "/" in prompt or "\0" in prompt:
        raise ValueError(f"{source}: no file can be named after {prompt!r}; VBench needs that")
    if len(prompt.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{source}: {prompt[:40]!r}... is longer than a file's name can be ({_LONGEST_NAME} bytes); longer "
            "wordings for the model go into a second file, --extended"
        )
