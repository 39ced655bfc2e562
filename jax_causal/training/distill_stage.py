"""Stage four: Self-Forcing (arXiv:2506.08009) with distribution matching (DMD, arXiv:2405.14867): the few-step model.

The generator rolls whole clips out from noise exactly as at inference, cached keys and values included, and its output
is made to look as probable to the teacher as to a critic that keeps learning what the generator makes. No video is
needed, only prompts.

An update is one of the generator and then `critic_steps` of the critic, each on prompts and rollouts of its own. The
papers' code counts these apart: its 600 iterations are 120 of these updates. Prompts are encoded when they are drawn:
the encoder of the 1.3B model takes 1.4 GB on each of eight devices and 1 % of an update's time, where embeddings made
beforehand would take 4 MB a prompt.

Source: Self-Forcing, algorithm 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import flow, modules, sampling, transformer
from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.rollout import RolloutSpec
from jax_causal.text import UMT5Encoder
from jax_causal.tokenizer import Tokenizer, load_tokenizer
from jax_causal.training import data, diffusion, optim, previews
from jax_causal.training.causal_stage import gapped_frames
from jax_causal.training.config import TrainConfig
from jax_causal.training.folder import Components, placed
from jax_causal.training.self_forcing import last_pass, roll_out
from jax_causal.training.stage import step_key


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the stage `distill`.

    Attributes:
      teacher: model folder of the bidirectional model whose distribution is to be matched; the critic starts as its
        copy.
      prompts: text file with a prompt on each line, tokenized as the model folder `init_from` does; without one,
        prompts are captions of the procedural world.
      num_prompts, wordings: scenes whose captions are rolled out, and captions of each.
      negative_prompt: what guidance leads away from; empty for the prompt that says nothing.
      guidance: of the teacher, 1 meaning none.
      critic_steps: critic updates for one of the generator.
      critic_learning_rate: the generator's is `learning_rate` of the configuration; schedules of both go alike.
      earliest, latest: timesteps between which the two scores are compared.
      longest_gap, gap_share: as of the stage `causal`.
    """

    teacher: str = ""
    prompts: str = ""
    num_prompts: int = 20_480
    wordings: int = 4
    negative_prompt: str = ""
    guidance: float = 3.0
    critic_steps: int = 5
    critic_learning_rate: float = 1e-4
    earliest: float = 20.0
    latest: float = 980.0
    longest_gap: int = 0
    gap_share: float = 0.5


