"""Checkpoints of a running training: `step_00000120/` holds `state/` (orbax) and `record.json`, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import jax

from jax_causal import checkpoint
from jax_causal.training.config import FREE, TrainConfig, changes

KEEP = 2
_RECORD = "record.json"


def name(step: int) -> str:
    """Of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def save(folder: Path, step: int, state: dict, config: TrainConfig, elapsed_s: float) -> Path:
    """Writes the state after `step` updates, then removes all but the last `KEEP` checkpoints.

    Raises:
      OSError: the disk is full, or the folder cannot be written to; the checkpoints before are intact.
    """
    path = folder / name(step)
    new = path.with_name(f".{path.name}.new")
    is_first = jax.process_index() == 0
    if is_first:
        shutil.rmtree(new, ignore_errors=True)
    try:
        checkpoint.save(new / "state", state, overwrite=True)
        if is_first:
            record = {"step": step, "elapsed_s": elapsed_s, "config": config.to_dict()}
            record["hash"] = _hash(record["config"])
            (new / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)  # of the same step, hence the same
            new.rename(path)
            for old in _paths(folder)[:-KEEP]:
                shutil.rmtree(old)
    except BaseException:
        if is_first:
            _remove(new)
        raise
    return path


def _remove(folder: Path) -> None:
    """Removes a folder until it stays away: where a save has failed, threads of orbax may still write and make it."""
    away = 0
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        away = 0 if folder.exists() else away + 1
        if away == 10:
            return


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a training folder."""
    return (_paths(folder) or [None])[-1]


def restore(
    path: Path, abstract: dict, config: TrainConfig, *, allow_changes: bool = False
) -> tuple[int, dict, float]:
    """(updates done, state, seconds of training so far) of a checkpoint.

    Args:
      abstract: nested dict of `jax.ShapeDtypeStruct`, with the shardings to restore onto.
      config: of the run that goes on. It must be that of the checkpoint, `FREE` keys apart, unless `allow_changes`.

    Raises:
      ValueError: damaged, or of another configuration or other leaves; the message says what differs.
    """
    record = _read(path)
    found = changes(record["config"], config.to_dict(), ignore=FREE)
    if found and not allow_changes:
        raise ValueError(
            f"{path} was trained with another configuration: {'; '.join(found)}. Resume with the old one, train into "
            "another folder with init_from, or pass --allow-changes"
        )
    try:
        state = checkpoint.restore(path / "state", abstract)
    except FileNotFoundError:
        raise ValueError(_damaged(path, "it has no state")) from None
    except checkpoint.OtherLeaves as error:
        raise ValueError(f"{path} holds another state than this stage has:\n{error.differences}") from None
    except ValueError as error:
        raise ValueError(_damaged(path, "its state cannot be read")) from error
    # Empty dicts are not stored.
    state = jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(state))
    return record["step"], state, record["elapsed_s"]


def _read(path: Path) -> dict:
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        sound = record["hash"] == _hash(record["config"]) and isinstance(record["step"], int)
        if sound and isinstance(record["elapsed_s"], float):
            return record
        reason = "its configuration does not match its hash"
    except (OSError, ValueError, KeyError, TypeError):
        reason = f"{_RECORD} cannot be read"
    raise ValueError(_damaged(path, reason))


def _damaged(path: Path, reason: str) -> str:
    before = [other for other in _paths(path.parent) if other < path]
    then = f"go on from {before[-1].name}" if before else "start anew"
    return f"the checkpoint {path} is damaged ({reason}): delete it to {then}"


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed save left."""
    for path in folder.glob(".step_*.new"):
        shutil.rmtree(path, ignore_errors=True)
