"""Recognising checkpoints: which component a set of keys is, in which layout, and of which sizes.

`converters.names` speaks the layout of the original Wan2.1 releases. Here the others are renamed to it:
diffusers (`WanTransformer3DModel`, `AutoencoderKLWan`), transformers (`UMT5EncoderModel`), and the
wrappers that training runs leave inside keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jax_causal.config import TextConfig, TransformerConfig, VAEConfig

SUPPORTED = "Wan2.1 text-to-video transformers (Self-Forcing included), the Wan2.1 VAE, and UMT5 encoders"

# (component, layout, what a key of it contains)
_SIGNATURES = (
    ("transformer", "original", r"^blocks\.\d+\.self_attn\."),
    ("transformer", "diffusers", r"^blocks\.\d+\.attn1\."),
    ("vae", "original", r"^encoder\.downsamples\.\d+\.residual\."),
    ("vae", "diffusers", r"^encoder\.down_blocks\.\d+\.conv1\."),
    ("text_encoder", "original", r"^blocks\.\d+\.pos_embedding\."),
    ("text_encoder", "transformers", r"^encoder\.block\.\d+\.layer\.0\.SelfAttention\."),
)

# Relatives that share most of their keys with a supported family, so they are asked about first.
_UNSUPPORTED = (
    (r"\.lora_|^lora_", "a LoRA adapter, not a whole model"),
    (r"^img_emb\.|\.k_img\.|image_embedder\.|\.add_k_proj\.", "an image-to-video Wan transformer"),
    (r"^vace_", "a VACE transformer"),
    (r"^(en|de)coder\.\d+\.conv\.", "a tiny preview autoencoder (TAEHV)"),
    (r"\.(down|up)samples\.\d+\.(down|up)samples\.|\.down_blocks\.\d+\.resnets\.", "a Wan2.2 VAE"),
    (r"^decoder\.block\.", "a T5 encoder-decoder; convert its encoder alone"),
)

# Applied in order; a later rule sees the result of the earlier ones.
_RENAMES: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("transformer", "diffusers"): (
        (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
        (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"_attn\.to_out\.0\.", "_attn.o."),
        (r"_attn\.to_([qkv])\.", r"_attn.\1."),
        (r"\.norm2\.", ".norm3."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    ),
    ("vae", "diffusers"): (
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.gamma$", ".head.0.gamma"),
        (r"\.conv_out\.", ".head.2."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"^encoder\.down_blocks\.", "encoder.downsamples."),
        # Each decoder stage is three residual blocks and an upsampler, numbered through in the original.
        (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".upsamples.{4 * int(m[1]) + 3}."),
        (r"(\.\d+)\.norm1\.gamma$", r"\1.residual.0.gamma"),
        (r"(\.\d+)\.conv1\.", r"\1.residual.2."),
        (r"(\.\d+)\.norm2\.gamma$", r"\1.residual.3.gamma"),
        (r"(\.\d+)\.conv2\.", r"\1.residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
    ),
    ("text_encoder", "transformers"): (
        (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),  # tied: the same tensor twice
        (r"^encoder\.final_layer_norm\.", "norm."),
        (r"^encoder\.block\.", "blocks."),
        (r"\.layer\.0\.layer_norm\.", ".norm1."),
        (r"\.layer\.1\.layer_norm\.", ".norm2."),
        (r"\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
        (r"\.layer\.0\.SelfAttention\.", ".attn."),
        (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
        (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
        (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
        (r"\.layer\.0\.pos_embedding\.", ".pos_embedding."),
    ),
}


def unwrap(key: str) -> str:
    """`key` without what FSDP, activation checkpointing, `torch.compile` and the model wrapper add."""
    for fragment in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        key = key.replace(fragment, "")
    return key.removeprefix("model.")


def detect(keys: Iterable[str]) -> tuple[str, str]:
    """The (component, layout) that the unwrapped `keys` belong to.

    Raises:
      ValueError: an unsupported relative, named where it is known, or something else altogether.
    """
    keys = list(keys)
    for pattern, what in _UNSUPPORTED:
        if any(re.search(pattern, key) for key in keys):
            raise ValueError(f"wrong family: this is {what}. Supported are {SUPPORTED}.")
    for component, layout, pattern in _SIGNATURES:
        if any(re.search(pattern, key) for key in keys):
            return component, layout
    shown = ", ".join(keys[:3]) or "no tensors at all"
    raise ValueError(f"wrong family: the file holds {shown}. Supported are {SUPPORTED}.")


def to_original(keys: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Recognises `keys` and renames them.

    Returns:
      The component and a dict from original-layout key to the key in the file.

    Raises:
      ValueError: `detect` fails, or two keys of the file name the same tensor.
    """
    unwrapped = {key: unwrap(key) for key in keys}
    component, layout = detect(unwrapped.values())
    renamed: dict[str, str] = {}
    for key, name in unwrapped.items():
        tied = (component, name) == ("text_encoder", "encoder.embed_tokens.weight")
        if tied and "shared.weight" in unwrapped.values():
            continue
        for pattern, replacement in _RENAMES.get((component, layout), ()):
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"{renamed[name]} and {key} name the same tensor ({name}): keep one of them")
        renamed[name] = key
    return component, renamed


