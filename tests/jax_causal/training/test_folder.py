"""Model folders at both ends of a training run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import checkpoint, modules
from jax_causal.config import preset
from jax_causal.text import UMT5Encoder
from jax_causal.training.folder import Components, export, model_config
from tests.toy_stage import ToyStage, config


def test_sizes_of_the_model(tmp_path):
    tiny = preset("tiny")
    assert model_config(config(model="tiny")) == tiny
    with pytest.raises(ValueError, match=r"config\.model is not given"):
        model_config(config())
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        model_config(config(init_from=str(tmp_path)))
    params = {"a": jnp.ones(2)}
    export(tmp_path / "m", tiny, {"vae": params}, None)
    assert model_config(config(init_from=str(tmp_path / "m"))) == tiny
    assert model_config(config(model=str(tmp_path / "m"))) == tiny
    # Sizes of what is not trained yet may differ, those of a component that is there may not.
    other = json.loads(tiny.to_json())
    other["transformer"]["num_layers"] = 2
    assert model_config(config(model=other, init_from=str(tmp_path / "m"))).transformer.num_layers == 2
    other["vae"]["dim"] = 8
    with pytest.raises(ValueError, match=r"the vae of .* is not that of config\.model: dim was 16, is 8"):
        model_config(config(model=other, init_from=str(tmp_path / "m")))


def test_components_are_read_when_asked_for(tmp_path):
    tiny, parallel = preset("tiny"), ToyStage(config()).parallel
    params = modules.init(UMT5Encoder, tiny.text_encoder, jax.random.key(0), dtype=jnp.bfloat16)
    checkpoint.save(tmp_path / "text_encoder", params)
    (tmp_path / "vae").mkdir()  # damaged, which is nobody's concern here
    found = Components(tmp_path, tiny, parallel)
    assert set(found) == {"vae", "text_encoder"}
    assert "transformer" not in found
    assert found.get("transformer") is None
    restored = found["text_encoder"]
    jax.tree.map(
        np.testing.assert_array_equal, restored, jax.tree.map(lambda x: x.astype(jnp.float32), params)
    )
    assert len(Components(None, tiny, parallel)) == 0
