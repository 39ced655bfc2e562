"""Which checkpoint tensor becomes which parameter: one declarative table per component.

A row is `(source key, target path, layout)`. Source keys are those of the original Wan2.1 releases;
other layouts are renamed to them first (`converters.layouts`). `{i}` in both columns is the index of a
list element; `{i}` in the source alone numbers the layers that the target stacks on a leading axis.
The layout is an einops pattern from torch's axes to ours, so that it can be read, and reversed.

A mapping is complete in both directions, every source tensor used once and every parameter filled, or
it is an error that lists what is wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_causal.checkpoint import differences

SAME = "... -> ..."
LINEAR = "o i -> i o"
CONV2D = "o i h w -> h w i o"
CONV3D = "o i t h w -> t h w i o"
POINTWISE2D = "o i 1 1 -> i o"
POINTWISE3D = "o i 1 1 1 -> i o"
GAMMA2D = "c 1 1 -> c"
GAMMA3D = "c 1 1 1 -> c"
MODULATION = "1 n e -> n e"
# Patch rows come channel-slowest from the file; ours are channel-fastest, the order of the head's columns.
PATCH = "e c 1 y x -> (y x c) e"
_PATCH_SIZES = {"y": 2, "x": 2}  # the spatial patch of every Wan model

Row = tuple[str, str, str]


def _layer(source: str, target: str, layout: str = LINEAR) -> list[Row]:
    """Weight and bias of a linear or convolutional layer."""
    return [(f"{source}.weight", f"{target}.kernel", layout), (f"{source}.bias", f"{target}.bias", SAME)]


def _transformer() -> list[Row]:
    rows = [
        *_layer("patch_embedding", "patch_embedding", PATCH),
        *_layer("text_embedding.0", "text_embedding.fc1"),
        *_layer("text_embedding.2", "text_embedding.fc2"),
        *_layer("time_embedding.0", "time_embedding.fc1"),
        *_layer("time_embedding.2", "time_embedding.fc2"),
        *_layer("time_projection.1", "time_projection"),
        ("head.modulation", "head.modulation", MODULATION),
        *_layer("head.head", "head.linear"),
        ("blocks.{i}.modulation", "blocks.modulation", MODULATION),
        ("blocks.{i}.norm3.weight", "blocks.norm3.scale", SAME),
        ("blocks.{i}.norm3.bias", "blocks.norm3.bias", SAME),
        *_layer("blocks.{i}.ffn.0", "blocks.ffn.fc1"),
        *_layer("blocks.{i}.ffn.2", "blocks.ffn.fc2"),
    ]
    for attention in ("self_attn", "cross_attn"):
        for name in "qkvo":
            rows += _layer(f"blocks.{{i}}.{attention}.{name}", f"blocks.{attention}.{name}")
        for name in ("norm_q", "norm_k"):
            rows.append((f"blocks.{{i}}.{attention}.{name}.weight", f"blocks.{attention}.{name}.scale", SAME))
    return rows


def _vae() -> list[Row]:
    # The two 1x1x1 convolutions around the latent; "conv1" names another layer inside encoder and decoder.
    rows = [*_layer("conv1", "quant_conv", POINTWISE3D), *_layer("conv2", "post_quant_conv", POINTWISE3D)]
    for side, stages in (("encoder", "downsamples"), ("decoder", "upsamples")):
        rows += [
            *_layer(f"{side}.conv1", f"{side}.conv_in", CONV3D),
            (f"{side}.head.0.gamma", f"{side}.norm_out.scale", GAMMA3D),
            *_layer(f"{side}.head.2", f"{side}.conv_out", CONV3D),
        ]
        for at in (f"{side}.{stages}.{{i}}", f"{side}.middle.{{i}}"):
            rows += [  # a residual block
                (f"{at}.residual.0.gamma", f"{at}.norm1.scale", GAMMA3D),
                *_layer(f"{at}.residual.2", f"{at}.conv1", CONV3D),
                (f"{at}.residual.3.gamma", f"{at}.norm2.scale", GAMMA3D),
                *_layer(f"{at}.residual.6", f"{at}.conv2", CONV3D),
                *_layer(f"{at}.shortcut", f"{at}.shortcut", POINTWISE3D),
            ]
        at = f"{side}.{stages}.{{i}}"
        rows += [*_layer(f"{at}.resample.1", f"{at}.conv", CONV2D)]
        rows += [*_layer(f"{at}.time_conv", f"{at}.time_conv", CONV3D)]
        at = f"{side}.middle.{{i}}"
        rows += [(f"{at}.norm.gamma", f"{at}.norm.scale", GAMMA2D)]
        rows += [*_layer(f"{at}.to_qkv", f"{at}.to_qkv", POINTWISE2D)]
        rows += [*_layer(f"{at}.proj", f"{at}.proj", POINTWISE2D)]
    return rows


def _text_encoder() -> list[Row]:
    return [
        ("token_embedding.weight", "token_embedding.embedding", SAME),
        ("norm.weight", "norm.scale", SAME),
        ("blocks.{i}.norm1.weight", "blocks.norm1.scale", SAME),
        *((f"blocks.{{i}}.attn.{name}.weight", f"blocks.attn.{name}.kernel", LINEAR) for name in "qkvo"),
        ("blocks.{i}.pos_embedding.embedding.weight", "blocks.pos_embedding.embedding", SAME),
        ("blocks.{i}.norm2.weight", "blocks.norm2.scale", SAME),
        ("blocks.{i}.ffn.gate.0.weight", "blocks.ffn.gate.kernel", LINEAR),
        ("blocks.{i}.ffn.fc1.weight", "blocks.ffn.fc1.kernel", LINEAR),
        ("blocks.{i}.ffn.fc2.weight", "blocks.ffn.fc2.kernel", LINEAR),
    ]


TABLES: dict[str, list[Row]] = {
    "transformer": _transformer(),
    "vae": _vae(),
    "text_encoder": _text_encoder(),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and the checkpoint tensors it is made of: one, or one per stacked layer."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    layout: str
    stacked: bool

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The torch shape that every source tensor must have."""
        left, right = self.layout.split(" -> ")
        shape = self.shape[1:] if self.stacked else self.shape
        ours = np.broadcast_to(np.int8(0), shape)  # a shape without memory
        return rearrange(ours, f"{right} -> {left}", **(_PATCH_SIZES if self.layout == PATCH else {})).shape

    def parts(self, state_dict: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """(source key, tensor in our layout), layer by layer; views, but for the patch embedding."""
        for key in self.sources:
            yield key, rearrange(state_dict[key], self.layout)


def leaves(component: str, abstract: Mapping) -> list[Leaf]:
    """The rows of `component`'s table written out for one model.

    Args:
      component: "transformer", "vae" or "text_encoder".
      abstract: nested dict of anything with a shape, e.g. from `jax_causal.modules.abstract`.

    Raises:
      ValueError: a parameter has no row in the table.
    """
    return [_leaf(component, path, tuple(a.shape)) for path, a in flatten_dict(dict(abstract)).items()]


def _leaf(component, path, shape) -> Leaf:
    name = ".".join(map(str, path))
    for source, target, layout in TABLES[component]:
        match = re.fullmatch(re.escape(target).replace(r"\{i\}", r"(\d+)"), name)
        if match is None:
            continue
        stacked = "{i}" in source and "{i}" not in target
        numbers = range(shape[0]) if stacked else match.groups() or (0,)
        return Leaf(path, shape, tuple(source.replace("{i}", str(i)) for i in numbers), layout, stacked)
    raise ValueError(f"no checkpoint tensor is known for the {component} parameter {name}")


def check(component: str, plan: list[Leaf], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless `shapes` (original key -> torch shape) holds exactly the sources of `plan`."""
    expected = {key: leaf.source_shape for leaf in plan for key in leaf.sources}
    found = {key: tuple(shape) for key, shape in shapes.items()}
    if problems := differences(found, expected):
        raise ValueError(f"it does not fit the {component} (keys of the original Wan layout)\n{problems}")


def to_params(component: str, state_dict: Mapping[str, np.ndarray], abstract: Mapping) -> dict:
    """The parameter tree made from a whole state dict in memory.

    Args:
      component: "transformer", "vae" or "text_encoder".
      state_dict: original-layout key -> array of torch's shape.
      abstract: nested dict of shapes and dtypes that the result takes (`jax_causal.modules.abstract`).

    Returns:
      Nested dict of numpy arrays.

    Raises:
      ValueError: keys or shapes do not match exactly, in either direction.
    """
    plan = leaves(component, abstract)
    check(component, plan, {key: value.shape for key, value in state_dict.items()})
    dtypes = {path: leaf.dtype for path, leaf in flatten_dict(dict(abstract)).items()}
    params = {}
    for leaf in plan:
        parts = [part.astype(dtypes[leaf.path]) for _, part in leaf.parts(state_dict)]
        params[leaf.path] = np.stack(parts) if leaf.stacked else parts[0]
    return unflatten_dict(params)
