"""`jax-causal bench --scaling`: a share is what a device really does, projections add up, and the command shows both.

Shares are held against the compiled programs of sharded rollouts. No time is tested.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jax_causal import (
    attention,
    bench,
    bench_ceilings,
    bench_profile,
    cli,
    components,
    environment,
    peer_memory,
    rollout,
)
from jax_causal.bench_rows import COMMUNICATION, Row
from jax_causal.config import PRESETS, SamplerConfig, TransformerConfig, VAEConfig
from jax_causal.parallel import SingleDevice
from jax_causal.pipeline import Pipeline
from jax_causal.rollout import RolloutSpec
from sharding import scaling_report
from sharding.compiled import abstract_block, device_bytes
from sharding.hlo import Program
from sharding.link import measure_link
from sharding.scaling import ROWS, Measured, Scaling, Way, alone
from sharding.sequence_parallel import SequenceParallel, Sharded
from sharding.share import Share
from sharding.strategies import Link, Strategy
from tests.sharding import seeded

pytestmark = pytest.mark.sp

SMALL = dataclasses.replace(
    PRESETS["tiny"],
    name="small",
    transformer=TransformerConfig(dim=32, num_layers=1, num_heads=4, ffn_dim=32, text_dim=16, text_length=8),
    vae=VAEConfig(dim=8, multipliers=(1, 1), num_res_blocks=1, temporal_downsample=(True,)),
    sampler=SamplerConfig(frames_per_block=2, steps=(1000, 500)),
    height=8,
    width=32,
    num_frames=7,
)
INPUTS = {"num_frames": 7, "height": 8, "width": 32, "seed": 0}  # 4 latent frames of 16 tokens
LIMITS = {"window": None, "sink": 0}


# A share.


def _block(parallel):
    """A compiled denoising step and its arguments' bytes: weights, cache, text."""
    spec = RolloutSpec.create(seeded.CONFIG, seeded.SAMPLER, (6, 20), 8, parallel=parallel)
    arguments = abstract_block(spec, jnp.float32)
    compiled = rollout.denoise_block.lower(spec, *arguments).compile()
    return compiled, [device_bytes(tree) for tree in arguments[:3]]


@pytest.mark.parametrize(
    "case",
    [("gather", 8), ("ring", 8), ("ulysses", 4), ("hybrid", (1, 2, 4)), ("ring", 7)],
    ids=seeded.label,
)
def test_a_share_is_what_one_device_does(case):
    """As many operations and bytes as the real program has on its first device, and nothing sent."""
    real = seeded.parallel(case, unroll=False)
    share = Share.create(real.strategy, jax.devices()[0], unroll=False)
    expected, expected_bytes = _block(real)
    found, found_bytes = _block(share)
    assert Program(expected.as_text()).sent()
    assert not Program(found.as_text()).sent()
    assert found_bytes == expected_bytes
    assert found.cost_analysis()["flops"] == pytest.approx(expected.cost_analysis()["flops"], rel=0.05)


# One device, the link, and the sum.


def test_every_device_is_measured_alone(monkeypatch):
    """On its own: weights and cache lie there. The first one before the others and after them."""
    used = []

    def run(pipe, *, only, **options):
        (device,) = pipe.parallel.cache_sharding(stacked=True).device_set
        assert all(x.devices() == {device} for x in jax.tree.leaves(pipe.params))
        used.append((device, tuple(only)))
        return [Row(name, 1.0, 1.0, 1.0, "s") for name in only]

    monkeypatch.setattr(bench, "run", run)
    first, second, third = devices = jax.devices()[:3]
    scaling = Scaling(SMALL, "float32", INPUTS, LIMITS)
    found = [scaling.single(), *scaling.each(devices)]
    assert [one.label for one in found] == [
        "single",
        "single, again",
        "single (device 1)",
        "single (device 2)",
    ]
    assert used == [(first, ROWS), *((device, ("rollout",)) for device in (first, second, third))]
    assert not list(scaling.each(devices[:1]))
    assert not list(Scaling(SMALL, "float32", INPUTS, LIMITS, rows=("first_frame",)).each(devices))


