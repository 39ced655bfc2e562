"""The small vocabulary of the procedural world: a sentencepiece model learned from its captions.

Most words of the captions become single tokens; anything else falls back to pieces and bytes, so that no prompt is
refused. Upper and lower case are one.
"""

from __future__ import annotations

import io
from pathlib import Path

import jax
import sentencepiece

from jax_causal.tokenizer import VOCABULARY
from jax_causal.training import captions, data

NUM_CAPTIONS = 20_000


def train(path: str | Path = VOCABULARY, *, vocab_size: int = 576, seed: int = 0) -> None:
    """Writes a sentencepiece model of `vocab_size` pieces, bytes included, to the file `path`.

    With its defaults it makes the vocabulary that the package ships.
    """
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
