"""The choice of a strategy, its formulas on cases worked out by hand, and what it refuses."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jax_causal import arguments
from jax_causal.config import PRESETS, TransformerConfig
from jax_causal.console import nbytes
from jax_causal.generate import Job
from sharding import STRATEGIES, SequenceParallel
from sharding.mesh import pick_devices, rows_of_share
from sharding.strategies import Collective, Strategy, Workload, choose, fitting

pytestmark = pytest.mark.sp

WAN = PRESETS["wan-1.3b"]  # 12 heads
BLOCK = Workload(WAN.transformer, tokens=1560, frames=3, held=21)


def _heads(count: int) -> Workload:
    config = TransformerConfig(dim=8 * count, num_layers=2, num_heads=count, ffn_dim=64)
    return Workload(config, tokens=60, frames=3, held=9)


def _mesh(**axes) -> Mesh:
    grid = np.reshape(jax.devices()[: np.prod(list(axes.values()))], list(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


# Which strategies fit.


@pytest.mark.parametrize(
    ("name", "degrees"), [("gather", {(8, 1)}), ("ring", {(8, 1)}), ("hybrid", {(2, 4)}), ("auto", None)]
)
def test_12_heads_on_8_devices(name, degrees):
    parallel = SequenceParallel(8, name).for_model(WAN)
    strategy = parallel.strategy
    assert strategy.devices == parallel.num_devices == 8
    assert degrees is None or (strategy.seq, strategy.heads) in degrees
    assert dict(parallel.mesh.shape) == {"data": 1, "seq": strategy.seq, "heads": strategy.heads}
    # Every head is one of the model's: none is padded, in the cache neither.
    assert 12 % strategy.heads == 0
    cache = parallel.cache_sharding(stacked=True).shard_shape((30, 1, strategy.seq, 100, 12, 128))
    assert cache[-2] == (12 if name == "gather" else 12 // strategy.heads)


def test_ulysses_for_12_heads_on_8_devices_says_what_fits():
    expected = (
        "ulysses cannot share 12 heads among 8 devices, only among 1, 2, 3, 4, 6, 12: "
        "use gather or ring or hybrid, or auto"
    )
    with pytest.raises(ValueError, match=expected):
        SequenceParallel(8, "ulysses").for_model(WAN)


def test_hybrid_without_a_common_divisor_says_what_fits():
    with pytest.raises(ValueError, match="divisor of 12 heads and 5 devices: use gather or ring, or auto"):
        SequenceParallel(5, "hybrid").for_model(WAN)


@pytest.mark.parametrize("with_mesh", [False, True])
def test_unknown_strategy(with_mesh):
    asked = SequenceParallel(2, "Ring", mesh=_mesh(seq=2) if with_mesh else None)
    with pytest.raises(
        ValueError, match="unknown strategy 'Ring': choose auto, gather, ulysses, ring, hybrid"
    ):
        asked.for_model(WAN)


def test_every_fitting_strategy_divides_the_heads():
    for heads in range(1, 41):
        for devices in range(1, 17):
            found = fitting(devices, heads)
            assert {"gather", "ring"} <= set(found) <= set(STRATEGIES)
            for name, strategy in found.items():
                assert (strategy.name, strategy.devices) == (name, devices)
                assert heads % strategy.heads == 0
            assert ("ulysses" in found) == (heads % devices == 0)


@pytest.mark.parametrize("memory", [None, 0])
def test_auto_never_fails_because_of_a_head_count(memory):
    for heads in range(1, 41):
        for devices in range(1, 17):
            strategy, reason = choose("auto", devices, _heads(heads), memory)
            assert strategy in fitting(devices, heads).values()
            assert f"auto chose {strategy.name} for {heads} heads on {devices} device" in reason


# What auto chooses.


def test_auto_takes_the_fastest_by_the_cost_model():
    strategy, reason = choose("auto", 8, BLOCK)
    seconds = {name: s.seconds(BLOCK) for name, s in fitting(8, 12).items()}
    assert strategy.name == min(seconds, key=seconds.get)
    for name, value in seconds.items():
        assert f"{name} " in reason
        assert f"{value * 1e3:.3f} ms" in reason


def test_memory_moves_auto_away_from_gather():
    # Whole on one device the cache takes 6.04 GB: 2 x 30 layers x 32760 tokens x 1536 channels x 2 bytes.
    assert choose("auto", 2, BLOCK)[0].name == choose("auto", 2, BLOCK, 7 * 10**9)[0].name == "gather"
    strategy, reason = choose("auto", 2, BLOCK, 6 * 10**9)
    assert strategy.name != "gather"
    assert "cache 6.04 GB, does not fit" in reason
    assert "cache 3.02 GB;" in reason


def test_auto_counts_the_weights_in(monkeypatch):
    for beside_weights, gathers in ((7e9, True), (6e9, False)):
        limit = int(beside_weights + 2.8e9)
        monkeypatch.setattr("sharding.sequence_parallel._memory", lambda device, limit=limit: limit)
        assert SequenceParallel(2).for_model(WAN).strategy.gathers == gathers


def test_auto_judges_by_the_size_asked_for(monkeypatch):
    """A cache of 6.04 GB does not fit beside the weights; one of a window of 9 frames, or of small ones, does."""
    monkeypatch.setattr("sharding.sequence_parallel._memory", lambda device: int(6e9 + 2.8e9))
    assert not SequenceParallel(2).for_model(WAN).strategy.gathers
    assert SequenceParallel(2).for_model(WAN, held=9).strategy.gathers
    small = dataclasses.replace(WAN, height=240, width=416)
    assert SequenceParallel(2).for_model(small).strategy.gathers
    assert not SequenceParallel(2).for_model(small, held=84).strategy.gathers


@pytest.mark.parametrize(
    ("options", "gathers"),
    [((), False), (("--window", "9"), True), (("--height", "240", "--width", "416"), True)],
)
def test_generate_tells_auto_what_is_asked_for(options, gathers, monkeypatch):
    monkeypatch.setattr("sharding.sequence_parallel._memory", lambda device: int(6e9 + 2.8e9))
    args = arguments.parse(["generate", "x", "--out", "x.mp4", "--preset", "wan-1.3b", *options], {})
    assert Job.create(args, SequenceParallel(2), "x").parallel.strategy.gathers == gathers


# Formulas.


def test_formulas_of_hybrid_by_hand():
    """12 heads of 128 on 2 x 4 devices: 200 rows of a frame a device, in eights, 800 in an entry of seq; bfloat16."""
    strategy = Strategy("hybrid", seq=2, heads=4)
    assert strategy.collectives(BLOCK) == [
        Collective("all-to-all", 5_529_600, 4),  # 3 x 600 x 1536 x 2
        Collective("all-gather", 3_686_400, 2),  # 4800 x 3 heads x 128 x 2
        Collective("all-to-all", 7_430_400, 2),  # 4800 x 3 heads x (128 + 1) x 4
        Collective("all-to-all", 1_843_200, 4),  # 600 x 1536 x 2
    ]
    assert strategy.cache_bytes(BLOCK) == 774_144_000  # 2 x 30 x 21 x 800 keys x 3 heads x 128 x 2
    assert strategy.activation_bytes(BLOCK) == max(
        25_190_400,  # 600 x (2 x 8960 + 2 x 1536) x 2
        33_292_800,  # 600 x 8 x 1536 x 2, 3,686,400 and twice 7,430,400
    )


@pytest.mark.parametrize(
    ("tokens", "devices", "rows"),
    [
        (1560, 1, 1560),
        (1560, 2, 784),
        (1560, 8, 200),
        (1560, 16, 98),
        (30, 4, 8),
        (3600, 7, 520),
        (28, 16, 2),
    ],
)
def test_rows_in_eights_where_that_adds_little(tokens, devices, rows):
    assert rows_of_share(tokens, devices) == rows
    assert rows * devices >= tokens


@pytest.mark.parametrize(
    ("tokens", "devices", "rows", "last"),
    [
        (1560, 1, 1560, 1560),
        (1560, 2, 792, 768),  # 6 tiles of 128
        (1560, 4, 392, 384),
        (1560, 8, 200, 160),  # 128 on the last would be 208 on the others, 6 % more
        (3600, 2, 1808, 1792),
        (420, 2, 216, 204),
        (24, 4, 6, 6),
    ],
)
def test_the_last_share_has_whole_tiles_where_that_adds_little(tokens, devices, rows, last):
    assert rows_of_share(tokens, devices, short_last=True) == rows
    assert tokens - (devices - 1) * rows == last


def test_formulas_with_short_shares_by_hand():
    """10 tokens on 4 devices: 3 rows each, 2 of them padding; 2 frames, 4 heads of 4 channels, float32."""
    config = TransformerConfig(dim=16, num_layers=2, num_heads=4, ffn_dim=64)
    work = Workload(config, tokens=10, frames=2, held=5, bytes_per_element=4)
    gather, ring, ulysses = Strategy("gather", 4, 1), Strategy("ring", 4, 1), Strategy("ulysses", 1, 4)
    assert gather.collectives(work) == [Collective("all-gather", 3072, 4)]  # 2 x 24 x 16 x 4
    assert ring.collectives(work) == [
        Collective("all-gather", 1536, 4),  # 24 x 16 x 4
        Collective("all-to-all", 1920, 4),  # 24 x (16 + 4) x 4
    ]
    assert ulysses.collectives(work) == [
        Collective("all-to-all", 1152, 4),  # 3 x 6 x 16 x 4
        Collective("all-to-all", 384, 4),
    ]
    # Padding is stored where the tokens of a frame are cut, and nowhere else; keys are rounded up to eights.
    assert gather.cache_bytes(work) == 14_336  # 2 x 2 x (5 x 10 + 6) x 16 x 4
    assert ring.cache_bytes(work) == 4_096  # 2 x 2 x (5 x 3 + 1) x 16 x 4
    assert ulysses.cache_bytes(work) == 3_584  # 2 x 2 x (5 x 10 + 6) x 4 x 4


@pytest.mark.parametrize("name", ["gather", "ring", "ulysses"])
def test_one_device_sends_nothing(name):
    assert choose(name, 1, BLOCK)[0].collectives(BLOCK) == []


def test_the_memory_table_of_the_readme():
    """Its cells are what the formulas say, which the compiled programs are held against elsewhere."""
    text = Path(__file__).parents[2].joinpath("README.md").read_text()
    ways = {"one device alone": Strategy("gather", 1, 1)}
    ways |= {f"`{name}`": name for name in STRATEGIES}
    for label, way in ways.items():
        cells = []
        for preset in ("wan-1.3b", "wan-14b"):
            work = dataclasses.replace(BLOCK, config=PRESETS[preset].transformer)
            strategy = way if isinstance(way, Strategy) else fitting(8, work.config.num_heads).get(way)
            if strategy is None:
                cells += ["12 heads do not divide", ""]
            else:
                cells += [nbytes(strategy.cache_bytes(work)), nbytes(strategy.activation_bytes(work))]
        row = " | ".join([label, *cells])
        assert f"| {row} |".replace("  ", " ") in text


def test_weights_of_the_presets():
    for name, parameters in (("wan-1.3b", 1_418_996_800), ("wan-14b", 14_288_491_584)):
        work = dataclasses.replace(BLOCK, config=PRESETS[name].transformer)
        assert work.weight_bytes == pytest.approx(2 * parameters, rel=0.03)


# Devices and meshes.


def test_devices():
    present = jax.devices()
    assert pick_devices(None) == present
    assert pick_devices(3) == present[:3]
    assert pick_devices(present[4:6]) == present[4:6]


@pytest.mark.parametrize("count", [0, 17])
def test_more_devices_than_there_are(count):
    with pytest.raises(ValueError, match=rf"devices={count}, but there are 16 cpu devices: use 1 to 16"):
        SequenceParallel(count).for_model(WAN)


@pytest.mark.parametrize(
    ("data", "asked", "shape"),
    [
        (2, "ring", {"data": 2, "seq": 4, "heads": 1}),
        (2, "ulysses", {"data": 2, "seq": 1, "heads": 4}),  # 12 heads do not divide by all 8 devices
        (4, "hybrid", {"data": 4, "seq": 1, "heads": 2}),
        (8, "auto", {"data": 8, "seq": 1, "heads": 1}),
    ],
)
def test_groups_of_devices_share_the_batch(data, asked, shape):
    parallel = SequenceParallel(8, asked, data=data).for_model(WAN)
    assert dict(parallel.mesh.shape) == shape
    assert parallel.num_devices == 8


def test_groups_are_equal():
    with pytest.raises(ValueError, match="8 devices cannot be split into data=3 equal groups"):
        SequenceParallel(8, data=3).for_model(WAN)


@pytest.mark.parametrize(
    ("axes", "asked", "name"),
    [
        ({"data": 2, "seq": 4}, "auto", "ring"),
        ({"data": 2, "seq": 4}, "gather", "gather"),
        ({"data": 2, "heads": 4}, "auto", "ulysses"),
        ({"data": 2, "seq": 2, "heads": 2}, "auto", "hybrid"),
        ({"heads": 2, "seq": 2, "data": 2}, "hybrid", "hybrid"),
        ({"seq": 2}, "auto", "ring"),
    ],
)
def test_a_mesh_of_the_caller(axes, asked, name):
    mesh = _mesh(**axes)
    parallel = SequenceParallel(strategy=asked, mesh=mesh).for_model(WAN)
    assert parallel.strategy == Strategy(name, axes.get("seq", 1), axes.get("heads", 1))
    # The same devices under the same coordinates.
    assert dict(parallel.mesh.shape) == {"data": 1, "seq": 1, "heads": 1} | axes
    first = dict.fromkeys(("data", "seq", "heads"), 0)
    for axis in axes:
        at = first | {axis: 1}
        device = mesh.devices[tuple(at[a] for a in axes)]
        assert parallel.mesh.devices[at["data"], at["seq"], at["heads"]] == device


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        (
            {"seq": 2, "model": 2},
            {},
            r"axes \['model'\]; known are 'data' \(batch_axis=\), 'seq' and 'heads'",
        ),
        ({"data": 2, "seq": 2}, {"batch_axis": "replica"}, r"axes \['data'\]; known are 'replica'"),
        ({"heads": 8}, {}, "12 heads cannot be shared by the 8 devices of mesh axis 'heads'"),
        ({"seq": 2, "heads": 2}, {"strategy": "gather"}, "gather does not shard over 'heads'"),
        ({"seq": 2, "heads": 2}, {"strategy": "ring"}, "ring does not shard over 'heads'"),
        ({"seq": 2, "heads": 2}, {"strategy": "ulysses"}, "ulysses does not shard over 'seq'"),
    ],
)
def test_a_mesh_that_does_not_fit(axes, options, message):
    with pytest.raises(ValueError, match=message):
        SequenceParallel(mesh=_mesh(**axes), **options).for_model(WAN)
