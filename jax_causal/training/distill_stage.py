"""Stage four: Self-Forcing (arXiv:2506.08009) with distribution matching (DMD, arXiv:2405.14867): the few-step model.

The generator rolls whole clips out from noise exactly as at inference, cached keys and values included, and its output
is made to look as probable to the teacher as to a critic that keeps learning what the generator makes. No video is
needed, only prompts.

An update is `critic_steps` steps of the critic and then one of the generator, each on prompts and rollouts of its own.
The papers' code counts these apart: its 600 iterations are 120 of these updates, and each begins with the generator.
Prompts are encoded when they are drawn: the encoder of the 1.3B model takes 1.4 GB on each of eight devices and 1 % of
an update's time, where embeddings made beforehand would take 4 MB a prompt.

The generator is the same for all rollouts of an update, so they are made together: fewer and larger kernels, where
those of a small model are too short to fill a GPU. With `remat` or `accumulate`, which say that memory is short, each
step makes its own when it needs them. Both ways give the same rollouts: drawn from the step's own key, save the gap
behind the first block, which is one for all rollouts of an update.

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
from jax_causal.training.self_forcing import Rollouts, last_pass, roll_out
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
      often: motions and shapes of these that are drawn more often than others; see `world.sample`.
      negative_prompt: what guidance leads away from; empty for the prompt that says nothing.
      guidance: of the teacher, 1 meaning none.
      critic_steps: steps of the critic for one of the generator.
      critic_learning_rate: the generator's is `learning_rate` of the configuration; schedules of both go alike.
      earliest, latest: timesteps between which the two scores are compared.
      longest_gap, gap_share: as of the stage `causal`.
    """

    teacher: str = ""
    prompts: str = ""
    num_prompts: int = 20_480
    wordings: int = 4
    often: tuple[str, ...] = ()
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
        sample = jax.jit(lambda key: data.scenes(key, self.options.num_prompts, often=self.options.often))
        scenes = sample(jax.random.key(self.config.seed + 3))
        return data.prompts(data.attribute_sets(scenes), self.tokenizer, self.options.wordings).ids

    def update(self, state, step, data):
        """`critic_steps` steps of the critic, then one of the generator, each on rollouts of its own."""
        ids, negative, frozen = data
        config, turns = self.config, self.options.critic_steps
        frames_key, key = jax.random.split(step_key(config.seed, step))
        keys = jax.random.split(key, (turns + 1, 2 * config.accumulate))
        frames = self.frames(frames_key)
        roll_out = functools.partial(
            self.rollouts,
            state["generator"]["params"],
            frames=frames,
            ids=ids,
            frozen=frozen,
            batch=config.batch_size // config.accumulate,
        )
        together = roll_out(keys[:, 0]) if config.accumulate == 1 and not config.remat else None

        def made(together, key):
            """The rollouts of a step: those that it has already, or else of `key`."""
            return jax.tree.map(lambda x: x[0], roll_out(key[None])) if together is None else together

        def critic_step(critic, inputs):
            turn, keys, together = inputs

            def loss(params, roll_key, key):
                return self.critic_loss(params, key, made(together, roll_key))

            return _step(self.critic_optimizer, self.critic_config, critic, keys, step * turns + turn, loss)

        def generator_loss(params, roll_key, key):
            rollouts = made(jax.tree.map(lambda x: x[-1], together), roll_key)
            return self.generator_loss(params, critic["params"], key, rollouts, frames, negative, frozen)

        steps = (jnp.arange(turns), keys[:-1], jax.tree.map(lambda x: x[:-1], together))
        critic, critic_metrics = jax.lax.scan(critic_step, state["critic"], steps)
        generator, metrics = _step(self.optimizer, config, state["generator"], keys[-1], step, generator_loss)
        metrics |= {f"critic_{name}": value.mean() for name, value in critic_metrics.items()}
        return {"generator": generator, "critic": critic}, metrics

    def rollouts(self, params, keys, frames, ids, frozen, batch: int) -> Rollouts:
        """Rollouts of random prompts with `params`, `batch` for each of `keys` [G]: leaves [G, ...].

        Each of G is drawn from its key alone and has an exit step of its own.
        """
        params = diffusion.computed(params, self.config)
        which, noise, exits = jax.lax.map(lambda key: self._draw(key, ids.shape[:2], batch), keys)
        # G is the minor part of the batch: a mesh that shares the batch shares each of G.
        which, noise = (jnp.moveaxis(x, 0, 2) for x in (which, noise))
        which, noise = (x.reshape(len(x), -1, *x.shape[3:]) for x in (which, noise))
        context = diffusion.encode_prompts(self.model, frozen["text_encoder"], ids[tuple(which)])
        text = transformer.bind(self.model.transformer, params).embed_text(context)
        exit_step = exits[0] if len(keys) == 1 else jnp.tile(exits, batch)
        inputs, clean = roll_out(self.spec, params, text, noise[0], noise[1:], exit_step, frames)
        apart = (jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 0) for x in (context, inputs, clean))
        return Rollouts(*apart, exits)

    def _draw(self, key, prompts: tuple[int, int], batch: int):
        """Indices of prompts and wordings [2, B], noise of all steps [steps, B, F, S, 4C], and the exit step."""
        keys = jax.random.split(key, 3)
        which = jax.random.randint(keys[0], (2, batch), 0, np.array([prompts]).T)
        draws = jax.random.split(keys[1], len(self.spec.sampler.steps))
        noise = jnp.stack([self.setting.noise(key, batch, self.config.dtype) for key in draws])
        return which, noise, self.draw_exit(keys[2])

    # The two losses.

    def generator_loss(self, params, critic, key, rollouts: Rollouts, frames, negative, frozen):
        """DMD on the last pass of rollouts; the gradient stays inside that pass."""
        params = diffusion.computed(params, self.config)
        x = last_pass(self.spec, params, rollouts, frames, remat=self.config.remat)
        keys = jax.random.split(key)
        t, sigma = self.draw_times(keys[0], len(x))
        noise = self.setting.noise(keys[1], len(x), self.config.dtype)
        noisy = flow.add_noise(jax.lax.stop_gradient(x), noise, sigma)
        context = rollouts.context
        real = self.score(frozen["teacher"], noisy, t, sigma, context)
        if self.options.guidance != 1:
            without = diffusion.encode_prompts(self.model, frozen["text_encoder"], negative[None])
            without = jnp.broadcast_to(without, context.shape)
            real = sampling.guide(
                real, self.score(frozen["teacher"], noisy, t, sigma, without), self.options.guidance
            )
        fake = self.score(critic, noisy, t, sigma, context)
        loss, size = diffusion.dmd_loss(x, real, fake, self.setting.tokens)
        return loss, {"loss": loss, "direction": size}

    def critic_loss(self, params, key, rollouts: Rollouts):
        """Flow matching on what the generator makes."""
        x, keys = rollouts.clean, jax.random.split(key)
        t, sigma = self.draw_times(keys[0], len(x))
        noise = self.setting.noise(keys[1], len(x), x.dtype)
        loss = diffusion.flow_matching_loss(
            lambda x, t: self.velocity(params, x, t, rollouts.context),
            x,
            noise,
            t,
            sigma,
            self.setting.tokens,
        )
        return loss, {"loss": loss}

    def frames(self, key):
        """Rotary factors [2, F, pairs] of the clips' frames, those behind the first block moved by a random gap."""
        return gapped_frames(key, self.blocks, self.model.transformer.head_dim, self.options)

    def draw_exit(self, key):
        """Index, int32 [], of the denoising step at which all blocks of a step's rollouts are left."""
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


def _step(optimizer, config: TrainConfig, state, keys, step, loss):
    """One optimizer step of one of the two networks: new state, and metrics.

    `keys` are two for each microbatch; `loss` is (params, one, other) -> (scalar, metrics).
    """
    grads, metrics = optim.accumulate(
        lambda params, keys: loss(params, *keys), state["params"], keys, config.accumulate
    )
    return optim.step(optimizer, config, state, grads, step, metrics)


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
