"""The smallest model of the procedural world, with random weights, and its training stages."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_causal import modules
from jax_causal.components import COMPONENTS
from jax_causal.config import ModelConfig, from_dict
from jax_causal.training import stage as stages
from jax_causal.training.config import TrainConfig

CONFIGS = Path(__file__).parent / "jax_causal/training/micro"


@functools.cache
def model(size: int = 24) -> ModelConfig:
    """Sizes of the configurations in `micro/`, for frames of another size: 24 pixels are 9 tokens."""
    data = json.loads((CONFIGS / "vae.json").read_text())["model"]
    return from_dict(ModelConfig, data | {"height": size, "width": size}, "model")


@functools.cache
def components(size: int = 24) -> dict:
    """Random fp32 parameters by component."""
    keys = jax.random.split(jax.random.key(11), len(COMPONENTS))
    return {
        name: jax.jit(functools.partial(modules.init, module, getattr(model(size), name)))(key)
        for key, (name, module) in zip(keys, COMPONENTS.items(), strict=True)
    }


def config(stage: str, **changes) -> TrainConfig:
    """A configuration with few clips; `options` are added to those that it has."""
    options = {"distill": {"num_prompts": 16, "wordings": 2, "critic_steps": 2, "longest_gap": 4}}.get(
        stage, {"num_clips": 16, "wordings": 2, "encode_batch": 8}
    )
    if stage == "causal":
        options["longest_gap"] = 4
    if stage == "vae":
        options = {"num_frames": 5}
    values = {"stage": stage, "num_steps": 10, "batch_size": 8, "learning_rate": 1e-3, "dtype": "float32"}
    options |= changes.pop("options", {})
    return TrainConfig.from_dict(values | changes | {"options": options})


def stage(name: str, parallel=None, **changes):
    """A stage of the micro model with random weights."""
    more = {"teacher": {"transformer": teacher()}} if name == "distill" else {}
    if parallel is not None:
        parallel = parallel.for_model(model())
    return stages.create(config(name, **changes), model(), components(), parallel, **more)


@functools.cache
def teacher() -> dict:
    """Parameters of a transformer other than that of `components`."""
    return jax.tree.map(lambda p: p + 0.05 * jnp.cos(100 * p), components()["transformer"])
