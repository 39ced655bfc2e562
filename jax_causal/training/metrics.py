"""Metrics of a run: one JSON object a line, one line an update."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """Appends to a JSONL file: {"step", "elapsed_s", then the metrics}. What is not finite is written as null.

    Args:
      path: its folder exists.
      first: update that comes next. Lines from there on, and from one that a kill cut off, are dropped.
    """

    def __init__(self, path: Path, first: int):
        lines = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if not line.endswith("\n") or not _step(line) < first:
                    break
                lines.append(line)
        new = path.with_name(f".{path.name}.new")
        new.write_text("".join(lines), encoding="utf-8")
        new.replace(path)
        self._path, self._pending = path, []

    def write(self, step: int, elapsed_s: float, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        record = {"step": step, "elapsed_s": round(elapsed_s, 3), **values}
        self._pending.append(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Puts on disk what was written since the last time."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(self._pending)
        self._pending.clear()

    def close(self) -> None:
        self.flush()


def _step(line: str) -> float:
    """The update of a line; infinite where it holds none."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