def test_devices_alone_count_alike():
    """However often each was measured; what is shared does not count."""
    ring = Measured(Way(Strategy("ring", 2, 1), "ring"), _rows(9.0))
    found = [
        Measured(None, _rows(3.0)),
        ring,
        Measured(None, _rows(5.0), again=True),
        Measured(None, _rows(6.0), 1),
    ]
    assert [alone(found[:end]) for end in (1, 3, 4)] == [{"rollout": x} for x in (3, 4, 5)]


def test_link_is_measured():
    link = measure_link(jax.devices()[:2], jnp.float32, repeats=1)
    assert link.latency > 0
    assert link.bandwidth > 0
    with pytest.raises(ValueError, match="two devices"):
        measure_link(jax.devices()[:1], jnp.float32)


def _rows(seconds) -> dict[str, Row]:
    return {name: Row(name, seconds, seconds, seconds, "s") for name in ("rollout",)}


def test_projection_by_hand(monkeypatch):
    """2 blocks x 3 passes x 1 layer of one all-gather: keys and values of 2 x 16 tokens of 32 channels, float32."""
    scaling = Scaling(SMALL, "float32", INPUTS, LIMITS)
    monkeypatch.setattr(scaling, "_rows", lambda parallel, names: _rows(1.5 / parallel.num_devices))
    link = Link(latency=0.01, bandwidth=8192.0)
    here, there = (Way(Strategy("gather", n, 1), "gather") for n in (2, 4))
    two = scaling.project(here, link, measured=Measured(here, _rows(2.0)))
    assert two.share == 0.75
    assert two.sending == pytest.approx(6 * (0.01 + 8192 / 2 / 8192))
    assert two.together == pytest.approx(0.75 + 3.06)
    assert two.exposed == pytest.approx(1.25 / 3.06)
    assert two.calibrated is None
    four = scaling.project(there, link, calibration=two)
    assert four.sending == pytest.approx(6 * (0.01 + 8192 * 3 / 4 / 8192))
    assert four.calibrated == pytest.approx(0.375 + 4.56 * 1.25 / 3.06)
    uncalibrated = scaling.project(there, link)
    assert (uncalibrated.exposed, uncalibrated.calibrated) == (None, None)


def test_ways():
    """4 heads: hybrid is ulysses on 2 and 4 devices and something of its own on 8."""
    scaling = Scaling(SMALL, "float32", INPUTS, LIMITS)
    names = {n: [way.label for way in scaling.ways(n)] for n in (2, 3, 8)}
    gathers = ["gather", "gather, keys in 8", "gather, no overlap"]
    assert names == {2: [*gathers, "ring", "ulysses"], 3: [*gathers, "ring"], 8: [*gathers, "ring", "hybrid"]}
    assert [way.label for way in scaling.ways(2, ["ring"])] == ["ring"]
    assert scaling.ways(3, ["ulysses"]) == []
    ring = Scaling(SMALL, "float32", INPUTS, {"window": 2, "sink": 0})
    assert "gather, no overlap" not in [way.label for way in ring.ways(2)]
    decoding = Scaling(SMALL, "float32", INPUTS, LIMITS, rows=["end_to_end"])
    assert [way.label for way in decoding.ways(2)] == ["gather", "ring", "ulysses"]


def test_weights_are_placed_as_a_pipeline_has_them():
    scaling = Scaling(SMALL, "float32", INPUTS, LIMITS)
    for parallel in (SingleDevice(unroll=False), SequenceParallel(2, "ring", unroll=True)):
        expected = Pipeline.random(SMALL, dtype="float32", parallel=parallel)
        placed = components.place(scaling.config, scaling._params, expected.parallel)
        expected = {name: expected.params[name] for name in ("transformer", "vae")}
        assert jax.tree.all(
            jax.tree.map(lambda a, b: (a == b).all() and a.sharding == b.sharding, placed, expected)
        )


