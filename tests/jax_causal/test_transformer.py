"""The network without a rollout: every forward against the golden vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import modules, rope, transformer, transformer_layers
from jax_causal.cache import CacheLayout
from jax_causal.config import PRESETS
from jax_causal.parallel import SingleDevice
from tests import golden_data
from tests.models import SMALL, golden_transformer, patchify, unpatchify

ATOL = 2e-5
PARALLEL = SingleDevice()


def _tokens(x):
    """Golden inputs are [B, C, F, H, W]."""
    return jnp.asarray(patchify(x.transpose(0, 2, 1, 3, 4)))


def _flow(tokens, like):
    return unpatchify(tokens, *like.shape[-2:]).transpose(0, 2, 1, 3, 4)


def _inputs(name):
    data = golden_data.load(name)
    config, params = golden_transformer(data)
    grid = (data[next(k for k in ("x", "x0") if k in data)].shape[-2] // 2, data["cfg/lat_w"] // 2)
    return data, config, params, tuple(int(n) for n in grid)


def _network(config, params, unrolled):
    return transformer.bind(config, transformer.unroll(params) if unrolled else params)


@pytest.mark.golden
@pytest.mark.parametrize("unrolled", [False, True], ids=["scanned", "unrolled"])
def test_bidirectional(unrolled):
    data, config, params, grid = _inputs("dit_bidirectional")
    network = _network(config, params, unrolled)
    frames = rope.frame_factors(0, data["x"].shape[2], config.head_dim)
    text = network.embed_text(data["context"])
    out = network.forward(_tokens(data["x"]), data["t"][:, None], text, frames, grid, PARALLEL)
    np.testing.assert_allclose(_flow(out, data["x"]), data["flow"], atol=ATOL)


@pytest.mark.golden
def test_embeddings():
    data, config, params, _ = _inputs("dit_bidirectional")
    network = transformer.bind(config, params)
    e, e0 = network.embed_time(data["t"][:, None])
    np.testing.assert_allclose(e[:, 0], data["inter/time_embed"], atol=ATOL)
    np.testing.assert_allclose(e0.reshape(len(e0), -1), data["inter/time_proj"], atol=ATOL)
    first = network.patch_embedding(_tokens(data["x"])[:1])
    expected = data["inter/patch_embed_b0"]  # [1, E, F, h, w]
    expected = expected.transpose(0, 2, 3, 4, 1).reshape(first.shape)
    np.testing.assert_allclose(first, expected, atol=ATOL)
    padding = config.text_length - data["context"].shape[1]
    text = network.text_embedding(jnp.pad(data["context"], ((0, 0), (0, padding), (0, 0))))
    np.testing.assert_allclose(text, data["inter/text_embed"], atol=ATOL)


def _masked(data, config, params, grid, x, t, mask, unrolled=False):
    network = _network(config, params, unrolled)
    frames = rope.frame_factors(0, x.shape[2], config.head_dim)
    text = network.embed_text(data["context"])
    out = network.forward(_tokens(x), t, text, frames, grid, PARALLEL, frame_mask=mask)
    return _flow(out, x)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["plain", "window", "independent"])
def test_block_causal(case):
    data, config, params, grid = _inputs("dit_block_causal")
    settings = golden_data.settings(data)
    suffix = "_indep" if case == "independent" else ""
    x, t = data[f"x{suffix}"], data[f"t{suffix}"]
    blocks = transformer.block_index(x.shape[2], settings["npb"], case == "independent")
    window = settings["local_attn_frames"] if case == "window" else None
    mask = transformer.block_causal_mask(blocks, window)
    key = {"plain": "", "window": "_local", "independent": "_indep"}[case]
    out = _masked(data, config, params, grid, x, t, mask)
    np.testing.assert_allclose(out, data[f"flow_block_causal{key}"], atol=ATOL)


@pytest.mark.golden
@pytest.mark.parametrize("augmented", [False, True])
def test_teacher_forcing(augmented):
    data, config, params, grid = _inputs("dit_block_causal")
    network = transformer.bind(config, params)
    num_frames = data["x"].shape[2]
    blocks = transformer.block_index(num_frames, golden_data.settings(data)["npb"])
    out = network.teacher_forcing(
        _tokens(data["x"]),
        data["t"],
        _tokens(data["clean_x"]),
        network.embed_text(data["context"]),
        rope.frame_factors(0, num_frames, config.head_dim),
        grid,
        PARALLEL,
        frame_mask=transformer.teacher_forcing_mask(blocks),
        clean_t=data["aug_t"] if augmented else None,
    )
    key = "flow_teacher_forcing" + ("_aug" if augmented else "")
    np.testing.assert_allclose(_flow(out, data["x"]), data[key], atol=ATOL)


@pytest.mark.golden
@pytest.mark.parametrize("unrolled", [False, True], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_cached_forward_from_a_prefix(unrolled, split):
    """Two blocks after a prefix of arbitrary keys and values, at a start offset."""
    data, config, params, grid = _inputs("dit_headdim128_cached")
    parts = golden_data.divisors(grid[0] * grid[1])[0] if split else 1
    settings = golden_data.settings(data)
    tokens, start, size = grid[0] * grid[1], settings["start_frame"], settings["npb"]
    layout = CacheLayout.create(start + 2 * size, tokens=tokens, block=size, parts=parts)
    shape = (config.num_layers, 1, config.num_heads, config.head_dim)
    cache = SingleDevice().init_cache(layout, *shape, jnp.float32, stacked=not unrolled)
    prefix = [data[f"cache_prefix_{x}"].reshape(1, start, tokens, *shape[2:]) for x in "kv"]
    for layer in range(config.num_layers):
        cache = cache.write(layout, layer, np.arange(start), *map(jnp.asarray, prefix))
    network = _network(config, params, unrolled)
    text = network.embed_text(data["context"])
    for call in range(2):
        placement = layout.place(start + call * size, size, config.head_dim)
        x = data[f"x{call}"]
        out, cache = network.denoise(
            _tokens(x), data[f"t{call}"], text, cache, placement, layout, grid, PARALLEL
        )
        np.testing.assert_allclose(_flow(out, x), data[f"flow{call}"], atol=ATOL)
    for index, name in enumerate(("new_k", "new_v")):
        held = [cache.read_frame(layout, config.num_layers - 1, start + f)[index] for f in range(2 * size)]
        np.testing.assert_allclose(np.concatenate(held, axis=1), data[name], atol=ATOL)


@pytest.mark.golden
def test_a_gradient_keeps_what_enters_the_activation():
    x = jnp.linspace(-3, 3, 7)
    y, pullback = jax.vjp(transformer_layers.gelu, x)
    assert [leaf.tolist() for leaf in jax.tree.leaves(pullback)] == [x.tolist()]
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    np.testing.assert_allclose(y, x / 2 * (1 + tanh), atol=1e-6)
    slope = (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    np.testing.assert_allclose(pullback(jnp.ones(7))[0], slope, atol=1e-6)


def test_one_timestep_for_all_frames_equals_one_each():
    data, config, params, grid = _inputs("dit_block_causal")
    t = data["t"][:, :1]
    args = (data, config, params, grid, data["x"])
    blocks = transformer.block_index(data["x"].shape[2], golden_data.settings(data)["npb"])
    mask = transformer.block_causal_mask(blocks)
    one = _masked(*args, t, mask)
    each = _masked(*args, np.repeat(t, data["x"].shape[2], axis=1), mask)
    np.testing.assert_array_equal(one, each)
    with pytest.raises(ValueError, match="cannot be shared evenly"):
        _masked(*args, np.repeat(t, data["x"].shape[2] - 1, axis=1), mask)


@pytest.mark.golden
def test_bfloat16_stays_bfloat16():
    data, config, params, grid = _inputs("dit_bidirectional")
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    network = transformer.bind(config, low)
    frames = rope.frame_factors(0, data["x"].shape[2], config.head_dim)
    out = network.forward(
        _tokens(data["x"]).astype(jnp.bfloat16),
        data["t"][:, None],
        network.embed_text(data["context"]),
        frames,
        grid,
        PARALLEL,
    )
    assert out.dtype == jnp.bfloat16
    error = _flow(out.astype(jnp.float32), data["x"]) - data["flow"]
    relative = np.linalg.norm(error) / np.linalg.norm(data["flow"])
    print(f"bf16 relative error of one pass: {relative:.4f}")
    # About ten roundings to 2^-9 per layer, in weights, residual stream and modulation.
    assert relative < 0.02


@pytest.mark.golden
def test_text_of_the_wrong_shape_is_refused():
    _, config, params, _ = _inputs("dit_bidirectional")
    network = transformer.bind(config, params)
    too_long = np.zeros((1, config.text_length + 1, config.text_dim), np.float32)
    for context in (too_long, np.zeros((1, 4, config.text_dim + 1), np.float32)):
        with pytest.raises(ValueError, match="prompt embeddings must be"):
            network.embed_text(context)


@pytest.mark.parametrize("unrolled", [False, True])
def test_keys_of_padding_are_equal_from_where_it_is_said(unrolled):
    config = SMALL.transformer
    params = transformer.init(config, jax.random.key(0))
    network = transformer.bind(config, transformer.unroll(params) if unrolled else params)
    context = jax.random.normal(jax.random.key(1), (2, config.text_length, config.text_dim))
    assert int(network.embed_text(context).distinct) == config.text_length
    assert int(network.embed_text(jnp.zeros_like(context)).distinct) == 0
    # The longer of two prompts counts, its own zeros among it.
    context = context[:, :6].at[0, 3:].set(0).at[1, 1].set(0).at[1, 5].set(0)
    text = network.embed_text(context)
    assert int(text.distinct) == 5
    for x in (np.stack(text.k), np.stack(text.v)):
        np.testing.assert_allclose(x[:, :, 5:], np.broadcast_to(x[:, :, 5:6], x[:, :, 5:].shape), rtol=1e-5)
        assert not np.allclose(x[:, 1, 4], x[:, 1, 5], rtol=1e-2)


@pytest.mark.parametrize(("name", "count"), [("wan-1.3b", 1_418_996_800), ("wan-14b", 14_288_491_584)])
def test_parameter_count(name, count):
    assert modules.num_parameters(transformer.abstract(PRESETS[name].transformer)) == count


def test_frame_masks():
    """Small masks written out by hand: rows are queries."""
    blocks = transformer.block_index(5, 2, independent_first=True)
    assert blocks.tolist() == [0, 1, 1, 2, 2]
    rows = functools.partial(np.array, dtype=bool)
    plain = rows([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(transformer.block_causal_mask(blocks), plain)
    windowed = plain.copy()
    windowed[3:, 0:2] = False
    np.testing.assert_array_equal(transformer.block_causal_mask(blocks, window=3)[3:], windowed[3:])
    forcing = rows([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
    np.testing.assert_array_equal(transformer.teacher_forcing_mask(np.array([0, 1])), forcing)


def test_unrolling_can_consume_the_stacks():
    params = transformer.init(PRESETS["tiny"].transformer, jax.random.key(0))
    kept, stacks = transformer.unroll(params), jax.tree.leaves(params["blocks"])
    consumed = transformer.unroll(params, consume=True)
    assert all(x.is_deleted() for x in stacks)
    jax.tree.map(np.testing.assert_array_equal, consumed, kept)
