"""The small vocabulary of the procedural world: a sentencepiece model learned from its captions.

Words of the captions become single tokens; anything else falls back to pieces and bytes, so that no prompt is
refused. Upper and lower case are one.
"""

from __future__ import annotations

import io
from pathlib import Path

import jax
import sentencepiece

from jax_causal.config import ModelConfig
from jax_causal.tokenizer import Tokenizer, load_tokenizer
from jax_causal.training import captions, data

FOLDER = Path(__file__).parent / "tokenizer"  # as a model folder's `tokenizer/`
NUM_CAPTIONS = 20_000


def load(model: ModelConfig) -> Tokenizer:
    """The bundled vocabulary as the tokenizer of `model`."""
    return load_tokenizer(model.tokenizer, FOLDER, model.text_encoder.max_length)


def train(path: str | Path, *, vocab_size: int, seed: int = 0) -> None:
    """Writes a sentencepiece model of `vocab_size` pieces, bytes included, to the file `path`."""
    scenes = jax.jit(lambda key: data.scenes(key, NUM_CAPTIONS, split="all"))(jax.random.key(seed))
    texts = [captions.caption(attributes, i) for i, attributes in enumerate(data.attribute_sets(scenes))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="nmt_nfkc_cf",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    Path(path).write_bytes(model.getvalue())
