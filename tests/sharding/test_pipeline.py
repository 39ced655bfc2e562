"""The pipeline on many devices: the same video as on one, weights where they belong, nothing traced twice."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jax_causal import Pipeline, checkpoint, modules, rollout
from jax_causal.components import COMPONENTS, decode_chunk, encode_text
from jax_causal.config import (
    PRESETS,
    SamplerConfig,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
    VAEConfig,
)
from sharding import SequenceParallel
from tests.sharding import seeded

pytestmark = pytest.mark.sp

# 12 heads, which 8 devices cannot share evenly.
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    name="small",
    transformer=TransformerConfig(
        dim=96, num_layers=2, num_heads=12, ffn_dim=128, text_dim=32, text_length=16
    ),
    vae=VAEConfig(dim=8, multipliers=(1, 1), num_res_blocks=1, temporal_downsample=(True,)),
    text_encoder=TextConfig(
        vocab_size=384, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=2, max_length=16
    ),
    tokenizer=TokenizerConfig(kind="bytes"),
    sampler=SamplerConfig(frames_per_block=2, steps=(1000, 500)),
    height=8,
    width=32,
    num_frames=11,
)
FIRST = dataclasses.replace(
    SMALL, name="first", sampler=dataclasses.replace(SMALL.sampler, independent_first_frame=True)
)
PROMPT = "a red ball"


@functools.cache
def _one(config=SMALL):
    """On one device."""
    if config is SMALL:
        return Pipeline.random(config, dtype="float32")
    return Pipeline(config, _one().params, _one().tokenizer)


@functools.cache
def _many(case, config=SMALL, **options):
    """On several, with the same weights."""
    parallel = seeded.parallel(case, config, **options)
    params = {
        component: jax.device_put(leaves, parallel.shardings(leaves, component))
        for component, leaves in _one().params.items()
    }
    return Pipeline(config, params, _one().tokenizer, parallel=parallel)


@functools.cache
def _expected(prompt=PROMPT, seed=5, **inputs):
    return _one()(prompt, seed=seed, **inputs).frames


def _close(frames, expected):
    """Equal up to one level where rounding to 8 bits fell the other way."""
    assert frames.shape == expected.shape
    assert expected.std() > 5  # something is on it
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1


def _cases(*always, slow=()):
    return [
        pytest.param(case, marks=() if case in always else pytest.mark.slow, id=seeded.label(case))
        for case in (*always, *slow)
    ]


HYBRID = ("hybrid", 8)  # 2 x 4
SLOW = [("ring", 8), ("ulysses", 4), ("auto", 8), ("ring", 5), ("gather", 2)]


@pytest.mark.parametrize("case", _cases(("gather", 8), HYBRID, slow=SLOW))
def test_same_video_and_nothing_compiled_after_warm_up(case):
    pipe = _many(case)
    pipe.warmup()
    functions = (encode_text, rollout.embed_text, rollout.denoise_block, rollout.write_context, decode_chunk)
    programs = [f._cache_size() for f in functions]
    with jax.no_tracing():
        chunks = list(pipe.stream(PROMPT, num_frames=11, seed=5))
        video = pipe(PROMPT, seed=5)
    assert [f._cache_size() for f in functions] == programs
    assert [len(c) for c in chunks] == [1, 2, 4, 4]
    np.testing.assert_array_equal(np.concatenate(chunks), video.frames)
    _close(video.frames, _expected())


@pytest.mark.parametrize("case", _cases(("auto", (2, 2, 2)), slow=[("gather", 8)]))
def test_batch(case):
    videos = _many(case)([PROMPT, "a blue cube"], num_frames=3, seed=5)
    _close(videos[0].frames, _expected(num_frames=3))
    _close(videos[1].frames, _expected("a blue cube", num_frames=3, seed=6))


@pytest.mark.parametrize("case", _cases(("ring", 8), slow=[HYBRID]))
def test_image_is_continued(case):
    image = np.random.default_rng(1).integers(0, 256, (8, 32, 3), dtype=np.uint8)
    expected = _one(FIRST)(PROMPT, image=image, num_frames=5, seed=5).frames
    _close(_many(case, FIRST)(PROMPT, image=image, num_frames=5, seed=5).frames, expected)


@pytest.mark.parametrize("case", _cases(slow=[("gather", 8), HYBRID]))
def test_clip_is_continued(case):
    clip = np.random.default_rng(1).integers(0, 256, (3, 8, 32, 3), dtype=np.uint8)
    expected = _one()(PROMPT, video=clip, num_frames=11, seed=5).frames
    _close(_many(case)(PROMPT, video=clip, num_frames=11, seed=5).frames, expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 24), (16, 40)])
def test_sizes_that_do_not_divide(size):
    """6 and 20 tokens, 12 and 20 latent columns, on 8 devices."""
    sizes = dict(zip(("height", "width"), size, strict=True), num_frames=7)
    _close(_many(("gather", 8))(PROMPT, seed=5, **sizes).frames, _expected(**sizes))


@pytest.mark.slow
def test_window_and_sink():
    one, many = _one(), _many(("ring", 8))
    videos = [
        Pipeline(SMALL, p.params, p.tokenizer, parallel=p.parallel, window=4, sink=2)(
            PROMPT, num_frames=19, seed=5
        )
        for p in (one, many)
    ]
    _close(videos[1].frames, videos[0].frames)


# Weights.


def _share(params) -> float:
    """Bytes on the fullest device over bytes in all."""
    leaves = jax.tree.leaves(params)
    held = {}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in leaves)


def test_text_encoder_is_sharded():
    pipe = _many(("gather", 8))
    assert _share(pipe.params["text_encoder"]) == pytest.approx(1 / 8, rel=0.1)
    assert _share(pipe.params["transformer"]) == 1
    ids = pipe.tokenizer([PROMPT])
    embeds = [encode_text(SMALL.text_encoder, p.params["text_encoder"], *ids) for p in (pipe, _one())]
    np.testing.assert_allclose(*map(np.asarray, embeds), atol=2e-5)


def test_sharded_parameters_give_the_same_video():
    pipe = _many(HYBRID, shard_params=True)
    assert _share(pipe.params["transformer"]) == pytest.approx(1 / 8, rel=0.1)
    _close(pipe(PROMPT, num_frames=3, seed=5).frames, _expected(num_frames=3))


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_real_models_are_sharded_evenly(preset):
    config = PRESETS[preset]
    parallel = SequenceParallel(8, shard_params=True).for_model(config)
    for component in ("transformer", "text_encoder"):
        shapes = modules.abstract(COMPONENTS[component], getattr(config, component))
        shardings = parallel.shardings(shapes, component)
        held = jax.tree.map(lambda x, s: np.prod(s.shard_shape(x.shape)), shapes, shardings)
        share = sum(jax.tree.leaves(held)) / modules.num_parameters(shapes)
        assert share == pytest.approx(1 / 8, rel=0.1)


def test_model_folder_is_restored_onto_the_devices(tmp_path):
    for component in COMPONENTS:
        checkpoint.save(tmp_path / component, _one().params[component])
    (tmp_path / "config.json").write_text(SMALL.to_json())
    wanted = _many(HYBRID, shard_params=True)
    parallel = SequenceParallel(8, "hybrid", shard_params=True)
    pipe = Pipeline.from_pretrained(tmp_path, dtype="float32", parallel=parallel)
    jax.tree.map(np.testing.assert_array_equal, pipe.params, wanted.params)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, pipe.params, wanted.params)
    assert all(jax.tree.leaves(same))


# Bad input.


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (SequenceParallel(17), "use 1 to 16"),
        (SequenceParallel(0), "use 1 to 16"),
        (SequenceParallel(8, "ulysses"), "use gather or ring or hybrid"),
        (SequenceParallel(5, "hybrid"), "use gather or ring"),
        (SequenceParallel(8, "spiral"), "unknown strategy 'spiral'"),
    ],
)
def test_what_cannot_be_shared(parallel, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.random(SMALL, parallel=parallel)


def test_batch_that_the_mesh_cannot_share():
    with pytest.raises(ValueError, match=r"3 videos cannot be shared by the 2 devices.*multiple of 2"):
        next(_many(("auto", (2, 2, 2))).stream([PROMPT] * 3, num_frames=3))
