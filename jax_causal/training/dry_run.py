"""What training takes of every device's memory, from compiling an update: no weights are read, nothing is run.

Counted is what XLA's account of the compiled program (`memory_analysis`) says of one device:

  state: what is trained and kept between updates, in fp32: weights, two moments, the average, of all networks.
  data: what updates read: encoded clips, token ids, frozen networks in the dtype of computation.
  temporary: the most that an update needs at any time besides: weights cast and gathered, gradients, activations, the
    key/value cache of rollouts.

Not counted: a second copy of the state with `guard` (it is in temporary), what the libraries of a GPU hold (about a
gigabyte), sample videos, and the checkpoint that is being written.

The program is compiled for virtual CPU devices, whatever the machine has, and that makes "temporary" a bound from
above for accelerators: a CPU computes bfloat16 products in fp32 and keeps their operands so, and its attention, which
goes over keys in chunks, keeps a mask for each chunk (for the 1.3B model 19 GB).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from jax_causal import modules
from jax_causal.components import COMPONENTS
from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel
from jax_causal.training import stage as stages
from jax_causal.training import trainer
from jax_causal.training.config import TrainConfig
from jax_causal.training.stage import init_key


class Unread(Mapping):
    """Random parameters in the place of a model folder's, by component. Under `jax.eval_shape` they take no memory."""

    def __init__(self, model: ModelConfig):
        self._model = model

    def __getitem__(self, component: str) -> dict:
        if component not in COMPONENTS:
            raise KeyError(component)
        sizes = getattr(self._model, component)
        return modules.init(COMPONENTS[component], sizes, jax.random.key(0), dtype=jnp.float32)

    def __contains__(self, component) -> bool:
        return component in COMPONENTS

    def __iter__(self) -> Iterator[str]:
        return iter(COMPONENTS)

    def __len__(self) -> int:
        return len(COMPONENTS)


def memory(config: TrainConfig, model: ModelConfig, parallel: Parallel) -> dict[str, int]:
    """Bytes on each device by name: "state", "data", "temporary" and their sum, "total"."""
    weights = Unread(model)
    teacher = {"teacher": weights} if config.stage == "distill" else {}
    stage = stages.create(config, model, weights, parallel, **teacher)
    carry = trainer.abstract_carry(jax.eval_shape(stage.init, init_key(config.seed)), parallel)
    data = trainer.placed_like(stage.data_like(), parallel)
    _, update = trainer.compile_update(stage, carry, data, guard=config.guard)
    account = update.memory_analysis()
    sizes = {
        "state": _on_one_device(carry),
        "data": _on_one_device(data),
        "temporary": account.temp_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values())}


def _on_one_device(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
