"""Text to video: a model folder in, frames out, block by block.

pipe = Pipeline.from_pretrained("tiny")
pipe("a red ball rolls to the right").save("ball.mp4")
for chunk in pipe.stream("a red ball rolls to the right"):  # uint8 [t, H, W, 3], as soon as decoded
    ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import checkpoint, components, rollout, transformer
from jax_causal.config import PRESETS, ModelConfig
from jax_causal.model_folder import check_kind, find_model, incomplete
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.request import Request, prepare
from jax_causal.timings import Phases, Report
from jax_causal.tokenizer import Tokenizer, load_tokenizer
from jax_causal.video import Video


class Pipeline:
    """A text-to-video model ready to run.

    Attributes:
      config: the model's `ModelConfig`.
      params: component name to its parameters; the transformer's may be unrolled.
      tokenizer: prompts to token ids, or None where there is no text encoder.
      parallel: how it is run.
      window, sink: latent frames attended to and kept for ever; see `CacheLayout.create`.
      folder: the model folder it came from, if any.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, dict],
        tokenizer: Tokenizer | None = None,
        *,
        parallel: Parallel | None = None,
        window: int | None = None,
        sink: int = 0,
        folder: Path | None = None,
    ):
        check_kind(config)
        self.config, self.params, self.tokenizer, self.folder = config, dict(params), tokenizer, folder
        self.parallel = (parallel or SingleDevice()).for_model(config)
        self.window, self.sink = window, sink
        if self.parallel.unrolled and not transformer.is_unrolled(self.params["transformer"]):
            self.params["transformer"] = transformer.unroll(self.params["transformer"], self.parallel.joined)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        dtype="bfloat16",
        parallel: Parallel | None = None,
        window: int | None = None,
        sink: int = 0,
        text_encoder: bool = True,
    ) -> Pipeline:
        """Loads a bundled model or a model folder, straight onto its final device and dtype.

        Args:
          name_or_folder: "tiny", or a folder that `jax-causal convert` made.
          dtype: of parameters and computation, "bfloat16" or "float32".
          parallel: how to run; None is one device.
          window, sink: latent frames attended to, and first frames kept for ever; None keeps all.
          text_encoder: whether to load it, most of a model's memory; without it prompts are given as `prompt_embeds`.

        Raises:
          FileNotFoundError: no such folder, or a component is missing; the message names the command to run.
          ValueError: an undistilled model, a damaged checkpoint or a config that does not fit it.
        """
        config, folder = find_model(name_or_folder)
        parallel = (parallel or SingleDevice()).for_model(config)
        params, tokenizer = components.restore(
            config, folder, jnp.dtype(dtype), parallel, text_encoder=text_encoder
        )
        return cls(config, params, tokenizer, parallel=parallel, window=window, sink=sink, folder=folder)

    @classmethod
    def random(
        cls,
        model: str | ModelConfig,
        *,
        seed: int = 0,
        dtype="bfloat16",
        parallel: Parallel | None = None,
        window: int | None = None,
        sink: int = 0,
        text_encoder: bool = True,
    ) -> Pipeline:
        """A preset (by name) or configuration with random weights: for measuring and testing, not for looking.

        Where the tokenizer needs a file there is none, and `prompt_embeds` stand in for a prompt; without
        `text_encoder` there are neither.
        """
        config = PRESETS[model] if isinstance(model, str) else model
        parallel = (parallel or SingleDevice()).for_model(config)
        params = components.init(config, seed, jnp.dtype(dtype), parallel, text_encoder=text_encoder)
        tokenizer = None
        if text_encoder and config.tokenizer is not None and not config.tokenizer.needs_file:
            tokenizer = load_tokenizer(config.tokenizer, None, config.text_encoder.max_length)
        return cls(config, params, tokenizer, parallel=parallel, window=window, sink=sink)

    # Use.

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        report=None,
        **inputs,
    ) -> Video | list[Video]:
        """A video of `num_frames` frames (default: the model's), or a list of them for a list of prompts.

        Takes what `stream` takes, and raises what it raises.
        """
        num_frames = num_frames or self.config.num_frames
        chunks = list(self.stream(prompt, num_frames=num_frames, report=report, **inputs))
        frames = np.concatenate(chunks, axis=-4)
        held = jax.process_index() == 0
        if frames.ndim == 4:
            return Video(frames if held else None, self.config.fps)
        return [Video(one if held else None, self.config.fps) for one in frames]

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        prompt_embeds=None,
        image=None,
        video=None,
        noise=None,
        renoise=None,
        report: Report | None = None,
    ) -> Iterator[np.ndarray]:
        """Frames as soon as they are decoded: uint8 [t, H, W, 3], or [B, t, H, W, 3] for a list of prompts.

        The first chunk is a single frame, so that it is seen early; the next ends the first block, and every
        later one is a block. Of several processes only the first gets frames; the others' chunks have t = 0. Input
        is checked before this returns, not when the first chunk is asked for.

        Args:
          prompt: what the video shows; a list makes a batch. None with `prompt_embeds`.
          num_frames: video frames in all, given ones included; None goes on until the caller stops, which needs a
            window and takes the model's trained length, sink one block, where none was set.
          height, width: pixels; default the model's.
          seed: of the noise; video i of a batch takes seed + i (or its entry of a sequence) and equals the video
            that this seed gives alone.
          prompt_embeds: [B, <= text length, text dim], in place of the prompt's encoding.
          image: first frame, for models with an independent first frame: a path, or uint8 [H, W, 3].
          video: clip to extend: a path, or uint8 [T, H, W, 3]; of whole blocks.
          noise: [B, F, C, H/8, W/8] starting noise of the new frames, in place of the seed's.
          renoise: noise added between passes, in place of the seed's: one [F, C, h, w] or [B, F, C, h, w] for
            every step but the last of every block, in order.
          report: called with (phase, seconds) after each phase. Timing waits for the device after every phase;
            without it, the next block is started before a chunk is handed over.

        Raises:
          ValueError: frame counts, sizes, noise or prompts that do not fit; nearby values that do are named.
        """
        request = prepare(
            self.config,
            parallel=self.parallel,
            window=self.window,
            sink=self.sink,
            prompt=prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            seed=seed,
            prompt_embeds=prompt_embeds,
            image=image,
            video=video,
            noise=noise,
            renoise=renoise,
        )
        tokens = None
        if request.prompt_embeds is None:
            tokens = self._tokenize(request.prompts)
        return self._frames(request, tokens, report)

    def warmup(
        self,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        image=None,
        video=None,
    ) -> None:
        """Compiles everything that a run of these sizes needs, by running its first blocks.

        After it, a run with the same sizes (and `image` or `video` given or not, alike) traces nothing.
        `num_frames=None` prepares the model's default length; for endless streams pass 0.
        """
        num_frames = self.config.num_frames if num_frames is None else num_frames or None
        length, width_ = self.config.transformer.text_length, self.config.transformer.text_dim
        text = {"prompt_embeds": np.zeros((batch, length, width_), np.float32)}
        if self.tokenizer is not None:
            text = {"prompt": ["warm up"] * batch}
        chunks = self.stream(
            num_frames=num_frames, height=height, width=width, image=image, video=video, **text
        )
        # One frame, the rest of the first block, a regular block: after these, every program has run. Two blocks
        # more where frames are given or the first one stands alone.
        lead = image is not None or video is not None or self.config.sampler.independent_first_frame
        for _ in zip(range(4 if lead else 3), chunks, strict=False):
            pass

    # The loop.

    def _frames(self, request: Request, tokens, report) -> Iterator[np.ndarray]:
        """Decoded chunks on the host, the work for the next block always dispatched before one is awaited."""
        ready, state, framing = deque(), None, request.spec.framing
        timed = Phases(report)
        for block in self._blocks(request, tokens, timed):
            while ready:
                yield self._to_host(request, ready.popleft())
            # The first latent frame alone decodes to one video frame.
            cuts = [1] if state is None and block.shape[1] > 1 else []
            for piece in jnp.split(block, cuts, axis=1):
                frames, state = components.decode_chunk(
                    self.config.vae, framing, self.params["vae"], piece, state, first=state is None
                )
                timed("decode", frames)
                frames.copy_to_host_async()
                ready.append(frames)
                if report:
                    yield self._to_host(request, ready.popleft())
            # Starting a block can take the host as long as the block before, and the first frame must not wait for it;
            # the device still has the rest of the first block to decode.
            if cuts and ready:
                yield self._to_host(request, ready.popleft())
        while ready:
            yield self._to_host(request, ready.popleft())

    def _blocks(self, request: Request, tokens, timed) -> Iterator[jax.Array]:
        """Clean blocks [B, F, S, 4C] on the device, given frames first."""
        spec, params = request.spec, self.params["transformer"]
        dtype = jax.tree.leaves(params)[0].dtype
        timed.start()
        embeds = request.prompt_embeds
        if embeds is None:
            embeds = components.encode_text(self.config.text_encoder, self.params["text_encoder"], *tokens)
        text = rollout.embed_text(spec, params, embeds)
        timed("text", text)

        batch, stacked = request.batch, not transformer.is_unrolled(params)
        cache = rollout.new_cache(spec, batch, dtype, stacked=stacked)
        begin = 0
        if request.given is not None:
            clean = components.encode_video(self.config.vae, spec.framing, self.params["vae"], request.given)
            clean = clean.astype(dtype)
            clean = jnp.broadcast_to(clean, (batch, *clean.shape[1:]))
            timed("encode", clean)
            for start, size in rollout.initial_blocks(clean.shape[1], spec.sampler):
                block = clean[:, start : start + size]
                yield block
                timed.start()
                cache = rollout.write_context(
                    spec, params, cache, text, block, spec.place(start, size), np.float32(0)
                )
                timed("context", cache)
            begin = clean.shape[1]

        for index, (start, size) in enumerate(rollout.block_sizes(request.num_frames, spec.sampler, begin)):
            noise, renoise = self._noise(request, index, start, size, dtype)
            place = spec.place(start, size)
            timed.start()
            x0, cache = rollout.denoise_block(spec, params, cache, text, noise, renoise, place)
            timed("denoise", x0)
            yield x0
            if start + size == request.num_frames:
                return  # nobody will look at the last block's keys
            timed.start()
            t = np.float32(spec.sampler.context_noise)
            cache = rollout.write_context(spec, params, cache, text, x0, place, t)
            timed("context", cache)

    def _noise(self, request: Request, index, start, size, dtype):
        spec = request.spec
        noise, renoise = rollout.draw_noise(spec, request.keys, np.int32(start), size, dtype)
        if request.noise is not None:
            first = start - request.given_frames
            noise = rollout.to_tokens(spec, request.noise[:, first : first + size].astype(dtype))
        if request.renoise is not None:
            draws = np.broadcast_to(request.renoise[index], (len(renoise), *request.renoise_shape(size)))
            renoise = jnp.stack([rollout.to_tokens(spec, draw.astype(dtype)) for draw in draws])
        return noise, renoise

    @staticmethod
    def _to_host(request: Request, frames) -> np.ndarray:
        if jax.process_index() == 0:
            frames = np.asarray(frames)
        else:
            frames = np.empty((len(frames), 0, *jax.block_until_ready(frames).shape[2:]), np.uint8)
        return frames if request.batched else frames[0]

    def _tokenize(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.tokenizer is None and self.folder is None:
            raise ValueError(
                "this model has no text encoder and tokenizer: pass prompt_embeds instead of a prompt"
            )
        if self.tokenizer is None:
            lacking = checkpoint.missing(self.folder)
            if not lacking:
                raise ValueError("the model was loaded without its text encoder: pass prompt_embeds instead")
            raise ValueError(incomplete(self.folder, min(lacking, key=list(checkpoint.SOURCES).index)))
        ids, mask = self.tokenizer(prompts)
        if ids.max() >= (size := self.config.text_encoder.vocab_size):
            raise ValueError(
                f"the tokenizer gives the token {ids.max()}, and the text encoder knows {size}: they do not belong "
                "together; convert both from one source"
            )
        return ids, mask
