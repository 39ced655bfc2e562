"""Stage one: the VAE, on clips of the procedural world.

Clips are as long as the model's: in them the layers that look back in time have seen all that they can see. Trained on
17 frames, a decoder loses the colors of the background soon after. The scene changes now and then within a clip, so
that a batch of few clips shows many colors and shapes.

Loss: mean absolute error of the reconstruction, most of it near objects, plus a little of the Kullback-Leibler
divergence of the posterior from a unit Gaussian, which keeps latents small and close latents alike (arXiv:1312.6114).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import modules
from jax_causal.config import ModelConfig, VAEConfig
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.training import data, optim, world
from jax_causal.training.config import TrainConfig
from jax_causal.training.stage import step_key
from jax_causal.vae import VAE, to_uint8

_REACH = 6  # pixels beyond an object that count as near it


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the stage `vae`.

    Attributes:
      num_frames: video frames of a clip, 1 + 4 k; None is the model's.
      kl_weight: of the divergence, per latent value.
      cuts: share of latent frames, at most, before which another scene begins; see `data.clips`.
      often: what clips show more often than other things; see `world.sample`.
      statistics_clips: clips that the latents' mean and standard deviation are taken over, once trained.
    """

    num_frames: int | None = None
    kl_weight: float = 1e-4
    cuts: float = 0.5
    often: tuple[str, ...] = ()
    statistics_clips: int = 256


class VAEStage:
    """See the module's text, and `stage.Stage` for the methods."""

    name = "vae"

    def __init__(
        self, config: TrainConfig, model: ModelConfig, components: dict, parallel: Parallel | None = None
    ):
        self.config, self.options = config, config.stage_options(Options)
        # Latents are normalised by what this stage measures at its end; until then they are as they come.
        plain = {"latents_mean": (0.0,) * model.vae.z_dim, "latents_std": (1.0,) * model.vae.z_dim}
        self.vae: VAEConfig = dataclasses.replace(model.vae, **plain)
        self.model, self.components = model, components
        self.parallel = parallel or SingleDevice()
        self.optimizer = optim.optimizer(config)
        self.num_frames = self.options.num_frames or model.num_frames

    def init(self, key):
        params = self.components.get("vae") or modules.init(VAE, self.vae, key)
        return {"params": params, "optimizer": self.optimizer.init(params), "ema": params}

    def data(self):
        return None

    def data_like(self):
        return None

    def loss(self, params, key, batch: int):
        """Scalar loss and metrics of `batch` fresh clips; computes in the configured dtype, reduces in fp32."""
        clip_key, noise_key = jax.random.split(key)
        video, background = data.clips(
            clip_key,
            batch,
            self.num_frames,
            self.model.height,
            cuts=self.options.cuts,
            cut_every=self.vae.temporal_factor,
            often=self.options.often,
        )
        video = self.parallel.constrain(video, ("batch",))
        vae = modules.bind(VAE, self.vae, optim.cast(params, self.config.dtype))
        mean, log_variance, _ = vae.posterior(video, None, first=True)
        mean, log_variance = mean.astype(jnp.float32), jnp.clip(log_variance.astype(jnp.float32), -30, 20)
        noise = jax.random.normal(noise_key, mean.shape)
        shown, _ = vae.decode(mean + jnp.exp(log_variance / 2) * noise, None, first=True)
        error = balanced_error(shown.astype(jnp.float32), video, background)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        loss = error + self.options.kl_weight * divergence
        return loss, {"loss": loss, "error": error, "divergence": divergence}

    def update(self, state, step, _):
        key = step_key(self.config.seed, step)
        grads, metrics = optim.accumulate(
            lambda params, key: self.loss(params, key, self.config.batch_size // self.config.accumulate),
            state["params"],
            key,
            self.config.accumulate,
        )
        return optim.step(self.optimizer, self.config, state, grads, step, metrics)

    def sample(self, state):
        """Clips above what the decoder makes of them, uint8 [4, T, 2 H, W, 3]."""
        video, _ = data.clips(jax.random.key(7), 4, self.num_frames, self.model.height)
        return np.asarray(_beside_reconstruction(self.vae, state["ema"], video))

    def export(self, state):
        return {"vae": state["ema"]}

    def trained_model(self, state) -> ModelConfig:
        """The model with the statistics of its latents, measured on whole clips.

        They are those of samples, as the decoder saw them in training, not of the encoder's means: a channel that
        carries nothing has means next to zero and samples of a variance near one. Over the deviation of the means,
        it would become noise that the diffusion model must learn; over that of the samples it stays next to zero.
        """
        batch = data.scenes(jax.random.key(self.config.seed + 1), self.options.statistics_clips)
        size, frames = self.model.height, self.model.num_frames
        moments = [
            _moments(self.vae, state["ema"], jax.tree.map(lambda x, i=i: x[i], batch), frames, size)
            for i in range(self.options.statistics_clips)
        ]
        mean, square = np.mean(np.asarray(moments, np.float64), axis=0)
        mean, std = (tuple(float(f"{x:.4f}") for x in row) for row in (mean, np.sqrt(square - mean**2)))
        return dataclasses.replace(
            self.model, vae=dataclasses.replace(self.vae, latents_mean=mean, latents_std=std)
        )


@functools.partial(jax.jit, static_argnames=("config", "num_frames", "size"))
def _moments(config: VAEConfig, params, scene: world.Scene, num_frames: int, size: int):
    """First and second moments [2, C], fp32, of latents sampled for one scene's clip."""
    video = world.render(scene, world.frame_times(num_frames), size)[None]
    mean, log_variance, _ = modules.bind(VAE, config, params).posterior(video, None, first=True)
    square = jnp.square(mean) + jnp.exp(jnp.clip(log_variance, -30, 20))
    return jnp.stack([mean.mean((0, 1, 3, 4)), square.mean((0, 1, 3, 4))])


def balanced_error(shown, video, background):
    """Mean absolute error of [B, T, H, W, 3] near objects and far from them, weighted 3 to 1.

    Objects cover a few hundredths of a frame: in a plain mean a model does well that paints the background alone.
    "Near" reaches `_REACH` pixels beyond an object, because what tells a cross from a diamond is the background
    between its arms. Each frame's mean counts alike, whatever its objects cover: over all pixels together a small
    star would weigh less than half as much as a large one, and is drawn as a circle. `background` is the color
    [B, T, 3] of each frame's.
    """
    error = jnp.abs(shown - video).mean(-1)
    objects = jnp.any(jnp.abs(video - background[:, :, None, None]) > 0.01, axis=-1)
    window = (1, 1, 2 * _REACH + 1, 2 * _REACH + 1)
    near = jax.lax.reduce_window(objects.astype(jnp.float32), 0.0, jax.lax.max, window, (1, 1, 1, 1), "SAME")
    return 0.75 * _mean_of_frames(error, near) + 0.25 * _mean_of_frames(error, 1 - near)


def _mean_of_frames(error, mask):
    """The mean, over the frames [B, T] that have pixels in the mask [B, T, H, W], of the error's mean over these."""
    count = mask.sum((2, 3))
    means = (error * mask).sum((2, 3)) / jnp.maximum(count, 1)
    return means.sum() / jnp.maximum((count > 0).sum(), 1)


@functools.partial(jax.jit, static_argnames="config")
def _beside_reconstruction(config: VAEConfig, params, video):
    vae = modules.bind(VAE, config, params)
    latents, _ = vae.encode(video, None, first=True)
    shown, _ = vae.decode(latents, None, first=True)
    return jnp.concatenate([to_uint8(video), to_uint8(shown)], axis=2)