def test_ways_of_gather_where_a_kernel_sends(monkeypatch):
    """And where it cannot, because shares or heads do not suit it: what is measured and projected is named alike."""
    monkeypatch.setattr(attention, "_device", lambda: ("gpu", (9, 0)))
    monkeypatch.setattr(peer_memory, "can_reach_peers", lambda: True)
    monkeypatch.setattr(Sharded, "unrolled", True)
    inputs = {"num_frames": 81, "height": 480, "width": 832, "seed": 0}

    def ways(preset, devices):
        return Scaling(PRESETS[preset], "bfloat16", inputs, LIMITS).ways(devices, ["gather"])

    assert [(way.label, way.direct, way.overlap) for way in ways("wan-1.3b", 2)] == [
        ("gather", True, True), ("gather, by collectives", False, True), ("gather, no overlap", False, False)
    ]  # fmt: skip
    assert [way.label for way in ways("wan-14b", 2)] == ["gather", "gather, no overlap"]
    two, sixteen = ways("wan-1.3b", 2), ways("wan-1.3b", 16)
    assert [way.direct for way in sixteen] == [False, False]  # 98 rows with padding
    kinds = [scaling_report._kind(way) for way in two]
    assert len(set(kinds)) == 3
    assert kinds.index(scaling_report._kind(sixteen[0])) == 1


def test_keys_are_split_as_a_full_size_block_wants():
    """195 rows of a lone first frame would want 4 parts on 8 devices, the 585 rows of every other block 2."""
    wan = PRESETS["wan-1.3b"]
    lone = dataclasses.replace(wan, sampler=dataclasses.replace(wan.sampler, independent_first_frame=True))
    inputs = {"num_frames": 73, "height": 480, "width": 832, "seed": 0}
    labels = [way.label for way in Scaling(lone, "bfloat16", inputs, LIMITS).ways(8)]
    assert labels[:2] == ["gather", "gather, keys in 2"]


# The command.


@pytest.fixture(autouse=True)
def _presets(monkeypatch):
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)
    monkeypatch.setitem(PRESETS, "small", SMALL)


def command(*argv) -> int:
    return cli.main(["bench", "--preset", "small", "--repeats", "1", *map(str, argv)])


