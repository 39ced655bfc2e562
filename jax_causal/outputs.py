"""Where the command line puts things: a folder of numbered videos that can be continued, and JSON records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

RECORD = "prompts.json"


class VideoFolder:
    """A folder with one video per prompt, and a record of what they are made from.

    A video that is there is finished, because videos are written atomically: a run over the folder makes those that
    are not. Making one of these only looks; `begin` changes things.

    Args:
      folder: made by `begin` where it does not exist.
      prompts: one per video.
      settings: whatever else the videos depend on, JSON values by name.
      overwrite: make all videos anew.
      names: of the files, one per prompt; None numbers them.
      record: where the record goes; None is into the folder.

    Raises:
      FileExistsError: the folder's videos were made from something else; the message says what differs.
      OSError: the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        settings: dict,
        *,
        overwrite: bool = False,
        names: Sequence[str] | None = None,
        record: Path | None = None,
    ):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, and the videos need a folder: choose another name")
        check_folder(folder if folder.exists() else folder.parent)
        self.folder, self.overwrite = folder, overwrite
        self.record = record or folder / RECORD
        self._record = {"settings": settings, "prompts": list(prompts)}
        if names is not None:
            self._record["names"] = list(names)
        if not overwrite:
            self._check()

    def unfinished(self) -> list[tuple[Path, str]]:
        """(path, prompt) of the videos to make."""
        videos = zip(self._paths(self._record), self._record["prompts"], strict=True)
        return [(path, prompt) for path, prompt in videos if self.overwrite or not path.exists()]

    def begin(self) -> None:
        """Makes the folder and its record. With `overwrite` the old videos go first, so that an interruption does not
        leave a mixture of old and new that looks like a half-finished run."""
        self.folder.mkdir(exist_ok=True)
        if self.overwrite:
            for path in self._paths(self._read() or self._record) + self._paths(self._record):
                path.unlink(missing_ok=True)
        new = self.record.with_name(f".{self.record.name}.new")
        new.write_text(json.dumps(self._record, indent=2) + "\n", encoding="utf-8")
        new.replace(self.record)

    def _check(self):
        old = self._read()
        if old is None:
            existing = [path for path in self._paths(self._record) if path.exists()]
            problem = f"{existing[0]} exists, and no {self.record.name} says what from" if existing else None
        else:
            differences = _differences(old, self._record)
            problem = differences and f"{self.folder} was made from other input: {'; '.join(differences)}"
        if problem:
            raise FileExistsError(
                f"{problem}. Pass --overwrite to make all videos anew, or choose another folder"
            )

    def _read(self) -> dict | None:
        if not self.record.exists():
            return None
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            names = {"names": list(record["names"])} if "names" in record else {}
            return {"settings": dict(record["settings"]), "prompts": list(record["prompts"])} | names
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.record} is damaged: choose another folder, or delete it") from None

    def _paths(self, record: dict) -> list[Path]:
        numbered = [f"{number:04d}.mp4" for number in range(1, len(record["prompts"]) + 1)]
        return [self.folder / name for name in record.get("names", numbered)]


def _differences(old: dict, new: dict) -> list[str]:
    """What changed from one record to another, in words."""
    was, now = old["settings"], new["settings"]
    found = [
        f"{key} was {was.get(key)}, is {now.get(key)}" for key in was | now if was.get(key) != now.get(key)
    ]
    was, now = old["prompts"], new["prompts"]
    if len(was) != len(now):
        found.append(f"there were {len(was)} prompts, are {len(now)}")
    changed = [number for number, (a, b) in enumerate(zip(was, now, strict=False), 1) if a != b]
    if changed:
        first = changed[0]
        found.append(f"prompt {first} was {was[first - 1]!r}, is {now[first - 1]!r}")
    return found


def json_writer(target: str | None, *, replace: bool = False) -> Callable[[dict], None]:
    """A function that writes records as JSON, one to a line.

    Args:
      target: a file, which the first record replaces; "-" for standard output; None for nowhere.
      replace: whether in a file every record replaces the one before.

    Raises:
      OSError: there is no such folder, or it cannot be written to.
    """
    if target is None:
        return lambda record: None
    if target == "-":
        return lambda record: print(json.dumps(record), flush=True)
    path, lines = Path(target), []
    check_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file for --json")

    def write(record):
        if replace:
            lines.clear()
        lines.append(json.dumps(record) + "\n")
        path.write_text("".join(lines), encoding="utf-8")

    return write


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError or PermissionError unless files can be made in `folder`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist: make it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {folder} cannot be written to: choose another")