class DistillStage:
    """See the module's text, and `stage.Stage` for the methods.

    Args:
      teacher: components of the teacher, instead of the folder that the options name.
    """

    name = "distill"

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        components: Mapping,
        parallel: Parallel | None = None,
        *,
        teacher: Mapping | None = None,
    ):
        self.config, self.options = config, config.stage_options(Options)
        self.model, self.components = model, components
        self.parallel = parallel or SingleDevice()
        diffusion.require(components, self.name, "transformer", "text_encoder")
        self.teacher = teacher or _teacher(self.options.teacher, model, self.parallel)
        turns = self.options.critic_steps
        self.critic_config = dataclasses.replace(
            config,
            learning_rate=self.options.critic_learning_rate,
            num_steps=config.num_steps * turns,
            warmup_steps=config.warmup_steps * turns,
        )
        self.optimizer, self.critic_optimizer = map(optim.optimizer, (config, self.critic_config))
        self.setting = diffusion.Setting.create(model, self.parallel)
        self.spec = RolloutSpec.create(
            model.transformer,
            model.sampler,
            self.setting.grid,
            self.setting.num_frames,
            parallel=self.parallel,
        )
        sampler = model.sampler
        self.blocks = transformer.block_index(
            self.setting.num_frames, sampler.frames_per_block, sampler.independent_first_frame
        )

    def init(self, key):
        generator, critic = self.components["transformer"], self.teacher["transformer"]
        return {
            "generator": {"params": generator, "optimizer": self.optimizer.init(generator), "ema": generator},
            "critic": {"params": critic, "optimizer": self.critic_optimizer.init(critic)},
        }

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        folder = self.config.init_from and Path(self.config.init_from, "tokenizer")
        return load_tokenizer(self.model.tokenizer, folder, self.model.text_encoder.max_length)

    def data(self):
        """Token ids of the prompts [N, V, L] and of the negative one [L], and the parameters that stay as they are."""
        parts = {"teacher": self.teacher["transformer"], "text_encoder": self.components["text_encoder"]}
        ids, negative = map(jnp.asarray, (self._prompt_ids(), self._negative_prompt()))
        return ids, negative, optim.cast(parts, self.config.dtype)

    def data_like(self):
        """The form of `data()`, with `num_prompts` prompts whatever a file holds."""
        model, dtype = self.model, self.config.dtype
        shape = (self.options.num_prompts, self.options.wordings, model.text_encoder.max_length)
        ids, negative = (jax.ShapeDtypeStruct(s, jnp.int32) for s in (shape, shape[-1:]))
        teacher = transformer.abstract(model.transformer, dtype)
        encoder = modules.abstract(UMT5Encoder, model.text_encoder, dtype=dtype)
        teacher = placed(teacher, self.parallel)
        encoder = placed(encoder, self.parallel, "text_encoder")
        return ids, negative, {"teacher": teacher, "text_encoder": encoder}

    def _negative_prompt(self) -> np.ndarray:
        text = self.options.negative_prompt
        return self.tokenizer(text)[0][0] if text else diffusion.null_prompt(self.tokenizer)

    def _prompt_ids(self) -> np.ndarray:
        if self.options.prompts:
            ids, _ = self.tokenizer(_read_prompts(self.options.prompts))
            return ids[:, None]
        sample = jax.jit(lambda key: data.scenes(key, self.options.num_prompts))
        scenes = sample(jax.random.key(self.config.seed + 3))
        return data.prompts(data.attribute_sets(scenes), self.tokenizer, self.options.wordings).ids

    def update(self, state, step, data):
        """A generator update, then `critic_steps` critic updates, each on rollouts of its own."""
        key = step_key(self.config.seed, step)
        state, metrics = self._step("generator", state, jax.random.fold_in(key, 0), step, data)

        def critic_step(state, turn):
            key_ = jax.random.fold_in(key, 1 + turn)
            return self._step("critic", state, key_, step * self.options.critic_steps + turn, data)

        state, critic = jax.lax.scan(critic_step, state, jnp.arange(self.options.critic_steps))
        return state, metrics | {f"critic_{name}": value.mean() for name, value in critic.items()}

    def _step(self, part: str, state, key, step, data):
        """One optimizer step of one of the two networks."""
        loss, config, optimizer = {
            "generator": (self.generator_loss, self.config, self.optimizer),
            "critic": (self.critic_loss, self.critic_config, self.critic_optimizer),
        }[part]
        grads, metrics = optim.accumulate(
            lambda params, key: loss(params, state, key, *data, config.batch_size // config.accumulate),
            state[part]["params"],
            key,
            config.accumulate,
        )
        new, metrics = optim.step(optimizer, config, state[part], grads, step, metrics)
        return state | {part: new}, metrics

    # The two losses.

    def rollouts(self, params, key, ids, frozen, batch: int):
        """Rollouts of random prompts with `params` and what belongs to them: see `self_forcing.roll_out`."""
        keys = jax.random.split(key, 5)
        which = jax.random.randint(keys[0], (2, batch), 0, np.array([ids.shape[:2]]).T)
        context = diffusion.encode_prompts(self.model, frozen["text_encoder"], ids[which[0], which[1]])
        network = transformer.bind(self.model.transformer, params)
        draws = jax.random.split(keys[1], len(self.spec.sampler.steps))
        noise = jnp.stack([self.setting.noise(key, batch, self.config.dtype) for key in draws])
        exit_step = self.draw_exit(keys[2])
        frames = gapped_frames(
            keys[3],
            self.blocks,
            self.model.transformer.head_dim,
            self.options.longest_gap,
            self.options.gap_share,
        )
        text = jax.lax.stop_gradient(network.embed_text(context))
        inputs, clean = roll_out(self.spec, params, text, noise[0], noise[1:], exit_step, frames)
        return context, inputs, clean, exit_step, frames

    def generator_loss(self, params, state, key, ids, negative, frozen, batch: int):
        """DMD on the last pass of rollouts; the gradient stays inside that pass."""
        params = diffusion.computed(params, self.config)
        keys = jax.random.split(key, 3)
        context, inputs, clean, exit_step, frames = self.rollouts(
            jax.lax.stop_gradient(params), keys[0], ids, frozen, batch
        )
        x = last_pass(self.spec, params, context, inputs, clean, exit_step, frames, remat=self.config.remat)
        t, sigma = self.draw_times(keys[1], batch)
        noise = self.setting.noise(keys[2], batch, self.config.dtype)
        noisy = flow.add_noise(jax.lax.stop_gradient(x), noise, sigma)
        real = self.score(frozen["teacher"], noisy, t, sigma, context)
        if self.options.guidance != 1:
            without = diffusion.encode_prompts(self.model, frozen["text_encoder"], negative[None])
            without = jnp.broadcast_to(without, context.shape)
            real = sampling.guide(
                real, self.score(frozen["teacher"], noisy, t, sigma, without), self.options.guidance
            )
        fake = self.score(state["critic"]["params"], noisy, t, sigma, context)
        loss, size = dmd_loss(x, real, fake, self.setting.tokens)
        return loss, {"loss": loss, "direction": size}

    def critic_loss(self, params, state, key, ids, negative, frozen, batch: int):
        """Flow matching on what the generator makes."""
        keys = jax.random.split(key, 3)
        generator = diffusion.computed(state["generator"]["params"], self.config)
        context, _, x, _, _ = jax.lax.stop_gradient(self.rollouts(generator, keys[0], ids, frozen, batch))
        t, sigma = self.draw_times(keys[1], batch)
        noise = self.setting.noise(keys[2], batch, x.dtype)
        loss = diffusion.flow_matching_loss(
            lambda x, t: self.velocity(params, x, t, context), x, noise, t, sigma, self.setting.tokens
        )
        return loss, {"loss": loss}

    def draw_exit(self, key):
        """Index, int32 [], of the denoising step at which all blocks of all rollouts are left."""
        return jax.random.randint(key, (), 0, len(self.spec.sampler.steps))

    def draw_times(self, key, batch: int):
        """One timestep and sigma for each whole video, [B, 1] fp32."""
        options = self.options
        return diffusion.clipped_times(
            key, (batch, 1), self.model.sampler.shift, options.earliest, options.latest
        )

    def velocity(self, params, x, t, context):
        """A bidirectional pass."""
        params = diffusion.computed(params, self.config)
        network = transformer.bind(self.model.transformer, params, remat=self.config.remat)
        text = network.embed_text(context)
        return network.forward(x, t, text, self.setting.frames, self.setting.grid, self.parallel)

    def score(self, params, x, t, sigma, context):
        """Clean prediction of a bidirectional network, fp32 and without gradient."""
        v = self.velocity(jax.lax.stop_gradient(params), x, t, context)
        return jax.lax.stop_gradient(flow.x0_from_flow(x.astype(jnp.float32), v, sigma))

    # What comes out.

    def sample(self, state):
        components = ChainMap(self.export(state), self.components)
        return previews.rollouts(self.model, components, self.tokenizer, self.parallel, self.config.mesh.data)

    def export(self, state):
        return {"transformer": state["generator"]["ema"]}

    def trained_model(self, state) -> ModelConfig:
        return dataclasses.replace(self.model, kind="causal-distilled")


def _teacher(folder: str, model: ModelConfig, parallel: Parallel) -> Mapping:
    if not folder:
        raise ValueError("config.options.teacher is not given: name the model folder of the stage `teacher`")
    components = Components(folder, model, parallel)
    if "transformer" not in components:
        raise FileNotFoundError(
            f"config.options.teacher: {folder} has no transformer; train the stage `teacher` there"
        )
    return components


def _read_prompts(path: str) -> list[str]:
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"config.options.prompts: {path} holds no prompts: write one on each line")
    return [line for line in lines if line]


def dmd_loss(x, real, fake, tokens: int):
    """Loss [] whose gradient in `x` is that of distribution matching, and the mean size [] of that direction.

    Args:
      x: generated samples [B, F, S, C]; the only argument with a gradient.
      real, fake: clean predictions of teacher and critic for `x` with noise, fp32.
      tokens: of a frame that count; see `diffusion.token_mean`.

    The direction is (fake - real) / mean |x - real|, the mean over all but the batch (DMD, equation 8), and zero where
    that is. What is not a number stays so: the trainer is to see it.
    """
    x = x.astype(jnp.float32)
    fixed, real, fake = jax.lax.stop_gradient((x, real, fake))
    scale = diffusion.token_mean(jnp.abs(fixed - real), tokens, each=True)
    direction = jnp.where(scale == 0, 0, (fake - real) / scale)
    loss = 0.5 * diffusion.token_mean(jnp.square(x - (fixed - direction)), tokens)
    return loss, diffusion.token_mean(jnp.abs(direction), tokens)
