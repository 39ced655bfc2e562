"""AdamW and Muon on fp32 parameters, gradient accumulation, moving averages: plain functions on nested dicts."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from optax import contrib

from jax_causal.training.config import TrainConfig

# Root mean square of an update of Muon over the learning rate: that of AdamW, so that both take the same rates
# (arXiv:2502.16982, section 2.2).
_MUON_SIZE = 0.2
_MUON_MOMENTUM = 0.95


class AdamW:
    """Adam with decoupled weight decay of matrices, after clipping by the global norm; put together from optax.

    Its state is a nested dict, {"mu", "nu", "count"}: moments laid out as the parameters, and the updates so far.
    """

    def __init__(self, config: TrainConfig):
        self.schedule = schedule(config)
        self._adam = optax.scale_by_adam(*config.betas, eps=config.eps)
        self._clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
        self._decay = optax.add_decayed_weights(config.weight_decay, mask=is_matrix)

    def init(self, params: dict) -> dict:
        return dict(self._adam.init(params)._asdict())

    def directions(self, grads: dict, state: dict) -> tuple[dict, dict]:
        """What the parameters move by for a learning rate of -1, without decay, and the new state."""
        updates, new = self._adam.update(grads, optax.ScaleByAdamState(**state))
        return updates, dict(new._asdict())

    def update(
        self, grads: dict, state: dict, params: dict, step: jax.Array
    ) -> tuple[dict, dict, dict[str, jax.Array]]:
        """New parameters, new state, and metrics: the gradient's norm before clipping, and the learning rate, which
        goes by the `step` of the run."""
        rate = self.schedule(step)
        norm = optax.tree.norm(grads)
        updates, _ = self._clip.update(grads, optax.EmptyState())
        updates, state = self.directions(updates, state)
        updates, _ = self._decay.update(updates, self._decay.init(params), params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, state, {"grad_norm": norm, "learning_rate": rate}


class Muon(AdamW):
    """`AdamW`, save that kernels move along their momentum made orthogonal (arXiv:2502.16982).

    The kernel of a convolution counts as one matrix from all it sees to its output channels, stacked layers as a
    matrix each. Embeddings, biases, scales and modulations stay with Adam.

    Its state is {"kernels": {"mu"}, "others": {"mu", "nu"}, "count"}.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        axes = contrib.MuonDimensionNumbers(1, 2)
        self._muon = contrib.scale_by_muon(
            beta=_MUON_MOMENTUM, weight_dimension_numbers=lambda groups: dict.fromkeys(groups, axes)
        )

    def init(self, params: dict) -> dict:
        kernels, others = _kernels_and_others(params)
        mu = unflatten_dict(optax.tree.zeros_like(kernels))
        return {"kernels": {"mu": mu}, "others": super().init(unflatten_dict(others)), "count": jnp.int32(0)}

    def directions(self, grads: dict, state: dict) -> tuple[dict, dict]:
        kernels, others = _kernels_and_others(grads)
        muon = self._muon.init({})._replace(
            count=state["count"], mu=_matrices(flatten_dict(state["kernels"]["mu"]))
        )
        directions, muon = self._muon.update(_matrices(kernels), muon)
        directions = {shape: _MUON_SIZE * max(shape) ** 0.5 * x for shape, x in directions.items()}
        others, adam = super().directions(unflatten_dict(others), state["others"])
        mu = unflatten_dict(_kernels(muon.mu, kernels))
        new = {"kernels": {"mu": mu}, "others": adam, "count": muon.count}
        return unflatten_dict(_kernels(directions, kernels) | flatten_dict(others)), new


def _kernels_and_others(tree: dict) -> tuple[dict, dict]:
    """Leaves named "kernel", and the rest, by path."""
    flat = flatten_dict(tree)
    kernels = {path: leaf for path, leaf in flat.items() if path[-1] == "kernel"}
    return kernels, {path: leaf for path, leaf in flat.items() if path not in kernels}


