"""Model configurations: frozen, hashable, static under `jax.jit`, and round-trippable through JSON.

Every size of a model comes from here. The presets hold the sizes of the public Wan2.1 releases
and of the small model; `ModelConfig.to_json` / `from_json` are the `config.json` of a model folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Literal

# What a checkpoint was trained to do, hence which sampler may drive it.
#   causal-distilled  few-step causal model (Self-Forcing): what `generate` runs
#   causal            causal but undistilled (diffusion forcing, ODE initialisation): training only
#   bidirectional     full attention over the whole clip (original Wan): teacher and critic
Kind = Literal["causal-distilled", "causal", "bidirectional"]

# Per-channel statistics that normalise the latents of the Wan2.1 VAE.
_WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the diffusion transformer (DiT)."""

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2  # spatial; the temporal patch is always 1
    frequency_dim: int = 256  # length of the sinusoidal time feature
    text_dim: int = 4096
    text_length: int = 512  # text positions; shorter prompts are padded with zero vectors and attended
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def __post_init__(self):
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} must be a multiple of num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"the head dim {self.head_dim} must be even: rotary embedding turns pairs")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal 3-D VAE. Each stage after the first halves height and width; stages marked in
    `temporal_downsample` halve time as well."""

    dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = _WAN_LATENTS_STD

    @property
    def spatial_factor(self) -> int:
        """Pixels along height or width for one latent position."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Video frames for one latent frame, the first latent frame excepted (it holds one)."""
        return 2 ** sum(self.temporal_downsample)

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.multipliers) - 1:
            raise ValueError(
                f"temporal_downsample needs one entry per stage boundary: {len(self.multipliers) - 1}, "
                f"not {len(self.temporal_downsample)}"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(f"{name} needs z_dim={self.z_dim} values, not {len(getattr(self, name))}")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the UMT5 text encoder. `max_length` is the number of token positions handed to the DiT."""

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    max_length: int = 512
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.attention_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Few-step flow-matching sampler. `steps` are unwarped timesteps in [0, 1000]; `shift` warps them."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    context_noise: float = 0.0  # timestep of the context pass
    frames_per_block: int = 3  # latent frames denoised together
    independent_first_frame: bool = False  # block sizes 1, n, n, ... instead of n, n, n, ...
    trained_frames: int = 21  # latent frames the model saw in training: the longest context known to be good


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer the prompt goes through: a file in the model folder's `tokenizer/`, plain bytes, or the
    vocabulary of the procedural world, which comes with the package."""

    kind: Literal["sentencepiece", "tokenizers", "bytes", "world"] = "sentencepiece"
    eos_id: int = 1
    pad_id: int = 0

    @property
    def needs_file(self) -> bool:
        """Whether a model folder must have a `tokenizer/`."""
        return self.kind in ("sentencepiece", "tokenizers")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole text-to-video model; what `config.json` of a model folder holds.

    Components that a folder does not have yet are None.
    """

    name: str
    kind: Kind = "causal-distilled"
    family: str = "wan2.1"
    transformer: TransformerConfig | None = None
    vae: VAEConfig | None = None
    text_encoder: TextConfig | None = None
    tokenizer: TokenizerConfig | None = None
    sampler: SamplerConfig = SamplerConfig()
    fps: int = 16
    height: int = 480
    width: int = 832
    num_frames: int = 81

    def to_json(self) -> str:
        """Indented JSON text, one key per field."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Parses `to_json`'s text. Raises ValueError on unknown keys, missing keys or wrong types."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config.json is not valid JSON: {error}") from None
        return from_dict(cls, data, "config")


def from_dict(cls, data, where: str):
    """Builds the dataclass `cls` from parsed JSON. Raises ValueError, naming the offending key below `where`."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{where} has unknown keys {unknown}{hint}; known are {sorted(fields)}")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise ValueError(f"{where} lacks the keys {missing}")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _convert(hint, value, where):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # Of several kinds, an object is the dataclass, and anything else is not.
        kinds = [a for a in args if a is not type(None)]
        fits = [a for a in kinds if dataclasses.is_dataclass(a) == isinstance(value, dict)]
        return _convert((fits or kinds)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {list(args)}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {hint.__name__}, not {value!r}")
    return value


def _presets() -> dict[str, ModelConfig]:
    wan = {"vae": VAEConfig(), "text_encoder": TextConfig(), "tokenizer": TokenizerConfig()}
    return {
        "wan-1.3b": ModelConfig(
            name="wan-1.3b",
            transformer=TransformerConfig(dim=1536, num_layers=30, num_heads=12, ffn_dim=8960),
            **wan,
        ),
        "wan-14b": ModelConfig(
            name="wan-14b",
            transformer=TransformerConfig(dim=5120, num_layers=40, num_heads=40, ffn_dim=13824),
            **wan,
        ),
        "tiny": ModelConfig(
            name="tiny",
            transformer=TransformerConfig(
                dim=192, num_layers=8, num_heads=8, ffn_dim=768, text_dim=128, text_length=32
            ),
            vae=VAEConfig(dim=16),
            text_encoder=TextConfig(
                vocab_size=576,
                dim=128,
                attention_dim=128,
                ffn_dim=320,
                num_heads=4,
                num_layers=4,
                max_length=32,
            ),
            tokenizer=TokenizerConfig(kind="world"),
            sampler=SamplerConfig(shift=3.0),
            height=96,
            width=96,
        ),
    }


PRESETS: dict[str, ModelConfig] = _presets()


def preset(name: str) -> ModelConfig:
    """The named preset. Raises ValueError, naming the known ones, for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]
