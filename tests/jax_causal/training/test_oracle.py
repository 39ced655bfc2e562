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


# What was read wrongly once. A scene is drawn as told, whatever `world.sample` would choose.


def scene(motion, *things, background="black", **numbers):
    """uint8 frames and attributes of (color, shape, size) things."""
    first, second = (things[0], things[-1])
    values = {
        "start": (0.5, 0.5),
        "speed": 0.3,
        "heading": 0.0,
        "turn": 1.0,
        "period": 2.0,
        "phase": 0.0,
    } | numbers
    drawn = world.Scene(
        background=np.int32(list(world.BACKGROUNDS).index(background)),
        motion=np.int32(world.MOTIONS.index(motion)),
        color=np.asarray([list(world.COLORS).index(t[0]) for t in (first, second)]),
        shape=np.asarray([world.SHAPES.index(t[1]) for t in (first, second)]),
        size=np.asarray([list(world.SIZES).index(t[2]) for t in (first, second)]),
        **{name: np.asarray(value, np.float32) for name, value in values.items()},
    )
    frames = (np.asarray(world.render(drawn, world.frame_times(81))) + 1) * 127.5
    return frames, world.attributes(drawn)


def test_a_bounce_off_all_borders_is_no_orbit():
    """The path is a diamond round the middle, whose distance from it varies little."""
    margin = 1.2 * world.SIZES["small"]
    at = {"start": (margin, 0.5), "heading": np.pi / 4, "speed": 0.45}
    frames, a = scene("bounce", ("green", "star", "small"), background="gray", **at)
    assert oracle.read(to_uint8(frames)).motion == "bounce"
    frames, a = scene("orbit", ("green", "star", "small"), background="gray", period=4.0)
    assert oracle.score(to_uint8(frames), a)["all"]


def test_thin_rings_count():
    frames, a = scene(
        "pass", ("pink", "ring", "small"), ("orange", "square", "medium"), background="beige", phase=0.5
    )
    assert oracle.score(to_uint8(frames), a)["all"]


def test_soft_edges_are_not_another_color():
    """Yellow fading into black passes near orange."""
    frames, a = scene("right", ("yellow", "square", "medium"))
    soft = 0.95 * ndimage.gaussian_filter(frames, (0.4, 1.2, 1.2, 0))
    assert oracle.score(to_uint8(soft), a)["all"]


def test_fading_where_a_clip_begins_is_smooth():
    # A quarter of a period into the cycle the object is half visible and on its way in.
    frames, a = scene("blink", ("pink", "circle", "small"), background="beige", phase=0.25)
    assert oracle.score(to_uint8(frames), a)["smooth"]
    assert oracle.score(to_uint8(frames), a)["all"]


def test_swapped_captions_of_pairs_score_by_chance():
    """As for one object; both colors, and the shape of each, have to agree."""
    pairs = clips(24, 2, seed=5, size=64)
    readings = [oracle.read(frames) for frames, _ in pairs]
    agreed, expected = collections.Counter(), collections.Counter()
    for i, reading in enumerate(readings):
        for j, (_, a) in enumerate(pairs):
            if i != j:
                other = pairs[i][1]
                expected["background"] += a.background == other.background
                expected["color"] += {o.color for o in a.objects} == {o.color for o in other.objects}
                for key in ("background", "color", "shape", "motion", "all"):
                    agreed[key] += oracle.compare(reading, a)[key]
    n = len(pairs) * (len(pairs) - 1)
    for key in expected:
        assert agreed[key] / n == pytest.approx(expected[key] / n, abs=0.02)
    assert agreed["motion"] / n < 0.35  # four motions
    assert agreed["shape"] / n < 0.1
    assert agreed["all"] / n < 0.01