def test_command(tmp_path, capsys, monkeypatch):
    # Of two devices: collectives in a rollout, and what of them is exposed. A CPU's profile does not show them.
    monkeypatch.setattr(bench_profile, "communication", lambda run: [(0.6, 0.06), (1.2, 0.18)])
    ceilings, measure = [], bench_ceilings.measure_ceilings
    weights, init = [], components.init
    monkeypatch.setattr(components, "init", lambda *x, **y: weights.append(init(*x, **y)) or weights[0])
    monkeypatch.setattr(
        bench_ceilings, "measure_ceilings", lambda *x, **y: ceilings.append(measure(*x, **y)) or ceilings[0]
    )
    path = tmp_path / "scaling.json"
    argv = ("--scaling", "--devices", 2, "--strategy", "ring", "--only", "rollout", "--project", 4)
    assert command(*argv, "--json", path) == 0
    assert len(ceilings) == len(weights) == 1  # for all that is measured
    text = " ".join(capsys.readouterr().out.split())
    assert "Projection of the rollout, not a measurement" in text
    assert "measured on these devices" in text
    record = json.loads(path.read_text())
    rows = {(row["strategy"], row["devices"], row["name"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"])
    # 2 blocks of 3 passes; one device has nothing to send.
    total, shown = (rows.pop(("ring", 2, name)) for name in COMMUNICATION)
    assert [total[x] for x in ("median", "min", "max")] == pytest.approx([0.15, 0.1, 0.2])
    assert [shown[x] for x in ("median", "min", "max")] == pytest.approx([0.02, 0.01, 0.03])
    assert (total["unit"], total["speedup"]) == ("s", None)
    assert "ring 2 150.000 ms 20.000 ms" in text
    medians = {(way, devices): row["median"] for (way, devices, _), row in rows.items()}
    assert set(medians) == {("single", 1), ("single, again", 1), ("single (device 1)", 1), ("ring", 2)}
    first, again, other = (medians[way, 1] for way in ("single", "single, again", "single (device 1)"))
    for row in rows.values():
        assert row["speedup"] == pytest.approx(((first + again) / 2 + other) / 2 / row["median"])
        assert f"{row['speedup']:.2f} x" in text
    assert {"link_latency_s", "link_bandwidth_bytes_per_s", "how"} <= set(record)
    assert set(record["boundaries"]) == {"rollout", *COMMUNICATION}
    two, four = record["projection"]
    assert [p["devices"] for p in (two, four)] == [2, 4]
    assert two["measured_s"] == rows["ring", 2, "rollout"]["median"]
    assert four["measured_s"] is None
    assert four["exposed"] == two["exposed"]
    assert four["calibrated_s"] == pytest.approx(four["share_s"] + four["exposed"] * four["sending_s"])


def test_everything_is_measured_unless_a_strategy_is_named(tmp_path, capsys, monkeypatch):
    """And strategies, without their other forms, projected: calibrated where the same one was measured. Rows and link
    are stand-ins."""

    def rows(scaling, parallel, names):
        return {name: Row(name, 3.0, 3.0, 3.0, "s") for name in names if name in ROWS}

    monkeypatch.setattr(Scaling, "_rows", rows)
    path = tmp_path / "scaling.json"
    assert command("--scaling", "--devices", 2, "--strategy", "auto", "--project", 8, "--json", path) == 0
    record = json.loads(path.read_text())
    assert record["strategy"] == "all"
    gathers = ["gather", "gather, keys in 8", "gather, no overlap"]
    measured = list(dict.fromkeys((row["strategy"], row["devices"]) for row in record["rows"]))
    several = [(name, 2) for name in [*gathers, "ring", "ulysses"]]
    assert measured == [("single", 1), *several, ("single, again", 1), ("single (device 1)", 1)]
    calibrated = {
        p["strategy"]: p["calibrated_s"] is not None for p in record["projection"] if p["devices"] == 8
    }
    assert calibrated == {"gather": True, "ring": True, "hybrid": False}
    assert [p["strategy"] for p in record["projection"] if p["devices"] == 2] == ["gather", "ring"]
    # Forms of gather decode as gather does, and all devices as the first: of them the rollout is measured alone.
    for label, expected in {
        "single": set(ROWS),
        "single (device 1)": {"rollout"},
        "gather": set(ROWS),
        "gather, no overlap": {"rollout"},
        "ring": set(ROWS),
    }.items():
        assert {row["name"] for row in record["rows"] if row["strategy"] == label} == expected
    shown = capsys.readouterr().out
    assert "whole past" in shown
    table = [line.split() for line in shown.splitlines()]
    assert ["gather,", "no", "overlap", "2", "3.000", "s", "1.00", "x"] in table


def test_strategies_by_name(tmp_path, capsys, monkeypatch):
    """Those that do not fit the devices that are there are only projected, and the run says so."""
    rows = {"rollout": Row("rollout", 3.0, 2.0, 4.0, "s")}
    monkeypatch.setattr(Scaling, "_rows", lambda scaling, parallel, names: rows)
    path = tmp_path / "scaling.json"
    argv = ("--scaling", "--devices", 2, "--strategy", "ring, hybrid", "--only", "rollout", "--project", 8)
    assert command(*argv, "--json", path) == 0
    record = json.loads(path.read_text())
    assert record["strategy"] == "ring,hybrid"
    assert {row["strategy"] for row in record["rows"] if row["devices"] == 2} == {"ring"}
    projected = [(p["strategy"], p["devices"]) for p in record["projection"]]
    assert projected == [("ring", 2), ("ring", 8), ("hybrid", 8)]
    assert "hybrid does not fit 2 devices: it is only projected" in capsys.readouterr().err


def test_no_projection_and_rows_as_they_come(tmp_path, capsys, monkeypatch):
    rows = {name: Row(name, 3.0, 2.0, 4.0, "s") for name in ROWS}
    monkeypatch.setattr(Scaling, "_rows", lambda scaling, parallel, names: rows)
    path = tmp_path / "scaling.json"
    assert command("--scaling", "--devices", 2, "--strategy", "ring", "--project", 0, "--json", path) == 0
    assert json.loads(path.read_text())["projection"] == []
    shown = capsys.readouterr()
    assert "Projection" not in shown.out
    assert "ring, 2 devices: rollout 3.000 s (2.000 s to 4.000 s; 1.00 x)" in shown.err


def test_rows_that_are_not_asked_for_are_not_measured(tmp_path, capsys, monkeypatch):
    asked = []

    def rows(scaling, parallel, names):
        asked.append(tuple(names))
        return {name: Row(name, 3.0, 2.0, 4.0, "s") for name in names}

    monkeypatch.setattr(Scaling, "_rows", rows)
    path = tmp_path / "scaling.json"
    argv = ("--scaling", "--devices", 2, "--strategy", "ring", "--only", "rollout", "--project", 0)
    assert command(*argv, "--json", path) == 0
    assert asked == [("rollout",), ("rollout", *COMMUNICATION), ("rollout",), ("rollout",)]
    record = json.loads(path.read_text())
    assert set(record["boundaries"]) == {"rollout", *COMMUNICATION}
    assert "first_frame" not in "".join(capsys.readouterr())


def test_what_was_measured_stays_where_the_rest_fails(tmp_path, monkeypatch):
    def rows(scaling, parallel, names):
        if getattr(parallel, "strategy", None) == "ring":
            raise RuntimeError("no more memory")
        return {name: Row(name, 3.0, 2.0, 4.0, "s") for name in names}

    monkeypatch.setattr(Scaling, "_rows", rows)
    path = tmp_path / "scaling.json"
    with pytest.raises(RuntimeError, match="no more memory"):
        command("--scaling", "--devices", 2, "--only", "rollout", "--project", 0, "--json", path)
    record = json.loads(path.read_text())
    assert {row["strategy"] for row in record["rows"]} == {
        "single",
        "gather",
        "gather, keys in 8",
        "gather, no overlap",
    }


def test_one_device_projects_from_the_assumed_link(capsys):
    argv = ("--scaling", "--devices", 1, "--strategy", "hybrid", "--only", "rollout", "--project", 8)
    assert command(*argv, "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["link"], record["link_latency_s"]) == ("assumed", 1e-4)
    assert set(record["boundaries"]) == {"rollout"}
    (hybrid,) = record["projection"]
    assert hybrid["calibrated_s"] is None
    assert hybrid["together_s"] == pytest.approx(hybrid["share_s"] + hybrid["sending_s"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--only", "rollout,decode"),
            "--only decode: the rows of --scaling are rollout, end_to_end, first_frame",
        ),
        (("--only", "first_frame"), "a projection is of the rollout: add it to --only"),
        (("--compare", "other.json"), "--compare is not for --scaling"),
        (
            ("--strategy", "ring,ulysses", "--devices", 3, "--project", 5),
            "ulysses is nothing to measure on 3 or 5 devices: use gather or ring",
        ),
        (("--strategy", "spiral"), "spiral is nothing to measure on 16 or 8 devices: use gather or ring or"),
        (("--devices", 17), "use 1 to 16"),
        (("--project", 1), "--project 1: one device is measured"),
    ],
)
def test_bad_input(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run", None)
    assert command("--scaling", *argv) == 2
    assert message in capsys.readouterr().err
