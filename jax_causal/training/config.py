"""Configurations of training: frozen, hashable, round-trippable through JSON, and with errors for unknown keys.

Files lie in `configs/`, by name; `--set key=value` changes single values. Importing this does not start JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from jax_causal.config import ModelConfig, from_dict, preset

StageName = Literal["vae", "teacher", "causal", "distill"]
CONFIGS = Path(__file__).parent / "configs"

# What may change when a run is resumed, because the weights do not depend on it (on the devices only by rounding).
FREE = ("checkpoint_every", "sample_every", "log_every", "guard", "mesh", "strategy", "shard_params", "remat")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices: `data` groups share the batch, and the `seq` devices of a group share every frame's tokens."""

    data: int = 1
    seq: int = 1

    @property
    def size(self) -> int:
        return self.data * self.seq


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run, of one stage.

    Attributes:
      stage: which objective.
      num_steps: updates in all.
      batch_size: clips of an update, over all devices and microbatches.
      learning_rate: the highest.
      optimizer: "adamw", or "muon" for the kernels and Adam for all else; see `optim`.
      model: name of a preset, a model folder whose sizes to take, or sizes; None for those of `init_from`.
      init_from: model folder to start from; the stage takes from it what it needs.
      seed: of weights, data and noise.
      accumulate: microbatches of an update, one after the other.
      warmup_steps: over which the learning rate rises linearly from zero.
      schedule: of the learning rate after that; "cosine" falls to zero at `num_steps`.
      weight_decay: of matrices (arrays of rank 2 and more), decoupled.
      betas, eps: of Adam.
      grad_clip: largest global norm of a gradient; 0 for no limit.
      ema: decay of the moving average of the weights; 0 for none.
      ema_start: updates before the average begins; until then it is the weights.
      dtype: of computation. Weights, optimizer and averages are always fp32.
      checkpoint_every, sample_every: updates between checkpoints and between sample videos; 0 for the end only, and
        for never.
      log_every: updates whose metrics are fetched together.
      guard: keep the state before an update with a metric that is not finite, to save it. This takes memory for a
        second copy of what is trained; without it such a run ends with its last checkpoint.
      mesh, strategy: devices and how those of a group share a frame, as in `sharding.SequenceParallel`.
      shard_params: shard weights and optimizer over all devices.
      remat: gradients compute the transformer's blocks again instead of keeping what is inside them: much less memory,
        a third more time, and a program that compiles sooner, because layers are then scanned and not unrolled.
      options: of the stage, a JSON object as canonical text; see `stage_options`.
    """

    stage: StageName
    num_steps: int
    batch_size: int
    learning_rate: float
    model: str | ModelConfig | None = None
    init_from: str | None = None
    seed: int = 0
    accumulate: int = 1
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 1.0
    ema: float = 0.0
    ema_start: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpoint_every: int = 0
    sample_every: int = 0
    log_every: int = 10
    guard: bool = True
    mesh: MeshConfig = MeshConfig()
    strategy: str = "auto"
    shard_params: bool = False
    remat: bool = False
    options: str = "{}"

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "accumulate", "log_every", "mesh.data", "mesh.seq"):
            if (value := _get(self, name)) < 1:
                raise ValueError(f"config.{name} must be 1 or more, not {value}")
        for name in (
            "warmup_steps",
            "checkpoint_every",
            "sample_every",
            "weight_decay",
            "grad_clip",
            "seed",
            "ema_start",
        ):
            if not (value := _get(self, name)) >= 0:
                raise ValueError(f"config.{name} must be 0 or more, not {value}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"config.learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"config.ema must be at least 0 and less than 1, not {self.ema}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"config.betas must be two numbers from 0 to less than 1, not {self.betas}")
        if self.seed >= 2**32:
            raise ValueError(
                f"config.seed must be less than 2**32, not {self.seed}: JAX would drop higher bits"
            )
        if self.batch_size % (self.accumulate * self.mesh.data):
            raise ValueError(
                f"config.batch_size={self.batch_size} must be a multiple of accumulate x mesh.data = "
                f"{self.accumulate} x {self.mesh.data}"
            )
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"config.warmup_steps={self.warmup_steps} exceeds num_steps={self.num_steps}")

    def stage_options(self, cls: type[T]) -> T:
        """The options as the frozen dataclass `cls` of a stage. Raises ValueError for unknown keys."""
        return from_dict(cls, json.loads(self.options), "config.options")

    def to_dict(self) -> dict:
        """JSON values by key."""
        data = json.loads(json.dumps(dataclasses.asdict(self)))
        return data | {"options": json.loads(self.options)}

    def to_json(self) -> str:
        """Indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: dict) -> TrainConfig:
        """The inverse of `to_dict`. Raises ValueError on unknown keys, missing keys or wrong values."""
        if isinstance(data, dict) and "options" in data:
            if not isinstance(data["options"], dict):
                raise ValueError(f"config.options must be a JSON object, not {data['options']!r}")
            data = data | {"options": json.dumps(data["options"], sort_keys=True)}
        return from_dict(cls, data, "config")

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The inverse of `to_json`. Raises ValueError as `from_dict` does."""
        return cls.from_dict(_parse(text, "the configuration"))


def load(source: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a file, or of a name in `configs/`, with single values changed.

    Args:
      overrides: "key=value" each; dots lead into objects (`mesh.data=8`, `options.guidance=3`), into the sizes of a
        named model too (`model.transformer.dim=64`). Values are JSON, and anything that is not is a string.

    Raises:
      FileNotFoundError: no such file or name.
      ValueError: not JSON, unknown keys or wrong values.
    """
    path = Path(source)
    if not path.is_file():
        names = sorted(file.stem for file in CONFIGS.glob("*.json"))
        if str(source) not in names:
            near = difflib.get_close_matches(str(source), names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            known = ", ".join(names)
            raise FileNotFoundError(
                f"there is no configuration {source}{hint}: name a file, or one of {known}"
            )
        path = CONFIGS / f"{source}.json"
    data = _parse(path.read_text(encoding="utf-8"), str(path))
    for override in overrides:
        _set(data, override)
    return TrainConfig.from_dict(data)


def changes(old: dict, new: dict, *, ignore: Sequence[str] = ()) -> list[str]:
    """What differs between two `to_dict`s, in words, one entry for each value."""
    was, now = _flat(old), _flat(new)
    return [
        f"{key} was {json.dumps(was.get(key))}, is {json.dumps(now.get(key))}"
        for key in was | now
        if was.get(key) != now.get(key) and key.split(".")[0] not in ignore
    ]


def _parse(text: str, where: str) -> dict:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(data).__name__}")
    return data


def _set(data: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{override!r} is not key=value, for example learning_rate=1e-4 or mesh.data=8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *path, last = key.split(".")
    if path[:1] == ["model"] and isinstance(data.get("model"), str):
        data["model"] = json.loads(_sizes(data["model"]).to_json())
    for i, name in enumerate(path):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ValueError(f"cannot set {key}: {'.'.join(path[: i + 1])} is {data!r}, not an object")
    data[last] = value


def _sizes(model: str) -> ModelConfig:
    file = Path(model) / "config.json"
    return ModelConfig.from_json(file.read_text(encoding="utf-8")) if file.is_file() else preset(model)


def _get(config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _flat(data, prefix: str = "") -> dict:
    flat = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
