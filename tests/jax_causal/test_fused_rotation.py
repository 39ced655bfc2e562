"""Rotation into the cache by one kernel, walked through on the CPU, against float64; several devices that write to each
other's caches; gradients and lowering."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import environment, fused_rotation, hopper_rows, peer_memory, rope
from jax_causal.peer_memory import Peers
from tests.kernels_on_cpu import assert_rounded, f64, machine, random, relative

__all__ = ["machine"]

EPS = 1e-6


def _queries(B=2, F=3, S=8, N=4, slots=(4, 0, 2), room=48):
    D = hopper_rows.HEAD_DIM
    qkv, *scales, keys, values = random((B, F, S, 3, N, D), *2 * [(N * D,)], *2 * [(B, 1, room, N, D)])
    frames, spatial = rope.frame_factors(1000, F, D), rope.spatial_factors(2, S // 2, D)
    return qkv, scales, rope.tables(jnp.asarray(frames), spatial), keys, values, jnp.asarray(slots)


def _parts(qkv):
    """Queries and keys, and values."""
    return qkv[:, :, :, :2], qkv[:, :, :, 2]


def _turned(x, table):
    """By complex numbers."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    cos, sin = f64(table)[:, :, :, None]
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _expected(qkv, scales, table):
    """Rotated queries and keys, in float64."""
    N, D = qkv.shape[-2:]
    for i in range(2):
        x = f64(qkv)[:, :, :, i]
        x = x / np.sqrt((x**2).mean((-2, -1), keepdims=True) + EPS) * f64(scales[i]).reshape(N, D)
        yield _turned(x, table)


def _check_cache(new_keys, new_values, keys, values, qkv, expected_keys, slots):
    """What slots hold, and that nothing else was written."""
    F, S = qkv.shape[1:3]
    untouched = np.ones(keys.shape[2], bool)
    for f, slot in enumerate(slots.tolist()):
        place = slice(slot * S, (slot + 1) * S)
        untouched[place] = False
        assert_rounded(new_keys[:, 0, place], expected_keys[:, f])
        np.testing.assert_array_equal(f64(new_values[:, 0, place]), f64(qkv)[:, f, :, 2])
    assert untouched.sum() == keys.shape[2] - F * S
    for new, old in ((new_keys, keys), (new_values, values)):
        np.testing.assert_array_equal(f64(new)[:, :, untouched], f64(old)[:, :, untouched])


def test_one_device(machine):
    qkv, scales, table, keys, values, slots = _queries()
    q, *held, _ = fused_rotation.rotate_into_cache(*_parts(qkv), scales, table, keys, values, slots, eps=EPS)
    expected_q, expected_k = _expected(qkv, scales, table)
    assert_rounded(q, expected_q.swapaxes(1, 2))
    _check_cache(*held, keys, values, qkv, expected_k, slots)
    assert not machine.awaited


SHARES = [(8, 2, 4), (20, 2, 10), (28, 2, 16), (24, 3, 8), (28, 3, 12), (20, 4, 8)]  # tokens, devices, rows


