"""The pipeline: streaming, batches, injected noise, extension, warm-up, model folders, bad input.

Weights are random and sizes small; what the frames must equal is computed through the block functions by hand.
"""

import dataclasses
import functools
import gc
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import Pipeline, checkpoint, modules, rollout, transformer
from jax_causal.components import COMPONENTS, encode_text
from jax_causal.config import PRESETS, ModelConfig, SamplerConfig, TransformerConfig, VAEConfig
from jax_causal.parallel import SingleDevice
from jax_causal.vae import VAE, to_uint8

SMALL = dataclasses.replace(
    PRESETS["tiny"],
    name="small",
    transformer=TransformerConfig(
        dim=32, num_layers=2, num_heads=2, ffn_dim=64, text_dim=128, text_length=64
    ),
    vae=VAEConfig(dim=8, multipliers=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True)),
    sampler=SamplerConfig(frames_per_block=2, steps=(1000, 500)),
    height=16,
    width=24,
    num_frames=13,
)
FIRST = dataclasses.replace(
    SMALL,
    name="first",
    sampler=SamplerConfig(frames_per_block=2, steps=(1000, 500), independent_first_frame=True),
)
PROMPT = "a red ball rolls to the right"


@functools.cache
def _pipe(config=SMALL, **kwargs):
    return Pipeline.random(config, dtype="float32", **kwargs)


def _by_hand(pipe, noise, renoise, num_frames, prompt=PROMPT):
    """The same video from the block functions and one decode of everything at once."""
    config = pipe.config
    spec = rollout.RolloutSpec.create(config.transformer, config.sampler, (2, 3), num_frames)
    params = pipe.params["transformer"]
    embeds = encode_text(config.text_encoder, pipe.params["text_encoder"], *pipe.tokenizer([prompt]))
    text = rollout.embed_text(spec, params, embeds)
    cache = rollout.init_cache(spec, 1, jnp.float32)
    blocks = []
    for index, (start, size) in enumerate(rollout.block_sizes(num_frames, config.sampler)):
        place = spec.place(start, size)
        x = rollout.to_tokens(spec, noise[:, start : start + size])
        again = rollout.to_tokens(spec, renoise[index][None])[None]
        x0, cache = rollout.denoise_block(spec, params, cache, text, x, again, place)
        cache = rollout.write_context(spec, params, cache, text, x0, place, np.float32(0))
        blocks.append(rollout.from_tokens(spec, x0))
    vae = modules.bind(VAE, config.vae, pipe.params["vae"])
    video, _ = vae.decode(jnp.concatenate(blocks, axis=1), None, first=True)
    return np.asarray(to_uint8(video))[0]


