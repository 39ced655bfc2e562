"""`jax-causal bench`: rows and JSON, comparison, what it refuses, and the operations that floors are made of.

Counts are held against XLA's own count of compiled programs and against sums by hand. No time is tested.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import (
    Pipeline,
    arguments,
    bench,
    bench_ceilings,
    bench_report,
    bench_rows,
    bench_start,
    cli,
    environment,
    modules,
    rollout,
)
from jax_causal.bench_rows import COMMUNICATION
from jax_causal.components import decode_chunk
from jax_causal.config import PRESETS, SamplerConfig, TransformerConfig, VAEConfig
from jax_causal.generate import Job
from jax_causal.vae import VAE
from tests.models import SMALL

FIELDS = ["name", "median", "min", "max", "unit", "floor"]
WITH_FLOOR = {
    "end_to_end", "first_frame", "rollout", "rollout_without_last_context", "rollout_throughput", "decode",
    "steady_block", "text", "first_frame_text", "first_frame_denoise", "first_frame_decode",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _presets(monkeypatch):
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)
    monkeypatch.setitem(PRESETS, "small", SMALL)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.random(SMALL, dtype="float32")


@pytest.fixture(scope="module")
def rows(pipe):
    return bench.run(pipe, repeats=2)


def command(*argv) -> int:
    """The exit status of `jax-causal bench ARGV...`."""
    try:
        return cli.main(["bench", *map(str, argv)])
    except SystemExit as end:
        return end.code


# Rows.


def test_every_row_that_a_cpu_can_give(rows):
    names = [row.name for row in rows]
    left = {"peak_memory", "peak_memory_all", "start_cold", "start_warm", "start_loading", *COMMUNICATION}
    assert names == [name for name in bench_rows.BOUNDARIES if name not in left]
    for row in rows:
        assert 0 <= row.min <= row.median <= row.max, row
        assert (row.floor is not None) == (row.name in WITH_FLOOR), row
        assert row.ratio == (row.median / row.floor if row.floor else None)


def test_parts_lie_inside_what_contains_them(rows):
    by_name = {row.name: row for row in rows}
    assert by_name["first_frame"].min < by_name["end_to_end"].max
    assert by_name["rollout_without_last_context"].min < by_name["rollout"].max
    assert by_name["rollout_without_last_context"].floor < by_name["rollout"].floor
    assert by_name["rollout_throughput"].floor == by_name["product_ceiling"].median
    # Throughput and time are one measurement, tied by the operations.
    spec = rollout.RolloutSpec.create(SMALL.transformer, SMALL.sampler, (2, 3), 4)
    operations = bench_ceilings.rollout_operations(spec, 4, last_context=True).total
    work = by_name["rollout_throughput"].max * by_name["rollout"].min * 1e12
    assert work == pytest.approx(operations, rel=1e-9)


def test_prompts_are_full_but_the_short_one(pipe, monkeypatch):
    found, embed_text = [], rollout.embed_text

    def record(*args):
        found.append(int(embed_text(*args).distinct))
        return embed_text(*args)

    monkeypatch.setattr(rollout, "embed_text", record)
    bench.run(pipe, repeats=1, only=["rollout", "rollout_short_prompt"])
    positions = SMALL.transformer.text_length
    assert found == [positions, positions // 8]
    assert positions // 8 > 0


def test_a_rollout_is_begun_whole_before_anything_is_waited_for(pipe, monkeypatch):
    """The device would stand still while the host begins what comes behind."""
    happened = []

    def recorded(module, name, what):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (happened.append(what), function(*args))[1])

    roll = bench._Bench(pipe, 21, 8, 8, repeats=1, seed=0)._roller()
    recorded(rollout, "denoise_block", "pass")
    recorded(rollout, "write_context", "pass")
    recorded(jax, "block_until_ready", "wait")
    full, without = roll()
    assert 0 < without <= full
    blocks = len(list(rollout.block_sizes(6, SMALL.sampler)))
    assert happened == ["wait", *["pass"] * (2 * blocks), "wait", "wait"]


def test_given_ceilings_are_not_measured_again(pipe, monkeypatch):
    monkeypatch.setattr(bench_ceilings, "measure_ceilings", None)
    ceilings = bench_ceilings.Ceilings(*[(2.0, 2.0, 2.0)] * 3)
    (row,) = bench.run(pipe, repeats=1, only=["rollout"], ceilings=ceilings)
    spec = rollout.RolloutSpec.create(SMALL.transformer, SMALL.sampler, (2, 3), 4)
    assert row.floor == bench_ceilings.rollout_operations(spec, 4, last_context=True).total / 2


def test_rows_that_decode_compile_no_decoder_of_their_own(pipe):
    """The first frame, the rest of its block and a regular chunk: a minute of compiling on a GPU."""
    params = {name: pipe.params[name] for name in ("transformer", "vae")}
    measured = bench._Bench(Pipeline(SMALL, params), 21, 8, 8, repeats=1, seed=0)
    ceilings = bench_ceilings.Ceilings(*[(1.0, 1.0, 1.0)] * 3)
    before = decode_chunk._cache_size()
    measured.end_to_end(ceilings)
    assert decode_chunk._cache_size() == before + 3
    measured.first_frame(ceilings)
    measured.decode(ceilings)
    measured.steady_block(ceilings)  # which has a window
    assert decode_chunk._cache_size() == before + 3


def test_only_the_rows_asked_for(pipe):
    params = {name: pipe.params[name] for name in ("transformer", "vae")}
    rows = bench.run(Pipeline(SMALL, params), repeats=1, only=["decode", "text", "copy_ceiling"])
    assert [row.name for row in rows] == ["decode", "copy_ceiling"]  # and no text, without an encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["dekode"]}, "no row 'dekode': the rows are end_to_end"),
        ({"only": []}, "no rows are asked for"),
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
        ({"num_frames": 12}, "use 5 or 13"),
    ],
)
def test_refuses(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        bench.run(pipe, **options)


def test_profile_adds_up(rows):
    by_name = {row.name: row.median for row in rows}
    parts = {part: by_name[f"profile_{part}"] for part in bench_rows.PROFILE}
    assert parts["products"] > 0
    assert parts["elementwise"] > 0
    assert parts["collectives"] == 0
    assert parts["gaps"] < by_name["end_to_end"] * 3  # profiling slows a CPU down


# The command.


def test_json_then_compare(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Job, "load", lambda job, **options: pipe)  # the same model, compiled already
    file = tmp_path / "before.json"
    measure = ["--preset", "small", "--repeats", 1, "--only", "rollout,decode,peak_memory_all"]
    assert command(*measure, "--json", file) == 0
    table = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert [row["name"] for row in record["rows"]] == ["rollout", "decode"]
    assert all(list(row) == FIELDS for row in record["rows"])
    assert record["left_out"] == ["peak_memory_all"]
    assert set(record["boundaries"]) == {"rollout", "decode"}
    facts = {"model": "small", "weights": "random", "frames": 13, "height": 16, "width": 24, "devices": 1}
    facts |= {"precision": "float32", "jax": jax.__version__, "repeats": 1, "window": None, "sink": 0}
    assert facts == {name: record[name] for name in facts}
    assert {"device_kind", "xla_flags", "strategy", "floors"} <= set(record)
    shown = [
        jax.__version__,
        "random weights",
        "float32",
        "XLA_FLAGS",
        bench_rows.BOUNDARIES["decode"],
        "peak_memory_all",
    ]
    unwrapped = " ".join(table.split())
    assert [text for text in shown if text not in unwrapped] == []

    # An earlier run of half the speed, and another device count: shown, not refused.
    for row in record["rows"]:
        row["median"] *= 2
    file.write_text(json.dumps(record | {"devices": 2}))
    assert command(*measure, "--json", "-", "--compare", file) == 0
    output = capsys.readouterr().out
    again = json.loads(output)  # nothing else is on standard output
    medians = {row["name"]: row["median"] for row in record["rows"]}
    assert again["compare"] == {
        row["name"]: pytest.approx(row["median"] / medians[row["name"]]) for row in again["rows"]
    }


@pytest.mark.slow
def test_fresh_processes(capsys):
    """Two real ones. The second finds what the first compiled."""
    size = ["--frames", 9, "--height", 32, "--width", 32]
    status = command(
        "--preset", "tiny", *size, "--only", "start_cold,start_warm,start_loading", "--json", "-"
    )
    captured = capsys.readouterr()
    assert status == 0, captured.err
    rows = {row["name"]: row["median"] for row in json.loads(captured.out)["rows"]}
    assert set(rows) == {"start_cold", "start_warm", "start_loading"}
    assert 0 < rows["start_warm"] < rows["start_cold"]
    assert rows["start_loading"] > 0


def test_a_fresh_process_that_fails_says_why(monkeypatch):
    args = arguments.parse(["bench", "--preset", "tiny", "--frames", "9", "--window", "1"], {})
    with pytest.raises(RuntimeError, match="window=1 must hold"):
        bench_start.measure(args)


def test_comparison_knows_units():
    row = bench_rows.Row("decode", 3.0, 2.0, 4.0, "s")
    earlier = [bench_rows.Row("decode", 2.0, 2.0, 2.0, "s"), bench_rows.Row("text", 1.0, 1.0, 1.0, "s")]
    assert bench_report.compare([row], {"rows": [r.to_json() for r in earlier]}) == {"decode": 1.5}
    other = dataclasses.replace(earlier[0], unit="GiB").to_json()
    assert bench_report.compare([row], {"rows": [other]}) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "holds no measurements"),
        ("[]", "holds no measurements"),
        ('{"model": "small"}', "holds no measurements"),
        ({"model": "wan-1.3b"}, "model was wan-1.3b, is small"),
        ({"height": 32, "window": 4}, "height was 32, is 16; window was 4, is None"),
        ({"rows": []}, "it has no rows"),
    ],
)
def test_refuses_to_compare(content, message, tmp_path, capsys):
    like = {"model": "small", "frames": 13, "height": 16, "width": 24, "window": None, "sink": 0}
    like["rows"] = [bench_rows.Row("decode", 1.0, 1.0, 1.0, "s").to_json()]
    file = tmp_path / "before.json"
    file.write_text(content if isinstance(content, str) else json.dumps(like | content))
    assert command("--preset", "small", "--compare", file) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "small", "--only", "dekode"], "no row 'dekode'"),
        (["--preset", "small", "--frames", 12], "use 5 or 13"),
        (["--preset", "nothing"], "unknown preset 'nothing'"),
        (["--preset", "small", "--json", "no/a.json"], "the folder no does not exist"),
        (["--preset", "small", "--compare", "no.json"], "no.json"),
        (["--preset", "small", "--repeats", 0], "must be a whole number"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert command(*argv) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert not captured.out


# Operations.


def _flops(function, *args) -> float:
    """XLA's count before optimisation: products and, beside them, every elementwise operation."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def test_pass_against_xla():
    # Wide and few layers, so that products are nearly all; unrolled, because XLA counts a loop's body once.
    config = TransformerConfig(dim=256, num_layers=2, num_heads=2, ffn_dim=512, text_dim=64, text_length=64)
    spec = rollout.RolloutSpec.create(config, SamplerConfig(frames_per_block=2), (8, 8), 4)
    params = modules.abstract(rollout.transformer.CausalDiT, config, unrolled=True)
    kv = jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.float32)
    text = rollout.transformer.TextKV((kv, kv), (kv, kv), jax.ShapeDtypeStruct((), jnp.int32))
    cache = rollout.init_cache(spec, 1, jnp.float32, stacked=False)
    x = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.float32)

    def one(params, cache, text, x):
        return rollout.predict(spec, params, cache, text, x, jnp.float32(500), spec.place(2, 2))

    counted = bench_ceilings.pass_operations(config, tokens=128, keys=256).total
    # Norms, activations and softmax are XLA's excess: some per cent at this width.
    assert counted <= _flops(one, params, cache, text, x) <= 1.08 * counted
    assert bench_ceilings.count_products(one, params, cache, text, x) == counted


