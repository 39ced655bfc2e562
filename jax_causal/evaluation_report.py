"""Scores for people and for programs: tables, one flat JSON record, a contact sheet.

The record, beside facts about the run:

  scores       {variant, set, window, attribute, value, low, high, prompts, clips}
  differences  {kind, variant, to, set, attribute, value, low, high}: kind "variant" compares with the first variant on
               the same prompts and seeds, "split" unseen with seen combinations, "drift" the last window of long clips
               with their first
  frame_differences  {variant, to, set, clips, max_difference, share_differing}: of levels 0 to 255; a value differs
               where it does so by more than 1, to which rounding may come
  clips        {variant, set, window, index, seed, prompt, and a bool for every attribute}

Shares are of 1, with 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from rich.text import Text

from jax_causal import evaluation_statistics as statistics
from jax_causal.evaluation import ATTRIBUTES, Outcomes
from jax_causal.video import write_png

_SPLITS = (("held-out", "seen"), ("held-out-pairs", "seen-pairs"))
_SHOWN = ("background", "color", "shape", "motion")  # what a contact sheet tells


def record(outcomes: Sequence[Outcomes]) -> dict:
    """All that is known of `outcomes`, as JSON values. The first variant is the one that others are compared with."""
    found = {"scores": [], "differences": [], "frame_differences": [], "clips": []}
    by_name = {(o.variant, o.set): o for o in outcomes}
    first = outcomes[0].variant
    for o in outcomes:
        for window in range(len(o.right)):
            found["scores"] += _scores(o, window)
            found["clips"] += _clips(o, window)
        reference = by_name.get((first, o.set))
        if o.variant != first and reference is not None:
            found["differences"] += _paired(o, reference)
            found["frame_differences"] += _frames(o, reference)
        if len(o.right) > 1:
            found["differences"] += _drift(o)
    for unseen, seen in _SPLITS:
        for variant in dict.fromkeys(o.variant for o in outcomes):
            if (variant, unseen) in by_name and (variant, seen) in by_name:
                pair = by_name[variant, unseen], by_name[variant, seen]
                found["differences"] += _rows(
                    {
                        "kind": "split",
                        "variant": variant,
                        "to": seen,
                        "set": unseen,
                    },
                    lambda a, pair=pair: statistics.difference(*(o.of(a) for o in pair)),
                )
    return found


def _rows(facts: dict, estimate) -> list[dict]:
    return [facts | {"attribute": a} | estimate(a)._asdict() for a in ATTRIBUTES]


def _scores(o: Outcomes, window: int) -> list[dict]:
    counts = {"prompts": len(o.prompts), "clips": o.of("all").size}
    facts = {"variant": o.variant, "set": o.set, "window": window}
    return [row | counts for row in _rows(facts, lambda a: statistics.share(o.of(a, window)))]


def _clips(o: Outcomes, window: int) -> list[dict]:
    return [
        {"variant": o.variant, "set": o.set, "window": window, "index": p.index, "seed": p.seed(number)}
        | {"prompt": p.text}
        | dict(zip(ATTRIBUTES, map(bool, right), strict=True))
        for p, seeds in zip(o.prompts, o.right[window], strict=True)
        for number, right in enumerate(seeds)
    ]


def _paired(o: Outcomes, reference: Outcomes) -> list[dict]:
    """Of the prompts that both were asked for; long clips count by their first window."""
    both = {p.index for p in o.prompts} & {p.index for p in reference.prompts}
    rows, others = ([i for i, p in enumerate(x.prompts) if p.index in both] for x in (o, reference))
    facts = {"kind": "variant", "variant": o.variant, "to": reference.variant, "set": o.set}
    return _rows(facts, lambda a: statistics.paired_difference(o.of(a)[rows], reference.of(a)[others]))


def _drift(o: Outcomes) -> list[dict]:
    last = len(o.right) - 1
    facts = {
        "kind": "drift",
        "variant": o.variant,
        "to": "its window 0",
        "set": o.set,
    }
    return _rows(facts, lambda a: statistics.paired_difference(o.of(a, last), o.of(a)))


def _frames(o: Outcomes, reference: Outcomes) -> list[dict]:
    """How far the frames of the kept clips are from those of the reference, where they are of one shape."""
    pairs = [
        (a.astype(int), b)
        for a, b in zip(o.clips, reference.clips, strict=False)
        if a.shape == b.shape and len(o.prompts) == len(reference.prompts)
    ]
    if not pairs:
        return []
    gaps = np.stack([np.abs(a - b) for a, b in pairs])
    return [
        {
            "variant": o.variant,
            "to": reference.variant,
            "set": o.set,
            "clips": len(pairs),
            "max_difference": int(gaps.max()),
            "share_differing": float((gaps > 1).mean()),
        }
    ]


# For people.


def sections(found: dict) -> list:
    """What rich shows of a record: for every set a table of scores, and one of comparisons."""
    parts = []
    for name in dict.fromkeys(row["set"] for row in found["scores"]):
        parts += [
            Text(f"\n{name}: share right in %, 95 % interval", "bold"),
            _score_table(found["scores"], name),
        ]
        if rows := [row for row in found["differences"] if row["set"] == name]:
            parts += [
                Text(f"\n{name}: differences in points, 95 % interval", "bold"),
                _difference_table(rows),
            ]
    for row in found["frame_differences"]:
        parts.append(
            f"{row['variant']} and {row['to']}, frames of {row['clips']} clips of {row['set']}: at most "
            f"{row['max_difference']} of 255 levels apart, {100 * row['share_differing']:.3f} % by more than 1"
        )
    return parts


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for attribute in ATTRIBUTES:
        table.add_column(attribute, justify="right")
    return table


def _score_table(rows: Sequence[dict], name: str) -> Table:
    table = _table("", "clips")
    cells = {}
    for row in rows:
        if row["set"] == name:
            cells.setdefault((row["variant"], row["window"]), []).append(row)
    long = {variant for variant, window in cells if window}
    for (variant, window), group in cells.items():
        title = f"{variant}, window {window}" if variant in long else variant
        shares = [
            f"{100 * r['value']:.1f} {100 * r['low']:.0f}-{100 * r['high']:.0f}" for r in _ordered(group)
        ]
        table.add_row(title, str(group[0]["clips"]), *shares)
    return table


def _difference_table(rows: Sequence[dict]) -> Table:
    table = _table("")
    cells = {}
    for row in rows:
        cells.setdefault(f"{row['variant']} - {row['to']}", []).append(row)
    for title, group in cells.items():
        points = [
            f"{100 * r['value']:+.1f} {100 * r['low']:+.0f} to {100 * r['high']:+.0f}"
            for r in _ordered(group)
        ]
        table.add_row(title, *points)
    return table


def _ordered(rows: Sequence[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: ATTRIBUTES.index(row["attribute"]))


# The contact sheet.


def sheet(outcomes: Outcomes, columns: int = 10) -> np.ndarray:
    """Kept clips below each other, frames over time from left to right, over each what was asked for and what of it
    is right: uint8 [H, W, 3]."""
    rows = []
    for i, (prompt, clip) in enumerate(zip(outcomes.prompts, outcomes.clips, strict=False)):
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        strip = np.concatenate(
            list(np.pad(clip[picks], ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)), 1
        )
        rows += [_heading(prompt.text, outcomes.right[0, i, 0], strip.shape[1]), strip]
    return np.concatenate(rows)


def _heading(text: str, right: np.ndarray, width: int) -> np.ndarray:
    font = ImageFont.load_default(13)
    image = Image.new("RGB", (width, 38), "white")
    draw = ImageDraw.Draw(image)
    draw.text((2, 3), text, "black", font)
    x = 2
    for attribute in _SHOWN:
        good = right[ATTRIBUTES.index(attribute)]
        word = f"{attribute} right" if good else f"{attribute} WRONG"
        draw.text((x, 20), word, "#187a2f" if good else "#b3261e", font)
        x += int(draw.textlength(word, font)) + 14
    return np.asarray(image)


def save_sheet(path: Path, outcomes: Outcomes) -> None:
    """Writes `sheet` as a png, whole or not at all."""
    write_png(path, sheet(outcomes))
