"""Small checkpoints in every public layout, made from the golden weights.

The names of the other layouts are written here a second time, from the original to the other layout, so
that the converters' tables (from the other to the original) are checked against something.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from converters import convert as converter
from tests import golden_data, torch_writer


def num_heads() -> int:
    """Heads of the golden transformer, which its tensors do not show."""
    return golden_data.settings(golden_data.load("dit_weights"))["heads"]


def original(component: str) -> dict[str, np.ndarray]:
    """Golden weights of a component under the original keys."""
    file = {"transformer": "dit_weights", "vae": "vae", "text_encoder": "umt5"}[component]
    return golden_data.state_dict(golden_data.load(file))


_DIFFUSERS_TRANSFORMER = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_DIFFUSERS_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_TRANSFORMERS_LAYER = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def to_diffusers_transformer(key: str) -> str:
    prefix, name = (f"{m[1]}.", m[2]) if (m := re.match(r"(blocks\.\d+)\.(.+)", key)) else ("", key)
    if m := re.match(r"(self|cross)_attn\.([qkvo])\.(.+)", name):
        number = {"self": 1, "cross": 2}[m[1]]
        return f"{prefix}attn{number}.{'to_out.0' if m[2] == 'o' else 'to_' + m[2]}.{m[3]}"
    name = name.replace("self_attn.", "attn1.").replace("cross_attn.", "attn2.")
    for ours, theirs in _DIFFUSERS_TRANSFORMER.items():
        if name == ours or name.startswith(f"{ours}."):
            return prefix + theirs + name.removeprefix(ours)
    return prefix + name


def to_diffusers_vae(key: str) -> str:
    side, _, rest = key.partition(".")
    if side in ("conv1", "conv2"):
        return f"{'quant_conv' if side == 'conv1' else 'post_quant_conv'}.{rest}"
    kind, _, rest = rest.partition(".")
    if kind == "conv1":
        return f"{side}.conv_in.{rest}"
    number, _, rest = rest.partition(".")
    if kind == "head":
        return f"{side}.{'norm_out' if number == '0' else 'conv_out'}.{rest}"
    for ours, theirs in _DIFFUSERS_BLOCK.items():
        if rest.startswith(f"{ours}."):
            rest = theirs + rest.removeprefix(ours)
    if kind == "middle":
        return f"{side}.{_MIDDLE[number]}.{rest}"
    if kind == "downsamples":
        return f"{side}.down_blocks.{number}.{rest}"
    block, j = divmod(int(number), 4)
    return f"{side}.up_blocks.{block}.{f'resnets.{j}' if j < 3 else 'upsamplers.0'}.{rest}"


def to_transformers(key: str) -> str:
    if m := re.match(r"blocks\.(\d+)\.(.+)", key):
        return f"encoder.block.{m[1]}.{_TRANSFORMERS_LAYER[m[2]]}"
    return {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}[key]


OTHER_LAYOUT = {
    "transformer": to_diffusers_transformer,
    "vae": to_diffusers_vae,
    "text_encoder": to_transformers,
}


def write_sharded(folder: Path, name: str, tensors: dict[str, np.ndarray], shards: int = 2) -> None:
    """Safetensors shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"{name}-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: np.ascontiguousarray(tensors[key]) for key in keys[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(keys[i::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def write_diffusers(folder: Path) -> None:
    """A diffusers pipeline: `transformer/` in shards, `vae/`, `text_encoder/`."""
    renamed = {
        component: {rename(key): value for key, value in original(component).items()}
        for component, rename in OTHER_LAYOUT.items()
    }
    renamed["text_encoder"]["encoder.embed_tokens.weight"] = renamed["text_encoder"]["shared.weight"]
    write_sharded(folder / "transformer", "diffusion_pytorch_model", renamed["transformer"])
    (folder / "transformer" / "config.json").write_text(json.dumps({"num_attention_heads": num_heads()}))
    for component, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / component).mkdir()
        save_file(renamed[component], folder / component / f"{name}.safetensors")


def write_wan(folder: Path) -> None:
    """An original Wan release, its tokenizer left out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(original("transformer"), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "num_heads": num_heads(), "text_len": 16}
    (folder / "config.json").write_text(json.dumps(config))
    torch_writer.save(folder / "Wan2.1_VAE.pth", original("vae"))
    torch_writer.save(folder / "models_t5_umt5-xxl-enc-bf16.pth", original("text_encoder"))


def write_self_forcing(path: Path, entries=("generator", "generator_ema", "critic"), prefix="model.") -> None:
    """A Self-Forcing file; the entries' weights differ by a factor: 1, 2, 3 in the order given."""
    weights = original("transformer")
    content = {
        entry: {prefix + key: value * (i + 1) for key, value in weights.items()}
        for i, entry in enumerate(entries)
    }
    torch_writer.save(path, content)


def convert(source: Path, dest: Path, **options) -> converter.Report:
    """`converters.convert.convert` with the golden transformer's heads, and without a progress bar."""
    return converter.convert(source, dest, **{"num_heads": num_heads(), "progress": False} | options)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything under `folder`, hidden files and empty folders included."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}
