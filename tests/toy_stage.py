"""A stage for tests of the trainer: linear regression on data drawn from the step number.

    y = x @ W + noise, with W fixed by the data, [8, 4]

Run as a program it trains in a folder, to be killed: python -m tests.toy_stage FOLDER CONFIG_JSON [--resume]
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal.config import preset
from jax_causal.parallel import SingleDevice
from jax_causal.training import optim
from jax_causal.training.config import TrainConfig
from jax_causal.training.stage import step_key
from jax_causal.training.trainer import train


@dataclasses.dataclass(frozen=True)
class Options:
    noise: float = 0.1
    nan_at: int = -1  # update whose loss is not a number


class ToyStage:
    def __init__(self, config, model=None, components=None, parallel=None):
        self.config, self.options = config, config.stage_options(Options)
        self.model, self.initial = model or preset("tiny"), (components or {}).get("transformer")
        self.parallel = parallel or SingleDevice()
        self.name, self.num_steps = config.stage, config.num_steps
        self.optimizer = optim.optimizer(config)

    def init(self, key):
        params = self.initial or {
            "kernel": jax.random.normal(key, (8, 4)),
            "layers": {i: {"bias": jnp.zeros(4)} for i in (0, 2, 10)},
        }
        return {"params": params, "optimizer": self.optimizer.init(params), "ema": params}

    def data(self):
        return {"weights": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}

    def update(self, state, step, data):
        def loss(params, keys):
            x, noise = jax.vmap(self.example)(keys)
            x = self.parallel.constrain(x, ("batch",))
            y = x @ data["weights"] + self.options.noise * noise
            bias = sum(layer["bias"] for layer in params["layers"].values())
            error = jnp.square(x @ params["kernel"] + bias - y).mean()
            error = jnp.where(step == self.options.nan_at, jnp.nan, error)
            return error, {"loss": error}

        keys = jax.random.split(step_key(self.config.seed, step), self.config.batch_size)
        grads, metrics = optim.accumulate(loss, state["params"], keys, self.config.accumulate)
        return optim.step(self.optimizer, self.config, state, grads, step, metrics)

    def example(self, key):
        x_key, noise_key = jax.random.split(key)
        return jax.random.normal(x_key, (8,)), jax.random.normal(noise_key, (4,))

    def sample(self, state):
        value = np.uint8(np.clip(np.asarray(state["params"]["kernel"][0, 0]) * 100, 0, 255))
        return np.full((3, 5, 7, 6, 3), value, np.uint8)

    def export(self, state):
        return {"transformer": state["ema"]}

    def trained_model(self, state):
        return dataclasses.replace(self.model, kind="bidirectional")


def config(**changes) -> TrainConfig:
    values = {"stage": "teacher", "num_steps": 40, "batch_size": 8, "learning_rate": 0.02, "ema": 0.9}
    values |= {"log_every": 3, "checkpoint_every": 5, "weight_decay": 0.01, "warmup_steps": 4}
    return TrainConfig.from_dict(values | changes)


if __name__ == "__main__":
    folder, text, *options = sys.argv[1:]
    settings = TrainConfig.from_json(text)
    train(ToyStage(settings), settings, Path(folder), resume="--resume" in options)
