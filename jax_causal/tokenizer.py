"""Prompts to token ids: cleaning, then a sentencepiece model, a `tokenizer.json` or plain bytes.

All three give what the text encoder was trained on: no special token but the end of sequence, padding on the
right.
"""

from __future__ import annotations

import dataclasses
import html
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np

from jax_causal.config import TokenizerConfig

VOCABULARY = Path(__file__).with_name("vocabulary.model")  # made by `training.vocabulary`


def clean_prompt(text: str) -> str:
    """The text as the encoder expects it: encoding damage and HTML entities (even escaped twice) undone, runs
    of whitespace collapsed to one space, none at the ends. Case and punctuation stay."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Fixed-length token ids of cleaned prompts. Made by `load_tokenizer`.

    Attributes:
      encode: text to token ids, without any special token.
      max_length: tokens per prompt, the end of sequence included.
    """

    encode: Callable[[str], list[int]]
    max_length: int
    eos_id: int
    pad_id: int

    def __call__(self, prompts: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Cleans and tokenizes prompts.

        Returns:
          ids: int32 [B, max_length]; each row is the prompt, the end of sequence, then padding.
          mask: int32 [B, max_length]; 1 up to and including the end of sequence, 0 at the padding.

        Raises:
          ValueError: a prompt is empty once cleaned.

        Warns:
          UserWarning: a prompt is too long and its tail was cut off.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = np.full((len(prompts), self.max_length), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            which = f"prompt {row + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            tokens = self.encode(clean_prompt(prompt))
            if not tokens:
                raise ValueError(f"{which} is empty: describe what the video shows in a sentence or more")
            tokens = [*tokens, self.eos_id]
            if (excess := len(tokens) - self.max_length) > 0:
                warnings.warn(
                    f"{which} has {len(tokens)} tokens and the model reads {self.max_length}: "
                    f"the last {excess} were cut off",
                    stacklevel=2,
                )
                tokens = [*tokens[: self.max_length - 1], self.eos_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


def load_tokenizer(config: TokenizerConfig, folder: Path | None, max_length: int) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
      config: which kind of tokenizer, and its special ids.
      folder: the model folder's `tokenizer/`; "bytes" and "world" need none.
      max_length: tokens per prompt, `TextConfig.max_length`.

    Raises:
      FileNotFoundError: the folder holds no file of that kind.
      ValueError: the file cannot be read, or several could be meant.
      ImportError: `tokenizer.json` needs the extra `tokenizers`.
    """
    load = {"sentencepiece": _sentencepiece, "tokenizers": _tokenizers, "bytes": _bytes, "world": _world}[
        config.kind
    ]
    return Tokenizer(load(folder), max_length, config.eos_id, config.pad_id)


def _bytes(folder) -> Callable[[str], list[int]]:
    """UTF-8, three ids up to leave room for padding, end of sequence and unknown."""
    return lambda text: [byte + 3 for byte in text.encode()]


def _world(folder) -> Callable[[str], list[int]]:
    return _load_sentencepiece(VOCABULARY)


def _sentencepiece(folder) -> Callable[[str], list[int]]:
    return _load_sentencepiece(_find(folder, "spiece.model", "*.model"))


def _load_sentencepiece(path: Path) -> Callable[[str], list[int]]:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    except RuntimeError as error:
        raise ValueError(f"{path} is not a readable sentencepiece model: {error}") from error


def _tokenizers(folder) -> Callable[[str], list[int]]:
    path = _find(folder, "tokenizer.json")
    try:
        import tokenizers
    except ImportError:
        raise ImportError(f"{path} needs one more package: pip install 'jax-causal[tokenizers]'") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    # The file may ask for a length of its own; ours counts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _find(folder: Path | None, *patterns: str) -> Path:
    """The file in `folder` for the first pattern that matches any."""
    for pattern in patterns:
        found = sorted(Path(folder).glob(pattern)) if folder else []
        if len(found) > 1:
            raise ValueError(
                f"{folder} holds several tokenizers ({', '.join(path.name for path in found)}): "
                f"keep one, or name the right one {patterns[0]}"
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        f"no tokenizer: looked for {' or '.join(patterns)} in {folder or 'no folder'}; put the file there, "
        "or run `jax-causal convert` on a source that has a tokenizer/ folder"
    )
