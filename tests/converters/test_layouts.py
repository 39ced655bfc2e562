"""Recognising checkpoints and renaming their keys."""

import pytest

from converters import layouts
from tests.converters import checkpoints, manifests

LAYOUTS = [
    ("transformer", "wan2_1_t2v_1_3b_dit", "diffusers_wan_transformer_1_3b"),
    ("transformer", "wan2_1_t2v_14b_dit", "diffusers_wan_transformer_14b"),
    ("vae", "wan2_1_vae", "diffusers_autoencoder_kl_wan"),
    ("text_encoder", "wan2_1_umt5_xxl_enc", "transformers_umt5_xxl_encoder"),
]


@pytest.mark.parametrize(("component", "original", "other"), LAYOUTS)
def test_other_layouts_are_renamed(component, original, other):
    rename = checkpoints.OTHER_LAYOUT[component]
    expected = {key: rename(key) for key in manifests.load(original)}
    found, renamed = layouts.to_original(manifests.load(other))
    assert found == component
    assert renamed == expected


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "model._fsdp_wrapped_module.",
        "_orig_mod.model.",
        "_fsdp_wrapped_module.model._orig_mod.",
    ],
)
@pytest.mark.parametrize("inner", ["", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._orig_mod."])
def test_wrappers_are_removed(prefix, inner):
    keys = manifests.load("wan2_1_t2v_1_3b_dit")
    wrapped = {prefix + key.replace("self_attn.", f"{inner}self_attn.{inner}"): key for key in keys}
    component, renamed = layouts.to_original(wrapped)
    assert component == "transformer"
    assert {original: wrapped[key] for original, key in renamed.items()} == {key: key for key in keys}


def test_one_tensor_under_two_names_is_refused():
    keys = [*manifests.load("wan2_1_t2v_1_3b_dit"), "model.blocks.3.norm3.weight"]
    with pytest.raises(
        ValueError, match=r"blocks\.3\.norm3\.weight and model\.blocks\.3\.norm3\.weight name the same"
    ):
        layouts.to_original(keys)


@pytest.mark.parametrize(
    "present", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")]
)
def test_the_tied_embedding_may_be_stored_once_or_twice(present):
    keys = [
        k
        for k in manifests.load("transformers_umt5_xxl_encoder")
        if not k.endswith(("shared.weight", "tokens.weight"))
    ]
    _, renamed = layouts.to_original([*keys, *(f"{name}.weight" for name in present)])
    assert set(renamed) == set(manifests.load("wan2_1_umt5_xxl_enc"))
    assert renamed["token_embedding.weight"] == f"{present[0]}.weight"


@pytest.mark.parametrize(
    ("manifest", "what"), [("taew2_1", "tiny preview autoencoder"), ("wan2_1_i2v_14b_dit", "image-to-video")]
)
def test_relatives_are_named_and_refused(manifest, what):
    with pytest.raises(ValueError, match=f"wrong family: this is an? {what}"):
        layouts.detect(manifests.load(manifest))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["blocks.0.self_attn.q.lora_A.weight"], "LoRA"),
        (["blocks.0.self_attn.q.weight", "vace_blocks.0.norm3.weight"], "VACE"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.x"], "encoder-decoder"),
        (["encoder.downsamples.0.downsamples.0.residual.0.gamma"], "Wan2.2 VAE"),
        (
            ["unet.conv_in.weight", "unet.conv_in.bias"],
            r"the file holds unet\.conv_in\.weight, unet\.conv_in\.bias",
        ),
        ([], "no tensors at all"),
    ],
)
def test_other_families_are_refused(keys, what):
    with pytest.raises(ValueError, match=rf"wrong family: .*{what}.*Supported are Wan2\.1"):
        layouts.detect(keys)


def test_heads_must_be_told_where_they_are_not_128_wide():
    shapes = {
        "patch_embedding.weight": (64, 16, 1, 2, 2),
        "blocks.0.ffn.0.weight": (160, 64),
        "head.head.weight": (64, 64),
        "time_embedding.0.weight": (64, 256),
        "text_embedding.0.weight": (64, 32),
    }
    with pytest.raises(ValueError, match="--num-heads"):
        layouts.infer_config("transformer", shapes)
    assert layouts.infer_config("transformer", shapes, num_heads=4).head_dim == 16


def test_an_image_conditioned_transformer_is_refused():
    shapes = manifests.load("wan2_1_t2v_14b_dit") | {"patch_embedding.weight": (5120, 36, 1, 2, 2)}
    with pytest.raises(ValueError, match="36 input and 16 output channels is image-conditioned"):
        layouts.infer_config("transformer", shapes)


def test_sizes_need_their_tensors():
    shapes = manifests.load("wan2_1_t2v_1_3b_dit")
    with pytest.raises(ValueError, match=r"lacks 'patch_embedding\.weight'"):
        layouts.infer_config("transformer", {k: v for k, v in shapes.items() if not k.startswith("patch")})
    with pytest.raises(ValueError, match="wrong rank"):
        layouts.infer_config("transformer", shapes | {"patch_embedding.weight": (1536, 64)})


def test_a_vae_with_other_latents_is_refused():
    shapes = manifests.load("wan2_1_vae") | {"conv2.weight": (48, 48, 1, 1, 1)}
    with pytest.raises(ValueError, match="48 latent channels"):
        layouts.infer_config("vae", shapes)
