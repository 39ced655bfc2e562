"""The mapping tables: complete in both directions, and every tensor where it belongs."""

import math

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from converters import layouts, names
from jax_causal import modules
from jax_causal.components import COMPONENTS
from jax_causal.config import preset
from jax_causal.transformer import CausalDiT
from tests.converters import checkpoints, manifests

# manifest, component, preset, what num_elements counts twice
FORMATS = [
    ("wan2_1_t2v_1_3b_dit", "transformer", "wan-1.3b", 0),
    ("wan2_1_t2v_14b_dit", "transformer", "wan-14b", 0),
    ("self_forcing_dmd", "transformer", "wan-1.3b", 0),
    ("diffusers_wan_transformer_1_3b", "transformer", "wan-1.3b", 0),
    ("diffusers_wan_transformer_14b", "transformer", "wan-14b", 0),
    ("wan2_1_vae", "vae", "wan-1.3b", 0),
    ("diffusers_autoencoder_kl_wan", "vae", "wan-1.3b", 0),
    ("wan2_1_umt5_xxl_enc", "text_encoder", "wan-1.3b", 0),
    ("transformers_umt5_xxl_encoder", "text_encoder", "wan-1.3b", 256384 * 4096),
]
SIZES = {
    ("transformer", "wan-1.3b"): (825, 1_418_996_800),
    ("transformer", "wan-14b"): (1095, 14_288_491_584),
    ("vae", "wan-1.3b"): (194, 126_892_531),
    ("text_encoder", "wan-1.3b"): (242, 5_680_910_336),
}


@pytest.mark.parametrize(("manifest", "component", "size", "tied"), FORMATS)
def test_presets_match_the_manifests_exactly(manifest, component, size, tied):
    shapes = manifests.load(manifest)
    num_tensors, num_elements = manifests.totals(manifest)
    assert (len(shapes), sum(math.prod(s) for s in shapes.values())) == (num_tensors, num_elements)

    found, keys = layouts.to_original(shapes)
    assert found == component
    config = getattr(preset(size), component)
    abstract = modules.abstract(COMPONENTS[component], config)
    plan = names.leaves(component, abstract)
    names.check(component, plan, {key: shapes[theirs] for key, theirs in keys.items()})

    assert (sum(len(leaf.sources) for leaf in plan), num_elements - tied) == SIZES[component, size]
    assert modules.num_parameters(abstract) == num_elements - tied


@pytest.mark.parametrize("component", COMPONENTS)
def test_presets_are_recovered_from_shapes(component):
    manifest = {
        "transformer": "wan2_1_t2v_14b_dit",
        "vae": "wan2_1_vae",
        "text_encoder": "wan2_1_umt5_xxl_enc",
    }[component]
    config = layouts.infer_config(component, manifests.load(manifest))
    assert config == getattr(preset("wan-14b"), component)


def params_of(component):
    weights = checkpoints.original(component)
    fields = {"num_heads": checkpoints.num_heads()} if component == "transformer" else {}
    config = layouts.infer_config(component, {k: v.shape for k, v in weights.items()}, **fields)
    abstract = modules.abstract(COMPONENTS[component], config)
    return weights, names.to_params(component, weights, abstract), abstract


@pytest.mark.golden
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_value_arrives_exactly_once(component):
    weights, params, abstract = params_of(component)
    params = flatten_dict(params)
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
        k: (v.shape, v.dtype) for k, v in flatten_dict(abstract).items()
    }
    arrived = np.sort(np.concatenate([v.ravel() for v in params.values()]))
    np.testing.assert_array_equal(arrived, np.sort(np.concatenate([v.ravel() for v in weights.values()])))


def linear(w):
    return w.T


def conv(w):
    return np.moveaxis(w, (0, 1), (-1, -2))


def pointwise(w):
    return w[(..., *[0] * (w.ndim - 2))].T


def patches(w):
    return np.stack([w[:, :, 0, dy, dx].T for dy in range(2) for dx in range(2)]).reshape(-1, len(w))


