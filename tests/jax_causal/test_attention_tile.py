"""What a warpgroup does at the barriers of a cluster when it has no queries, in order."""

import jax.numpy as jnp
import pytest

from jax_causal import attention_tile


class _Barriers:
    def __init__(self, name):
        self.name = name

    at = property(lambda self: self)

    def __getitem__(self, slot):
        return f"{self.name} {int(slot)}"


@pytest.mark.parametrize("done", [0, 3])
def test_a_warpgroup_without_queries_lets_go_of_a_step_with_all_its_warps(monkeypatch, done):
    """One warp arrives for all four: none of them may still be waiting for that step then."""
    order = []

    def loop(start, stop):
        def run(body):
            for step in range(start, stop):
                body(jnp.int32(step))

        return run

    monkeypatch.setattr(attention_tile.pl, "loop", loop)
    monkeypatch.setattr(attention_tile.plgpu, "barrier_wait", lambda barrier: order.append(("wait", barrier)))
    monkeypatch.setattr(
        attention_tile.plgpu, "barrier_arrive", lambda barrier: order.append(("arrive", barrier))
    )
    monkeypatch.setattr(attention_tile, "gather_warps", lambda: order.append("all warps"))
    keys, values = (
        (jnp.zeros((2, 8, 8)), _Barriers(f"{name} ready"), _Barriers(f"{name} free")) for name in ("k", "v")
    )
    attention_tile.skip(keys, values, done, 3, lambda: order.append("ahead"))
    expected = ["ahead"]
    for step in range(done, done + 3):
        for name in ("k", "v"):
            slot = step % 2
            expected += [("wait", f"{name} ready {slot}"), "all warps", ("arrive", f"{name} free {slot}")]
    assert order == expected
