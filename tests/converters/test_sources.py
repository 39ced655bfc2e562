"""Finding and opening weights: files, folders, safetensors, and the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters import sources
from tests import torch_writer
from tests.converters import checkpoints, hub

ROOT = Path(__file__).parents[2]
TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array(2.5, np.float16),
}


def same(read, expected):
    assert set(read) == set(expected)
    for key, value in expected.items():
        assert read[key].dtype == value.dtype
        np.testing.assert_array_equal(read[key], value)


def found(folder):
    source = sources.locate(folder)
    return [str(w.path.relative_to(folder)) for w in source.weights], [p.name for p in source.tokenizer]


def test_safetensors_are_mapped(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = sources.open_safetensors(tmp_path / "a.safetensors")
    same(read, TENSORS)
    with pytest.raises(ValueError, match="read-only"):
        read["a"][0] = 1


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            sources.open_safetensors(path)


def test_shards(tmp_path):
    checkpoints.write_sharded(tmp_path, "model", TENSORS)
    (weights,) = sources.locate(tmp_path).weights
    assert weights.path.name == "model.safetensors.index.json"
    same(weights.open(), TENSORS)


def test_a_missing_shard_is_named(tmp_path):
    checkpoints.write_sharded(tmp_path, "model", TENSORS)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (weights,) = sources.locate(tmp_path).weights
    with pytest.raises(
        FileNotFoundError, match=r"points at model-00002-of-00002\.safetensors, which is missing"
    ):
        weights.open()


def test_a_shard_without_its_tensor_is_named(tmp_path):
    checkpoints.write_sharded(tmp_path, "model", TENSORS)
    save_file({"x": TENSORS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    (weights,) = sources.locate(tmp_path).weights
    with pytest.raises(
        ValueError, match=r"expects . in model-00001-of-00002\.safetensors, which does not hold"
    ):
        weights.open()


def test_shards_without_an_index(tmp_path):
    checkpoints.write_sharded(tmp_path, "model", TENSORS)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json is missing"):
        sources.locate(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metadata": {}}'])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="not a safetensors index"):
        sources.locate(tmp_path)


def test_a_diffusers_folder(tmp_path):
    checkpoints.write_diffusers(tmp_path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    weights, tokenizer = found(tmp_path)
    assert weights == [
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]
    assert tokenizer == ["tokenizer.json"]


def test_an_original_wan_folder(tmp_path):
    checkpoints.write_wan(tmp_path)
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / "google" / "umt5-xxl" / name).write_text("")
    weights, tokenizer = found(tmp_path)
    assert weights == [
        "Wan2.1_VAE.pth",
        "diffusion_pytorch_model.safetensors",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ]
    assert tokenizer == ["spiece.model", "tokenizer.json"]


def test_single_files(tmp_path):
    for name in ("a.pt", "spiece.model"):
        (tmp_path / name).touch()
    assert sources.locate(tmp_path / "a.pt").weights == (sources.Weights(tmp_path / "a.pt"),)
    assert sources.locate(tmp_path / "spiece.model").tokenizer == (tmp_path / "spiece.model",)


def test_fields_that_only_a_config_tells(tmp_path):
    weights = sources.Weights(tmp_path / "a.safetensors")
    assert weights.config_fields("transformer") == {}
    config = {
        "num_attention_heads": 40,
        "eps": 1e-6,
        "latents_mean": [0.5, 1.0],
        "relative_attention_max_distance": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weights.config_fields("transformer") == {"num_heads": 40, "eps": 1e-6}
    assert weights.config_fields("vae") == {"latents_mean": (0.5, 1.0)}
    assert weights.config_fields("text_encoder") == {"max_distance": 64}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        weights.config_fields("vae")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources.locate(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="holds no weights and no tokenizer"):
        sources.locate(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.pt").touch()
    with pytest.raises(ValueError, match=r"name one of checkpoints/model\.pt"):
        sources.locate(tmp_path)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A folder of hub repositories, laid out as the public ones are."""
    folder = tmp_path_factory.mktemp("hub")
    self_forcing = folder / "someone" / "Self-Forcing" / "checkpoints"
    self_forcing.mkdir(parents=True)
    torch_writer.save(self_forcing / "self_forcing_dmd.pt", TENSORS)
    torch_writer.save(self_forcing / "ode_init.pt", TENSORS)
    wan = folder / "someone" / "Wan"
    checkpoints.write_wan(wan)
    checkpoints.write_diffusers(folder / "someone" / "Wan-Diffusers")
    for name in ("Wan/google/umt5-xxl/spiece.model", "Wan-Diffusers/tokenizer/spiece.model"):
        (folder / "someone" / name).parent.mkdir(parents=True)
        (folder / "someone" / name).write_text("spiece")
    for name in ("Wan/assets/logo.png", "Wan/README.md", "Wan-Diffusers/scheduler/scheduler_config.json"):
        (folder / "someone" / name).parent.mkdir(exist_ok=True)
        (folder / "someone" / name).write_text("not needed")
    return folder


