"""From checkpoints in every public layout to a model folder."""

import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from converters import names
from converters.convert import main
from jax_causal import checkpoint, modules
from jax_causal.components import COMPONENTS
from jax_causal.config import ModelConfig
from jax_causal.tokenizer import load_tokenizer
from tests import torch_writer
from tests.converters import checkpoints
from tests.converters.checkpoints import convert

pytestmark = pytest.mark.golden


def config_of(folder) -> ModelConfig:
    return ModelConfig.from_json((folder / "config.json").read_text())


def stored(folder, component):
    """The component as the model folder says it is."""
    config = getattr(config_of(folder), component)
    return checkpoint.restore(folder / component, modules.abstract(COMPONENTS[component], config))


def expected(folder, component, scale=1):
    """What `names.to_params`, checked elsewhere, makes of the golden weights."""
    weights = {key: value * scale for key, value in checkpoints.original(component).items()}
    config = getattr(config_of(folder), component)
    return names.to_params(component, weights, modules.abstract(COMPONENTS[component], config))


def assert_stored(folder, component, scale=1):
    jax.tree.map(np.testing.assert_array_equal, stored(folder, component), expected(folder, component, scale))


def stored_dtypes(folder, component) -> dict[str, str]:
    leaves = flatten_dict(ocp.metadata(folder / component).metadata, sep=".")
    return {name: leaf.dtype.name for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    """A sentencepiece model with UMT5's special ids, trained here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "a red ball rolls slowly to the right of the blue house while three birds sing"
    (folder / "text.txt").write_text("\n".join(text[i:] for i in range(len(text))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "spiece.model"


@pytest.mark.parametrize(
    ("entries", "entry", "scale", "kind"),
    [
        (["generator", "generator_ema", "critic"], None, 2, "causal-distilled"),
        (["generator", "critic"], None, 1, "causal-distilled"),
        (["generator_ema"], None, 1, "causal-distilled"),
        (["critic"], None, 1, "bidirectional"),
        (["generator", "generator_ema", "critic"], "generator", 1, "causal-distilled"),
        (["generator", "generator_ema", "critic"], "critic", 3, "bidirectional"),
    ],
)
def test_self_forcing_entries(tmp_path, entries, entry, scale, kind):
    checkpoints.write_self_forcing(tmp_path / "model.pt", entries, prefix="model._fsdp_wrapped_module.")
    report = convert(tmp_path / "model.pt", tmp_path / "out", entry=entry)
    assert_stored(tmp_path / "out", "transformer", scale)
    assert config_of(tmp_path / "out").kind == kind
    assert list(report.written) == ["transformer"]
    assert list(report.missing) == ["vae", "text_encoder", "tokenizer"]


def test_kinds_that_the_file_does_not_show(tmp_path, self_forcing):
    shutil.copy(self_forcing, tmp_path / "ode_init.pt")
    convert(tmp_path / "ode_init.pt", tmp_path / "ode")
    assert config_of(tmp_path / "ode").kind == "causal"
    convert(self_forcing, tmp_path / "told", kind="causal")
    assert config_of(tmp_path / "told").kind == "causal"


def test_an_original_wan_folder(tmp_path, tokenizer_model):
    checkpoints.write_wan(tmp_path / "wan")
    (tmp_path / "wan" / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(tokenizer_model, tmp_path / "wan" / "google" / "umt5-xxl")
    report = convert(tmp_path / "wan", tmp_path / "out")
    for component in COMPONENTS:
        assert_stored(tmp_path / "out", component)
    assert config_of(tmp_path / "out").kind == "bidirectional"
    assert config_of(tmp_path / "out").transformer.text_length == 16
    assert set(report.written) == {"transformer", "vae", "text_encoder", "tokenizer"}
    assert report.missing == {}
    assert str(report).endswith("out is complete")


def test_a_diffusers_folder_with_its_tokenizer(tmp_path, tokenizer_model):
    checkpoints.write_diffusers(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "tokenizer").mkdir()
    shutil.copy(tokenizer_model, tmp_path / "pipeline" / "tokenizer")
    convert(tmp_path / "pipeline", tmp_path / "out", kind="causal-distilled")
    for component in COMPONENTS:
        assert_stored(tmp_path / "out", component)
    config = config_of(tmp_path / "out")
    assert config.kind == "causal-distilled"
    assert config.tokenizer.kind == "sentencepiece"
    tokenizer = load_tokenizer(config.tokenizer, tmp_path / "out" / "tokenizer", 16)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    ids = original.encode("a red ball rolls")
    np.testing.assert_array_equal(tokenizer("a red ball rolls")[0][0], [*ids, 1] + [0] * (15 - len(ids)))


def test_components_from_several_sources_make_one_folder(tmp_path, self_forcing, tokenizer_model):
    checkpoints.write_wan(tmp_path / "wan")
    out = tmp_path / "out"
    convert(self_forcing, out)
    first = config_of(out)
    convert(tmp_path / "wan" / "Wan2.1_VAE.pth", out)
    convert(tmp_path / "wan" / "models_t5_umt5-xxl-enc-bf16.pth", out)
    report = convert(tokenizer_model, out)
    assert report.missing == {}
    assert config_of(out).transformer == first.transformer
    assert config_of(out).kind == "causal-distilled"
    assert_stored(out, "transformer", 2)
    assert_stored(out, "vae")
    assert_stored(out, "text_encoder")
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "transformer",
        "vae",
        "text_encoder",
        "tokenizer",
    }


def test_dtypes_are_kept_or_chosen(tmp_path):
    weights = {k: v.astype(ml_dtypes.bfloat16) for k, v in checkpoints.original("text_encoder").items()}
    weights["norm.weight"] = weights["norm.weight"].astype(np.float32)
    torch_writer.save(tmp_path / "t5.pth", weights)
    convert(tmp_path / "t5.pth", tmp_path / "kept")
    kept = stored_dtypes(tmp_path / "kept", "text_encoder")
    assert kept.pop("norm.scale") == "float32"
    assert set(kept.values()) == {"bfloat16"}
    convert(tmp_path / "t5.pth", tmp_path / "chosen", dtype="float16")
    assert set(stored_dtypes(tmp_path / "chosen", "text_encoder").values()) == {"float16"}


def test_the_command_says_what_it_wrote_and_what_is_missing(tmp_path, self_forcing, capsys):
    out = tmp_path / "out"
    assert (
        main(
            [str(self_forcing), str(out), "--num-heads", str(checkpoints.num_heads()), "--dtype", "bfloat16"]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert re.search(rf"wrote {out}/transformer: [\d,]+ parameters, bfloat16, from {self_forcing}", shown.out)
    for component in ("vae", "text_encoder", "tokenizer"):
        assert re.search(rf"still lacks {component}: jax-causal convert \S+ {out}\n", shown.out)
    assert "transformer" in shown.err  # the progress bar


def test_what_is_there_is_not_replaced_unasked(tmp_path, self_forcing):
    out = tmp_path / "out"
    convert(self_forcing, out)
    before = checkpoints.contents(out)
    with pytest.raises(FileExistsError, match="already has transformer: pass --overwrite to replace"):
        convert(self_forcing, out, entry="critic")
    assert checkpoints.contents(out) == before
    convert(self_forcing, out, entry="critic", overwrite=True)
    assert_stored(out, "transformer", 3)
    assert config_of(out).kind == "bidirectional"
