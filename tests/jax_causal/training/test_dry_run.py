"""What a dry run says of memory: exact where there is another way to count, and enough for the 1.3B model."""

import json
import math

import jax
import pytest

from jax_causal import cli, environment
from jax_causal.config import preset
from jax_causal.training import config as configs
from jax_causal.training import dry_run
from sharding import SequenceParallel
from tests import micro_world
from tests.micro_world import CONFIGS

pytestmark = pytest.mark.sp


def memory(config, parallel):
    model = micro_world.model()
    return dry_run.memory(config, model, parallel.for_model(model))


@pytest.mark.slow
def test_state_and_data_are_counted():
    """Generator with two moments and average, critic with two moments, the steps of both; the teacher is data."""
    size = sum(leaf.size for leaf in jax.tree.leaves(micro_world.components()["transformer"]))
    whole = memory(micro_world.config("distill"), SequenceParallel(8, data=8))
    assert whole["state"] == 4 * 7 * size + 2 * 4 + 1
    frozen = size + sum(leaf.size for leaf in jax.tree.leaves(micro_world.components()["text_encoder"])) / 8
    assert whole["data"] == pytest.approx(4 * frozen, rel=0.02)
    assert whole["total"] == whole["state"] + whole["data"] + whole["temporary"]


def test_in_shards_the_state_is_an_eighth():
    size = sum(leaf.size for leaf in jax.tree.leaves(micro_world.components()["transformer"]))
    sharded = memory(micro_world.config("causal"), SequenceParallel(8, data=8, shard_params=True))
    assert sharded["state"] == pytest.approx(4 * 4 * size / 8, rel=0.02)


@pytest.mark.slow
def test_blocks_computed_again_take_less():
    single = SequenceParallel(1)
    plain, remat = (memory(micro_world.config("teacher", remat=on), single) for on in (False, True))
    assert remat["state"] == plain["state"]
    assert remat["temporary"] < 0.75 * plain["temporary"]


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "apply", lambda *args, **kwargs: None)
    assert cli.main(["train", "--config", str(CONFIGS / "vae.json"), "--dry-run", "--json", "-"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    parts = [record[f"{name}_bytes"] for name in ("state", "data", "temporary")]
    assert record["total_bytes"] == sum(parts)
    assert parts[1] == 0
    assert "on each device (an H100 has 80 GB, an H200 141 GB)" in shown.err
    assert not list(tmp_path.iterdir())
    assert cli.main(["train", "--config", str(CONFIGS / "vae.json")]) == 2
    assert "--out FOLDER, or --dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_distillation_at_1_3b_fits():
    """Compiled for eight devices. Measured 61.1 GB on each, 19 GB of them what only CPUs keep."""
    config = configs.load("wan-1.3b-distill")
    model = preset("wan-1.3b")
    parallel = SequenceParallel(8, data=config.mesh.data, shard_params=config.shard_params).for_model(model)
    sizes = dry_run.memory(config, model, parallel)
    weights = 1_418_996_800
    assert sizes["state"] == pytest.approx(7 * 4 * weights / 8, rel=0.01)
    assert sizes["data"] < 2 * (weights + 5_680_910_336) / 8 * 1.1
    assert sizes["total"] < 80e9
    assert math.isclose(sizes["total"], sum(sizes[name] for name in ("state", "data", "temporary")))