def _noise(seed, frames, block=2):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(1, frames, 16, 4, 6)).astype(np.float32)
    renoise = rng.normal(size=(-(-frames // block), block, 16, 4, 6)).astype(np.float32)
    return noise, list(renoise)


def _close(a, b):
    """Equal up to one level where rounding to 8 bits fell the other way."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_injected_noise_gives_the_hand_made_video():
    noise, renoise = _noise(0, 4)
    video = _pipe()(PROMPT, num_frames=13, noise=noise, renoise=renoise)
    assert video.frames.std() > 5  # something is on it
    _close(video.frames, _by_hand(_pipe(), noise, renoise, 4))


def test_stream_yields_a_frame_then_blocks():
    chunks = list(_pipe().stream(PROMPT, num_frames=21, seed=3))
    assert [len(c) for c in chunks] == [1, 4, 8, 8]
    assert all(c.dtype == np.uint8 and c.shape[1:] == (16, 24, 3) for c in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks), _pipe()(PROMPT, num_frames=21, seed=3).frames)


def test_the_first_frame_waits_for_no_other_pass(monkeypatch):
    """A host can be as long in starting a block as the device with the block before."""
    passes = []
    for name in ("denoise_block", "write_context"):
        original = getattr(rollout, name)
        monkeypatch.setattr(
            rollout, name, lambda *args, name=name, run=original: passes.append(name) or run(*args)
        )
    chunks = _pipe().stream(PROMPT, num_frames=21)
    next(chunks)
    assert passes == ["denoise_block"]
    # From then on the device has the next block to work on while a chunk is looked at.
    next(chunks)
    assert passes == ["denoise_block", "write_context", "denoise_block"]


def test_timed_and_untimed_runs_agree():
    phases = []
    timed = _pipe()(PROMPT, num_frames=13, report=lambda phase, seconds: phases.append((phase, seconds)))
    np.testing.assert_array_equal(timed.frames, _pipe()(PROMPT, num_frames=13).frames)
    assert [p for p, _ in phases] == ["text", "denoise", "decode", "decode", "context", "denoise", "decode"]
    assert all(seconds >= 0 for _, seconds in phases)


def test_seeds_and_batches():
    pipe = _pipe()
    batch = pipe([PROMPT, "a blue square"], num_frames=13, seed=7)
    _close(batch[0].frames, pipe(PROMPT, num_frames=13, seed=7).frames)
    _close(batch[1].frames, pipe("a blue square", num_frames=13, seed=8).frames)
    chosen = pipe([PROMPT, PROMPT], num_frames=13, seed=[9, 9])
    _close(chosen[0].frames, chosen[1].frames)
    assert not np.array_equal(batch[0].frames, chosen[0].frames)


def test_the_prompt_matters():
    a, b = (_pipe()(p, num_frames=13).frames.astype(int) for p in (PROMPT, "an entirely different sentence"))
    assert np.abs(a - b).max() > 2


def test_prompt_embeds_replace_the_prompt():
    pipe = _pipe()
    embeds = encode_text(pipe.config.text_encoder, pipe.params["text_encoder"], *pipe.tokenizer([PROMPT]))
    np.testing.assert_array_equal(
        pipe(prompt_embeds=embeds, num_frames=13).frames, pipe(PROMPT, num_frames=13).frames
    )


def test_unrolled_and_scanned_agree():
    unrolled = Pipeline(SMALL, _pipe().params, _pipe().tokenizer, parallel=SingleDevice(unroll=True))
    assert transformer.is_unrolled(unrolled.params["transformer"])
    _close(unrolled(PROMPT, num_frames=13).frames, _pipe()(PROMPT, num_frames=13).frames)


def test_another_device_than_the_first():
    """All of it there, as on the first."""
    second = jax.devices()[1]
    pipe = Pipeline.random(SMALL, dtype="float32", parallel=SingleDevice(device=second))
    assert all(x.devices() == {second} for x in jax.tree.leaves(pipe.params))
    spec = rollout.RolloutSpec.create(SMALL.transformer, SMALL.sampler, (2, 3), 3, parallel=pipe.parallel)
    noise = rollout.draw_noise(spec, jax.random.split(jax.random.key(0), 1), 0, 3, jnp.float32)
    assert all(x.devices() == {second} for x in noise)
    _close(pipe(PROMPT, num_frames=13).frames, _pipe()(PROMPT, num_frames=13).frames)


def test_extension_begins_with_the_given_clip():
    """Latents of the given frames are the clip's own encoding, so the first frames are its reconstruction."""
    pipe = _pipe()
    clip = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    longer = pipe(PROMPT, video=clip, num_frames=13)
    vae = modules.bind(VAE, SMALL.vae, pipe.params["vae"])
    latents, _ = vae.encode(jnp.asarray(clip[None] / 127.5 - 1, jnp.float32), None, first=True)
    reconstruction, _ = vae.decode(latents, None, first=True)
    _close(longer.frames[:5], np.asarray(to_uint8(reconstruction))[0])
    assert longer.frames.shape[0] == 13
    other = pipe(PROMPT, video=255 - clip, num_frames=13)
    assert (
        np.abs(other.frames[5:].astype(int) - longer.frames[5:]).max() > 2
    )  # it is continued, not prepended


def test_image_is_the_first_frame():
    pipe = _pipe(FIRST)
    image = np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    chunks = list(pipe.stream(PROMPT, image=image, num_frames=17))
    assert [len(c) for c in chunks] == [1, 8, 8]
    assert [len(c) for c in pipe.stream(PROMPT, num_frames=17)] == [1, 8, 8]


def test_endless_stream_is_bounded_and_stops_when_asked():
    chunks = _pipe().stream(PROMPT)
    frames = sum(len(next(chunks)) for _ in range(20))
    chunks.close()
    assert frames == 1 + 4 + 18 * 8


@pytest.mark.parametrize("endless", [False, True])
def test_nothing_is_traced_after_warm_up(endless):
    pipe = Pipeline(SMALL, _pipe().params, _pipe().tokenizer, window=4, sink=2)
    num_frames = None if endless else 45
    pipe.warmup(num_frames=0 if endless else num_frames, batch=2)
    with jax.no_tracing():
        chunks = pipe.stream([PROMPT, "another"], num_frames=num_frames, seed=5)
        for _ in zip(range(7), chunks, strict=False):
            pass


def test_200_blocks_trace_nothing_and_leak_nothing():
    pipe = Pipeline(SMALL, _pipe().params, _pipe().tokenizer, window=4, sink=2)
    chunks = pipe.stream(PROMPT)

    def held(blocks):
        """Bytes of all arrays and their number, and of this process, after that many more blocks."""
        for _ in range(blocks):
            chunk = next(chunks)
        del chunk
        gc.collect()
        arrays = jax.live_arrays()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return sum(x.nbytes for x in arrays), len(arrays), pages * os.sysconf("SC_PAGE_SIZE")

    held(20)
    before = held(30)
    with jax.no_tracing():
        after = held(150)
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 30 * 2**20  # 0.2 MB a block


def test_nothing_is_traced_after_warm_up_with_an_image():
    pipe = _pipe(FIRST)
    image = np.zeros((16, 24, 3), np.uint8)
    pipe.warmup(num_frames=33, image=image)
    with jax.no_tracing():
        pipe(PROMPT, num_frames=33, image=image + 1)


# Model folders.


def _write(folder, pipe, config=None, components=tuple(COMPONENTS)):
    folder.mkdir(exist_ok=True)
    for component in components:
        checkpoint.save(folder / component, pipe.params[component])
    (folder / "config.json").write_text((config or pipe.config).to_json())
    return folder


def test_model_folder_round_trip(tmp_path):
    folder = _write(tmp_path / "model", _pipe())
    loaded = Pipeline.from_pretrained(folder, dtype="float32")
    np.testing.assert_array_equal(loaded(PROMPT, num_frames=13).frames, _pipe()(PROMPT, num_frames=13).frames)
    embeds = np.zeros((1, 4, 128), np.float32)
    silent = Pipeline.from_pretrained(folder, dtype="float32", text_encoder=False)
    assert "text_encoder" not in silent.params
    np.testing.assert_array_equal(
        silent(prompt_embeds=embeds, num_frames=5).frames, loaded(prompt_embeds=embeds, num_frames=5).frames
    )
    (folder / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="without its text encoder: pass prompt_embeds"):
        silent.stream(PROMPT)
    low = Pipeline.from_pretrained(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype("bfloat16")}


def test_unrolled_weights_are_loaded_once(tmp_path):
    """Stacked arrays are gone once they are cut into layers: a device never holds all of both."""
    folder = _write(tmp_path / "model", _pipe())
    for load in (Pipeline.from_pretrained, lambda _, **options: Pipeline.random(SMALL, **options)):
        gc.collect()
        before = {id(x) for x in jax.live_arrays()}
        pipe = load(folder, dtype="float32", parallel=SingleDevice(unroll=True))
        assert transformer.is_unrolled(pipe.params["transformer"])
        new = [x for x in jax.live_arrays() if id(x) not in before and x.ndim > 1]
        assert not [x.shape for x in new if x.shape[0] == 2 and x.shape[-1] in (32, 64) and x.ndim == 3]
    np.testing.assert_array_equal(pipe(PROMPT, num_frames=5).frames, _pipe()(PROMPT, num_frames=5).frames)


def test_missing_components_name_the_command(tmp_path):
    config = dataclasses.replace(SMALL, vae=None)
    folder = _write(tmp_path / "no_vae", _pipe(), config, ("transformer", "text_encoder"))
    with pytest.raises(FileNotFoundError, match=r"no vae yet: add it with\s+jax-causal convert"):
        Pipeline.from_pretrained(folder)
    config = dataclasses.replace(SMALL, text_encoder=None, tokenizer=None)
    folder = _write(tmp_path / "no_text", _pipe(), config, ("transformer", "vae"))
    pipe = Pipeline.from_pretrained(folder, dtype="float32")
    with pytest.raises(ValueError, match=r"no text encoder yet: add it with\s+jax-causal convert"):
        pipe.stream(PROMPT)
    next(pipe.stream(prompt_embeds=np.zeros((1, 4, 128), np.float32), num_frames=5))


def test_undistilled_weights_are_refused(tmp_path):
    for kind in ("causal", "bidirectional"):
        config = dataclasses.replace(SMALL, kind=kind)
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(config.to_json())
        with pytest.raises(ValueError, match=f"is a {kind} model"):
            Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", "jax-causal convert Wan-AI/Wan2.1-T2V-1.3B FOLDER"),
        ("wan-1.3b", "preset without bundled weights"),
        ("no-such-model", "there is no model folder no-such-model"),
    ],
)
def test_names_that_are_no_folder(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        Pipeline.from_pretrained(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour="red"), "unknown keys"),
        (lambda d: d.pop("name"), "lacks the keys"),
        (lambda d: d["transformer"].update(dim="wide"), "config.transformer.dim must be int"),
        (lambda d: d["transformer"].update(num_heads=5), "must be a multiple of num_heads"),
        (lambda d: d.update(kind="magic"), "must be one of"),
    ],
)
def test_bad_config_names_the_key(change, message):
    data = json.loads(SMALL.to_json())
    change(data)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(json.dumps(data))


