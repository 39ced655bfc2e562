"""Cleaning against strings written by hand, ids against the tokenizer libraries called directly."""

import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from jax_causal.config import TokenizerConfig
from jax_causal.tokenizer import clean_prompt, load_tokenizer

CORPUS = [
    "a red ball rolls to the right across a wooden table",
    "the camera follows a dog that runs along the beach at sunset",
    "waves break against dark rocks while gulls circle overhead",
    "a woman in a yellow raincoat walks through a crowded market",
    "snow falls slowly on a quiet street lit by old lamps",
    "Zwei Katzen schlafen auf einem grünen Sofa, 3 more watch.",
]
SENTENCEPIECE = TokenizerConfig(kind="sentencepiece")
JSON = TokenizerConfig(kind="tokenizers")
BYTES = TokenizerConfig(kind="bytes")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A small unigram model with T5's special ids."""
    path = tmp_path_factory.mktemp("sentencepiece") / "spiece.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="unigram",
            vocab_size=200,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def json_folder(tmp_path_factory):
    """A word-level `tokenizer.json` that asks for an end of sequence, truncation and padding of its own."""
    folder = tmp_path_factory.mktemp("tokenizers")
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "ball": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a red ball", "a red ball"),
        ("  a\tred\n\n ball  ", "a red ball"),
        ("a\u00a0red\u3000ball\u2003rolls\u2028", "a red ball rolls"),
        ("schÃ¶ne KÃ¤tzchen", "schöne Kätzchen"),
        ("it â€™ s late", "it ' s late"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("<b> salt &amp;amp; pepper", "<b> salt & pepper"),
        ("one &lt;two&gt;", "one <two>"),
        ("fish&nbsp;&amp;nbsp;chips", "fish chips"),
        ("“Stop!”, CRIED the fox…", '"Stop!", CRIED the fox…'),
        ("\uff2c\uff2f\uff35\uff24", "LOUD"),
        ("half a pair \ud83d", "half a pair \ufffd"),
        (" \u00a0&nbsp; ", ""),
    ],
)
def test_clean_prompt(raw, clean):
    assert clean_prompt(raw) == clean


def test_sentencepiece_ids(model_file):
    prompts = ["a red ball rolls", "Zwei  Katzen &amp; a dog ☃", CORPUS[3]]
    cleaned = ["a red ball rolls", "Zwei Katzen & a dog ☃", CORPUS[3]]
    ids, mask = load_tokenizer(SENTENCEPIECE, model_file.parent, 64)(prompts)
    assert ids.dtype == mask.dtype == np.int32
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for row, text in enumerate(cleaned):
        tokens = processor.encode(text)
        assert 3 < len(tokens) < 63
        assert ids[row].tolist() == tokens + [1] + [0] * (63 - len(tokens))
        assert mask[row].tolist() == [1] * (len(tokens) + 1) + [0] * (63 - len(tokens))


def test_special_ids_come_from_the_config():
    ids, mask = load_tokenizer(TokenizerConfig("bytes", eos_id=7, pad_id=9), None, 5)("ab")
    assert ids.tolist() == [[100, 101, 7, 9, 9]]
    assert mask.tolist() == [[1, 1, 1, 0, 0]]


def test_tokenizer_json_ids(json_folder):
    ids, mask = load_tokenizer(JSON, json_folder, 8)(["a red ball", "a blue ball a ball a"])
    assert ids.tolist() == [[3, 4, 5, 1, 0, 0, 0, 0], [3, 2, 5, 3, 5, 3, 1, 0]]
    assert mask.sum(1).tolist() == [4, 7]


def test_byte_ids():
    ids, mask = load_tokenizer(BYTES, None, 8)(["a é", "~"])
    assert ids.tolist() == [[100, 35, 198, 172, 1, 0, 0, 0], [129, 1, 0, 0, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [5, 2]


def test_longest_prompt_that_fits():
    ids, mask = load_tokenizer(BYTES, None, 8)("1234567")
    assert ids[0, -1] == 1
    assert mask.all()


def test_long_prompt_is_cut_with_a_warning(model_file):
    prompt = " ".join(["ball rolls"] * 5000)
    tokens = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).encode(prompt)
    tokenize = load_tokenizer(SENTENCEPIECE, model_file.parent, 512)
    with pytest.warns(UserWarning, match=rf"prompt 2 of 2 .* the last {len(tokens) - 511} were cut off"):
        ids, mask = tokenize(["a red ball", prompt])
    assert ids.shape == (2, 512)
    assert ids[1].tolist() == [*tokens[:511], 1]
    assert mask[1].all()


@pytest.mark.parametrize("prompt", ["", "  \n\t", "&nbsp;"])
@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "bytes"])
def test_empty_prompt(prompt, kind, model_file, json_folder):
    folder = json_folder if kind == "tokenizers" else model_file.parent
    tokenize = load_tokenizer(TokenizerConfig(kind), folder, 16)
    with pytest.raises(ValueError, match="the prompt is empty"):
        tokenize(prompt)
    with pytest.raises(ValueError, match="prompt 2 of 3 is empty"):
        tokenize(["a", prompt, "b"])


@pytest.mark.parametrize(
    ("config", "wanted"), [(SENTENCEPIECE, r"spiece\.model or \*\.model"), (JSON, r"tokenizer\.json")]
)
def test_missing_file(config, wanted, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", None):
        with pytest.raises(FileNotFoundError, match=f"looked for {wanted} .*jax-causal convert"):
            load_tokenizer(config, folder, 16)


def test_a_single_model_of_any_name_will_do(model_file, tmp_path):
    model = model_file.read_bytes()
    (tmp_path / "mine.model").write_bytes(model)
    ids, _ = load_tokenizer(SENTENCEPIECE, tmp_path, 16)("a ball")
    (tmp_path / "other.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mine\.model, other\.model.*name the right one spiece\.model"):
        load_tokenizer(SENTENCEPIECE, tmp_path, 16)
    (tmp_path / "spiece.model").write_bytes(model)
    np.testing.assert_array_equal(load_tokenizer(SENTENCEPIECE, tmp_path, 16)("a ball")[0], ids)


@pytest.mark.parametrize(
    ("config", "name"), [(SENTENCEPIECE, "spiece.model"), (JSON, "tokenizer.json")], ids=["model", "json"]
)
def test_damaged_file(config, name, tmp_path):
    (tmp_path / name).write_bytes(b"{} not a tokenizer")
    with pytest.raises(ValueError, match=f"{name} is not a readable"):
        load_tokenizer(config, tmp_path, 16)


def test_json_without_the_package_names_the_extra(json_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'jax-causal\[tokenizers\]'"):
        load_tokenizer(JSON, json_folder, 16)
