"""`jax-causal convert SOURCE DEST`: adds the components that SOURCE holds to the model folder DEST.

Every parameter is assembled in a scratch file on the destination's disk, layer by layer, and handed to
orbax memory-mapped: the process itself never holds more than a slab of one tensor. A component appears
in DEST whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import os
import shutil
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from converters import layouts, names, sources
from jax_causal import checkpoint, modules
from jax_causal.components import COMPONENTS
from jax_causal.config import PRESETS, Kind, ModelConfig, TokenizerConfig

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_SLAB_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
      folder: the model folder.
      written: component -> what was written, in words.
      missing: component -> a command that adds it.
    """

    folder: Path
    written: dict[str, str]
    missing: dict[str, str]

    def __str__(self) -> str:
        lines = [f"wrote {self.folder / name}: {what}" for name, what in self.written.items()]
        lines += [f"{self.folder} still lacks {name}: {command}" for name, command in self.missing.items()]
        return "\n".join(lines if self.missing else [*lines, f"{self.folder} is complete"])


@dataclasses.dataclass(frozen=True)
class _Component:
    """A checkpoint that was checked and is ready to be written."""

    name: str
    path: Path
    config: layouts.Config
    kind: Kind
    plan: list[names.Leaf]
    dtypes: dict[tuple, np.dtype]
    tensors: Mapping[str, np.ndarray]  # by original-layout key

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in self.plan)

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(leaf.shape)) * self.dtypes[leaf.path].itemsize for leaf in self.plan)

    def __str__(self) -> str:
        stored = " and ".join(sorted({dtype.name for dtype in self.dtypes.values()}))
        return f"{self.num_parameters:,} parameters, {stored}, from {self.path}"


def convert(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    entry: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    kind: Kind | None = None,
    num_heads: int | None = None,
    progress: bool = True,
) -> Report:
    """Adds everything that `source` holds to the model folder `dest`.

    Args:
      source: a file, a folder or a hub repository; see `converters.sources.locate`.
      dest: the model folder; made where it does not exist.
      entry: which dict of a `.pt` file that holds several; by default `generator_ema`, else `generator`.
      dtype: "float32", "bfloat16" or "float16"; by default as stored.
      overwrite: replace components that `dest` has already.
      kind: what the transformer was trained for, where the file does not show it.
      num_heads: attention heads of the transformer, where they are not 128 channels wide.
      progress: show a progress bar on standard error.

    Raises:
      FileNotFoundError, OSError: the source cannot be read, or the destination cannot be written.
      FileExistsError: `dest` has the component already and `overwrite` is False.
      ValueError: the source is damaged, of another family, incomplete, or holds NaN or infinity.
    """
    dest = Path(dest)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    config = _read_config(dest)
    found = sources.locate(source)
    components = [_prepare(weights, entry, dtype, kind, num_heads) for weights in found.weights]
    _check_destination(dest, components, bool(found.tokenizer), overwrite)

    written = {}
    is_new = not dest.exists()
    dest.mkdir(parents=True, exist_ok=True)
    try:
        for component in components:
            _write(component, dest, overwrite, progress)
            config = _write_config(dest, _with_component(config, component))
            written[component.name] = str(component)
        if found.tokenizer:
            tokenizer = _write_tokenizer(found.tokenizer, dest)
            _write_config(dest, dataclasses.replace(config, tokenizer=tokenizer))
            written["tokenizer"] = f"{tokenizer.kind}, from {found.tokenizer[0].parent}"
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty: something was written
                dest.rmdir()
    return Report(dest, written, checkpoint.missing(dest))


def _prepare(weights, entry, dtype, kind, num_heads) -> _Component:
    """Opens a checkpoint and checks all that can be checked without reading its tensors."""
    try:
        entry, tensors = _select(weights.open(), entry)
        name, keys = layouts.to_original(tensors)
        tensors = {original: tensors[key] for original, key in keys.items()}
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        fields = weights.config_fields(name)
        if num_heads and name == "transformer":
            fields["num_heads"] = num_heads
        config = layouts.infer_config(name, shapes, **fields)
        plan = names.leaves(name, modules.abstract(COMPONENTS[name], config))
        names.check(name, plan, shapes)
        dtypes = {leaf.path: _dtype(leaf, tensors, dtype) for leaf in plan}
    except ValueError as error:
        where = str(weights.path)
        raise error if where in str(error) else ValueError(f"{where}: {error}") from None
    return _Component(name, weights.path, config, kind or _kind(weights.path, entry), plan, dtypes, tensors)


def _select(content, entry) -> tuple[str | None, dict[str, np.ndarray]]:
    """The dict of tensors to convert, and the name it has in a file that holds several."""
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not a dict of tensors")
    entries = {k: v for k, v in content.items() if isinstance(v, Mapping) and v}
    entries = {k: v for k, v in entries.items() if all(isinstance(t, np.ndarray) for t in v.values())}
    if not entries:
        if entry is not None:
            raise ValueError(f"has no entries to choose from: leave --entry {entry} out")
        return None, {k: v for k, v in content.items() if isinstance(v, np.ndarray)}
    if entry is None:
        preferred = [name for name in ("generator_ema", "generator", *entries) if name in entries]
        if len(entries) > 1 and preferred[0] not in ("generator_ema", "generator"):
            raise ValueError(f"holds several entries: choose one with --entry {' | '.join(entries)}")
        entry = preferred[0]
    if entry not in entries:
        raise ValueError(f"has no entry {entry!r}: choose one with --entry {' | '.join(entries)}")
    return entry, entries[entry]


