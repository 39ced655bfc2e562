"""Stages on meshes of devices against one device: the same losses, the same gradients.

Frames have 9 tokens, which no mesh here divides, so that padding has every occasion to get into a loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import SequenceParallel
from tests import micro_world

pytestmark = pytest.mark.sp
RTOL = 5e-6  # of losses; measured 5e-7
GRADIENT_RTOL = 1e-5  # of the norm of a leaf, or a thousandth of the largest norm; measured 1.2e-6

# (data, seq, strategy); shard_params as well where the name ends in +.
MESHES = {
    "8x1": (8, 1, "auto"),
    "8x1+": (8, 1, "auto"),
    "2x4-gather": (2, 4, "gather"),
    "2x4-ring": (2, 4, "ring"),
    "2x4-ulysses": (2, 4, "ulysses"),
    "2x4-hybrid": (2, 4, "hybrid"),
    "1x8-gather": (1, 8, "gather"),
    "1x8-ring": (1, 8, "ring"),
    "1x8-ulysses": (1, 8, "ulysses"),
    "1x8-hybrid": (1, 8, "hybrid"),
}
LOSSES = ("teacher", "causal", "generator", "critic")
ALWAYS = {
    ("teacher", "8x1"),
    ("causal", "2x4-ring"),
    ("generator", "1x8-hybrid"),
}


@functools.cache
def _outcome(loss, mesh):
    """Metrics of a loss, and its gradients by the name of the leaf."""
    parallel, batch = None, 8
    if mesh:
        data, seq, strategy = MESHES[mesh]
        parallel = SequenceParallel(data * seq, strategy, data=data, shard_params=mesh.endswith("+"))
    stage = micro_world.stage({"generator": "distill", "critic": "distill"}.get(loss, loss), parallel)
    state, data = stage.init(jax.random.key(0)), stage.data()
    state = jax.device_put(state, stage.parallel.shardings(state))
    key = jax.random.key(9)
    if loss == "teacher":
        params, run = state["params"], lambda params, data: stage.loss(params, key, data, batch)
    elif loss == "causal":
        params, run = state["params"], lambda params, data: stage.loss(params, key, *data, batch)
    else:
        params = state[loss]["params"]

        # Of the generator rollouts made alone, of the critic some made with others.
        keys = key[None] if loss == "generator" else jax.random.split(key, 2)

        def run(params, data):
            ids, negative, frozen = data
            frames = stage.frames(key)
            rolled_out = stage.rollouts(state["generator"]["params"], keys, frames, ids, frozen, batch)
            rolled_out = jax.tree.map(lambda x: x[-1], rolled_out)
            if loss == "critic":
                return stage.critic_loss(params, key, rolled_out)
            critic = state["critic"]["params"]
            return stage.generator_loss(params, critic, key, rolled_out, frames, negative, frozen)

    (_, metrics), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params, data)
    leaves = jax.tree.leaves_with_path(gradients)
    return jax.tree.map(float, metrics), {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}


def _cases():
    for loss in LOSSES:
        for mesh in MESHES:
            slow = () if (loss, mesh) in ALWAYS else (pytest.mark.slow,)
            yield pytest.param(loss, mesh, marks=slow, id=f"{loss}-{mesh}")


@pytest.mark.parametrize(("loss", "mesh"), list(_cases()))
def test_losses_and_gradients(loss, mesh):
    metrics, gradients = _outcome(loss, mesh)
    expected_metrics, expected = _outcome(loss, None)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=RTOL), name
    norms = {name: np.linalg.norm(leaf) for name, leaf in expected.items()}
    floor = 1e-3 * max(norms.values())
    assert floor > 0
    errors = {
        name: np.linalg.norm(gradients[name] - leaf) / max(norms[name], floor)
        for name, leaf in expected.items()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= GRADIENT_RTOL, worst


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8x1", "2x4-ring"])
def test_samples_while_training(mesh):
    """Four previews, whatever the number of groups, as on one device."""
    data, seq, strategy = MESHES[mesh]
    parallel = SequenceParallel(data * seq, strategy, data=data)
    for name in ("causal", "teacher"):
        videos = []
        for way, groups in ((None, 1), (parallel, data)):
            stage = micro_world.stage(name, way, mesh={"data": groups})
            state = jax.jit(stage.init)(jax.random.key(0))
            state = jax.device_put(state, stage.parallel.shardings(state))
            videos.append(np.asarray(stage.sample(state), np.int32))
        assert videos[0].shape == (4, 21, 24, 24, 3)
        assert np.abs(videos[0] - videos[1]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_whole_update(accumulate):
    """Generator and critic, compiled with the shardings of the trainer: weights move alike."""
    new = []
    for parallel in (None, SequenceParallel(8, "ring", data=2, shard_params=True)):
        stage = micro_world.stage("distill", parallel, accumulate=accumulate)
        state, data = stage.init(jax.random.key(0)), stage.data()
        state = jax.device_put(state, stage.parallel.shardings(state))
        state, metrics = jax.jit(stage.update)(state, jnp.int32(3), data)
        new.append((jax.tree.map(float, metrics), jax.tree.map(np.asarray, state)))
    (metrics, state), (expected_metrics, expected) = new
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    for part in ("generator", "critic"):
        for leaf, right in zip(
            *(jax.tree.leaves(x[part]["optimizer"]["mu"]) for x in (state, expected)), strict=True
        ):
            assert np.linalg.norm(leaf - right) <= 1e-3 * np.linalg.norm(right) + 1e-6