def test_config_round_trip_and_hash():
    for config in (*PRESETS.values(), SMALL, FIRST):
        assert ModelConfig.from_json(config.to_json()) == config
        assert hash(config) == hash(dataclasses.replace(config))


# Bad input, found before anything runs.


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"num_frames": 12}, "use 5 or 13"),
        ({"num_frames": 1}, "use 5"),
        ({"height": 20}, "use 16 or 24"),
        ({"width": 4}, "use 8"),
        ({"image": np.zeros((16, 24, 3), np.uint8)}, "cannot start from one image"),
        ({"video": np.zeros((7, 16, 24, 3), np.uint8)}, "give 5 or 13"),
        ({"video": np.zeros((5, 32, 24, 3), np.uint8)}, "resize them"),
        ({"video": np.zeros((5, 16, 24, 3))}, "must be uint8"),
        ({"video": np.zeros((13, 16, 24, 3), np.uint8)}, "ask for more"),
        ({"seed": [1, 2]}, "2 seeds for 1 videos"),
        ({"seed": 2**32}, "from 0 to 4294967295"),
        ({"seed": -1}, "from 0 to 4294967295"),
        ({"noise": np.zeros((1, 3, 16, 4, 6))}, r"noise must be \[1, 4, 16, 4, 6\]"),
        ({"renoise": [np.zeros((2, 16, 4, 6))]}, "2, not 1"),
        ({"renoise": [np.zeros((2, 16, 4, 4))] * 2}, "must end in"),
        ({"prompt_embeds": np.zeros((1, 4, 128))}, "either a prompt or prompt_embeds"),
        ({"prompt": None}, "either a prompt or prompt_embeds"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 4, 7))}, r"must be \[B, text, 128\]"),
        ({"num_frames": None, "noise": np.zeros(1)}, "needs num_frames"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        _pipe().stream(**{"prompt": PROMPT, "num_frames": 13} | inputs)


def test_window_must_hold_a_block():
    pipe = Pipeline(SMALL, _pipe().params, _pipe().tokenizer, window=3, sink=2)
    with pytest.raises(ValueError, match="use window=4 or more"):
        pipe.stream(PROMPT, num_frames=21)


def test_a_very_long_prompt_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match="were cut off"):
        _pipe().stream("word " * 10_000, num_frames=13)
