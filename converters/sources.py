"""Where weights come from: a file, a folder, or a repository on the Hugging Face hub.

Whatever the container, tensors come out as read-only numpy arrays over the memory-mapped file, so nothing
is read before it is used, and pages belong to the file rather than to the process.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from converters.torch_file import open_torch_file

_INDEX = ".safetensors.index.json"
_WEIGHTS = (".safetensors", ".pt", ".pth")
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Folders of a diffusers pipeline, and of an original Wan release, beside the top level.
_COMPONENT_FOLDERS = ("transformer", "vae", "text_encoder")
_TOKENIZER_FOLDERS = ("tokenizer", "google/umt5-xxl")

# Fields of a checkpoint's own config.json that no tensor shows -> ours.
_FIELDS = {
    "transformer": {
        "num_heads": "num_heads",
        "num_attention_heads": "num_heads",
        "text_len": "text_length",
        "eps": "eps",
    },
    "vae": {"latents_mean": "latents_mean", "latents_std": "latents_std"},
    "text_encoder": {"layer_norm_epsilon": "eps", "relative_attention_max_distance": "max_distance"},
}

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """One checkpoint: a weight file, or the index of a sharded one."""

    path: Path

    def open(self) -> Any:
        """Its tensors by key; for some `.pt` files, a dict of such dicts."""
        if self.path.name.endswith(_INDEX):
            return _open_sharded(self.path)
        if self.path.suffix == ".safetensors":
            return open_safetensors(self.path)
        return open_torch_file(self.path)

    def config_fields(self, component: str) -> dict[str, Any]:
        """Fields of our config that the `config.json` beside the weights tells, where there is one."""
        path = self.path.with_name("config.json")
        if not path.is_file():
            return {}
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        fields = {ours: config[theirs] for theirs, ours in _FIELDS[component].items() if theirs in config}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


@dataclasses.dataclass(frozen=True)
class Source:
    """What was found: checkpoints, and the files of a tokenizer."""

    weights: tuple[Weights, ...] = ()
    tokenizer: tuple[Path, ...] = ()


def locate(source: str | Path) -> Source:
    """Finds the checkpoints and the tokenizer that `source` names, downloading them where it must.

    Args:
      source: a file; a folder (a diffusers pipeline, an original Wan release, or one component); or, where
        no such path exists, a hub repository `org/name`, or a file or folder in it,
        `org/name/path/in/repo`.

    Raises:
      FileNotFoundError: nothing is there.
      OSError: the hub does not answer, or does not have it.
      ValueError: the folder holds no weights, or is already a converted model.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _download(str(source))
    if path.is_file():
        return Source(tokenizer=(path,)) if path.name in TOKENIZER_FILES else Source((Weights(path),))
    weights = [w for folder in ("", *_COMPONENT_FOLDERS) for w in _weights_in(path / folder)]
    tokenizers = [_tokenizer_in(path / folder) for folder in ("", *_TOKENIZER_FOLDERS)]
    found = Source(tuple(weights), next(filter(None, tokenizers), ()))
    if found == Source():
        deeper = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix in _WEIGHTS)
        hint = f"; name one of {', '.join(deeper[:5])}" if deeper else ""
        raise ValueError(f"{path} holds no weights and no tokenizer where they are usually kept{hint}")
    return found


def _weights_in(folder: Path) -> list[Weights]:
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    sharded = {shard for index in indexes for shard in _weight_map(index).values()}
    files = [p for p in sorted(folder.glob("*")) if p.suffix in _WEIGHTS and p.name not in sharded]
    for file in files:
        if match := re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.safetensors", file.name):
            raise FileNotFoundError(f"{file} is one of several shards, but {match[1]}{_INDEX} is missing")
    return [Weights(path) for path in (*indexes, *files)]


def _tokenizer_in(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def open_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, memory-mapped.

    The format is a length, a JSON header of that length, and the data; the `safetensors` package would
    copy each tensor into memory of the process.

    Raises:
      ValueError: the file is truncated or not of this format.
    """
    data = np.memmap(path, np.uint8, "r") if Path(path).stat().st_size else np.empty(0, np.uint8)
    try:
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            flat = data[start + first : start + last].view(_SAFETENSORS_DTYPES[entry["dtype"]])
            tensors[key] = flat.reshape(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is truncated or not a safetensors file: download or copy it again"
        ) from None


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is not a safetensors index: download or copy it again") from None


def _open_sharded(index: Path) -> dict[str, np.ndarray]:
    weight_map = _weight_map(index)
    shards = {}
    for name in sorted(set(weight_map.values())):
        if not index.with_name(name).is_file():
            raise FileNotFoundError(
                f"{index} points at {name}, which is missing: download it into the same folder"
            )
        shards[name] = open_safetensors(index.with_name(name))
    if absent := [key for key, name in weight_map.items() if key not in shards[name]]:
        raise ValueError(f"{index} expects {absent[0]} in {weight_map[absent[0]]}, which does not hold it")
    return {key: shards[name][key] for key, name in weight_map.items()}


def _download(source: str) -> Path:
    """Fetches what conversion needs of `org/name[/path]` into the hub's cache; the path of it there."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:[/:](.+))?", source)
    if match is None:
        raise FileNotFoundError(f"{source} does not exist")
    repo, inner = match[1], (match[2] or "").rstrip("/")
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(repo)
        files = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:  # the client has no common base class for "no such thing" and "no network"
        raise OSError(
            f"{source} is not a path here, and the hub does not have it or does not answer: {error}"
        ) from error
    wanted = [name for name in files if _needed(name, inner)]
    if not wanted:
        weights = [name for name in files if name.endswith(_WEIGHTS)]
        raise FileNotFoundError(
            f"the hub's {repo} has no weights at {inner or 'its top level'}"
            + (f"; name one of: {', '.join(f'{repo}/{name}' for name in weights[:5])}" if weights else "")
        )
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=wanted)
    except Exception as error:
        raise OSError(f"the download of {source} failed (run it again to resume): {error}") from error
    return Path(folder, inner)


def _needed(name: str, inner: str) -> bool:
    """Whether conversion of `inner` (a file, a folder, or "" for all) wants the repository's file `name`."""
    if name == inner:
        return True
    if inner.endswith(_INDEX):
        return name.startswith(inner.removesuffix(_INDEX) + "-")
    if not PurePosixPath(name).is_relative_to(inner):
        return False
    relative = PurePosixPath(name).relative_to(inner)
    parent = str(relative.parent) if relative.parent != PurePosixPath(".") else ""
    if parent in ("", *_TOKENIZER_FOLDERS) and relative.name in TOKENIZER_FILES:
        return True
    return parent in ("", *_COMPONENT_FOLDERS) and (
        relative.name.endswith((*_WEIGHTS, _INDEX)) or relative.name == "config.json"
    )
