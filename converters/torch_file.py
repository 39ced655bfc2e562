"""Reads `.pt` / `.pth` files without torch, and without running anything that their pickle asks for.

Such a file is a zip archive: `data.pkl` describes the tensors, and each storage is an uncompressed
member. The pickle may name tensors, storages and plain containers and nothing else; tensors come back as
read-only numpy views of the memory-mapped file, so that nothing is read before it is used and pages
belong to the file rather than to the process.
"""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_LEGACY_PREFIX = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch < 1.6, pickled
_LOCAL_HEADER = 30  # bytes of a zip member's local header before its name


class _Refused(Exception):
    """The pickle names something that is not a tensor; the message is the name."""


def open_torch_file(path: str | os.PathLike) -> Any:
    """What `torch.save` was given, with every tensor as a read-only, memory-mapped numpy array.

    Args:
      path: a `.pt` or `.pth` file in torch's zip format (torch 1.6 and later).

    Returns:
      The saved object: usually a dict of tensors, or a dict of such dicts. bfloat16 and float8 come
      back as `ml_dtypes`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, not of this format, or its pickle imports anything but tensors.
    """
    name = os.fspath(path)
    try:
        with zipfile.ZipFile(name) as archive:
            return _Reader(name, archive).load()
    except zipfile.BadZipFile:
        raise ValueError(_why_not_a_zip(name)) from None


def _why_not_a_zip(name: str) -> str:
    with open(name, "rb") as file:
        start = file.read(len(_LEGACY_PREFIX))
    if start == _LEGACY_PREFIX:
        return (
            f"{name} is in the legacy format of torch before 1.6. Where torch is installed, save it anew: "
            "torch.save(torch.load(PATH, weights_only=True), NEW_PATH)"
        )
    if start[:2] == b"PK":
        return f"{name} is truncated or damaged: download or copy it again"
    return f"{name} is not a torch file (it is neither a zip archive nor a pickle of torch's)"


class _Reader(pickle.Unpickler):
    """Unpickles `data.pkl` with an allow-list in place of imports."""

    def __init__(self, name: str, archive: zipfile.ZipFile):
        self._name = name
        self._members = {info.filename: info for info in archive.infolist()}
        pickles = [member for member in self._members if member.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{name} is a zip archive, but not one that torch.save wrote (no data.pkl)")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in self._members and archive.read(f"{self._root}byteorder") == b"big":
            raise ValueError(
                f"{name} was written on a big-endian machine: save it anew on a little-endian one"
            )
        self._bytes = np.memmap(name, np.uint8, "r")
        super().__init__(archive.open(pickles[0]))

    def load(self) -> Any:
        try:
            return super().load()
        except _Refused as error:
            raise ValueError(
                f"{self._name} is refused: its pickle imports {error}, and only tensors in plain containers "
                "are read. If you trust where it comes from, load it where torch is installed and save the "
                "weights alone: torch.save(model.state_dict(), NEW_PATH)"
            ) from None
        except ValueError:
            raise
        except Exception as error:  # a damaged pickle can fail in any way
            raise ValueError(f"{self._name} is damaged: {type(error).__name__} in its pickle") from error

    def find_class(self, module: str, name: str) -> Any:
        """What stands in for an import: nothing here has state that a pickle could build on to do harm."""
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch", "Size":
                return tuple
            case "torch", _ if name in _DTYPES:
                return name
            case "torch", _ if name in _STORAGES:
                return _STORAGES[name]
            case "torch.storage", "UntypedStorage":
                return "uint8"
            case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3":
                return self._tensor
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return lambda data, *_: data
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """The storage that `pid` = ("storage", type, key, device, number of elements) names, flat."""
        _, dtype, key, _, size = pid
        dtype = np.dtype(_DTYPES[dtype])
        info = self._members.get(f"{self._root}data/{key}")
        if info is None:
            raise ValueError(f"{self._name} is incomplete: it lacks the storage {key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                f"{self._name} holds compressed members, which cannot be memory-mapped: load it where torch "
                "is installed and save it anew with torch.save"
            )
        # The local header repeats the name, and has an extra field of its own (torch aligns data with it).
        header = self._bytes[info.header_offset : info.header_offset + _LOCAL_HEADER]
        name_and_extra = header[26:30].view("<u2")
        start = info.header_offset + _LOCAL_HEADER + int(name_and_extra.sum(dtype=np.int64))
        stop = start + size * dtype.itemsize
        if size * dtype.itemsize > info.file_size or stop > len(self._bytes):
            raise ValueError(f"{self._name} is truncated: the storage {key} ends early")
        return self._bytes[start:stop].view(dtype)

    def _tensor(self, storage, offset, shape, strides, _grad=False, _hooks=None, dtype=None, _meta=None):
        if dtype is not None:  # `_rebuild_tensor_v3`: an untyped storage
            storage = storage.view(_DTYPES[dtype])
        itemsize = storage.dtype.itemsize
        strides = tuple(stride * itemsize for stride in strides)
        try:
            return np.ndarray(shape, storage.dtype, storage, offset * itemsize, strides)
        except ValueError:
            raise ValueError(f"{self._name} is damaged: a tensor reaches beyond its storage") from None
