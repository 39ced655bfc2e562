"""Stage two: the bidirectional teacher and its text encoder, by flow matching on whole clips.

Clips are encoded once and kept on the device. Loss: mean squared error of the velocity (arXiv:2210.02747) at a noise
level drawn evenly from the schedule's table, one in ten prompts left out so that guidance has something to lead away
from. Beside it a linear probe reads what the prompt names from the text encoder's output: a much shorter way for words
to get a meaning than through the pictures. The probe is not exported.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_causal import modules, transformer
from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.text import UMT5Encoder
from jax_causal.tokenizer import load_tokenizer
from jax_causal.training import data, diffusion, optim, previews
from jax_causal.training.config import TrainConfig
from jax_causal.training.stage import step_key


@dataclasses.dataclass(frozen=True)
class Options(diffusion.ClipOptions):
    """Of the stage `teacher`.

    Attributes:
      probe_weight: of the probe's cross-entropy beside the velocity's error.
    """

    probe_weight: float = 0.05


class TeacherStage:
    """See the module's text, and `stage.Stage` for the methods."""

    name = "teacher"

    def __init__(
        self, config: TrainConfig, model: ModelConfig, components: dict, parallel: Parallel | None = None
    ):
        self.config, self.options = config, config.stage_options(Options)
        self.model, self.components = model, components
        self.tokenizer = load_tokenizer(model.tokenizer, None, model.text_encoder.max_length)
        self.parallel = parallel or SingleDevice()
        self.optimizer = optim.optimizer(config)
        self.setting = diffusion.Setting.create(model, self.parallel)
        diffusion.require(components, self.name, "vae")

    def init(self, key):
        keys = jax.random.split(key, 3)
        network = self.components.get("transformer") or diffusion.zero_velocity(
            transformer.init(self.model.transformer, keys[0])
        )
        encoder = self.components.get("text_encoder") or modules.init(
            UMT5Encoder, self.model.text_encoder, keys[1]
        )
        width = self.model.text_encoder.dim
        probe = jax.random.normal(keys[2], (width, sum(data.LABELS.values()))) / width**0.5
        params = {"transformer": network, "text_encoder": encoder, "probe": probe}
        return {"params": params, "optimizer": self.optimizer.init(params), "ema": params}

    def data(self):
        return diffusion.encoded_clips(
            self.model, self.components["vae"], self.tokenizer, self.parallel, self.options, self.config
        )

    def data_like(self):
        return diffusion.clips_like(self.model, self.parallel, self.options, self.config.dtype)

    def loss(self, params, key, clips: diffusion.Clips, batch: int):
        """Scalar loss and metrics of `batch` clips drawn with `key`."""
        params = optim.cast(params, self.config.dtype)
        keys = jax.random.split(key, 5)
        x0, ids, labels = diffusion.draw(keys[0], clips, batch)
        ids, dropped = diffusion.drop_prompts(
            keys[1], ids, self.options.drop_prompt, diffusion.null_prompt(self.tokenizer)
        )
        context = diffusion.encode_prompts(self.model, params["text_encoder"], ids)
        named = jnp.where(dropped, data.UNNAMED, labels)
        reading = diffusion.probe_loss(context, named, params["probe"])

        t, sigma = diffusion.draw_times(keys[2], (batch, 1), self.model.sampler.shift)
        noise = self.setting.noise(keys[3], batch, x0.dtype)
        network = diffusion.computed(params["transformer"], self.config)
        network = transformer.bind(self.model.transformer, network, remat=self.config.remat)
        text = network.embed_text(context)

        def velocity(x, t):
            return network.forward(x, t, text, self.setting.frames, self.setting.grid, self.parallel)

        error = diffusion.flow_matching_loss(velocity, x0, noise, t, sigma, self.setting.tokens)
        loss = error + self.options.probe_weight * reading
        return loss, {"loss": loss, "velocity_error": error, "probe_loss": reading}

    def update(self, state, step, clips):
        key = step_key(self.config.seed, step)
        grads, metrics = optim.accumulate(
            lambda params, key: self.loss(
                params, key, clips, self.config.batch_size // self.config.accumulate
            ),
            state["params"],
            key,
            self.config.accumulate,
        )
        return optim.step(self.optimizer, self.config, state, grads, step, metrics)

    def sample(self, state):
        components = self.export(state) | {"vae": self.components["vae"]}
        return previews.whole_clips(
            self.model, components, self.tokenizer, self.parallel, self.config.mesh.data
        )

    def export(self, state):
        return {name: state["ema"][name] for name in ("transformer", "text_encoder")}

    def trained_model(self, state) -> ModelConfig:
        return dataclasses.replace(self.model, kind="bidirectional")
