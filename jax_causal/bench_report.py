"""`jax-causal bench`: the measurements of `bench` as a table or as JSON, beside those of an earlier run if asked for.

Whatever can be wrong is checked before anything is loaded, the earlier run included.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from jax_causal import bench, bench_start
from jax_causal.bench_rows import BOUNDARIES, FLOORS, Row, check_rows
from jax_causal.console import note, report
from jax_causal.generate import Job
from jax_causal.outputs import json_writer
from jax_causal.parallel import Parallel

# What two runs must share to be comparable. Devices, strategy, precision and versions may be what is compared.
SAME = ("model", "frames", "height", "width", "window", "sink")
NOT_MEASURED = "not measured: the time of single kernels; jax.profiler.trace shows them"


def run(args: argparse.Namespace, parallel: Parallel, session=None) -> None:
    """Measures as the parsed arguments say, run in the way of `parallel`.

    `session` is this process's `sharding.distributed.Session`, if it is one of several; only the first of them writes
    and shows anything.

    Raises ValueError or OSError for bad input, before the work begins.
    """
    wanted = check_rows(args.only)
    job = Job.create(args, parallel, "any prompt")
    if args.since is not None:
        return bench_start.report(job, args.since)
    first = session is None or session.first
    if session:
        wanted -= set(bench_start.ROWS)
        session.check_agreement(job.agreed | {"rows": sorted(wanted), "repeats": args.repeats})
    facts = _facts(job, args.repeats)
    earlier = None if args.compare is None else read_earlier(args.compare, facts)
    write_json = json_writer(args.json if first else None)

    started = []
    if not wanted.isdisjoint(bench_start.ROWS):
        note(f"measuring fresh processes: {', '.join(bench_start.ROWS)}")
        started = [row for row in bench_start.measure(args) if row.name in wanted]
        _tell(started)
    say, tell = (note, _tell) if first else (_nothing, _nothing)
    say(f"loading {job.config.name}")
    size = {name: job.inputs[name] for name in ("num_frames", "height", "width", "seed")}
    measured = bench.run(
        job.load(text_encoder=not wanted.isdisjoint(("text", "peak_memory_all"))),
        **size,
        repeats=args.repeats,
        only=wanted,
        progress=lambda what: say(f"measuring {what}"),
        measured=tell,
    )
    if not first:
        return
    measured = sorted([*started, *measured], key=lambda row: list(BOUNDARIES).index(row.name))
    left_out = [name for name in BOUNDARIES if name in wanted and name not in {row.name for row in measured}]
    record = facts | {
        "rows": [row.to_json() for row in measured],
        "boundaries": {row.name: BOUNDARIES[row.name] for row in measured},
        "floors": FLOORS,
        "left_out": left_out,
        "not_measured": NOT_MEASURED,
    }
    if earlier:
        record["compare"] = compare(measured, earlier)
    write_json(record)
    if args.json != "-":
        report(*_sections(record, measured, earlier))


def _nothing(_) -> None:
    """Says nothing."""


def check_distributed(args: argparse.Namespace) -> None:
    """Raises ValueError for what several processes cannot measure together."""
    if args.scaling:
        raise ValueError("--scaling is for the devices of one process: leave out --distributed")
    for name in args.only or ():
        if name in bench_start.ROWS:
            raise ValueError(f"{name} is of a process alone: leave out --distributed")


def _tell(rows: Sequence[Row]) -> None:
    """Says what is known already: a long measurement may be cut short."""
    for row in rows:
        note(f"  {row.name} {_number(row.median)} {row.unit}")


def read_earlier(path: Path, facts: dict) -> dict:
    """The record that `bench --json` wrote to `path`.

    Raises ValueError if it is none, or of another model or size than `facts` say, with what differs.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["name"], float(row["median"]), row["unit"]) for row in record["rows"]]
        was = {name: record[name] for name in SAME}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no measurements: name a file that bench --json wrote") from None
    differences = [f"{name} was {was[name]}, is {facts[name]}" for name in SAME if was[name] != facts[name]]
    if differences or not rows:
        why = "; ".join(differences) or "it has no rows"
        raise ValueError(f"{path} cannot be compared with this run: {why}. Measure both alike")
    return record


def compare(rows: Sequence[Row], earlier: dict) -> dict[str, float]:
    """Median by earlier median, for every row that both have in the same unit."""
    before = {(row["name"], row["unit"]): row["median"] for row in earlier["rows"]}
    return {row.name: row.median / old for row in rows if (old := before.get((row.name, row.unit)))}


def _facts(job: Job, repeats: int) -> dict:
    """What the measurements are of."""
    return job.facts() | {
        "frames": job.inputs["num_frames"],
        **job.limits,
        "repeats": repeats,
        "weights": "random" if job.folder is None else str(job.folder),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _sections(record: dict, rows: Sequence[Row], earlier: dict | None) -> list:
    count = record["devices"]
    title = Text.assemble(
        (record["model"], "bold"),
        f" · {record['frames']} frames of {record['width']} x {record['height']} pixels"
        f" · {record['precision']} on {count} x {record['device_kind']}, {record['strategy']}",
    )
    weights = "random weights" if record["weights"] == "random" else f"weights of {record['weights']}"
    window = "whole past" if record["window"] is None else f"window {record['window']}, sink {record['sink']}"
    setting = (
        f"{weights} · {window} · median of {record['repeats']} warm runs · jax {record['jax']}\n"
        f"XLA_FLAGS {record['xla_flags'] or 'none'}"
    )
    sections = [title, Text(setting, "dim"), "", _table(rows, record.get("compare")), ""]
    sections += [Text(f"{row.name}: {BOUNDARIES[row.name]}", "dim") for row in rows]
    sections += [Text(FLOORS, "dim"), Text(NOT_MEASURED, "dim")]
    if record["left_out"]:
        names = ", ".join(record["left_out"])
        sections.append(f"left out, because the model or the device does not have it: {names}")
    if earlier:
        kinds = ("precision", "devices", "strategy", "device_kind", "jax", "xla_flags")
        changed = [name for name in kinds if earlier.get(name) != record[name]]
        sections += [f"{name} was {earlier.get(name)}, is {record[name]}" for name in changed]
    return sections


def _table(rows: Sequence[Row], ratios: dict[str, float] | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("median", "min", "max", "", "floor", "of floor", *(["of earlier"] if ratios else [])):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        values = [_number(value) for value in (row.median, row.min, row.max)]
        floor = ["", ""] if row.ratio is None else [_number(row.floor), f"{row.ratio:.2f} x"]
        old = [f"{ratios[row.name]:.3f} x" if row.name in ratios else ""] if ratios else []
        table.add_row(row.name, *values, row.unit, *floor, *old)
    return table


def _number(value: float) -> str:
    """Four digits, never an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}" if value >= 0.001 else f"{value:.6f}"
