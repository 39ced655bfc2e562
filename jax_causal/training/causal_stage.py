"""Stage three: the teacher's weights become causal, by teacher forcing on clean clips.

Every block is noised to a level of its own and predicted from the clean blocks before it, all blocks in one pass
(arXiv:2412.07772). Loss: mean squared error of the velocity of the noisy half.

So that a long video with a sink has nothing new about it, some steps move all blocks but the first to later
positions: then the first block is far away, as a sink is.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import modules, rope, transformer
from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.text import UMT5Encoder
from jax_causal.tokenizer import load_tokenizer
from jax_causal.training import diffusion, optim, previews
from jax_causal.training.config import TrainConfig
from jax_causal.training.folder import placed
from jax_causal.training.stage import step_key


@dataclasses.dataclass(frozen=True)
class Options(diffusion.ClipOptions):
    """Of the stage `causal`.

    Attributes:
      longest_gap: latent frames that blocks after the first are moved by, at most.
      gap_share: share of steps that move them at all.
    """

    longest_gap: int = 0
    gap_share: float = 0.5


class CausalStage:
    """See the module's text, and `stage.Stage` for the methods."""

    name = "causal"

    def __init__(
        self, config: TrainConfig, model: ModelConfig, components: dict, parallel: Parallel | None = None
    ):
        self.config, self.options = config, config.stage_options(Options)
        self.model, self.components = model, components
        self.tokenizer = load_tokenizer(model.tokenizer, None, model.text_encoder.max_length)
        self.parallel = parallel or SingleDevice()
        self.optimizer = optim.optimizer(config)
        self.setting = diffusion.Setting.create(model, self.parallel)
        diffusion.require(components, self.name, "transformer", "vae", "text_encoder")
        sampler = model.sampler
        self.blocks = transformer.block_index(
            self.setting.num_frames, sampler.frames_per_block, sampler.independent_first_frame
        )

    def init(self, key):
        params = self.components["transformer"]
        return {"params": params, "optimizer": self.optimizer.init(params), "ema": params}

    def data(self):
        clips = diffusion.encoded_clips(
            self.model, self.components["vae"], self.tokenizer, self.parallel, self.options, self.config
        )
        return clips, optim.cast(self.components["text_encoder"], self.config.dtype)

    def data_like(self):
        encoder = modules.abstract(UMT5Encoder, self.model.text_encoder, dtype=self.config.dtype)
        clips = diffusion.clips_like(self.model, self.parallel, self.options, self.config.dtype)
        return clips, placed(encoder, self.parallel, "text_encoder")

    def loss(self, params, key, clips: diffusion.Clips, encoder, batch: int):
        """Scalar loss and metrics of `batch` clips drawn with `key`; `encoder` holds the text encoder."""
        params = diffusion.computed(params, self.config)
        keys = jax.random.split(key, 5)
        x0, ids, _ = diffusion.draw(keys[0], clips, batch)
        ids, _ = diffusion.drop_prompts(
            keys[1], ids, self.options.drop_prompt, diffusion.null_prompt(self.tokenizer)
        )
        context = diffusion.encode_prompts(self.model, encoder, ids)

        t, sigma = diffusion.draw_times(keys[2], (batch, self.blocks[-1] + 1), self.model.sampler.shift)
        t, sigma = t[:, self.blocks], sigma[:, self.blocks]  # one for each frame
        noise = self.setting.noise(keys[3], batch, x0.dtype)
        frames = gapped_frames(keys[4], self.blocks, self.model.transformer.head_dim, self.options)
        network = transformer.bind(self.model.transformer, params, remat=self.config.remat)
        text = network.embed_text(context)

        def velocity(x, t):
            return network.teacher_forcing(
                x,
                t,
                x0,
                text,
                frames,
                self.setting.grid,
                self.parallel,
                frame_mask=transformer.teacher_forcing_mask(self.blocks),
                clean_t=jnp.full_like(t, self.model.sampler.context_noise),
            )

        error = diffusion.flow_matching_loss(velocity, x0, noise, t, sigma, self.setting.tokens)
        return error, {"loss": error}

    def update(self, state, step, data):
        key = step_key(self.config.seed, step)
        grads, metrics = optim.accumulate(
            lambda params, key: self.loss(
                params, key, *data, self.config.batch_size // self.config.accumulate
            ),
            state["params"],
            key,
            self.config.accumulate,
        )
        return optim.step(self.optimizer, self.config, state, grads, step, metrics)

    def sample(self, state):
        components = ChainMap(self.export(state), self.components)
        return previews.rollouts(self.model, components, self.tokenizer, self.parallel, self.config.mesh.data)

    def export(self, state):
        return {"transformer": state["ema"]}

    def trained_model(self, state) -> ModelConfig:
        return dataclasses.replace(self.model, kind="causal")


def gapped_frames(key, blocks: np.ndarray, head_dim: int, options):
    """Rotary factors [2, F, pairs] of frames 0, 1, ..., in some cases with a gap behind the first block.

    `blocks` holds the block of each frame [F]; `options` are those of a stage, with `longest_gap` and `gap_share`.
    """
    longest, share = options.longest_gap, options.gap_share
    if not longest:
        return rope.frame_factors(0, len(blocks), head_dim)
    draw_key, share_key = jax.random.split(key)
    gap = jax.random.randint(draw_key, (), 1, longest + 1) * jax.random.bernoulli(share_key, share)
    positions = np.arange(len(blocks)) + jnp.where(blocks > 0, gap, 0)
    return jnp.asarray(rope.frame_factors(0, len(blocks) + longest, head_dim))[:, positions]
