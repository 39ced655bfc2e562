"""The UMT5 encoder against the original's outputs, and its size and memory at full scale."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import names
from jax_causal import modules
from jax_causal.config import TextConfig
from jax_causal.text import UMT5Encoder, relative_position_bucket
from tests import golden_data

MANIFEST = Path(__file__).parents[1] / "manifests" / "wan2_1_umt5_xxl_enc.json"


class Golden:
    """The golden file, its encoder and the parameters converted from its weights."""

    def __init__(self):
        self.data = golden_data.load("umt5")
        sizes = golden_data.settings(self.data)
        self.config = TextConfig(
            vocab_size=sizes["vocab"],
            dim=sizes["dim"],
            attention_dim=sizes["dim_attn"],
            ffn_dim=sizes["dim_ffn"],
            num_heads=sizes["heads"],
            num_layers=sizes["layers"],
            num_buckets=sizes["num_buckets"],
            max_distance=sizes["max_distance"],
        )
        abstract = modules.abstract(UMT5Encoder, self.config)
        self.params = names.to_params("text_encoder", golden_data.state_dict(self.data), abstract)
        self.ids = self.data["ids"].astype(np.int32)
        self.mask = self.data["mask"].astype(np.int32)
        self.encode = jax.jit(lambda p, ids, mask: modules.bind(UMT5Encoder, self.config, p)(ids, mask))


@pytest.fixture(scope="module")
def golden():
    return Golden()


@pytest.mark.golden
def test_prompt_embeds(golden):
    embeds = golden.encode(golden.params, golden.ids, golden.mask)
    np.testing.assert_allclose(embeds, golden.data["prompt_embeds"], rtol=0, atol=2e-5)
    assert (golden.mask == 0).any(), "the file should have padding"
    assert not np.asarray(embeds)[golden.mask == 0].any(), "padding must be exactly zero"


@pytest.mark.golden
def test_hidden_states(golden):
    encoder = modules.bind(UMT5Encoder, golden.config, golden.params)
    hidden = encoder.hidden_states(golden.ids, golden.mask)
    np.testing.assert_allclose(hidden, golden.data["hidden"], rtol=0, atol=2e-5)


@pytest.mark.golden
def test_buckets(golden):
    bucket = relative_position_bucket(
        golden.data["rel_pos"], golden.config.num_buckets, golden.config.max_distance
    )
    np.testing.assert_array_equal(bucket, golden.data["rel_bucket"])


@pytest.mark.parametrize(
    ("relative_position", "bucket"),
    # By hand: 8 exact buckets, then 8 + floor(8 ln(a / 8) / ln 16), 16 more for keys ahead.
    [(0, 0), (-1, 1), (-7, 7), (-8, 8), (-11, 8), (-12, 9), (-127, 15), (-9999, 15), (1, 17), (16, 26)],
)
def test_bucket_by_hand(relative_position, bucket):
    assert relative_position_bucket(relative_position, 32, 128) == bucket


@pytest.mark.golden
def test_padding_is_never_attended(golden):
    """Neither the padding's ids nor its amount changes a prompt's embeddings."""
    row = int(np.argmin(golden.mask.sum(1)))
    length = int(golden.mask[row].sum())
    ids, mask = golden.ids[row : row + 1], golden.mask[row : row + 1]
    expected = golden.encode(golden.params, ids, mask)
    other = np.where(mask == 1, ids, (ids + 1) % golden.config.vocab_size)
    np.testing.assert_array_equal(golden.encode(golden.params, other, mask), expected)
    unpadded = golden.encode(golden.params, ids[:, :length], mask[:, :length])
    np.testing.assert_allclose(unpadded, expected[:, :length], rtol=0, atol=1e-5)


@pytest.mark.golden
def test_bfloat16(golden):
    """A bf16 run rounds some ten values a layer to 2^-9 relative each: a percent or two in all."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), golden.params)
    embeds = golden.encode(params, golden.ids, golden.mask)
    assert embeds.dtype == jnp.bfloat16
    embeds, expected = np.asarray(embeds, np.float32), golden.data["prompt_embeds"]
    assert np.linalg.norm(embeds - expected) < 0.05 * np.linalg.norm(expected)
    nothing = golden.encode(params, golden.ids, np.zeros_like(golden.mask))
    assert np.isfinite(np.asarray(nothing, np.float32)).all(), "a row without tokens must stay finite"


def test_full_size_is_the_released_model():
    manifest = json.loads(MANIFEST.read_text())
    params = modules.abstract(UMT5Encoder, TextConfig())
    stacked, others = jax.tree.leaves(params["blocks"]), jax.tree.leaves({**params, "blocks": {}})
    assert modules.num_parameters(params) == manifest["num_elements"] == 5_680_910_336
    assert sum(leaf.shape[0] for leaf in stacked) + len(others) == manifest["num_tensors"]


def test_full_size_memory():
    """One layer's scores at a time: 64 heads x 512 x 512 in fp32 are 64 MiB, those of 24 layers 1.5 GiB."""
    config = TextConfig()
    params = modules.abstract(UMT5Encoder, config)
    tokens = jax.ShapeDtypeStruct((1, config.max_length), jnp.int32)
    encode = jax.jit(lambda p, ids, mask: modules.bind(UMT5Encoder, config, p)(ids, mask))
    memory = encode.lower(params, tokens, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 30
