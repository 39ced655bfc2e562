"""The procedural world: splits, determinism, continuous time, and positions read off the pixels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal.training import world


@functools.partial(jax.jit, static_argnames=("count", "split", "objects", "often"))
def scenes(count, split="all", objects=None, seed=0, often=()):
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.vmap(lambda k: world.sample(k, split=split, objects=objects, often=often))(keys)


def unstack(batch):
    batch = jax.device_get(batch)
    return [jax.tree.map(lambda v, i=i: v[i], batch) for i in range(len(batch.motion))]


def one(motion, shape="square", color="red", size="small", background="black", **parameters):
    """A scene of one chosen motion, objects alike in shape and size."""
    base = unstack(scenes(1))[0]
    names = {"bounce": 0.7, "left": np.pi, "right": 0.0, "up": 1.5 * np.pi, "down": 0.5 * np.pi}
    chosen = {
        "background": np.int32(list(world.BACKGROUNDS).index(background)),
        "motion": np.int32(world.MOTIONS.index(motion)),
        "shape": np.full(2, world.SHAPES.index(shape)),
        "color": np.asarray([list(world.COLORS).index(color), 3]),
        "size": np.full(2, list(world.SIZES).index(size)),
        "start": np.asarray([0.5, 0.5], np.float32),
        "heading": np.float32(names.get(motion, 0.0)),
        "speed": np.float32(0.25),
        "period": np.float32(2.0),
        "phase": np.float32(0.0),
        "turn": np.float32(1.0),
    }
    return base._replace(**(chosen | parameters))


render = jax.jit(world.render, static_argnames="size")


def redness(frames):
    """Weight of the red object on black, [T, H, W] in [0, 1]."""
    return (np.asarray(frames)[..., 0] + 1) * 127.5 / world.COLORS["red"][0]


def test_splits_give_what_they_say():
    seen = {}
    for split in ("train", "held_out"):
        found = [world.attributes(s) for s in unstack(scenes(2000, split))]
        seen[split] = {a.motion for a in found}
        assert {world.held_out(a) for a in found} == {split == "held_out"}
        assert all(len({o.color for o in a.objects}) == len(a.objects) for a in found)
        assert not any(a.motion == "spin" and a.objects[0].shape in ("circle", "ring") for a in found)
    assert seen["train"] == seen["held_out"] == set(world.MOTIONS)


def test_motions_are_equally_likely():
    batch = scenes(6000, "train")
    counts = np.bincount(np.asarray(batch.motion), minlength=len(world.MOTIONS)) / 6000
    np.testing.assert_allclose(counts, 1 / len(world.MOTIONS), atol=0.015)
    assert {len(world.attributes(s).objects) for s in unstack(scenes(50, objects=1))} == {1}
    assert {len(world.attributes(s).objects) for s in unstack(scenes(50, objects=2))} == {2}


def test_colors_are_well_apart():
    palette = np.asarray([*world.BACKGROUNDS.values(), *world.COLORS.values()], float)
    apart = np.linalg.norm(palette[:, None] - palette[None], axis=-1) + 1e3 * np.eye(len(palette))
    assert apart.min() > 60
    assert apart[: len(world.BACKGROUNDS), len(world.BACKGROUNDS) :].min() > 85


def test_render_is_a_function_of_time_alone():
    scene = unstack(scenes(1, seed=3))[0]
    times = world.frame_times(9, start=40)
    clip = np.asarray(render(scene, times))
    assert clip.shape == (9, 96, 96, 3)
    assert clip.dtype == np.float32
    assert np.abs(clip).max() <= 1 + 1e-6
    np.testing.assert_allclose(clip[4:], np.asarray(render(scene, times[4:])), atol=1e-5)
    batch = jax.vmap(lambda s: world.render(s, times, 32))(jax.tree.map(lambda v: jnp.stack([v, v]), scene))
    assert batch.shape == (2, 9, 32, 32, 3)
    np.testing.assert_allclose(batch[0], batch[1])


@pytest.mark.parametrize(
    ("motion", "step"),
    [("right", (4, 0)), ("left", (-4, 0)), ("down", (0, 4)), ("up", (0, -4)), ("still", (0, 0))],
)
def test_straight_motion_wraps_for_ever(motion, step):
    """A quarter of a side each second is 4 of 64 pixels a frame at 4 fps, and still is after 1000 seconds."""
    scene = one(motion)
    for start in (0, 4000):
        clip = np.asarray(render(scene, world.frame_times(20, start=start, fps=4), size=64))
        for now, after in itertools.pairwise(clip):
            moved = np.roll(now, (step[1], step[0]), axis=(0, 1))
            assert np.abs(moved - after).mean() < 0.01


@pytest.mark.parametrize("shape", world.SHAPES)
def test_area_is_that_of_the_shape(shape):
    r = world.SIZES["large"] * world.CIRCUMRADIUS[shape] * 192
    exact = {
        "circle": np.pi * r**2,
        "square": 2 * r**2,
        "triangle": 3 * np.sqrt(3) / 4 * r**2,
        "star": 5 * r**2 * world.STAR_INNER * np.sin(np.pi / 5),
        "cross": 4 * r**2 * (2 * world.CROSS_ARM - world.CROSS_ARM**2),
        "ring": np.pi * r**2 * (1 - world.RING_HOLE**2),
    }[shape]
    area = redness(render(one("still", shape, size="large"), world.frame_times(1), size=192)).sum()
    assert area == pytest.approx(exact, rel=0.01)


def test_size_and_visibility_over_time():
    times = np.asarray([0.0, 0.5, 1.0, 2.0, 4.5, 60.0])
    area = {m: redness(render(one(m, size="large"), times)).sum((1, 2)) for m in world.SINGLE_MOTIONS}
    full = area["still"][0]
    assert area["grow"][-1] == pytest.approx(full, rel=1e-3)
    assert area["grow"][0] == pytest.approx(full / 4, rel=0.05)
    assert area["shrink"][-1] == pytest.approx(full / 4, rel=0.05)
    assert area["appear"][0] < 1e-3 < 0.99 * full < area["appear"][-1]
    assert area["disappear"][-1] < 1e-3 < 0.99 * full < area["disappear"][0]
    np.testing.assert_allclose(area["spin"], full, rtol=0.01)
    blink = redness(render(one("blink"), np.linspace(0, 2, 33))).sum((1, 2)) / full
    assert blink.min() < 1e-3


def test_bouncing_objects_stay_inside():
    batch = [s for s in unstack(scenes(400, seed=5)) if world.MOTIONS[int(s.motion)] == "bounce"]
    assert batch
    for scene in batch:
        position = np.asarray(world.poses(scene, np.linspace(0, 50, 500)).position[:, 0])
        radius = list(world.SIZES.values())[int(scene.size[0])]
        assert position.min() > radius
        assert position.max() < 1 - radius
        assert (np.diff(np.sign(np.diff(position, axis=0)), axis=0) != 0).any(0).all()


def test_pairs_do_not_touch_unless_they_collide():
    for scene in unstack(scenes(100, objects=2, seed=2)):
        position = np.asarray(world.poses(scene, world.frame_times(81)).position)
        gap = (position[:, 0] - position[:, 1] + 0.5) % 1 - 0.5
        reach = sum(np.asarray(list(world.SIZES.values()))[np.asarray(scene.size)])
        nearest = np.linalg.norm(gap, axis=-1).min()
        if world.MOTIONS[int(scene.motion)] == "collide":
            assert nearest == pytest.approx(0.92 * reach, abs=0.01)
        else:
            assert nearest > reach


def test_what_is_asked_for_is_drawn_more_often():
    batch = scenes(4000, "train", often=("spin", "spin", "star"))
    spins = np.asarray(batch.motion) == world.MOTIONS.index("spin")
    assert spins.mean() == pytest.approx(3 / (len(world.MOTIONS) + 2), abs=0.02)
    # Four shapes can be seen to spin, each in the seven colors that the split has of it; stars count twice.
    stars = np.asarray(batch.shape)[spins, 0] == world.SHAPES.index("star")
    assert stars.mean() == pytest.approx(14 / (14 + 3 * 7), abs=0.06)


def test_sizes_that_are_asked_for_are_drawn_more_often():
    """Each object has its own; two large ones have no room."""
    batch = scenes(4000, "train", often=("small",))
    pair = np.asarray(batch.motion) >= len(world.SINGLE_MOTIONS)
    for chosen, expected in ((~pair, [2 / 4, 1 / 4, 1 / 4]), (pair, [2 / 3, 1 / 3, 0])):
        shares = np.bincount(np.asarray(batch.size)[chosen].ravel(), minlength=3) / (2 * chosen.sum())
        np.testing.assert_allclose(shares, expected, atol=0.03)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"often has \['jump'\]"):
        world.sample(jax.random.key(0), often=("spin", "jump"))
    with pytest.raises(ValueError, match="choose 'train'"):
        world.sample(jax.random.key(0), split="test")
    with pytest.raises(ValueError, match="choose 1, 2"):
        world.sample(jax.random.key(0), objects=3)