# Original key, where its values are, in which arrangement; {last} is the last layer.
PLACES = {
    "transformer": [
        ("patch_embedding.weight", "patch_embedding.kernel", patches),
        ("text_embedding.2.weight", "text_embedding.fc2.kernel", linear),
        ("time_embedding.0.bias", "time_embedding.fc1.bias", np.ravel),
        ("time_projection.1.weight", "time_projection.kernel", linear),
        ("head.modulation", "head.modulation", np.squeeze),
        ("head.head.weight", "head.linear.kernel", linear),
        ("blocks.{last}.modulation", "blocks.modulation.{last}", np.squeeze),
        *(
            (f"blocks.{{last}}.self_attn.{x}.weight", f"blocks.self_attn.{x}.kernel.{{last}}", linear)
            for x in "qkvo"
        ),
        *((f"blocks.0.cross_attn.{x}.bias", f"blocks.cross_attn.{x}.bias.0", np.ravel) for x in "qkvo"),
        ("blocks.{last}.self_attn.norm_q.weight", "blocks.self_attn.norm_q.scale.{last}", np.ravel),
        ("blocks.{last}.cross_attn.norm_k.weight", "blocks.cross_attn.norm_k.scale.{last}", np.ravel),
        ("blocks.0.norm3.weight", "blocks.norm3.scale.0", np.ravel),
        ("blocks.0.norm3.bias", "blocks.norm3.bias.0", np.ravel),
        ("blocks.{last}.ffn.0.weight", "blocks.ffn.fc1.kernel.{last}", linear),
        ("blocks.{last}.ffn.2.weight", "blocks.ffn.fc2.kernel.{last}", linear),
    ],
    "vae": [
        ("conv1.weight", "quant_conv.kernel", pointwise),
        ("conv2.weight", "post_quant_conv.kernel", pointwise),
        ("encoder.conv1.weight", "encoder.conv_in.kernel", conv),
        ("encoder.head.0.gamma", "encoder.norm_out.scale", np.ravel),
        ("decoder.head.2.weight", "decoder.conv_out.kernel", conv),
        ("encoder.downsamples.3.residual.0.gamma", "encoder.downsamples.3.norm1.scale", np.ravel),
        ("encoder.downsamples.3.residual.2.weight", "encoder.downsamples.3.conv1.kernel", conv),
        ("encoder.downsamples.3.residual.3.gamma", "encoder.downsamples.3.norm2.scale", np.ravel),
        ("encoder.downsamples.3.residual.6.weight", "encoder.downsamples.3.conv2.kernel", conv),
        ("encoder.downsamples.3.shortcut.weight", "encoder.downsamples.3.shortcut.kernel", pointwise),
        ("encoder.downsamples.5.resample.1.weight", "encoder.downsamples.5.conv.kernel", conv),
        ("decoder.upsamples.7.time_conv.weight", "decoder.upsamples.7.time_conv.kernel", conv),
        ("decoder.middle.1.norm.gamma", "decoder.middle.1.norm.scale", np.ravel),
        ("decoder.middle.1.to_qkv.weight", "decoder.middle.1.to_qkv.kernel", pointwise),
        ("decoder.middle.1.proj.weight", "decoder.middle.1.proj.kernel", pointwise),
        ("decoder.middle.2.residual.6.bias", "decoder.middle.2.conv2.bias", np.ravel),
    ],
    "text_encoder": [
        ("token_embedding.weight", "token_embedding.embedding", np.asarray),
        ("norm.weight", "norm.scale", np.asarray),
        ("blocks.{last}.norm1.weight", "blocks.norm1.scale.{last}", np.asarray),
        ("blocks.{last}.norm2.weight", "blocks.norm2.scale.{last}", np.asarray),
        *((f"blocks.{{last}}.attn.{x}.weight", f"blocks.attn.{x}.kernel.{{last}}", linear) for x in "qkvo"),
        ("blocks.{last}.pos_embedding.embedding.weight", "blocks.pos_embedding.embedding.{last}", np.asarray),
        ("blocks.0.ffn.gate.0.weight", "blocks.ffn.gate.kernel.0", linear),
        ("blocks.0.ffn.fc1.weight", "blocks.ffn.fc1.kernel.0", linear),
        ("blocks.0.ffn.fc2.weight", "blocks.ffn.fc2.kernel.0", linear),
    ],
}


@pytest.mark.golden
@pytest.mark.parametrize("component", COMPONENTS)
def test_tensors_are_where_they_belong(component):
    weights, params, _ = params_of(component)
    last = max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=0)
    for key, place, arranged in PLACES[component]:
        key, value = key.format(last=last), params
        for part in place.format(last=last).split("."):
            value = value[int(part)] if part.isdigit() else value[part]
        np.testing.assert_array_equal(value, arranged(weights[key]), err_msg=key)


def test_misfits_are_listed_together():
    shapes = manifests.load("wan2_1_t2v_1_3b_dit")
    plan = names.leaves("transformer", modules.abstract(CausalDiT, preset("wan-1.3b").transformer))
    del shapes["head.head.bias"], shapes["blocks.7.norm3.bias"]
    shapes["blocks.30.norm3.bias"] = (1536,)
    shapes["text_embedding.0.weight"] = (1536, 768)
    with pytest.raises(ValueError) as error:
        names.check("transformer", plan, shapes)
    message = str(error.value)
    assert "2 missing: " in message
    assert "head.head.bias" in message
    assert "blocks.7.norm3.bias" in message
    assert "1 unexpected: blocks.30.norm3.bias" in message
    assert "1 of wrong shape: text_embedding.0.weight is (1536, 768), expected (1536, 4096)" in message


def test_a_parameter_without_a_tensor_is_an_error():
    with pytest.raises(ValueError, match=r"new_layer\.kernel"):
        names.leaves("transformer", {"new_layer": {"kernel": np.zeros(3)}})
