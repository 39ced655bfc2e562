"""The command `jax-causal bench --scaling`: what it runs, writes down and says. No time is tested."""

import json

import pytest

from jax_causal import bench, bench_ceilings, bench_profile, cli, components, environment
from jax_causal.bench_rows import COMMUNICATION, Row
from jax_causal.config import PRESETS
from sharding.scaling import ROWS, Scaling
from tests.sharding.small import SMALL

pytestmark = pytest.mark.sp


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
