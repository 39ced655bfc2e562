"""What devices send each other while they attend, walked through on the CPU; the order of keys; lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import attention_hopper, attention_peers
from jax_causal.attention_hopper import BLOCK_K
from jax_causal.attention_peers import Peers
from tests.kernels_on_cpu import Memory, f64, machine, random

__all__ = ["machine"]


@pytest.mark.parametrize(("tokens", "devices", "rows"), [(8, 2, 4), (40, 2, 20), (48, 3, 16), (40, 4, 16)])
def test_all_rows_reach_all_devices(machine, tokens, devices, rows):
    """Even shares, and short and empty ones at the end."""
    B, F, N, D, slots, room = 2, 2, 2, 128, (2, 0), 3 * tokens + 4
    block = random(*2 * [(B, F, tokens, N, D)])
    before = random(*2 * [(B, room, N, D)], seed=1)
    numbers = np.array([0, 0, *slots], np.int32)
    machine.memory = [[np.array(x) for x in before] for _ in range(devices)]
    for device, caches in enumerate(machine.memory):
        own = slice(device * rows, min((device + 1) * rows, tokens))
        for cache, new in zip(caches, block, strict=True):
            for f, slot in enumerate(slots):
                cache[:, slot * tokens + own.start : slot * tokens + own.stop] = new[:, f, own]
    workers = 5
    for device, caches in enumerate(machine.memory):
        machine.device = device
        for worker in range(workers):
            machine.place(worker=worker)
            attention_peers.send(
                Peers(devices, tokens, machine.axis), (B, F, rows), worker, workers, *map(Memory, caches),
                Memory(numbers), None,
            )  # fmt: skip
    assert machine.signals == dict.fromkeys(range(devices), workers * (devices - 1))
    expected = [np.array(x) for x in before]
    for cache, new in zip(expected, block, strict=True):
        for f, slot in enumerate(slots):
            cache[:, slot * tokens : (slot + 1) * tokens] = new[:, f]
    for caches in machine.memory:
        for cache, right in zip(caches, expected, strict=True):
            np.testing.assert_array_equal(f64(cache), f64(right))


@pytest.mark.parametrize(
    ("tokens", "devices", "rows", "able"),
    [(40, 2, 20, True), (40, 3, 14, False), (20, 2, 10, False), (1560, 2, 784, True), (1560, 8, 195, True)],
)
def test_what_suits(tokens, devices, rows, able):
    assert Peers(devices, tokens, "seq").suit(rows) == able


@pytest.mark.parametrize("length", [8, 120, 128, 136, 1000, 4680])
@pytest.mark.parametrize("runs", [1, 3])
def test_fresh_keys_come_last(length, runs):
    """Every key once, those that are fresh not before the step that waits for them."""
    for fresh in {0, 8, length // 2, length - 8, length}:
        steps, walked = -(-length // BLOCK_K), []
        for run in range(runs):
            start, stop = run * steps // runs, (run + 1) * steps // runs
            numbers = map(jnp.int32, (start, stop, length, fresh))
            first, valid, fresh_step = attention_hopper._forward(*numbers)
            for step in range(max(stop - start, 1)):
                keys = range(int(first(step)), int(first(step)) + (int(valid) if step == 0 else BLOCK_K))
                walked += keys
                if step < fresh_step:
                    assert all(key < fresh for key in keys)
        assert sorted(walked) == list(range(length))


def test_nothing_is_valid_without_keys():
    _, valid, _ = attention_hopper._forward(*map(jnp.int32, (0, 0, 0, 0)))
    assert valid == 0


def test_lowers_for_a_gpu(monkeypatch):
    """The kernel for one layer of several: the cache is written in place."""
    if not attention_peers.can_reach_peers():
        pytest.skip("this version of jax cannot write to other devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("seq",))
    P = jax.sharding.PartitionSpec

    def layer(q, keys, values, slots, length):
        return attention_peers.attend(
            q, keys, values, slots, length, peers=Peers(2, 1560, "seq"), fresh=slots[0]
        )

    by_tokens = P(None, None, "seq")
    run = jax.shard_map(
        layer,
        mesh=mesh,
        in_specs=(by_tokens, P(), P(), P(), P()),
        out_specs=(by_tokens, P(), P()),
        check_vma=False,
    )
    q = jax.ShapeDtypeStruct((1, 3, 1568, 12, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, 1, 32760, 12, 128), jnp.bfloat16)
    slots, length = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(run).trace(q, cache, cache, slots, length).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert call.count("output_operand_alias<") == 3  # keys, values, and what counts arrivals
