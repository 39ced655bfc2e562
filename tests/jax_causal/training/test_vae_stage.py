"""What the VAE is trained on, and the statistics that its latents are normalised by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import modules
from jax_causal.training import data, world
from jax_causal.training.vae_stage import balanced_error
from jax_causal.vae import VAE
from tests import micro_world


def test_scenes_change_only_where_latent_frames_begin():
    count, frames = 24, 33
    video, background = data.clips(jax.random.key(3), count, frames, 24, cuts=0.8)
    assert video.shape == (count, frames, 24, 24, 3)
    # Objects cover less than half of a frame, so its median color is the background's.
    np.testing.assert_allclose(np.median(video, axis=(2, 3)), background, atol=1e-6)
    changes = np.any(np.diff(background, axis=1) != 0, axis=-1)  # [i, t]: between frames t and t + 1
    assert not changes[:, np.arange(frames - 1) % 4 != 0].any()
    # A share of 0.4 on average, and one in six scenes has the background of the one before.
    assert 0.2 < changes[:, ::4].mean() < 0.45


def test_one_scene_a_clip_without_cuts():
    video, background = data.clips(jax.random.key(3), 16, 9, 24)
    assert (background == background[:, :1]).all()
    np.testing.assert_allclose(np.median(video, axis=(2, 3)), background, atol=1e-6)


def test_clips_show_what_is_asked_for(monkeypatch):
    drawn = []

    def scenes(key, count, **how):
        drawn.append(how["often"])
        return plain(key, count, **how)

    plain = data.scenes
    monkeypatch.setattr(data, "scenes", scenes)
    stage = micro_world.stage("vae", options={"often": ["star", "small"]})
    jax.eval_shape(lambda params: stage.loss(params, jax.random.key(0), 1), micro_world.components()["vae"])
    assert drawn == [("star", "small")]


def test_error_is_mostly_of_what_is_near_objects():
    """An object of 2 x 2 pixels: near are 14 x 14, far the rest; each part is a mean of its own."""
    background = jnp.asarray([[[-1.0, 0.0, 1.0]]])
    video = jnp.broadcast_to(background[:, :, None, None], (1, 1, 40, 40, 3))
    video = video.at[:, :, 20:22, 20:22].set(0.5)

    def at(y, x):
        return balanced_error(video.at[:, :, y, x].add(0.3), video, background)

    near, far = 0.75 * 0.3 / 14**2, 0.25 * 0.3 / (40**2 - 14**2)
    np.testing.assert_allclose([at(20, 21), at(14, 14), at(27, 27)], near, rtol=1e-5)
    np.testing.assert_allclose([at(13, 20), at(28, 27), at(0, 0)], far, rtol=1e-5)


def test_small_objects_count_as_much_as_large_ones():
    """Three frames: an object of 2 x 2 pixels, one of 20 x 20, and none, which has no mean near objects."""
    video = jnp.zeros((1, 3, 60, 60, 3)).at[:, 0, 20:22, 20:22].set(0.5).at[:, 1, 20:40, 20:40].set(0.5)
    background = jnp.zeros((1, 3, 3))

    def all_near(frame):
        side = {0: 14, 1: 32}[frame]
        off = video.at[:, frame, 14 : 14 + side, 14 : 14 + side].add(0.3)
        return balanced_error(off, video, background)

    np.testing.assert_allclose([all_near(0), all_near(1)], 0.75 * 0.3 / 2, rtol=1e-5)
    np.testing.assert_allclose(
        balanced_error(video.at[:, 2].add(0.3), video, background), 0.25 * 0.3 / 3, rtol=1e-5
    )


@pytest.mark.slow
def test_statistics_are_those_of_sampled_latents():
    stage = micro_world.stage("vae", options={"statistics_clips": 3})
    params = dict(micro_world.components()["vae"])
    # One channel's mean is as good as nothing, and its deviation is near one.
    quant = params["quant_conv"]
    kernel, bias = np.array(quant["kernel"]), np.array(quant["bias"])
    kernel[:, 0] *= 1e-3
    bias[0] = 0
    kernel[:, stage.vae.z_dim] = 0
    params["quant_conv"] = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    found = stage.trained_model({"ema": params}).vae

    scenes = data.scenes(jax.random.key(stage.config.seed + 1), 3)
    video = jax.vmap(lambda s: world.render(s, world.frame_times(stage.model.num_frames), 24))(scenes)
    mean, log_variance, _ = modules.bind(VAE, stage.vae, params).posterior(video, None, first=True)
    rng = np.random.default_rng(0)
    draws = [mean + np.exp(log_variance / 2) * rng.normal(size=mean.shape) for _ in range(400)]
    draws = np.moveaxis(np.stack(draws), 3, 0).reshape(stage.vae.z_dim, -1)
    np.testing.assert_allclose(found.latents_mean, draws.mean(1), atol=0.02)
    np.testing.assert_allclose(found.latents_std, draws.std(1), rtol=0.02)
    assert 0.95 < found.latents_std[0] < 1.05
