"""What the trainer asks of a stage, and where the stages are.

An update is a pure function of (state, step, data): the step number is the position in the data and the state of the
random numbers. So a run that is killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel
from jax_causal.training.config import TrainConfig

State = dict[str, Any]  # nested dict of numeric arrays; no random keys
Metrics = dict[str, jax.Array]  # fp32 scalars by name

# Stage -> (module, class). Classes are made with (config, model, components of init_from, parallel).
STAGES = {
    "vae": ("jax_causal.training.vae_stage", "VAEStage"),
    "teacher": ("jax_causal.training.teacher_stage", "TeacherStage"),
    "causal": ("jax_causal.training.causal_stage", "CausalStage"),
    "distill": ("jax_causal.training.distill_stage", "DistillStage"),
}


class Stage(Protocol):
    """One objective."""

    def init(self, key: jax.Array) -> State:
        """Everything that is trained or kept between updates: fp32 parameters, optimizer, averages. Pure; compiled by
        the trainer. Arrays that it closes over become arguments of the compiled program, not constants in it."""

    def data(self) -> Any:
        """Whatever `update` reads and does not change, for example encoded clips or a frozen teacher: a pytree of
        arrays, or None. Called once, before the loop; a pure function of the seed, so that resuming makes it anew."""

    def data_like(self) -> Any:
        """The form of `data()` as `jax.ShapeDtypeStruct`s, with shardings where the stage settles them: enough to
        compile an update. Computes nothing."""

    def update(self, state: State, step: jax.Array, data: Any) -> tuple[State, Metrics]:
        """One step; `step` is int32 []. Pure; compiled with `state` donated. Draws all data and noise from
        `step_key(seed, step)`. Metrics hold "loss"; one that is not finite stops the run."""

    def sample(self, state: State) -> np.ndarray | None:
        """A few videos to look at, uint8 [n, T, H, W, 3]."""

    def export(self, state: State) -> dict[str, dict]:
        """Parameters by component of a model folder, averaged ones where there are."""

    def trained_model(self, state: State) -> ModelConfig:
        """The model's configuration that goes with what is exported."""


def step_key(seed: int, step) -> jax.Array:
    """The random key of an update."""
    return jax.random.fold_in(jax.random.key(seed), step)


def init_key(seed: int) -> jax.Array:
    """The random key of the first state: none of those of the updates, nor of what they split off."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))


def create(
    config: TrainConfig, model: ModelConfig, components: Mapping[str, dict], parallel: Parallel, **more
) -> Stage:
    """The stage of a configuration; `components` are fp32 parameters by component, of the folder to start from.
    `more` is for stages that take more."""
    module, name = STAGES[config.stage]
    return getattr(importlib.import_module(module), name)(config, model, components, parallel, **more)
