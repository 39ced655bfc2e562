"""The scaling benchmark as a table or as JSON."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from jax_causal.arguments import split_names
from jax_causal.bench_rows import BOUNDARIES, COMMUNICATION
from jax_causal.console import note, report
from jax_causal.generate import Job
from jax_causal.outputs import json_writer
from jax_causal.parallel import SingleDevice
from sharding.mesh import pick_devices
from sharding.scaling import HOW, ROWS, Measured, Projection, Scaling, Way, alone
from sharding.strategies import Link

FASTER = (
    "the time of one device alone, divided by this one's: the mean over all devices that were measured alone, the "
    "first of them before and after the rest"
)


def run(args: argparse.Namespace) -> None:
    """Measures as the parsed arguments say: JSON where asked for, and a report unless that is on standard output.

    Raises ValueError or OSError for bad input, before the work begins.
    """
    if args.compare is not None:
        raise ValueError("--compare is not for --scaling: what it compares, it measures in one run")
    rows = [name for name in ROWS if args.only is None or name in args.only]
    if unknown := set(args.only or ()) - set(ROWS):
        raise ValueError(f"--only {min(unknown)}: the rows of --scaling are {', '.join(ROWS)}")
    if args.project and "rollout" not in rows:
        raise ValueError("a projection is of the rollout: add it to --only, or leave it out with --project 0")
    if args.project == 1:
        raise ValueError("--project 1: one device is measured; use 0 for no projection, or 2 or more")
    job = Job.create(args, SingleDevice(), "any prompt")
    devices = pick_devices(args.devices)
    write_json = json_writer(args.json, replace=True)
    inputs = {name: job.inputs[name] for name in ("num_frames", "height", "width", "seed")}
    scaling = Scaling(
        job.config,
        job.precision,
        inputs,
        job.limits,
        rows=rows,
        repeats=args.repeats,
        progress=lambda what: note(f"measuring {what}"),
    )
    only = None if args.strategy in (None, "auto") else split_names(args.strategy)
    here, there = _ways(scaling, len(devices), args.project, only)
    measured, projections = [], []
    record = job.facts() | {
        "frames": inputs["num_frames"],
        **job.limits,
        "devices": len(devices),
        "strategy": ",".join(only or ["all"]),
        "repeats": args.repeats,
        "weights": "random",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "how": HOW | {"speedup": FASTER},
    }

    def keep(last: bool = False) -> None:
        """Writes down what is known so far: the rest may take long, or fail."""
        record["rows"] = _rows(measured)
        record["boundaries"] = {name: BOUNDARIES[name] for name in (*rows, *_profiled(measured))}
        record["projection"] = _projected(projections, alone(measured))
        if last or args.json != "-":
            write_json(record)

    def measure() -> Iterator[Measured]:
        yield scaling.single()
        yield from (scaling.measure(way, devices) for way in here)
        yield from scaling.each(devices)

    for one in measure():
        measured.append(one)
        note(_line(one, alone(measured)))
        keep()
    link, source = scaling.link(devices)
    record |= {
        "link": source,
        "link_latency_s": link.latency,
        "link_bandwidth_bytes_per_s": link.bandwidth,
    }
    for one in measured:
        if one.way and _kind(one.way) in there:
            projections.append(scaling.project(one.way, link, measured=one))
            keep()
    like = {_kind(projection.way): projection for projection in projections}
    for kind, way in there.items():
        if args.project != len(devices):
            projections.append(scaling.project(way, link, calibration=like.get(kind)))
            keep()
    keep(last=True)
    if args.json != "-":
        report(*_sections(record, measured, projections, link))


def _ways(
    scaling: Scaling, devices: int, more: int, only: list[str] | None
) -> tuple[list[Way], dict[tuple, Way]]:
    """What to measure, and by its kind what to project.

    Raises ValueError for a strategy in `only` that is neither.
    """
    here = scaling.ways(devices, only) if devices > 1 else []
    there = scaling.ways(more, only) if more else []
    counts = [count for count in (devices, more) if count > 1]
    for name in only if only and counts else ():
        fits, fits_more = (any(way.strategy.name == name for way in ways) for ways in (here, there))
        if not (fits or fits_more):
            found = dict.fromkeys(way.strategy.name for count in counts for way in scaling.ways(count))
            where = " or ".join(map(str, counts))
            raise ValueError(f"{name} is nothing to measure on {where} devices: use {' or '.join(found)}")
        if devices > 1 and not fits:
            note(f"{name} does not fit {devices} devices: it is only projected")
    return here, {_kind(way): way for way in there if not way.is_form}


def _line(one: Measured, single: dict[str, float]) -> str:
    """What was found of one way of running, as soon as it is known."""
    found = []
    for name in _shown(one):
        row = one.rows[name]
        faster = f"{single[name] / row.median:.2f} x"
        found.append(f"{name} {_seconds(row.median)} ({_seconds(row.min)} to {_seconds(row.max)}; {faster})")
    found += [f"{name} {one.rows[name].median * 1e3:.3f} ms" for name in COMMUNICATION if name in one.rows]
    return f"{one.label}, {one.devices} device{'s' * (one.devices > 1)}: {', '.join(found)}"


def _shown(one: Measured) -> list[str]:
    """Those of `ROWS` that were asked for."""
    return [name for name in ROWS if name in one.rows]


def _kind(way: Way) -> tuple:
    """What makes ways alike on any number of devices."""
    return way.strategy.name, way.direct, way.overlap, way.parts > 1


def _rows(measured: list[Measured]) -> list[dict]:
    """Every row with the way it was run, and how much faster than one device it is, where that was measured too."""
    single = alone(measured)
    return [
        {"strategy": one.label, "devices": one.devices}
        | row.to_json()
        | {"speedup": single[name] / row.median if name in single else None}
        for one in measured
        for name, row in one.rows.items()
    ]


def _profiled(measured: list[Measured]) -> list[str]:
    """Those of `COMMUNICATION` that the profiles showed."""
    return [name for name in COMMUNICATION if any(name in one.rows for one in measured)]


def _projected(projections: list[Projection], single: dict[str, float]) -> list[dict]:
    return [
        {
            "strategy": p.way.label,
            "devices": p.way.strategy.devices,
            "share_s": p.share,
            "sending_s": p.sending,
            "together_s": p.together,
            "together_speedup": single["rollout"] / p.together,
            "measured_s": p.measured,
            "exposed": p.exposed,
            "calibrated_s": p.calibrated,
            "calibrated_speedup": p.calibrated and single["rollout"] / p.calibrated,
        }
        for p in projections
    ]


def _sections(record: dict, measured: list[Measured], projections: list[Projection], link: Link) -> list:
    title = Text.assemble(
        (record["model"], "bold"),
        f" · {record['frames']} frames of {record['width']} x {record['height']} pixels"
        f" · {record['precision']} on {record['devices']} x {record['device_kind']}",
    )
    window = "whole past" if record["window"] is None else f"window {record['window']}, sink {record['sink']}"
    setting = (
        f"random weights · {window} · median of {record['repeats']} warm runs · jax {record['jax']}\n"
        f"XLA_FLAGS {record['xla_flags'] or 'none'}"
    )
    reach = f"{link.latency * 1e6:.0f} us and {link.bandwidth / 1e9:.3g} GB/s"
    origin = "measured on these devices" if record["link"] == "measured" else "assumed: there is one device"
    sections = [title, Text(setting, "dim"), "", _measured_table(measured), ""]
    sections += [Text(f"{name}: {BOUNDARIES[name]}", "dim") for name in _shown(measured[0])]
    sections.append(Text(f"x: {FASTER}", "dim"))
    if profiled := _profiled(measured):
        sections += ["", _communication_table(measured), ""]
        sections += [Text(f"{name}: {BOUNDARIES[name]}", "dim") for name in profiled]
    if not projections:
        return sections
    sections += [
        "",
        Text.assemble(("Projection", "bold"), f" of the rollout, not a measurement; link {reach}, {origin}"),
    ]
    sections += [_projected_table(record["projection"]), ""]
    return sections + [Text(f"{name}: {text}", "dim") for name, text in HOW.items()]


def _measured_table(measured: list[Measured]) -> Table:
    names, single = _shown(measured[0]), alone(measured)
    table = _table("measured", "devices", *(cell for name in names for cell in (name, "")))
    for one in measured:
        cells = []
        for name in names:
            own = one.rows[name].median if name in one.rows else None
            cells += ["", ""] if own is None else [_seconds(own), f"{single[name] / own:.2f} x"]
        table.add_row(one.label, str(one.devices), *cells)
    return table


def _communication_table(measured: list[Measured]) -> Table:
    table = _table("by the profiler", "devices", *COMMUNICATION)
    for one in measured:
        if cells := [f"{one.rows[name].median * 1e3:.3f} ms" for name in COMMUNICATION if name in one.rows]:
            table.add_row(one.label, str(one.devices), *cells)
    return table


def _projected_table(projected: list[dict]) -> Table:
    names = ("share", "sending", "together", "", "measured", "exposed", "calibrated", "")
    table = _table("projection", "devices", *names)
    for p in projected:
        table.add_row(
            p["strategy"],
            str(p["devices"]),
            *(_seconds(p[name]) for name in ("share_s", "sending_s", "together_s")),
            f"{p['together_speedup']:.2f} x",
            "" if p["measured_s"] is None else _seconds(p["measured_s"]),
            "" if p["exposed"] is None else f"{p['exposed']:.2f}",
            "" if p["calibrated_s"] is None else _seconds(p["calibrated_s"]),
            "" if p["calibrated_s"] is None else f"{p['calibrated_speedup']:.2f} x",
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
    return table


def _seconds(value: float) -> str:
    return f"{value:#.4g} s" if value >= 0.001 else f"{value:.6f} s"
