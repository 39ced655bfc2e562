"""Layers by fused kernels under every strategy, the kernels' plain forms in their place: goldens and gradients."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import fused_norm, fused_rotation, rollout, transformer
from jax_causal.config import PRESETS
from jax_causal.parallel import SingleDevice
from jax_causal.rollout import RolloutSpec
from sharding import SequenceParallel
from sharding.sequence_parallel import Sharded
from sharding.share import Share
from sharding.strategies import Strategy
from tests.golden_data import load
from tests.golden_rollout import ATOL, GoldenRollout
from tests.models import golden_transformer
from tests.sharding import seeded

pytestmark = pytest.mark.sp


@pytest.fixture
def peers(monkeypatch):
    """Who wrote to whom, and whether devices waited for each other before, by call."""
    found = []

    def rotate(eps, peers, waits, products, scales, factors, written, numbers):
        found.append((peers, waits))
        keys, values, *counts = written
        return *fused_rotation.plain_rotate(
            eps, peers, products, scales, factors, keys, values, numbers[0]
        ), *counts

    monkeypatch.setattr(Sharded, "fuses", lambda *args: True)
    monkeypatch.setattr(fused_rotation, "can_reach_peers", lambda: True)
    monkeypatch.setattr(fused_rotation, "_rotate_kernel", rotate)
    monkeypatch.setattr(fused_norm, "_add_norm_kernel", fused_norm.plain_add_norm)
    jax.clear_caches()  # of the same programs without
    yield found
    jax.clear_caches()


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "strategy", "devices", "direct"),
    [
        ("rollout_full", "gather", 2, True),
        ("rollout_local_sink", "gather", 3, True),
        ("rollout_full", "gather", 4, False),
        ("rollout_local_sink", "hybrid", 4, True),
    ],
)
def test_golden_rollout(peers, name, strategy, devices, direct):
    config, _ = golden_transformer(load(name))
    model = dataclasses.replace(PRESETS["tiny"], transformer=config)
    parallel = SequenceParallel(devices, strategy, direct=direct).for_model(model)
    golden = GoldenRollout(name, parallel=parallel, unrolled=True)
    np.testing.assert_allclose(golden.run(), golden.data["latents"], atol=ATOL)
    golden.check_cache(ATOL)
    writes = strategy == "gather" and direct
    assert {(p.count, p.axis) for p, _ in peers} == ({(devices, "seq")} if writes else set())
    layers, waits = config.num_layers, [wait for _, wait in peers]
    # The passes of the loop own its cache, the context pass does not.
    each = [True, *[False] * (layers - 1), *[True] * layers]
    assert waits == each * (len(waits) // len(each))


def test_who_can_send(monkeypatch):
    """All devices of a process in order, from the first; each writes to the places of all where it is alone."""
    monkeypatch.setattr(fused_rotation, "can_reach_peers", lambda: True)
    first, second, third = jax.devices()[:3]

    def peers(devices, tokens=24, **options):
        return SequenceParallel(devices, "gather", **options).for_model(seeded.MODEL)._peers(tokens)

    assert peers([first, second]) == (2, 24, "seq")
    assert peers([second, first]) is None
    assert peers([second, third]) is None
    assert peers([first, second], direct=False) is None
    assert peers([first, second, third], tokens=26) is None  # 9 rows, and a block of threads holds 4
    assert SequenceParallel(2, "ring").for_model(seeded.MODEL)._peers(24) is None
    assert Share.create(Strategy("gather", 2, 1), first)._peers(24) == (2, 24, None)


GRID, FRAMES = (2, 12), 2


@pytest.mark.parametrize("devices", [2, 3])
def test_hosts_meet_before_the_first_kernel_that_waits(peers, devices):
    """By a permute: of the values of every layer between two devices, before the first layer alone among more."""
    parallel = SequenceParallel(devices, "gather", unroll=True).for_model(seeded.MODEL)
    spec = RolloutSpec.create(seeded.CONFIG, seeded.SAMPLER, GRID, FRAMES, parallel=parallel)
    params = transformer.unroll(transformer.init(seeded.CONFIG, jax.random.key(0)))
    params = jax.device_put(params, spec.parallel.shardings(params))
    noise = rollout.to_tokens(spec, seeded.latents(spec, 1, FRAMES))
    cache = rollout.init_cache(spec, 1, jnp.float32, stacked=False)
    given = params, cache, seeded.text(spec, params, 1), noise, jnp.float32(500), spec.place(0, FRAMES)
    program = jax.jit(functools.partial(rollout.predict, spec)).lower(*given).as_text()
    assert len(peers) == seeded.CONFIG.num_layers
    permutes = re.findall(r"collective_permute.*-> (tensor<.*?>)", program)
    assert len(permutes) == (seeded.CONFIG.num_layers if devices == 2 else 1)
    assert devices == 2 or permutes == [f"tensor<{FRAMES}xi32>"]


def _gradients(parallel):
    """Of a block after another one, with respect to parameters and noise; through the cache of the first."""
    spec = RolloutSpec.create(seeded.CONFIG, seeded.SAMPLER, GRID, 2 * FRAMES, parallel=parallel)
    params = transformer.unroll(transformer.init(seeded.CONFIG, jax.random.key(0)))
    params = jax.device_put(params, spec.parallel.shardings(params))
    noise = rollout.to_tokens(spec, seeded.latents(spec, 1, FRAMES))

    def loss(params, noise):
        text, total = seeded.text(spec, params, 1), 0.0
        cache = rollout.init_cache(spec, 1, jnp.float32, stacked=False)
        for block in range(2):
            place = spec.place(block * FRAMES, FRAMES)
            _, x0, cache = rollout.predict(spec, params, cache, text, noise, jnp.float32(500), place)
            total += jnp.mean(jnp.square(rollout.from_tokens(spec, x0)))
        return total

    by_params, by_noise = jax.jit(jax.grad(loss, (0, 1)))(params, noise)
    return jax.tree.map(np.asarray, (by_params, rollout.from_tokens(spec, by_noise)))


@pytest.mark.parametrize("strategy", ["gather", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_gradients(peers, strategy):
    expected = _gradients(SingleDevice(unroll=True))
    found = _gradients(SequenceParallel(2, strategy, unroll=True).for_model(seeded.MODEL))
    assert bool(peers) == (strategy == "gather")
    for x, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.linalg.norm(x - right) <= 1e-5 * np.linalg.norm(right)
