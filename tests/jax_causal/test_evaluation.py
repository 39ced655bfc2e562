"""Evaluation: its prompts, and what its scores say of models that are right, wrong and shifting."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import (
    Pipeline,
    evaluation,
    evaluation_models,
    evaluation_report,
    modules,
    rollout,
    sampling,
    transformer,
)
from jax_causal.components import COMPONENTS, encode_text
from jax_causal.config import SamplerConfig, VAEConfig
from jax_causal.evaluation import ATTRIBUTES, SETS, Outcomes, Variant
from jax_causal.tokenizer import load_tokenizer
from jax_causal.training import captions, world
from jax_causal.vae import VAE, to_uint8
from tests.jax_causal.evaluation_stubs import CONFIG, SIZE, Stub

LIMIT = 24


def evaluate(variant, asked, *, seeds=1, batch=8, workers=1, **options):
    with evaluation.scoring(workers) as executor:
        return evaluation.evaluate(
            variant, "held-out", asked, seeds=seeds, batch=batch, executor=executor, **options
        )


# Prompts.


def test_prompts_are_fixed():
    """Pinned: scores of different days are of the same prompts."""
    texts = [p.text for p in evaluation.prompts("held_out", 3, 1)]
    assert texts == PINNED
    longer = evaluation.prompts("held_out", 5, 1)
    assert [p.text for p in longer[:3]] == texts
    np.testing.assert_array_equal(longer[2].scene.start, evaluation.prompts("held_out", 3, 1)[2].scene.start)


PINNED = [
    "a yellow circle flashes on and off against a beige background",
    "A big green star comes into view out of nothing in front of a beige background.",
    "a mid-sized purple ball glides from left to right on a plain navy blue backdrop.",
]


@pytest.mark.parametrize("name", SETS)
def test_sets_are_held_out_or_seen_as_they_say(name):
    split, objects = SETS[name]
    asked = evaluation.prompts(split, 64, objects)
    assert all(world.held_out(p.attributes) == name.startswith("held-out") for p in asked)
    assert all(len(p.attributes.objects) == objects for p in asked)
    motions = world.SINGLE_MOTIONS if objects == 1 else world.PAIR_MOTIONS
    assert {p.attributes.motion for p in asked} == set(motions)


def test_prompts_say_all_that_is_scored():
    for prompt in evaluation.prompts("all", 64, None):
        a, text = prompt.attributes, prompt.text.lower()
        wanted = [captions.BACKGROUND_WORDS.get(a.background, (a.background,))]
        for thing in a.objects:
            wanted += [captions.COLOR_WORDS[thing.color], captions.SHAPE_WORDS[thing.shape]]
        assert all(any(word in text for word in words) for words in wanted), (text, a)


def test_every_clip_has_a_seed_of_its_own():
    asked = evaluation.prompts("all", 16, None)
    seeds = [p.seed(number) for p in asked for number in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32


# Scores.


@pytest.fixture(scope="module")
def asked():
    return evaluation.prompts("held_out", LIMIT, 1)


def test_the_truth_scores_everything(asked):
    found = evaluate(Variant("model", evaluation_models.causal(Stub(LIMIT))), asked)
    assert found.right.shape == (1, LIMIT, 1, len(ATTRIBUTES))
    assert found.right.mean() > 0.99


def test_other_prompts_clips_score_by_chance(asked):
    """The share right is that of two of these prompts agreeing by accident, from how often each value occurs."""
    found = evaluate(Variant("model", evaluation_models.causal(Stub(LIMIT, shift=5))), asked)
    values = {
        "background": [p.attributes.background for p in asked],
        "color": [p.attributes.objects[0].color for p in asked],
        "shape": [p.attributes.objects[0].shape for p in asked],
        "motion": [p.attributes.motion for p in asked],
    }
    for attribute, given in values.items():
        counts = collections.Counter(given).values()
        chance = sum(c * (c - 1) for c in counts) / (LIMIT * (LIMIT - 1))
        spread = np.sqrt(chance * (1 - chance) / LIMIT)
        assert abs(found.of(attribute).mean() - chance) < 3 * spread
        assert found.of(attribute).mean() < 0.5
    assert found.of("all").mean() <= 1 / LIMIT


def test_processes_and_threads_agree(asked):
    variant = Variant("truth", evaluation_models.truth(81, SIZE))
    one, two = (evaluate(variant, asked[:4], workers=workers) for workers in (1, 2))
    np.testing.assert_array_equal(one.right, two.right)


def test_batches_are_of_one_size_and_clips_in_order(asked):
    calls = []

    def make(prompts, seeds):
        calls.append(seeds)
        # Only odd numbers of clips show what was asked for.
        frames = evaluation_models.truth(81, SIZE)(prompts, seeds)
        return np.where(np.asarray(seeds)[:, None, None, None, None] >= 2**16, frames, 0)

    found = evaluate(Variant("model", make), asked[:3], seeds=2, batch=4, keep=2)
    assert [len(seeds) for seeds in calls] == [4, 4]
    assert calls[0] == [0, 2**16, 1, 2**16 + 1]
    assert calls[1][:2] == [2, 2**16 + 2]
    np.testing.assert_array_equal(found.of("all"), [[False, True]] * 3)
    assert len(found.clips) == 2
    assert not np.any(found.clips)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds=0 and batch=8 must be 1 or more"),
        ({"batch": 0}, "seeds=1 and batch=0 must be 1 or more"),
        ({"asked": []}, "no prompts for m on held-out: raise --limit"),
    ],
)
def test_refuses_to_score_nothing(asked, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Variant("m", None), **{"asked": asked} | change)


def test_refuses_to_ask_for_nothing():
    with pytest.raises(ValueError, match="count=0 must be 1 or more"):
        evaluation.prompts("held_out", 0, 1)


def test_what_does_not_depend_on_seeds_is_scored_once(asked):
    variant = Variant("truth", evaluation_models.truth(81, SIZE), seeded=False)
    assert evaluate(variant, asked[:2], seeds=8).of("all").shape == (2, 1)


def test_windows_of_a_long_clip():
    """A clip four times as long, of 84 latent frames, is cut into clips of 81 frames that begin where blocks do."""
    numbered = np.broadcast_to(np.arange(333, dtype=np.uint16)[:, None, None, None], (333, 1, 1, 3))
    windows = Variant("m", None, windows=4, window_frames=81, stride=84).cut(numbered)
    assert [(w[0, 0, 0, 0], w[-1, 0, 0, 0]) for w in windows] == [(0, 80), (84, 164), (168, 248), (252, 332)]
    with pytest.raises(ValueError, match="made 332 frames, and its windows need 333"):
        Variant("m", None, windows=4, window_frames=81, stride=84).cut(numbered[:332])


def test_drift_shows_in_the_windows(asked):
    """Of a long clip that goes dark in its last window only that one is wrong, and only motions that go on count."""

    def make(prompts, seeds):
        frames = evaluation_models.truth(165, SIZE)(prompts, seeds).copy()
        frames[:, 84:] //= 8
        return frames

    variant = Variant("model-2x", make, windows=2, window_frames=81, stride=84)
    found = evaluate(variant, asked)
    assert {p.attributes.motion for p in found.prompts} <= set(world.SUSTAINED)
    assert 8 < len(found.prompts) < LIMIT
    assert found.of("all", 0).mean() > 0.9
    assert found.of("all", 1).mean() < 0.2
    rows = evaluation_report.record([found])["differences"]
    (drift,) = (row for row in rows if row["attribute"] == "all")
    assert drift["kind"] == "drift"
    assert drift["value"] == pytest.approx(found.of("all", 1).mean() - found.of("all", 0).mean())
    assert drift["high"] < 0


# The record.


def _outcomes(variant, prompts, all_right, name="held-out", clips=()):
    right = np.zeros((1, len(prompts), 1, len(ATTRIBUTES)), bool)
    right[0, :, 0, ATTRIBUTES.index("all")] = all_right
    return Outcomes(variant, name, list(prompts), right, list(clips))


def test_pairs_are_of_the_same_prompts(asked):
    """A variant that was asked a part of the prompts is compared with the first one on these."""
    first = _outcomes("model", asked[:6], [1, 0, 1, 0, 1, 0])
    second = _outcomes("windowed-2x", asked[1:6:2], [0, 0, 1])
    found = evaluation_report.record([first, second])
    (row,) = (r for r in found["differences"] if r["attribute"] == "all")
    assert (row["variant"], row["to"], row["kind"]) == ("windowed-2x", "model", "variant")
    assert row["value"] == pytest.approx(1 / 3)
    found = evaluation_report.record([second, first])
    (row,) = (r for r in found["differences"] if r["attribute"] == "all")
    assert row["value"] == pytest.approx(-1 / 3)
    (row,) = (r for r in found["scores"] if r["variant"] == "model" and r["attribute"] == "all")
    assert (row["value"], row["prompts"], row["clips"]) == (0.5, 6, 6)


def test_unseen_is_compared_with_seen(asked):
    found = evaluation_report.record(
        [_outcomes("model", asked[:4], [1, 1, 1, 0]), _outcomes("model", asked[:4], 1, "seen")]
    )
    (row,) = (r for r in found["differences"] if r["attribute"] == "all")
    assert (row["kind"], row["value"]) == ("split", -0.25)
    assert row["low"] < -0.25 < row["high"]


def test_frames_are_compared(asked):
    base = np.full((2, 4, 4, 3), 100, np.uint8)
    near, far = base + 1, base.copy()
    far[0, 0, 0, 0] = 110
    found = evaluation_report.record(
        [
            _outcomes("model", asked[:2], 1, clips=[base, base]),
            _outcomes("ring", asked[:2], 1, clips=[near, far]),
        ]
    )
    (row,) = found["frame_differences"]
    assert (row["variant"], row["to"], row["clips"]) == ("ring", "model", 2)
    assert row["max_difference"] == 10
    assert row["share_differing"] == pytest.approx(1 / (2 * base.size))


def test_the_sheet_has_a_row_for_every_clip(asked):
    clip = np.zeros((20, 8, 8, 3), np.uint8)
    image = evaluation_report.sheet(_outcomes("model", asked[:3], 1, clips=[clip] * 2), columns=5)
    assert image.shape[1:] == (5 * 10, 3)
    assert image.shape[0] % 2 == 0
    half = image[: image.shape[0] // 2]
    assert not half[-8:, :8].any()
    assert (half[:-8] < 100).any()  # there is text


# Models.


def test_many_step_model_and_reconstruction():
    """Both against their parts; the teacher begins with the noise of the causal model."""
    config = dataclasses.replace(
        CONFIG,
        transformer=dataclasses.replace(CONFIG.transformer, dim=32, num_layers=1, num_heads=2, ffn_dim=32),
        vae=VAEConfig(dim=8, multipliers=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True)),
        sampler=SamplerConfig(frames_per_block=2),
        text_encoder=dataclasses.replace(CONFIG.text_encoder, num_layers=1),
        height=16,
        width=16,
        num_frames=13,
    )
    rng = np.random.default_rng(0)
    params = {
        component: jax.tree.map(
            lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
            modules.abstract(module, getattr(config, component)),
        )
        for component, module in COMPONENTS.items()
    }
    pipe = Pipeline(config, params, load_tokenizer(config.tokenizer, None, config.text_encoder.max_length))
    asked = [dataclasses.replace(p, text=p.text[:40]) for p in evaluation.prompts("all", 2, 1)]
    vae = modules.bind(VAE, config.vae, pipe.params["vae"])
    decode = jax.jit(lambda latents: to_uint8(vae.decode(latents, None, first=True)[0]))
    encode = jax.jit(lambda video: vae.encode(video, None, first=True)[0])

    video = evaluation_models.truth(13, 16)(asked, [0, 1]) / 127.5 - 1
    found = evaluation_models.reconstruction(pipe)(asked, [0, 1])
    assert np.abs(found - np.asarray(decode(encode(jnp.asarray(video, jnp.float32))), int)).max() <= 1

    ids = np.zeros((1, config.text_encoder.max_length), np.int32)
    ids[0, 0] = 1
    read = functools.partial(encode_text, config.text_encoder, pipe.params["text_encoder"])
    context, null = read(*pipe.tokenizer([p.text for p in asked])), read(ids, (ids == 1).astype(np.int32))
    masks = {"bidirectional": None, "causal": transformer.block_causal_mask(np.array([0, 0, 1, 1]))}
    for kind, mask in masks.items():
        teacher = evaluation_models.ManyStep(
            dataclasses.replace(config, kind=kind), pipe.params, pipe.tokenizer, steps=3, guidance=2.0
        )
        keys = jnp.stack([jax.random.key(seed) for seed in (7, 9)])
        noise, _ = rollout.draw_noise(teacher.spec, keys, 0, 4, jnp.float32)
        sample = functools.partial(
            sampling.sample, config.transformer, grid=(2, 2), steps=3, shift=5.0, guidance=2.0,
            parallel=teacher.spec.parallel, frame_mask=mask,
        )  # fmt: skip
        tokens = jax.jit(sample)(pipe.params["transformer"], context, noise, null_context=null)
        found = teacher(asked, [7, 9])
        expected = np.asarray(decode(rollout.from_tokens(teacher.spec, tokens)), int)
        assert np.abs(found - expected).max() <= 1
        assert found.std() > 1
