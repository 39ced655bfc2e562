"""A golden rollout as inputs for the block functions, under any way of running them."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import rollout, transformer
from jax_causal.parallel import SingleDevice
from jax_causal.rollout import RolloutSpec
from tests import golden_data
from tests.models import golden_sampler, golden_transformer

ATOL = 1e-4
ROLLOUTS = golden_data.names("rollout_")
FRAME_TOKENS = golden_data.settings(golden_data.load("rollout_local_sink"))["frame_tokens"]


class GoldenRollout:
    """A golden file as a spec, parameters and inputs."""

    def __init__(self, name, parallel=None, unrolled=False, dtype=jnp.float32):
        self.data = golden_data.load(name)
        self.settings = golden_data.settings(self.data)
        self.config, params = golden_transformer(self.data)
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        self.params = transformer.unroll(params, (parallel or SingleDevice()).joined) if unrolled else params
        self.sampler = golden_sampler(self.data)
        self.height, self.width = self.data["noise"].shape[-2:]
        self.initial = self.settings["n_init"]
        self.num_frames = self.data["latents"].shape[1]
        window = self.settings["local_attn_size"]
        self.spec = RolloutSpec.create(
            self.config,
            self.sampler,
            (self.height // 2, self.width // 2),
            self.num_frames,
            window=None if window == -1 else window,
            sink=self.settings["sink_size"],
            parallel=parallel,
        )
        self.dtype = dtype
        self.batch = self.data["noise"].shape[0]
        self.cache = rollout.init_cache(self.spec, self.batch, dtype, stacked=not unrolled)
        self.text = rollout.embed_text(self.spec, self.params, self.data["context"])

    def tokens(self, latent):
        return rollout.to_tokens(self.spec, latent.astype(self.dtype))

    def latent(self, tokens):
        return np.asarray(rollout.from_tokens(self.spec, tokens), np.float32)

    def noise(self, start, size):
        return self.tokens(self.data["noise"][:, start - self.initial : start - self.initial + size])

    def blocks(self):
        """(place, noise, renoise) of every block to denoise."""
        draws = golden_data.numbered(self.data, "renoise")  # [B * F, C, h, w] each
        draws = [r.reshape(self.batch, -1, *r.shape[1:]) for r in draws]
        draws = rollout.split_renoise(self.spec, draws, self.num_frames, self.initial)
        plan = rollout.block_sizes(self.num_frames, self.sampler, self.initial)
        for (start, size), renoise in zip(plan, draws, strict=True):
            renoise = jnp.stack([self.tokens(r) for r in renoise])
            yield self.spec.place(start, size), self.noise(start, size), renoise

    def initial_blocks(self):
        for start, size in rollout.initial_blocks(self.initial, self.sampler):
            yield (
                self.spec.place(start, size),
                self.tokens(self.data["initial_latent"][:, start : start + size]),
            )

    def run(self):
        """The whole loop through the public block functions; returns latents [1, F, C, h, w]."""
        t = jnp.float32(self.sampler.context_noise)
        out = []
        for place, x0 in self.initial_blocks():
            self.cache = rollout.write_context(self.spec, self.params, self.cache, self.text, x0, place, 0.0)
            out.append(self.latent(x0))
        for place, noise, renoise in self.blocks():
            x0, self.cache = rollout.denoise_block(
                self.spec, self.params, self.cache, self.text, noise, renoise, place
            )
            self.cache = rollout.write_context(self.spec, self.params, self.cache, self.text, x0, place, t)
            out.append(self.latent(x0))
        return np.concatenate(out, axis=1)

    def check_cache(self, atol):
        """Held keys and values of the last layer, frame by frame in the original's order."""
        layout = self.spec.layout
        held = layout.held_frames(self.num_frames)
        assert len(held) * layout.tokens == self.data["final_cache_last_k"].shape[1]
        for index, name in enumerate("kv"):
            expected = self.data[f"final_cache_last_{name}"]
            expected = expected.reshape(self.batch, len(held), layout.tokens, *expected.shape[2:])
            for position, frame in enumerate(held):
                got = self.cache.read_frame(layout, self.config.num_layers - 1, int(layout.slot(frame)))
                np.testing.assert_allclose(got[index], expected[:, position], atol=atol, err_msg=f"{frame}")
