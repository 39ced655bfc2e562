"""A trained model folder as the package ships it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import Pipeline, checkpoint
from jax_causal.training import bundle
from tests.models import SMALL


def _save(folder, config=SMALL):
    params = Pipeline.random(SMALL, dtype="float32").params
    for name, tree in params.items():
        checkpoint.save(folder / name, tree)
    (folder / "config.json").write_text(config.to_json())
    return params


def test_the_same_model_in_bfloat16(tmp_path):
    params = _save(tmp_path / "trained")
    count, size = bundle.bundle(tmp_path / "trained", tmp_path / "shipped")
    assert count == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 2 * count < size < 2 * count + 1_000_000
    pipe = Pipeline.from_pretrained(tmp_path / "shipped", dtype="float32")
    assert pipe.config == dataclasses.replace(SMALL, name="shipped")
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, dict(pipe.params), rounded)
    with pytest.raises(FileExistsError, match="already exists"):
        bundle.bundle(tmp_path / "trained", tmp_path / "shipped")


def test_what_cannot_be_shipped(tmp_path, monkeypatch):
    _save(tmp_path / "teacher", dataclasses.replace(SMALL, kind="bidirectional"))
    with pytest.raises(ValueError, match="it was not distilled"):
        bundle.bundle(tmp_path / "teacher", tmp_path / "shipped")
    _save(tmp_path / "large")
    monkeypatch.setattr(bundle, "MOST_PARAMETERS", 1000)
    with pytest.raises(ValueError, match=r"too many to be shipped: 1,000"):
        bundle.bundle(tmp_path / "large", tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
