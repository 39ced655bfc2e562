"""What devices send each other while they attend, walked through on the CPU; the order of keys; lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import attention_peers
from jax_causal.attention_peers import Arrivals
from jax_causal.attention_tile import BLOCK_K
from jax_causal.fused_rotation import Peers
from tests.kernels_on_cpu import Ref, f64, machine, random

__all__ = ["machine"]


@pytest.mark.parametrize(("tokens", "devices", "rows"), [(8, 2, 4), (40, 2, 20), (48, 3, 16), (40, 4, 16)])
def test_all_rows_reach_all_devices(machine, tokens, devices, rows):
    """Even shares, and short and empty ones at the end."""
    B, F, N, D, slots, room, senders = 2, 2, 6, 128, (2, 0), 3 * tokens + 4, 5
    block = random(*2 * [(B, F, tokens, N, D)])
    before = random(*2 * [(B, room, N, D)], seed=1)
    machine.memory = [[np.array(x) for x in before] for _ in range(devices)]
    for device, caches in enumerate(machine.memory):
        own = slice(device * rows, min((device + 1) * rows, tokens))
        for cache, new in zip(caches, block, strict=True):
            for f, slot in enumerate(slots):
                cache[:, slot * tokens + own.start : slot * tokens + own.stop] = new[:, f, own]
    for device, caches in enumerate(machine.memory):
        machine.device = device
        for sender in range(senders):
            attention_peers.send(
                Peers(devices, tokens, machine.axis, True), (B, F, rows), jnp.int32(sender), senders,
                *map(Ref, caches), Ref(np.array([0, 0, *slots], np.int32)), None,
            )  # fmt: skip
    assert machine.signals == dict.fromkeys(range(devices), senders * (devices - 1))
    expected = [np.array(x) for x in before]
    for cache, new in zip(expected, block, strict=True):
        for f, slot in enumerate(slots):
            cache[:, slot * tokens : (slot + 1) * tokens] = new[:, f]
    for caches in machine.memory:
        for cache, right in zip(caches, expected, strict=True):
            np.testing.assert_array_equal(f64(cache), f64(right))


@pytest.mark.parametrize("length", [8, 120, 128, 136, 1000, 4680])
@pytest.mark.parametrize("runs", [1, 3])
def test_fresh_keys_come_last(monkeypatch, length, runs):
    """Every key once, and none that is fresh before what a run waits for."""
    waited, order = [], Arrivals(None, 7)
    monkeypatch.setattr(attention_peers, "_before_copies", lambda: None)
    monkeypatch.setattr(attention_peers.pl, "semaphore_wait", lambda *args, **kwargs: waited.append(args[1]))
    monkeypatch.setattr(
        attention_peers.pl, "when", lambda condition: lambda run: run() if condition else None
    )
    for fresh in {0, 8, length // 2 // 8 * 8, length - 8, length}:
        steps, walked = -(-length // BLOCK_K), []
        for run in range(runs):
            start, stop = run * steps // runs, (run + 1) * steps // runs
            count = max(stop - start, 1)
            valid = int(order.valid(*map(jnp.int32, (start, stop, count, length))))
            waited.clear()
            for step in range(count):
                order.wait(jnp.int32(start), jnp.int32(step), (jnp.int32(length), jnp.int32(fresh)))
                first = int(order.first(*map(jnp.int32, (start, count, step, length))))
                keys = range(first, first + (valid if step == 0 else BLOCK_K))
                walked += keys
                assert waited or all(key < fresh for key in keys)
            assert waited in ([], [7])
        assert sorted(walked) == list(range(length))


def test_nothing_is_valid_without_keys():
    assert Arrivals(None, 1).valid(*map(jnp.int32, (0, 0, 1, 0))) == 0


def test_lowers_for_a_gpu():
    """The kernel for one layer of several: the cache is written in place."""
    if jax.__version_info__[:2] != (0, 11):
        pytest.skip("this version of jax was not tried")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("seq",))
    P = jax.sharding.PartitionSpec

    def layer(q, keys, values, slots, length):
        peers = Peers(2, 1560, "seq", True)
        return attention_peers.attend(q, keys, values, slots, length, peers=peers, fresh=slots[0])

    tokens = P(None, None, "seq")
    run = jax.shard_map(
        layer, mesh=mesh, in_specs=(tokens, P(), P(), P(), P()), out_specs=(tokens, P(), P()), check_vma=False
    )
    q = jax.ShapeDtypeStruct((1, 3, 1568, 12, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, 1, 32760, 12, 128), jnp.bfloat16)
    slots, length = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(run).trace(q, cache, cache, slots, length).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert call.count("output_operand_alias<") == 3  # keys, values, and what counts arrivals
