"""The oracle against the ground truth of rendered clips, clean and degraded, and against wrong captions."""

import collections

import jax
import numpy as np
import pytest
from scipy import ndimage

from jax_causal.training import oracle, world

KEYS = ("background", "color", "shape", "size", "motion", "smooth", "all")


def clips(count, objects, seed, start=0, size=96):
    """[(uint8 frames, attributes)]"""
    keys = jax.random.split(jax.random.key(seed), count)
    batch = jax.jit(jax.vmap(lambda k: world.sample(k, split="all", objects=objects)))(keys)
    batch = jax.device_get(batch)
    render = jax.jit(lambda s: world.render(s, world.frame_times(81, start=start), size=size))
    scenes = [jax.tree.map(lambda v, i=i: v[i], batch) for i in range(count)]
    return [(to_uint8((np.asarray(render(s)) + 1) * 127.5), world.attributes(s)) for s in scenes]


def to_uint8(values):
    return np.clip(values, 0, 255).round().astype(np.uint8)


def accuracies(scores):
    return {k: np.mean([s[k] for s in scores]) for k in KEYS}


@pytest.fixture(scope="module")
def single():
    return clips(32, 1, seed=0)


def test_reads_one_object(single):
    found = accuracies([oracle.score(f, a) for f, a in single])
    assert min(found.values()) == 1, found


def test_reads_through_blur_and_noise(single):
    rng = np.random.default_rng(0)
    scores = []
    for frames, attributes in single[:16]:
        soft = ndimage.gaussian_filter(frames.astype(np.float32), (0.5, 0.8, 0.8, 0))
        scores.append(oracle.score(to_uint8(soft + rng.normal(0, 5, soft.shape)), attributes))
    found = accuracies(scores)
    assert all(v >= 0.93 for v in found.values()), found


def test_reads_two_objects():
    found = accuracies([oracle.score(f, a) for f, a in clips(8, 2, seed=1)])
    assert min(found.values()) == 1, found


def test_wrong_captions_score_by_chance(single):
    """Over all pairings of clips with the captions of others, rates are those of two captions agreeing."""
    readings = [oracle.read(frames) for frames, _ in single]
    truth = [a for _, a in single]
    counts = {k: collections.Counter() for k in ("background", "color", "shape", "motion")}
    for a in truth:
        values = a.background, a.objects[0].color, a.objects[0].shape, a.motion
        for counter, value in zip(counts.values(), values, strict=True):
            counter[value] += 1
    n = len(truth)
    chance = {k: sum(c * (c - 1) for c in v.values()) / (n * (n - 1)) for k, v in counts.items()}
    agreed = collections.Counter()
    for i, reading in enumerate(readings):
        for j, a in enumerate(truth):
            if i != j:
                for k, right in oracle.compare(reading, a).items():
                    agreed[k] += right
    rates = {k: agreed[k] / (n * (n - 1)) for k in KEYS}
    for k, expected in chance.items():
        assert rates[k] == pytest.approx(expected, abs=0.02)
        assert rates[k] < 0.3
    assert rates["all"] < 0.01


def test_sustained_motions_are_read_late_in_a_long_video():
    late = [(f, a) for f, a in clips(10, 1, seed=4, start=5000) if a.motion in world.SUSTAINED]
    assert len(late) > 2
    assert all(oracle.score(f, a)["all"] for f, a in late)


def test_a_jump_is_not_smooth(single):
    frames, attributes = next((f, a) for f, a in single if a.motion in ("left", "right", "up", "down"))
    assert oracle.score(frames, attributes)["smooth"]
    cut = np.concatenate([frames[:30], np.roll(frames[30:], (20, 20), axis=(1, 2))])
    assert not oracle.score(cut, attributes)["smooth"]
    flash = frames.copy()
    flash[40] = 255 - flash[40]
    assert not oracle.score(flash, attributes)["smooth"]


@pytest.mark.parametrize("kind", ["noise", "empty"])
def test_nonsense_is_not_read_as_something(kind):
    noise = np.random.default_rng(0).integers(0, 256, (20, 96, 96, 3), dtype=np.uint8)
    frames = noise if kind == "noise" else np.zeros_like(noise)
    attributes = world.Attributes("black", "still", (world.Object("red", "circle", "small"),))
    scores = oracle.score(frames, attributes)
    assert not scores["color"]
    assert not scores["shape"]
    assert not scores["motion"]
    assert not scores["smooth"]


def test_swapped_roles_are_wrong():
    frames, a = next((f, a) for f, a in clips(12, 2, seed=8, size=64) if a.motion == "chase")
    assert oracle.score(frames, a)["all"]
    swapped = world.Attributes(a.background, a.motion, a.objects[::-1])
    scores = oracle.score(frames, swapped)
    assert scores["color"]
    assert scores["shape"]
    assert not scores["motion"]


def test_bad_frames():
    with pytest.raises(ValueError, match="uint8"):
        oracle.read(np.zeros((81, 96, 96, 3), np.float32))
