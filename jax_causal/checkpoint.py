"""Parameters on disk: one orbax checkpoint per component, restored onto any sharding and dtype.

Arrays are stored uncompressed (weights hardly compress), so that host arrays, memory-mapped ones
included, are written straight from where they lie, without a copy in memory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

# Bytes being read at a time while restoring: host memory beyond what the parameters end up in.
_READ_BYTES = 2 * 2**30

# What a write fails with where there is no more room: on the disk, for this user, or in a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# The parts of a model folder, and public weights that each can be converted from.
SOURCES = {
    "transformer": "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt",
    "vae": "Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
    "text_encoder": "Wan-AI/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "Wan-AI/Wan2.1-T2V-1.3B/google/umt5-xxl",
}


class OtherLeaves(ValueError):
    """A checkpoint does not hold the leaves that were asked for; `differences` lists them."""

    def __init__(self, message: str, differences: str):
        super().__init__(f"{message}\n{differences}")
        self.differences = differences


def missing(folder: str | os.PathLike) -> dict[str, str]:
    """What the model folder lacks: component -> a command that adds it."""
    return {
        component: f"jax-causal convert {source} {folder}"
        for component, source in SOURCES.items()
        if not Path(folder, component).exists()
    }


def save(path: str | os.PathLike, params: Mapping, *, overwrite: bool = False) -> None:
    """Writes `params` to the folder `path`: whole, or not at all.

    Args:
      path: the folder to make; its parents are made too.
      params: nested dict of jax or numpy arrays of any dtype; list indices may be int keys.
      overwrite: replace an existing checkpoint, which stays in place until the new one is complete.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False.
      OSError: the disk is full, or the folder cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} already exists: pass overwrite=True (--overwrite) to replace it")
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    is_first = jax.process_index() == 0
    if is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(new, old)
    _sync("checkpoint: ready to write")
    try:
        # Orbax writes from threads of its own. Ctrl-C reaches this one only and the executor waits for its
        # thread, so that nothing is written any more when the leftovers are removed.
        with ThreadPoolExecutor(1) as executor:
            executor.submit(_write, new, unflatten_dict(_flat(params))).result()
        if is_first:
            if path.exists():
                path.rename(old)
            new.rename(path)
    except (ValueError, OSError) as error:
        # Orbax reports a failed write of an array as ValueError, and lets that of a file of its own through.
        if isinstance(error, OSError) and error.errno not in _FULL:
            raise
        raise OSError(f"cannot write {path} ({_first_line(error)}): is its disk full?") from error
    finally:
        if is_first:
            _remove(new, old)
    _sync("checkpoint: in place")


def _write(path, params):
    options = ocp.Context()
    options.array.saving.use_compression = False
    options.memory.deepcopy_host_arrays = False
    with options, _quiet():
        ocp.save(path, params)


def _remove(*paths):
    """Removes folders, and what orbax keeps beside them while it writes them."""
    for path in paths:
        for leftover in path.parent.glob(f"{path.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def restore(path: str | os.PathLike, abstract: Mapping) -> dict:
    """Reads the checkpoint at `path` straight onto the shardings and dtypes of `abstract`.

    Args:
      path: a folder written by `save`.
      abstract: nested dict of `jax.ShapeDtypeStruct`. A leaf without a sharding goes to the first
        local device.

    Returns:
      Nested dict of jax arrays with the keys of `abstract`.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the checkpoint is damaged, or (`OtherLeaves`) its leaves are not those of `abstract`.
    """
    path = Path(path).absolute()
    if not path.exists():
        command = missing(path.parent).get(path.name, f"jax-causal convert SOURCE {path.parent}")
        raise FileNotFoundError(f"there is no checkpoint at {path}: add it, for example with `{command}`")
    damaged = f"the checkpoint at {path} is incomplete or damaged: convert it again with --overwrite"
    try:
        with _quiet():
            stored = flatten_dict(ocp.metadata(path).metadata)
    except Exception as error:
        raise ValueError(f"{damaged} (its metadata cannot be read)") from error
    wanted = _flat(abstract)
    if problems := differences(_shapes(stored), _shapes(wanted)):
        message = f"the checkpoint at {path} does not hold this model's parameters; is its config.json the right one?"
        raise OtherLeaves(message, problems)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
        for key, leaf in wanted.items()
    }
    options = ocp.Context()
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in wanted.values()), default=0)
    options.memory.read_concurrent_bytes = max(_READ_BYTES, 2 * largest)
    try:
        with options, _quiet():
            loaded = flatten_dict(ocp.load(path, unflatten_dict(targets)))
    except (jax.errors.JaxRuntimeError, MemoryError):  # the checkpoint is sound, the device too small
        raise
    except Exception as error:
        raise ValueError(f"{damaged} ({_first_line(error)})") from error
    return unflatten_dict({key: loaded[tuple(map(str, key))] for key in flatten_dict(dict(abstract))})


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What tells two sets of named shapes apart, in words, a few names of each kind; "" where they agree."""
    wrong = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of wrong shape": wrong,
    }
    return "\n".join(
        f"  {len(names)} {kind}: {'; '.join(names[:5])}{'; ...' if len(names) > 5 else ''}"
        for kind, names in kinds.items()
        if names
    )


def _shapes(leaves):
    return {".".join(path): tuple(leaf.shape) for path, leaf in leaves.items()}


def _flat(tree):
    """Path of strings -> leaf. JSON, which orbax keeps the structure in, has no int keys."""
    return {tuple(map(str, key)): leaf for key, leaf in flatten_dict(dict(tree)).items()}


@contextlib.contextmanager
def _quiet():
    """Keeps a failure from being logged, trace by trace, from every thread before it is raised."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _sync(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]
