"""Layers by fused kernels under every strategy, the kernels' plain forms in their place: goldens and gradients."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_causal import fused_norm, fused_rotation, peer_memory, rollout, transformer
from jax_causal.attention import attention
from jax_causal.config import PRESETS
from jax_causal.parallel import SingleDevice
from jax_causal.peer_memory import Peers
from jax_causal.rollout import RolloutSpec
from sharding import SequenceParallel, causal_rope_sp, direct
from sharding.hlo import Program
from sharding.mesh import SEQ, make_mesh
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
    """How often, on all devices, a pass was begun and a layer written to peers: ("begin" or "layer", these)."""
    found = collections.Counter()

    def count(*what):
        jax.debug.callback(lambda: found.update([what]))

    def reach(peers, keys, values, zeros):
        count("begin", peers)
        addresses = jnp.zeros((peers.count, 2 * len(keys) + 1, 2), jnp.int32)
        return keys, values, peer_memory.Reach(addresses, zeros)

    def rotate(eps, peers, products, scales, factors, written, numbers):
        count("layer", peers)
        keys, values, *counts = written
        return *fused_rotation.plain_rotate(
            eps, peers, products, scales, factors, keys, values, numbers[0]
        ), *counts

    monkeypatch.setattr(Sharded, "fuses", lambda *args: True)
    monkeypatch.setattr(peer_memory, "can_reach_peers", lambda: True)
    monkeypatch.setattr(peer_memory, "reach", reach)
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
    jax.effects_barrier()
    # In every pass, the context pass too.
    passes = len(list(golden.blocks())) * (len(golden.sampler.steps) + 1) + len(list(golden.initial_blocks()))
    each = {"begin": devices * passes, "layer": devices * passes * config.num_layers}
    of = Peers(devices, golden.spec.layout.tokens, "seq")
    assert peers == ({(what, of): n for what, n in each.items()} if strategy == "gather" and direct else {})


def test_who_can_send(monkeypatch):
    """All devices of a process in order, from the first; each writes to the places of all where it is alone."""
    monkeypatch.setattr(peer_memory, "can_reach_peers", lambda: True)
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


@pytest.mark.parametrize("devices", [2, 3, 5])
def test_a_pass_begins_with_counts_that_are_zero_once_hosts_have_met(peers, devices):
    sharded = make_mesh(jax.devices()[:devices], devices, 1)
    of_device = Peers(devices, 24, SEQ)

    def body(keys):
        return direct.begin_pass((keys,) * 4, (keys,) * 4, peers=of_device)[2].counts

    begin = jax.jit(jax.shard_map(body, mesh=sharded, in_specs=P(), out_specs=P(SEQ), check_vma=False))
    keys = jnp.zeros((1, 1, 8, 1, 8))
    assert begin(keys).tolist() == [0] * (4 * devices)
    # They depend on a permute in which every device takes part.
    (permute,) = Program(begin.lower(keys).compile().as_text()).sent()
    assert permute.collective.kind == "collective-permute"
    pairs = re.search(r"source_target_pairs={(.*?)}}", permute.instruction.attributes)[1]
    assert pairs.count("{") == devices


def _two_blocks(parallel):
    """Parameters, noise, and a function of both: what is predicted for a block and for the next, through the cache."""
    spec = RolloutSpec.create(seeded.CONFIG, seeded.SAMPLER, GRID, 2 * FRAMES, parallel=parallel)
    params = transformer.unroll(transformer.init(seeded.CONFIG, jax.random.key(0)))
    params = jax.device_put(params, spec.parallel.shardings(params))
    noise = rollout.to_tokens(spec, seeded.latents(spec, 1, FRAMES))

    def predict(params, noise):
        text, found = seeded.text(spec, params, 1), []
        cache = rollout.init_cache(spec, 1, jnp.float32, stacked=False)
        for block in range(2):
            place = spec.place(block * FRAMES, FRAMES)
            _, x0, cache = rollout.predict(spec, params, cache, text, noise, jnp.float32(500), place)
            found.append(rollout.from_tokens(spec, x0))
        return jnp.stack(found)

    return spec, params, noise, predict


@pytest.mark.parametrize(("devices", "padding"), [(3, []), (7, [0, 4 * FRAMES])])
def test_queries_that_attention_may_leave_out_are_padding(peers, monkeypatch, devices, padding):
    """What comes out for them is replaced, and the rest stays right; the last of 7 devices has nothing else."""
    left_out = set()

    def attend(q, *keys, queries=None, **options):
        out = attention(q, *keys, **options)
        if queries is None:
            return out
        jax.debug.callback(lambda count: left_out.add(int(count)), q.shape[1] - queries)
        return jnp.where(jnp.arange(q.shape[1])[:, None, None] < queries, out, 7)

    monkeypatch.setattr(causal_rope_sp, "attention", attend)
    _, params, noise, predict = _two_blocks(SingleDevice(unroll=True))
    expected = jax.jit(predict)(params, noise)
    _, params, noise, predict = _two_blocks(
        SequenceParallel(devices, "gather", unroll=True).for_model(seeded.MODEL)
    )
    np.testing.assert_allclose(jax.jit(predict)(params, noise), expected, atol=1e-5)
    jax.effects_barrier()
    assert peers
    assert left_out == set(padding)


def _gradients(parallel):
    """With respect to parameters and noise."""
    spec, params, noise, predict = _two_blocks(parallel)

    def loss(params, noise):
        return jnp.square(predict(params, noise)).mean((1, 2, 3, 4, 5)).sum()

    by_params, by_noise = jax.jit(jax.grad(loss, (0, 1)))(params, noise)
    return jax.tree.map(np.asarray, (by_params, rollout.from_tokens(spec, by_noise)))


@pytest.mark.parametrize("strategy", ["gather", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_gradients(peers, strategy):
    expected = _gradients(SingleDevice(unroll=True))
    found = _gradients(SequenceParallel(2, strategy, unroll=True).for_model(seeded.MODEL))
    jax.effects_barrier()
    assert bool(peers) == (strategy == "gather")
    for x, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.linalg.norm(x - right) <= 1e-5 * np.linalg.norm(right)