Config = TransformerConfig | VAEConfig | TextConfig
_CONFIGS = {"transformer": TransformerConfig, "vae": VAEConfig, "text_encoder": TextConfig}


def infer_config(component: str, shapes: Mapping[str, tuple[int, ...]], **fields) -> Config:
    """The sizes of `component`, read off its tensors.

    Args:
      component: "transformer", "vae" or "text_encoder".
      shapes: original-layout key -> torch shape.
      **fields: config fields that no tensor shows, e.g. `num_heads` of a transformer (by default
        128 channels to a head, as in every Wan2.1 release).

    Raises:
      ValueError: tensors that the sizes come from are missing or of the wrong rank, or the sizes are
        of a model that is not supported.
    """
    infer = {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder}[component]
    try:
        sizes = infer(shapes)
    except KeyError as error:
        raise ValueError(f"the {component} checkpoint lacks {error}") from None
    except (ValueError, IndexError):
        raise ValueError(f"the {component} checkpoint has tensors of the wrong rank") from None
    if component == "transformer":
        if sizes["in_channels"] != sizes["out_channels"]:
            raise ValueError(
                f"wrong family: a transformer with {sizes['in_channels']} input and {sizes['out_channels']} "
                f"output channels is image-conditioned. Supported are {SUPPORTED}."
            )
        fields["num_heads"] = fields.get("num_heads") or _num_heads(sizes["dim"])
    if component == "vae" and sizes["z_dim"] != len(fields.get("latents_mean", VAEConfig.latents_mean)):
        raise ValueError(
            f"wrong family: a VAE with {sizes['z_dim']} latent channels, whose statistics are not known. "
            f"Supported are {SUPPORTED}."
        )
    return _CONFIGS[component](**sizes, **fields)


def _num_heads(dim):
    if dim % 128:
        raise ValueError(
            f"dim {dim} is not a multiple of 128: say how many heads there are with --num-heads N"
        )
    return dim // 128


def _count(shapes, prefix):
    """How many list elements there are under `prefix`."""
    return 1 + max((int(m[1]) for k in shapes if (m := re.match(rf"{prefix}\.(\d+)\.", k))), default=-1)


def _transformer(shapes):
    dim, in_channels, _, patch_size, _ = shapes["patch_embedding.weight"]
    return {
        "dim": dim,
        "num_layers": _count(shapes, "blocks"),
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // patch_size**2,
        "patch_size": patch_size,
        "frequency_dim": shapes["time_embedding.0.weight"][1],
        "text_dim": shapes["text_embedding.0.weight"][1],
    }


def _vae(shapes):
    """Walks the encoder: runs of residual blocks, each run but the last closed by a downsampling."""
    dim = shapes["encoder.conv1.weight"][0]
    stages, temporal = [[]], []
    for i in range(_count(shapes, r"encoder\.downsamples")):
        at = f"encoder.downsamples.{i}"
        if f"{at}.resample.1.weight" in shapes:
            temporal.append(f"{at}.time_conv.weight" in shapes)
            stages.append([])
        else:
            stages[-1].append(shapes[f"{at}.residual.6.weight"][0])
    return {
        "dim": dim,
        "multipliers": tuple(widths[-1] // dim for widths in stages),
        "num_res_blocks": len(stages[0]),
        "z_dim": shapes["conv2.weight"][0],
        "temporal_downsample": tuple(temporal),
    }


def _text_encoder(shapes):
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "vocab_size": shapes["token_embedding.weight"][0],
        "dim": shapes["token_embedding.weight"][1],
        "attention_dim": shapes["blocks.0.attn.q.weight"][0],
        "ffn_dim": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_heads": num_heads,
        "num_layers": _count(shapes, "blocks"),
        "num_buckets": num_buckets,
    }
