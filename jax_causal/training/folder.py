"""Model folders at both ends of a run: what a stage starts from, and what it leaves for the next."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_causal import checkpoint, modules
from jax_causal.components import COMPONENTS
from jax_causal.config import ModelConfig, preset
from jax_causal.parallel import Parallel
from jax_causal.training.config import TrainConfig, changes


def model_config(config: TrainConfig) -> ModelConfig:
    """The sizes that a run trains.

    Raises:
      FileNotFoundError: `init_from` or `model` names a folder that is not there.
      ValueError: neither is given, or a component of `init_from` has other sizes than the model.
    """
    start = None if config.init_from is None else _read(Path(config.init_from))
    if isinstance(config.model, ModelConfig):
        model = config.model
    elif config.model is not None:
        is_folder = Path(config.model).is_dir()
        model = _read(Path(config.model)) if is_folder else preset(config.model)
    elif start is not None:
        return start
    else:
        raise ValueError(
            "config.model is not given: name a preset, or init_from, a model folder to start from"
        )
    if start is not None:
        was, now = (json.loads(c.to_json()) for c in (start, model))
        for component in _present(Path(config.init_from)):
            if found := changes(was[component] or {}, now[component] or {}):
                raise ValueError(
                    f"the {component} of {config.init_from} is not that of config.model: {'; '.join(found)}. "
                    "Leave model out to take the sizes of init_from"
                )
    return model


class Components(Mapping):
    """Parameters of a model folder by component, fp32, each read when it is asked for.

    Args:
      folder: a model folder, or None for no components.
      model: its sizes.
      parallel: where the parameters go.
    """

    def __init__(self, folder: str | os.PathLike | None, model: ModelConfig, parallel: Parallel):
        self._folder, self._model, self._parallel = folder and Path(folder), model, parallel
        self._names = [] if folder is None else _present(Path(folder))

    def __getitem__(self, component: str) -> dict:
        if component not in self._names:
            raise KeyError(component)
        shapes = modules.abstract(COMPONENTS[component], getattr(self._model, component), dtype=jnp.float32)
        return checkpoint.restore(self._folder / component, placed(shapes, self._parallel, component))

    def __contains__(self, component) -> bool:
        return component in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def placed(abstract, parallel: Parallel, component: str = "transformer"):
    """`ShapeDtypeStruct`s with their shardings under `parallel`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        parallel.shardings(abstract, component),
    )


def export(folder: Path, model: ModelConfig, trained: dict[str, dict], init_from: str | None) -> None:
    """Makes `folder` a model folder: its `config.json`, what was trained, and the rest as `init_from` has it.

    Raises OSError when the disk is full; what is there is whole then, and exporting again completes it.
    """
    for component, params in trained.items():
        checkpoint.save(folder / component, params, overwrite=True)
    for component in checkpoint.SOURCES if init_from is not None else ():
        source, target = Path(init_from, component), folder / component
        if (
            component not in trained
            and source.is_dir()
            and not (component == "tokenizer" and target.is_dir())
        ):
            new = target.with_name(f".{component}.new")
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(source, new)
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
    new = folder / ".config.json.new"
    new.write_text(model.to_json(), encoding="utf-8")
    new.replace(folder / "config.json")


def _present(folder: Path) -> list[str]:
    return [component for component in COMPONENTS if (folder / component).is_dir()]


def _read(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    return ModelConfig.from_json(file.read_text(encoding="utf-8"))