def _matrices(kernels: dict) -> dict:
    """Kernels as the matrices that they count as, those of one shape in one array: [n, rows, columns] by (rows,
    columns). An optimizer that takes each by itself spends its time on launching: 1060 products in an update
    of the small VAE."""
    groups: dict = {}
    for path, kernel in kernels.items():
        groups.setdefault(_matrix(path, kernel), []).append(kernel)
    return {shape: jnp.concatenate([x.reshape(-1, *shape) for x in group]) for shape, group in groups.items()}


def _kernels(matrices: dict, like: dict) -> dict:
    """The inverse of `_matrices`."""
    found, taken = {}, dict.fromkeys(matrices, 0)
    for path, kernel in like.items():
        shape = _matrix(path, kernel)
        count = kernel.size // math.prod(shape)
        start = taken[shape]
        found[path] = matrices[shape][start : start + count].reshape(kernel.shape)
        taken[shape] = start + count
    return found


def _matrix(path, kernel) -> tuple[int, int]:
    """Shape of the matrix that a kernel counts as, or each of its layers."""
    return math.prod(kernel.shape[_stacked(path) : -1]), kernel.shape[-1]


def _stacked(path) -> bool:
    """Whether the parameter at this path, a sequence of keys, is one of all layers along its first axis."""
    return "blocks" in path and not any(isinstance(key, int) for key in path)


def optimizer(config: TrainConfig) -> AdamW:
    """The optimizer of a configuration."""
    return {"adamw": AdamW, "muon": Muon}[config.optimizer](config)


def schedule(config: TrainConfig) -> Callable[[jax.Array], jax.Array]:
    """Learning rate by step, fp32: a linear warm-up from zero, then constant or half a cosine down to zero."""
    rest = config.num_steps - config.warmup_steps
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, max(rest, 1)),
    }[config.schedule]
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        after = optax.join_schedules([warmup, after], [config.warmup_steps])
    return lambda step: jnp.asarray(after(step), jnp.float32)


def is_matrix(params: dict) -> dict:
    """True for the leaves that weight decay applies to. Stacked layers have one axis more, which does not count."""

    def leaf(path, x):
        return x.ndim - _stacked([getattr(entry, "key", None) for entry in path]) >= 2

    return jax.tree_util.tree_map_with_path(leaf, params)


def accumulate(loss: Callable, params: dict, key: jax.Array, n: int) -> tuple[dict, dict[str, jax.Array]]:
    """Mean gradient and mean metrics over `n` microbatches, one after the other, in fp32.

    Args:
      loss: (params, key) -> (scalar, metrics): the loss of a microbatch that it draws from the key.
      key: one key, from which every microbatch gets one of its own; or keys [B], one for each example, which are
        dealt out in order: the result is then that of one batch, whatever `n`.
    """
    microbatches = jax.random.split(key, n) if key.ndim == 0 else key.reshape(n, -1)

    def one(key):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, key)
        return cast((grads, metrics), jnp.float32)

    if n == 1:
        return one(microbatches[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, microbatches[0]))
    total, _ = jax.lax.scan(
        lambda total, key: (jax.tree.map(jnp.add, total, one(key)), None), zeros, microbatches
    )
    return jax.tree.map(lambda x: x / n, total)


def step(
    optimizer: AdamW, config: TrainConfig, state: dict, grads: dict, step: jax.Array, metrics: dict
) -> tuple[dict, dict[str, jax.Array]]:
    """One update of a state {"params", "optimizer", "ema" (optional)}; other entries stay. Also the metrics, with the
    optimizer's."""
    params, moments, more = optimizer.update(grads, state["optimizer"], state["params"], step)
    new = state | {"params": params, "optimizer": moments}
    if "ema" in state:
        decay = jnp.where(step < config.ema_start, 0.0, config.ema) if config.ema_start else config.ema
        new["ema"] = ema_update(state["ema"], params, decay)
    return new, metrics | more


def ema_update(ema: dict, params: dict, decay: float) -> dict:
    """The moving average moved on: decay * ema + (1 - decay) * params. A decay of 0 follows the parameters."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def cast(tree, dtype):
    """Floating-point leaves in `dtype`; others as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
