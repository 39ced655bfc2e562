"""The vocabulary of the procedural world: reproducible, long enough, and without words that it refuses."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jax_causal
from jax_causal.training import captions, data, vocabulary
from tests import micro_world


@pytest.fixture(scope="module")
def tokenizer():
    return micro_world.stage("teacher").tokenizer


def test_training_it_again_gives_the_same_file(tmp_path):
    vocabulary.train(tmp_path / "again.model", vocab_size=576)
    (bundled,) = Path(jax_causal.__file__).parent.rglob("*.model")
    assert (tmp_path / "again.model").read_bytes() == bundled.read_bytes()


def test_every_caption_fits_with_its_end(tokenizer):
    scenes = jax.jit(lambda key: data.scenes(key, 2000, split="all"))(jax.random.key(77))
    lengths = [
        len(tokenizer.encode(captions.caption(attributes, 10_000 + i)))
        for i, attributes in enumerate(data.attribute_sets(scenes))
    ]
    assert max(lengths) <= tokenizer.max_length - 1
    assert max(lengths) > 15


@pytest.mark.parametrize("text", ["a quetzal waltzes", "Ελλάδα", "犬が走る", "\U0001f98a", "A RED BALL"])
def test_unknown_words_become_pieces(tokenizer, text):
    ids, mask = tokenizer(text)
    assert mask.sum() > 1
    assert 2 not in ids  # no unknown token
    assert ids.max() < 576


def test_upper_case_is_lower_case(tokenizer):
    np.testing.assert_array_equal(tokenizer("A RED Ball")[0], tokenizer("a red ball")[0])
