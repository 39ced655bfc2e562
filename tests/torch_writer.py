"""Writes `.pt` / `.pth` files as `torch.save` does, without torch: a pickle of protocol 2 and one stored zip
member for each storage. Storages may be made on the fly, so a file may be larger than memory."""

import dataclasses
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
}
_ALIGNMENT = 64


@dataclasses.dataclass(eq=False)
class Storage:
    """Flat data of `size` elements; `make` returns it when it is written."""

    size: int
    dtype: np.dtype
    make: Callable[[], np.ndarray]


@dataclasses.dataclass
class Tensor:
    """A tensor over a storage, possibly shared; strides and offset count elements."""

    storage: Storage
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None


def tensor(array: np.ndarray) -> Tensor:
    """A tensor with a storage of its own."""
    return lazy(array.shape, array.dtype, lambda: array)


def lazy(shape: tuple[int, ...], dtype, make: Callable[[], np.ndarray]) -> Tensor:
    """A tensor whose values `make` returns when the file is written."""
    return Tensor(Storage(math.prod(shape), np.dtype(dtype), make), shape)


def save(path: str | Path, content, *, compress: bool = False) -> None:
    """Writes `content`: nested dicts of numpy arrays, `Tensor`s, numbers, strings and None."""
    storages: dict[Storage, str] = {}
    data = b"\x80\x02" + _pickled(content, storages) + b"."
    name = Path(path).stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        _add(archive, f"{name}/data.pkl", data)
        _add(archive, f"{name}/byteorder", b"little")
        for storage, key in storages.items():
            _add(
                archive, f"{name}/data/{key}", np.ascontiguousarray(storage.make()).reshape(-1).view(np.uint8)
            )
        _add(archive, f"{name}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data) -> None:
    """Adds a member whose data starts on an aligned offset, by padding its local header."""
    info = zipfile.ZipInfo(name)
    info.compress_type = archive.compression
    start = archive.fp.tell() + 30 + len(name) + 4
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    archive.writestr(info, data)


def _pickled(value, storages) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else _long(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(_pickled(v, storages) for v in value) + b"t"
        case Mapping():
            items = b"".join(_pickled(k, storages) + _pickled(v, storages) for k, v in value.items())
            return b"}(" + items + b"u"
        case np.ndarray():
            return _pickled(tensor(value), storages)
        case Tensor():
            return _pickled_tensor(value, storages)
    raise TypeError(f"cannot write a {type(value).__name__}")


def _long(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _pickled_tensor(value: Tensor, storages) -> bytes:
    storage = value.storage
    key = storages.setdefault(storage, str(len(storages)))
    strides = value.strides
    if strides is None:
        strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
    # ("storage", type, key, device, size) is the persistent id.
    persistent = (
        b"(" + _pickled("storage", storages) + _global("torch", _STORAGES[storage.dtype.name])
        + _pickled(key, storages) + _pickled("cpu", storages) + _pickled(storage.size, storages) + b"tQ"
    )  # fmt: skip
    arguments = b"".join(_pickled(v, storages) for v in (value.offset, tuple(value.shape), strides, False))
    hooks = _global("collections", "OrderedDict") + b")R"
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + persistent + arguments + hooks + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
