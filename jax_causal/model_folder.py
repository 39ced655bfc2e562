"""Model folders: `config.json`, one checkpoint per component, a tokenizer. Finding one and judging it, without weights.

`jax-causal convert` makes them; `Pipeline.from_pretrained` loads them.
"""

from __future__ import annotations

from pathlib import Path

from jax_causal import checkpoint
from jax_causal.config import PRESETS, ModelConfig


def find_model(name_or_folder: str | Path) -> tuple[ModelConfig, Path]:
    """Configuration and folder of a bundled model or a model folder that can generate; reads no weights.

    Raises what `Pipeline.from_pretrained` raises.
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    if not folder.is_dir() and name in PRESETS:
        folder = Path(__file__).parent / "weights" / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{name} is a preset without bundled weights: convert a checkpoint with `jax-causal convert "
                f"{checkpoint.SOURCES['transformer']} FOLDER` and load the folder, or try the size with random "
                f"weights: --preset {name}, in Python Pipeline.random({name!r})"
            )
    config = read_config(folder, name)
    check_kind(config)
    for component in ("transformer", "vae"):
        if component in checkpoint.missing(folder):
            raise FileNotFoundError(incomplete(folder, component))
    return config, folder


def read_config(folder: Path, name: str) -> ModelConfig:
    """The configuration of a model folder of any kind; `name` is what the user called it."""
    if not folder.is_dir():
        if name.count("/") == 1 and not name.startswith((".", "/")):
            raise FileNotFoundError(
                f"{name} is not a folder here. If it names original weights on the hub, convert them first: "
                f"jax-causal convert {name} FOLDER"
            )
        raise FileNotFoundError(f"there is no model folder {name}; bundled models: tiny")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, so it is not a model folder: make one with "
            f"jax-causal convert {checkpoint.SOURCES['transformer']} {folder}"
        )
    return ModelConfig.from_json((folder / "config.json").read_text())


def check_kind(config: ModelConfig) -> None:
    """Raises ValueError unless the model was distilled for the few-step causal rollout."""
    if config.kind != "causal-distilled":
        raise ValueError(
            f"{config.name} is a {config.kind} model, which a few-step causal rollout cannot sample: it was not "
            "distilled for it, so every video would be noise. Convert distilled causal weights instead: "
            f"jax-causal convert {checkpoint.SOURCES['transformer']} FOLDER"
        )


def incomplete(folder: Path, component: str) -> str:
    """A message that the folder lacks a component, and the command that adds it."""
    return f"{folder} has no {component.replace('_', ' ')} yet: add it with {checkpoint.missing(folder)[component]}"