@pytest.mark.parametrize(
    ("tokens", "devices", "rows", "ahead"),
    [*((*share, False) for share in SHARES), *((*share, True) for share in SHARES if share[1] == 2)],
)
def test_devices_write_to_all_caches(machine, tokens, devices, rows, ahead):
    """Even shares, shares that are no multiple of a block of threads, and short and empty ones at the end; values sent
    by the kernel and, between two devices, before it; as the second of three layers."""
    qkv, scales, table, keys, values, slots = _queries(
        B=1, F=2, S=tokens, N=2, slots=(2, 0), room=3 * tokens + 4
    )
    expected_q, expected_k = _expected(qkv, scales, table)
    peers, layer, layers = Peers(devices, tokens, machine.axis), 1, 3
    reaches = _begin_pass(machine, peers, *([x] * layers for x in (keys, values)))
    here_is = layer, layers + layer, 2 * layers
    # As `Sharded` cuts them, with whatever rows of padding.
    index = np.minimum(np.arange(devices * rows), tokens - 1).reshape(devices, rows)
    for device, here in enumerate(index):
        machine.device, machine.references = device, here_is
        received = qkv[:, :, index[1 - device], 2] if ahead else None
        q, *_ = fused_rotation.rotate_into_cache(
            *_parts(qkv[:, :, here]), scales, table[:, :, here], keys, values, slots,
            eps=EPS, peers=peers, received=received, reach=reaches[device], layer=layer,
        )  # fmt: skip
        assert_rounded(q, expected_q[:, :, here].swapaxes(1, 2))
    for device, arrays in enumerate(machine.memory):
        held = [arrays[number] for number in here_is]
        _check_cache(*(x[:, None] for x in held[:2]), keys, values, qkv, expected_k, slots)
        for number in set(range(2 * layers)) - set(here_is):
            np.testing.assert_array_equal(f64(arrays[number]), f64((keys, values)[number // layers][:, 0]))
        (awaited,) = machine.awaited[device]
        assert held[2].tolist() == [0, awaited, 0]
        assert awaited > 0
        assert set(machine.checked[device]) == set(here_is)
    if devices * rows == tokens:  # without padding whatever is counted was written before, and is there
        for device in range(devices):
            events = [what for what, where in machine.order if (where == device) != (what == "sent")]
            assert re.fullmatch("((write )+sent count )+", " ".join([*events, ""]))


def _begin_pass(machine, peers, keys, values):
    """Every device's memory, with caches of its own and counts, and its `Reach`."""
    layers = len(keys)
    machine.memory = [
        [*(np.array(x[:, 0]) for x in (*keys, *values)), np.zeros(layers, np.int32)]
        for _ in range(peers.count)
    ]
    machine.references, reaches = range(2 * layers + 1), []
    for machine.device in range(peers.count):
        _, _, reach = peer_memory.reach(peers, tuple(keys), tuple(values), jnp.zeros(layers, jnp.int32))
        reaches.append(reach)
    return reaches


def test_a_pass_begins_with_the_addresses_of_all_caches(machine):
    *_, keys, values, _ = _queries(B=1, F=1, S=8, slots=(1,), room=24)
    reaches = _begin_pass(machine, Peers(3, 24, machine.axis), [keys, keys], [values, values])
    for device, reach in enumerate(reaches):
        assert (reach.counts == 0).all()
        devices = [(device + step) % 3 for step in range(3)]
        assert reach.addresses.tolist() == [[[other, number] for number in range(5)] for other in devices]


def test_gradient_goes_through_the_beginning_of_a_pass(machine):
    """As through nothing at all."""
    *_, keys, values, _ = _queries(B=1, F=1, S=8, slots=(1,), room=24)
    peers, caches = Peers(2, 16, machine.axis), ((keys, 2 * keys), (values, 3 * values))
    _begin_pass(machine, peers, *caches)
    weights = jax.tree.map(lambda x: random(x.shape, seed=x.size)[0], caches)

    def loss(caches):
        *begun, _ = peer_memory.reach(peers, *caches, jnp.zeros(2, jnp.int32))
        return sum(
            (x.astype(jnp.float32) * w).sum()
            for x, w in zip(*map(jax.tree.leaves, (begun, weights)), strict=True)
        )

    gradient = jax.grad(loss)(caches)
    assert jax.tree.structure(gradient) == jax.tree.structure(caches)
    for x, w in zip(*map(jax.tree.leaves, (gradient, weights)), strict=True):
        np.testing.assert_array_equal(f64(x), f64(w))


@pytest.mark.parametrize(
    ("tokens", "devices", "rows", "able"), [(20, 2, 10, True), (28, 3, 10, False), (26, 3, 12, False)]
)
def test_no_block_of_threads_holds_tokens_and_padding(tokens, devices, rows, able):
    assert Peers(devices, tokens, "seq").suit(rows) == able


def test_a_share_writes_its_own_rows_to_all_places(machine):
    """Where the other devices are not there; see `sharding.share`."""
    qkv, scales, table, keys, values, slots = _queries(B=1, F=2, S=8, slots=(1, 0), room=40)
    peers = Peers(2, 16, None)
    _, new_keys, new_values, _ = fused_rotation.rotate_into_cache(
        *_parts(qkv), scales, table, keys, values, slots, eps=EPS, peers=peers
    )
    _, expected_k = _expected(qkv, scales, table)
    twice = jnp.concatenate([qkv, qkv], axis=2)
    expected_k = np.concatenate([expected_k] * 2, axis=2)
    _check_cache(new_keys, new_values, keys, values, twice, expected_k, slots)
    assert not machine.awaited


def test_the_plain_form_is_the_same_function(machine):
    """Of which the gradient is taken."""
    qkv, scales, table, keys, values, slots = _queries()
    factors = fused_rotation._factors(table)
    *results, _ = fused_rotation.rotate_into_cache(*_parts(qkv), scales, table, keys, values, slots, eps=EPS)
    products = *_parts(qkv), None
    arguments = jax.tree.map(lambda y: y.astype(jnp.float32), (products, scales, factors, keys, values))
    for result, plain in zip(results, fused_rotation.plain_rotate(EPS, None, *arguments, slots), strict=True):
        assert relative(result, plain) < 4e-3


def test_gradient_goes_around_the_kernel(machine):
    """With respect to the cache too, whose values before are not kept for it."""
    qkv, scales, table, *caches, slots = _queries(B=1, F=2, N=2, slots=(1, 0), room=24)
    weights = random(*[(1, 8, 2, 2, 128)], *2 * [(1, 1, 24, 2, 128)], seed=1)

    def loss(run, qkv, scales, caches):
        results = run(qkv, scales, *caches)
        return sum((y.astype(jnp.float32) * w).sum() for y, w in zip(results, weights, strict=True))

    def fused(qkv, scales, *caches):
        return fused_rotation.rotate_into_cache(*_parts(qkv), scales, table, *caches, slots, eps=EPS)[:3]

    def plain(qkv, scales, *caches):
        factors = fused_rotation._factors(table)
        return fused_rotation.plain_rotate(EPS, None, (*_parts(qkv), None), scales, factors, *caches, slots)

    of = (qkv, scales, caches)
    actual = jax.grad(functools.partial(loss, fused), (0, 1, 2))(*of)
    exact = jax.tree.map(lambda y: y.astype(jnp.float32), of)
    expected = jax.grad(functools.partial(loss, plain), (0, 1, 2))(*exact)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) < 2e-2


def test_lowers_for_a_gpu():
    """One kernel serves all layers, and the cache is written in place."""

    def layers(qkv, scale, table, keys, values, slots):
        for _ in range(3):
            q, keys, values, _ = fused_rotation.rotate_into_cache(
                *_parts(qkv), (scale, scale), table, keys, values, slots, eps=EPS
            )
            qkv = qkv.at[:, :, :, 0].set(q.swapaxes(1, 2))
        return qkv, keys, values

    E, D = 1536, 128
    qkv, scale, cache = (
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 3, 1560, 3, 12, D), (E,), (1, 1, 32760, 12, D))
    )
    table, slots = (
        jax.ShapeDtypeStruct((2, 3, 1560, D // 2), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    traced = jax.jit(layers).trace(qkv, scale, table, cache, cache, slots)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert call.count("output_operand_alias<") == 2


@pytest.mark.parametrize(
    ("version", "flags", "able"),
    [
        ((0, 11, 2), "--xla_gpu_collective_permute_mode=peer", True),
        ((0, 11, 2), "--xla_gpu_collective_permute_mode=nccl", False),
        ((0, 11, 2), "", False),
        ((0, 12, 0), "--xla_gpu_collective_permute_mode=peer", False),
    ],
)
def test_peers_are_reached_where_hosts_meet_at_a_permute(monkeypatch, version, flags, able):
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert peer_memory.can_reach_peers() == able


def test_the_command_line_lets_hosts_meet(monkeypatch):
    environ = {}
    environment.apply(environ)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setenv("XLA_FLAGS", environ["XLA_FLAGS"])
    assert peer_memory.can_reach_peers()