def _kind(path, entry) -> Kind:
    """What the file's shape tells about its training; `kind` overrides it."""
    if entry not in ("generator", "generator_ema"):
        return "bidirectional"
    # Self-Forcing publishes its starting point, causal but not distilled yet, as ode_init.pt.
    return "causal" if path.stem.startswith("ode_init") else "causal-distilled"


def _dtype(leaf, tensors, dtype) -> np.dtype:
    stored = {tensors[key].dtype for key in leaf.sources}
    if unusable := stored - {np.dtype(d) for d in (np.float64, *DTYPES.values())}:
        raise ValueError(
            f"{leaf.sources[0]} is stored as {unusable.pop()}: weights must be floats, not quantised"
        )
    if dtype is not None:
        return np.dtype(DTYPES[dtype])
    return stored.pop() if len(stored) == 1 and np.dtype(np.float64) not in stored else np.dtype(np.float32)


def _check_destination(dest, components, has_tokenizer, overwrite) -> None:
    coming = [component.name for component in components] + ["tokenizer"] * has_tokenizer
    for name in COMPONENTS:
        if coming.count(name) > 1:
            paths = ", ".join(str(component.path) for component in components if component.name == name)
            raise ValueError(f"the source holds several checkpoints of the {name}: name one of {paths}")
    if (present := [name for name in coming if (dest / name).exists()]) and not overwrite:
        raise FileExistsError(
            f"{dest} already has {', '.join(present)}: pass --overwrite to replace, or name one file of the source"
        )
    sizes = [component.nbytes for component in components]
    needed = sum(sizes) + max(sizes, default=0)
    there = next(p for p in (dest.absolute(), *dest.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{dest} needs {needed / 1e9:.1f} GB while converting (twice the component), "
            f"but its disk has {free / 1e9:.1f} GB free: make room, or choose --dtype bfloat16",
        )


def _write(component, dest, overwrite, progress) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    scratch = dest / f".{component.name}.converting"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
    try:
        scratch.mkdir()
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task(component.name, total=component.nbytes)
            params = _assemble(component, scratch, lambda count: bar.advance(task, count))
            bar.update(task, description=f"{component.name}: storing")
            checkpoint.save(dest / component.name, params, overwrite=overwrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _assemble(component, scratch, advance) -> dict:
    """The parameter tree, each leaf memory-mapped from a file of its own in `scratch`."""
    params = {}
    for number, leaf in enumerate(component.plan):
        dtype, path = component.dtypes[leaf.path], scratch / str(number)
        # Written rather than assigned through a mapping: a full disk is then an error, not a signal.
        try:
            with open(path, "wb") as file:
                for key, part in leaf.parts(component.tensors):
                    for slab in _slabs(key, part, dtype):
                        file.write(slab.reshape(-1).view(np.uint8))
                        advance(slab.nbytes)
        except OSError as error:
            raise OSError(f"cannot write to {scratch.parent} ({error}): is its disk full?") from error
        params[leaf.path] = np.memmap(path, dtype, "r", shape=leaf.shape)
    return unflatten_dict(params)


def _slabs(key, part, dtype):
    """`part` in slices along its first axis, contiguous, cast and checked."""
    rows = max(1, _SLAB_BYTES // max(1, part[:1].size * dtype.itemsize))
    for start in range(0, len(part), rows):
        with np.errstate(over="ignore"):  # a value too large for float16 becomes infinite, and is caught
            slab = np.ascontiguousarray(part[start : start + rows], dtype)
        if not np.isfinite(slab).all():
            raise ValueError(
                f"{key} holds NaN or infinity in {dtype.name}: it is damaged, or needs a wider --dtype"
            )
        yield slab


def _read_config(dest) -> ModelConfig:
    path = dest / "config.json"
    if not path.exists():
        return ModelConfig(name=dest.absolute().name)
    try:
        return ModelConfig.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a model folder's: {error}; choose another DEST") from None


def _with_component(config, component) -> ModelConfig:
    changes = {component.name: component.config}
    if component.name == "transformer":
        changes["kind"] = component.kind
        presets = [name for name, preset in PRESETS.items() if preset.transformer == component.config]
        changes["name"] = presets[0] if presets else config.name
    return dataclasses.replace(config, **changes)


def _write_config(dest, config) -> ModelConfig:
    new = dest / ".config.json.new"
    new.write_text(config.to_json())
    new.replace(dest / "config.json")
    return config


def _write_tokenizer(files, dest) -> TokenizerConfig:
    new, place = dest / ".tokenizer.new", dest / "tokenizer"
    try:
        new.mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(file, new / file.name)
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    kind = "sentencepiece" if (place / "spiece.model").exists() else "tokenizers"
    return TokenizerConfig(kind=kind)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jax-causal convert`."""
    parser.add_argument("source", metavar="SOURCE", help="file, folder, or hub repository org/name[/path]")
    parser.add_argument("dest", metavar="DEST", type=Path, help="model folder to make or to add to")
    parser.add_argument("--entry", help="which dict of a .pt file (default: generator_ema, else generator)")
    parser.add_argument("--dtype", choices=DTYPES, help="store as this dtype (default: as in the source)")
    parser.add_argument("--overwrite", action="store_true", help="replace components that DEST has")
    parser.add_argument("--kind", choices=typing.get_args(Kind), help="what the transformer was trained for")
    parser.add_argument("--num-heads", type=int, metavar="N", help="heads, where they are not 128 wide")


def run(args: argparse.Namespace) -> None:
    """Converts as the parsed arguments say, and prints what was written and what the folder still lacks."""
    print(
        convert(
            **{k: v for k, v in vars(args).items() if k in convert.__kwdefaults__ or k in ("source", "dest")}
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m converters.convert`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="jax-causal convert", description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
