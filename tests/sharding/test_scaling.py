"""What `jax-causal bench --scaling` measures: a share is what a device really does, and projections add up.

Shares are held against the compiled programs of sharded rollouts. No time is tested.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_causal import attention, bench, components, peer_memory, rollout
from jax_causal.bench_rows import Row
from jax_causal.config import PRESETS
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
from tests.sharding.small import INPUTS, LIMITS, SMALL

pytestmark = pytest.mark.sp


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
