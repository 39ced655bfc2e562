"""Training configurations: files, overrides, and what they refuse."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jax_causal.config import preset
from jax_causal.training import config as configs
from jax_causal.training.config import TrainConfig

ROOT = Path(__file__).parents[3]
SMALL = {"stage": "vae", "num_steps": 10, "batch_size": 4, "learning_rate": 1e-3}


@dataclasses.dataclass(frozen=True)
class Options:
    guidance: float = 3.0
    name: str = "a"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def test_round_trip_and_hash():
    config = TrainConfig.from_dict(
        SMALL | {"options": {"b": [1, {"c": 2}], "a": 1}, "model": json.loads(preset("tiny").to_json())}
    )
    again = TrainConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert json.loads(config.to_json())["options"] == {"b": [1, {"c": 2}], "a": 1}
    assert config.model == preset("tiny")


def test_the_order_of_options_does_not_matter():
    a, b = (TrainConfig.from_dict(SMALL | {"options": o}) for o in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert a == b


def test_options_are_the_stage_s():
    config = TrainConfig.from_dict(SMALL | {"options": {"guidance": 2}})
    assert config.stage_options(Options) == Options(guidance=2.0)
    config = TrainConfig.from_dict(SMALL | {"options": {"guidence": 2}})
    with pytest.raises(ValueError, match=r"config\.options has unknown keys \['guidence'\].*'guidance'"):
        config.stage_options(Options)


def test_overrides(file):
    config = configs.load(
        file,
        ["learning_rate=2e-4", "mesh.data=2", "init_from=runs/vae", "betas=[0.5,0.9]", "options.x.y=[1]"],
    )
    assert config.learning_rate == 2e-4
    assert (config.mesh.data, config.mesh.seq, config.mesh.size) == (2, 1, 2)
    assert config.init_from == "runs/vae"
    assert config.betas == (0.5, 0.9)
    assert json.loads(config.options) == {"x": {"y": [1]}}


def test_overrides_reach_into_the_sizes_of_a_named_model(file):
    config = configs.load(file, ["model=tiny", "model.transformer.num_layers=2", "model.name=two"])
    tiny = preset("tiny")
    transformer = dataclasses.replace(tiny.transformer, num_layers=2)
    assert config.model == dataclasses.replace(tiny, name="two", transformer=transformer)


BAD = {
    "unknown": (["learning_rat=1"], r"unknown keys \['learning_rat'\] \(did you mean 'learning_rate'\?\)"),
    "unknown below": (["mesh.dat=1"], r"config\.mesh has unknown keys \['dat'\] \(did you mean 'data'\?\)"),
    "into a number": (["seed.a=1"], r"cannot set seed\.a: seed is 3"),
    "no value": (["seed"], "'seed' is not key=value"),
    "type": (["num_steps=1.5"], r"config\.num_steps must be int"),
    "choice": (["schedule=linear"], r"must be one of \['constant', 'cosine'\]"),
    "options": (["options=3"], r"config\.options must be a JSON object"),
    "zero": (["batch_size=0"], "batch_size must be 1 or more"),
    "mesh": (["mesh.seq=0"], r"mesh\.seq must be 1 or more"),
    "microbatches": (["accumulate=3"], "batch_size=4 must be a multiple of accumulate x mesh.data = 3 x 1"),
    "rate": (["learning_rate=NaN"], "learning_rate must be positive"),
    "ema": (["ema=1.0"], "ema must be at least 0 and less than 1"),
    "betas": (["betas=[0.9]"], "betas must be two numbers"),
    "warm-up": (["warmup_steps=11"], "warmup_steps=11 exceeds num_steps=10"),
    "seed": (["seed=4294967296"], r"less than 2\*\*32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(tmp_path, case):
    overrides, message = BAD[case]
    (tmp_path / "c.json").write_text(json.dumps(SMALL | {"seed": 3}))
    with pytest.raises(ValueError, match=message):
        configs.load(tmp_path / "c.json", overrides)


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    (tmp_path / "tiny-vae.json").write_text(json.dumps(SMALL))
    assert configs.load("tiny-vae").num_steps == 10
    with pytest.raises(FileNotFoundError, match=r"no configuration tiny-vea \(did you mean tiny-vae\?\)"):
        configs.load("tiny-vea")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not valid JSON"):
        configs.load("bad")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        configs.load("list")


def test_changes():
    old = TrainConfig.from_dict(SMALL | {"options": {"a": 1, "b": 2}}).to_dict()
    new = TrainConfig.from_dict(
        SMALL | {"seed": 1, "log_every": 3, "options": {"a": 2, "c": {"d": 1}}}
    ).to_dict()
    assert configs.changes(old, old) == []
    assert configs.changes(old, new, ignore=configs.FREE) == [
        "seed was 0, is 1",
        "options.a was 1, is 2",
        "options.b was 2, is null",
        "options.c.d was null, is 1",
    ]


def test_bundled_configurations_are_valid():
    for path in configs.CONFIGS.glob("*.json"):
        assert configs.load(path.stem).stage in path.stem


def test_reading_a_configuration_does_not_start_jax(file):
    code = (
        "import sys; from jax_causal import train_command; from jax_causal.training.config import load; "
        "load(sys.argv[1], ['model=tiny']); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, check=True)
