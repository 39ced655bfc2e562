"""What devices send each other while they attend, walked through on the CPU; the order of keys; lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jax_causal import attention_peers
from jax_causal.attention_peers import PIECES, SLOWEST, Arrivals, Sender
from jax_causal.attention_tile import BLOCK_K, ROWS
from jax_causal.fused_rotation import Peers
from tests.kernels_on_cpu import Ref, f64, machine, random

__all__ = ["machine"]


@pytest.mark.parametrize(
    ("tokens", "devices", "rows"), [(128, 2, 64), (208, 2, 104), (272, 3, 104), (256, 4, 96)]
)
def test_all_rows_reach_all_devices(machine, tokens, devices, rows):
    """Even shares, and short and empty ones at the end."""
    B, F, N, D, slots, room, blocks = 2, 2, 3, 4, (2, 0), 3 * tokens + 8, 5
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
        for number in range(blocks):
            sender = Sender(
                Peers(devices, tokens, machine.axis, True), (B, F, rows, N), jnp.int32(number), blocks,
                [*map(Ref, caches)], Ref(np.array([0, 0, *slots], np.int32)),
                buffers=Ref(np.full((PIECES, ROWS, D), np.nan, jnp.bfloat16)), ready=Ref(np.zeros(PIECES)),
                sent=None, arrived=None,
            )  # fmt: skip
            for action in range(sender.actions):
                sender.act(jnp.int32(action))
    assert machine.signals == dict.fromkeys(range(devices), blocks * (devices - 1))
    assert machine.arrivals == blocks * devices
    expected = [np.array(x) for x in before]
    for cache, new in zip(expected, block, strict=True):
        for f, slot in enumerate(slots):
            cache[:, slot * tokens : (slot + 1) * tokens] = new[:, f]
    for caches in machine.memory:
        for cache, right in zip(caches, expected, strict=True):
            np.testing.assert_array_equal(f64(cache), f64(right))


class Actions:
    """A sender that notes what it is asked to do."""

    actions, block, blocks, arrived = 7, 0, 3, None
    peers = Peers(4, 8, "seq", True)

    def __init__(self, done):
        self.done = done

    def act(self, action):
        self.done.append(int(action))


@pytest.fixture
def done(monkeypatch):
    """What is done, in order: actions of a sender, and "wait"."""
    done = []
    monkeypatch.setattr(attention_peers, "_before_copies", lambda: None)
    monkeypatch.setattr(pl, "semaphore_wait", lambda *args, **kwargs: done.append(("wait", args[1])))
    monkeypatch.setattr(pl, "when", lambda condition: lambda run: run() if condition else None)
    monkeypatch.setattr(
        pl, "loop", lambda start, stop: lambda body: [body(i) for i in range(int(start), int(stop))]
    )
    monkeypatch.setattr(pl, "multiple_of", lambda x, _: x)
    return done


@pytest.mark.parametrize("length", [8, 120, 128, 136, 1000, 4680])
@pytest.mark.parametrize("runs", [1, 3])
def test_fresh_keys_come_last(done, length, runs):
    """Every key once, and none that is fresh before it is waited for; all is sent before, in order."""
    everything = [*range(Actions.actions), ("wait", 3 * 3)]
    for fresh in {0, 8, length // 2 // 8 * 8, length - 8, length}:
        steps, walked = -(-length // BLOCK_K), []
        order = Arrivals(Actions(done), np.array([length, fresh], np.int32))
        for run in range(runs):
            start, stop = run * steps // runs, (run + 1) * steps // runs
            count = max(stop - start, 1)
            done.clear()
            state = jnp.int32(0)
            origin, pace = order.begin(*map(jnp.int32, (start, count, length)))
            valid = int(order.valid(*map(jnp.int32, (start, stop, count, length))))
            for step in range(count):
                state = order.before(pace, *map(jnp.int32, (step, count)), state)
                first = int(order.first(origin, jnp.int32(step)))
                keys = range(first, first + (valid if step == 0 else BLOCK_K))
                walked += keys
                assert done == everything or (
                    all(key < fresh for key in keys) and done == everything[: len(done)]
                )
            state = order.before(pace, *map(jnp.int32, (count, count)), state)
            assert done[: Actions.actions] == everything[:-1]
            order.finish(state)
            assert len(done) <= len(everything)
        assert sorted(walked) == list(range(length))


@pytest.mark.parametrize("past", [4680, 9360, 28080])
def test_sending_takes_as_long_as_the_past_allows(done, past):
    """Blocks act in turn, at one pace, the last of them just before what the peers send is waited for."""
    length, acted = past + 4680, []
    steps = -(-length // BLOCK_K)
    for block in range(SLOWEST):
        sender = Actions(done)
        sender.block = jnp.int32(block)
        order = Arrivals(sender, np.array([length, past], np.int32))
        _, pace = order.begin(*map(jnp.int32, (0, steps, length)))
        state, when = jnp.int32(0), []
        done.clear()
        for step in range(steps):
            before, state = len(done), order.before(pace, *map(jnp.int32, (step, steps)), state)
            when += [step] * (len(done) - before)
        assert done == [*range(Actions.actions), ("wait", 3 * 3)]
        assert when[-1] == int(pace[0]) == (past - length % BLOCK_K) // BLOCK_K + 1
        every = min(when[-1] // (Actions.actions + 1), SLOWEST)
        assert set(np.diff(when[:-1])) == {every}
        acted.append(when[0])
        assert when[-2] < when[-1]
    assert acted == [-block % every for block in range(SLOWEST)]


def test_what_is_left_is_sent_before_results_need_the_memory(done):
    """A first tile with fewer steps than there are actions; what has come is not waited for again."""
    order = Arrivals(Actions(done), np.array([1280, 1152], np.int32))

    def walk(start, count, state):
        _, pace = order.begin(*map(jnp.int32, (start, count, 1280)))
        for step in range(count + 1):
            state = order.before(pace, *map(jnp.int32, (step, count)), state)
        return state

    state = walk(0, 3, jnp.int32(0))
    assert done == [*range(Actions.actions)]
    for start in (3, 7, 7):
        state = walk(start, 3, state)
        assert done == [*range(Actions.actions)] + [("wait", 3 * 3)] * (start == 7)
    order.finish(state)
    assert done == [*range(Actions.actions), ("wait", 3 * 3)]


def test_nothing_is_valid_without_keys():
    assert Arrivals(None, None).valid(*map(jnp.int32, (0, 0, 1, 0))) == 0


def test_lowers_for_a_gpu():
    """The kernel for one layer of several: the cache is written in place."""
    if jax.__version_info__[:2] != (0, 11):
        pytest.skip("this version of jax was not tried")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("seq",))
    P = jax.sharding.PartitionSpec

    def layer(q, keys, values, slots, length):
        peers = Peers(2, 1560, "seq", True)
        return attention_peers.attend(q, keys, values, slots, length, slots[0], peers=peers)

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