def test_rollout_by_hand():
    # Wan 1.3B at 480 x 832: a block of 4680 tokens, 7 blocks of 5 passes.
    config = PRESETS["wan-1.3b"]
    spec = rollout.RolloutSpec.create(config.transformer, config.sampler, (30, 52), 21)
    linear = 2 * 4680 * (6 * 1536**2 + 2 * 1536 * 8960) * 30
    attended = sum(4 * 4680 * (4680 * block + 512) * 1536 * 30 for block in range(1, 8))
    counted = bench_ceilings.rollout_operations(spec, 21, last_context=True)
    assert counted.products == pytest.approx(35 * linear, rel=2e-3)  # patches and head besides
    assert counted.attention == 5 * attended
    without = bench_ceilings.rollout_operations(spec, 21, last_context=False)
    assert counted.total - without.total == bench_ceilings.block_operations(spec, 18, 3, 1).total


@pytest.mark.parametrize("first", [True, False])
def test_decode_against_xla(first):
    config = VAEConfig(dim=32, multipliers=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
    params = modules.abstract(VAE, config)
    latents = jax.ShapeDtypeStruct((1, 2, 16, 16, 16), jnp.float32)
    state = jax.eval_shape(lambda: bench_ceilings.init_decoder_state(config, 1, 32, 32))

    def decode(params, latents, state):
        return modules.bind(VAE, config, params).decode(latents, state, first=first)

    counted = bench_ceilings.decode_operations(config, 2, 32, 32, first=first).total
    # XLA leaves out what falls on the zero padding of a convolution, and adds norms and activations.
    assert counted == pytest.approx(_flops(decode, params, latents, state), rel=0.1)


def test_counts_loops_and_grouped_convolutions():
    def looped(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    x, w = np.ones((3, 4), np.float32), np.ones((4, 4), np.float32)
    assert bench_ceilings.count_products(jax.jit(looped), x, w) == 5 * 2 * 3 * 4 * 4
    image, kernel = np.ones((1, 8, 8, 4), np.float32), np.ones((3, 3, 2, 6), np.float32)

    def grouped(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert bench_ceilings.count_products(grouped, image, kernel) == 2 * (8 * 8 * 6) * (3 * 3 * 2)

    def endless(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="count them by hand"):
        bench_ceilings.count_products(endless, x, w)


def test_floor_is_shared_by_devices():
    ceilings = bench_ceilings.Ceilings((10.0, 9.0, 11.0), (5.0, 4.0, 6.0), (1.0, 1.0, 1.0))
    operations = bench_ceilings.Operations(products=100, attention=20)
    assert ceilings.floor(operations) == 14
    assert ceilings.floor(operations, devices=4) == 3.5
