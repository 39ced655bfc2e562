"""The cache's ring against a plain list of frames that evicts as the original does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal.cache import CacheLayout, KVCache

TOKENS, HEADS, DIM, LAYERS = 6, 2, 4, 2


def _evicting_list(blocks, window, sink):
    """Held frames after each block: appended at the end, the oldest after the sink removed."""
    held = []
    for start, size in blocks:
        held += range(start, start + size)
        if window is not None and len(held) > window:
            del held[sink : sink + len(held) - window]
        yield list(held)


def _plan(lead, block, count):
    starts = [(0, lead)] if lead else []
    return starts + [(lead + i * block, block) for i in range(count)]


LAYOUTS = {
    "unlimited": {"block": 3, "num_frames": 24},
    "window": {"block": 3, "window": 6, "num_frames": None},
    "aligned sink": {"block": 3, "window": 9, "sink": 3, "num_frames": None},
    "unaligned sink": {"block": 3, "window": 7, "sink": 2, "num_frames": None},
    "unaligned window": {"block": 3, "window": 8, "num_frames": None},
    "first frame": {"block": 2, "window": 5, "sink": 1, "lead": 1, "num_frames": None},
    "window never reached": {"block": 3, "window": 30, "sink": 3, "num_frames": 24},
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "tuple"])
def test_holds_what_an_evicting_list_holds(name, parts, stacked):
    args = LAYOUTS[name]
    layout = CacheLayout.create(tokens=TOKENS, parts=parts, **args)
    lead, block = args.get("lead", 0), args["block"]
    blocks = _plan(lead, block, 8 if not lead else 7)
    rng = np.random.default_rng(0)
    content = rng.normal(size=(2, 1, 24, TOKENS, HEADS, DIM)).astype(np.float32)
    cache = KVCache.zeros(layout, LAYERS, 1, HEADS, DIM, jnp.float32, stacked=stacked)
    expected = _evicting_list(blocks, args.get("window"), args.get("sink", 0))
    for (start, size), held in zip(blocks, expected, strict=True):
        place = layout.place(start, size, DIM)
        assert place.held == len(held)
        assert layout.held_frames(start + size) == held
        new = content[:, :, start : start + size]
        for _ in range(2):  # a repeated pass lands in the same place
            cache = cache.write(layout, 1, place.slots, jnp.asarray(new[0]), jnp.asarray(new[1]))
        assert sorted(int(layout.slot(f)) for f in held) == list(range(len(held)))  # a prefix
        for frame in held:
            for got, want in zip(cache.read_frame(layout, 1, int(layout.slot(frame))), content, strict=True):
                np.testing.assert_array_equal(got, want[:, frame])
    untouched = np.concatenate([np.ravel(x) for x in cache.read(0)])
    assert not untouched.any()  # the other layer


def test_every_part_holds_an_equal_share():
    """After any block, the first `part_length(held)` keys of each part are exactly the held frames' tokens."""
    layout = CacheLayout.create(None, tokens=TOKENS, block=3, window=7, sink=2, parts=3)
    cache = KVCache.zeros(layout, 1, 1, HEADS, DIM, jnp.float32)
    frames = np.arange(1.0, 16)
    for start in range(0, 15, 3):
        place = layout.place(start, 3, DIM)
        new = np.broadcast_to(frames[None, start : start + 3, None, None, None], (1, 3, TOKENS, HEADS, DIM))
        cache = cache.write(layout, 0, place.slots, jnp.asarray(new), jnp.asarray(new))
        keys = np.asarray(cache.read(0)[0])[0, :, :, 0, 0]
        length = layout.part_length(int(place.held))
        share = sorted(np.repeat([frames[f] for f in layout.held_frames(start + 3)], TOKENS // 3))
        for part in keys[:, :length]:
            assert sorted(part) == share


@pytest.mark.parametrize("name", ["aligned sink", "unaligned sink"])
def test_write_is_in_place(name):
    """Donated, the written cache takes no second copy, whether a block is one piece or wraps."""
    layout = CacheLayout.create(tokens=TOKENS * 64, **LAYOUTS[name])
    cache = jax.eval_shape(lambda: KVCache.zeros(layout, 4, 1, HEADS, 32, jnp.float32))
    block = jax.ShapeDtypeStruct((1, 3, layout.tokens, HEADS, 32), jnp.float32)

    def write_all(cache, slots, k, v):
        return jax.lax.fori_loop(0, 4, lambda i, c: c.write(layout, i, slots, k, v), cache)

    write = jax.jit(write_all, donate_argnums=0)
    memory = (
        write.lower(cache, jax.ShapeDtypeStruct((3,), jnp.int32), block, block).compile().memory_analysis()
    )
    size = 2 * cache.k.size * 4
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 4


def test_bounded_attention_at_any_block():
    layout = CacheLayout.create(None, tokens=TOKENS, block=3, window=12, sink=3)
    at_10, at_50 = (layout.place(3 * block, 3, DIM) for block in (10, 50))
    assert at_10.held == at_50.held == 12


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_frames": None}, "pass window="),
        ({"num_frames": None, "window": 4, "sink": 2}, "use window=5 or more"),
        ({"num_frames": 9, "sink": 3}, "without a window"),
        ({"num_frames": 9, "parts": 4}, "must divide"),
    ],
)
def test_impossible_layouts(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CacheLayout.create(tokens=TOKENS, block=3, **kwargs)


def test_impossible_placements():
    unlimited = CacheLayout.create(6, tokens=TOKENS, block=3)
    with pytest.raises(ValueError, match="do not fit a cache of 6 frames"):
        unlimited.place(6, 3, DIM)
    ring = CacheLayout.create(None, tokens=TOKENS, block=3, window=6)
    with pytest.raises(ValueError, match="wrap around"):
        ring.place(4, 3, DIM)
    with pytest.raises(ValueError, match="overrun"):
        ring.place(0, 7, DIM)