@pytest.fixture
def download(repositories, tmp_path):
    """Runs `locate` in a process of its own (the endpoint is read at import) against a loopback server."""

    def run(source):
        code = (
            f"from converters.sources import locate; found = locate({source!r}); "
            "print(*(weights.path for weights in found.weights), *found.tokenizer)"
        )
        with hub.serve(repositories) as (endpoint, fetched):
            environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")}
            environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
            result = subprocess.run(
                [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
            )
        prefix = "someone/"
        return result, sorted(name.removeprefix(prefix) for name in fetched)

    return run


def test_hub_repositories_give_what_is_needed_and_no_more(download):
    result, fetched = download("someone/Wan")
    assert result.returncode == 0, result.stderr
    assert fetched == [
        "Wan/Wan2.1_VAE.pth",
        "Wan/config.json",
        "Wan/diffusion_pytorch_model.safetensors",
        "Wan/google/umt5-xxl/spiece.model",
        "Wan/models_t5_umt5-xxl-enc-bf16.pth",
    ]
    assert result.stdout.count("snapshots") == 4


def test_hub_diffusers_pipelines(download):
    result, fetched = download("someone/Wan-Diffusers")
    assert result.returncode == 0, result.stderr
    assert fetched == [
        "Wan-Diffusers/text_encoder/model.safetensors",
        "Wan-Diffusers/tokenizer/spiece.model",
        "Wan-Diffusers/transformer/config.json",
        "Wan-Diffusers/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "Wan-Diffusers/transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "Wan-Diffusers/transformer/diffusion_pytorch_model.safetensors.index.json",
        "Wan-Diffusers/vae/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "someone/Self-Forcing/checkpoints/self_forcing_dmd.pt",
            ["Self-Forcing/checkpoints/self_forcing_dmd.pt"],
        ),
        ("someone/Self-Forcing:checkpoints/ode_init.pt", ["Self-Forcing/checkpoints/ode_init.pt"]),
        ("someone/Wan/google/umt5-xxl", ["Wan/google/umt5-xxl/spiece.model"]),
        (
            "someone/Wan-Diffusers/transformer/diffusion_pytorch_model.safetensors.index.json",
            [
                "Wan-Diffusers/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
                "Wan-Diffusers/transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
                "Wan-Diffusers/transformer/diffusion_pytorch_model.safetensors.index.json",
            ],
        ),
    ],
)
def test_one_file_or_folder_of_a_hub_repository(download, source, expected):
    result, fetched = download(source)
    assert result.returncode == 0, result.stderr
    assert fetched == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/Self-Forcing", "name one of: someone/Self-Forcing/checkpoints/ode_init.pt"),
        ("someone/Nothing", "is not a path here, and the hub does not have it"),
    ],
)
def test_hub_errors_name_what_there_is(download, source, message):
    result, fetched = download(source)
    assert message in result.stderr
    assert fetched == []
