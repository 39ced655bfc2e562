"""AdamW on fp32 parameters, gradient accumulation, moving averages: plain functions on nested dicts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jax_causal.training.config import TrainConfig


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

    def update(
        self, grads: dict, state: dict, params: dict, step: jax.Array
    ) -> tuple[dict, dict, dict[str, jax.Array]]:
        """New parameters, new state, and metrics: the gradient's norm before clipping, and the learning rate, which
        goes by the `step` of the run."""
        rate = self.schedule(step)
        norm = optax.tree.norm(grads)
        updates, _ = self._clip.update(grads, optax.EmptyState())
        updates, new = self._adam.update(updates, optax.ScaleByAdamState(**state))
        updates, _ = self._decay.update(updates, self._decay.init(params), params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, dict(new._asdict()), {"grad_norm": norm, "learning_rate": rate}


def optimizer(config: TrainConfig) -> AdamW:
    """The optimizer of a configuration."""
    return AdamW(config)


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
        names = [getattr(entry, "key", None) for entry in path]
        stacked = "blocks" in names and not any(isinstance(name, int) for name in names)
        return x.ndim - stacked >= 2

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
