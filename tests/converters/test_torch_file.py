"""Reading `.pt` files without torch. The writer was checked against torch: torch.load reads its files."""

import os
import pickle
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest

from converters.torch_file import open_torch_file
from tests import torch_writer
from tests.torch_writer import Storage, Tensor


def raw(path, data: bytes, **members: bytes):
    """A zip archive with the given pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8]
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 1, 4), (0, 3)])
def test_values_and_dtypes(path, dtype, shape):
    array = np.random.default_rng(0).uniform(0, 9, shape).astype(dtype)
    torch_writer.save(path, {"a": array})
    read = open_torch_file(path)["a"]
    assert read.dtype == dtype
    assert read.shape == shape
    np.testing.assert_array_equal(read, array)


def test_containers_keep_their_structure(path):
    content = {
        "generator": {"a": np.ones(2, np.float32)},
        "step": 600,
        "big": 2**40,
        "lr": 0.5,
        "name": "é",
        "none": None,
    }
    content |= {"flag": True, "betas": (0.0, 0.999)}
    torch_writer.save(path, content)
    read = open_torch_file(path)
    np.testing.assert_array_equal(read["generator"].pop("a"), np.ones(2, np.float32))
    assert read == content | {"generator": {}}


def test_strides_offsets_and_shared_storages(path):
    data = np.arange(24, dtype=np.float32)
    storage = Storage(24, data.dtype, lambda: data)
    tensors = {
        "whole": Tensor(storage, (4, 6)),
        "transposed": Tensor(storage, (6, 4), 0, (1, 6)),
        "window": Tensor(storage, (2, 2), 8, (6, 1)),
        "expanded": Tensor(storage, (3, 2), 5, (0, 1)),
    }
    torch_writer.save(path, tensors)
    read = open_torch_file(path)
    whole = data.reshape(4, 6)
    np.testing.assert_array_equal(read["whole"], whole)
    np.testing.assert_array_equal(read["transposed"], whole.T)
    np.testing.assert_array_equal(read["window"], whole[1:3, 2:4])
    np.testing.assert_array_equal(read["expanded"], [[5, 6]] * 3)
    assert np.shares_memory(read["whole"], read["transposed"])
    with zipfile.ZipFile(path) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1


def test_tensors_are_mapped_and_read_only(path):
    torch_writer.save(path, {"a": np.zeros(3, np.float32)})
    read = open_torch_file(path)["a"]
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 1
    data = path.read_bytes()
    where = data.index(bytes(12), data.index(b"data/0"))
    with open(path, "r+b") as file:
        file.seek(where + (-where % 4))
        file.write(np.float32(7).tobytes())
    assert read[0] == 7  # not a copy: what is in the file is what is seen


def test_parameters_state_dicts_and_untyped_storages(path):
    """What `torch.save` writes for an nn.Parameter, a state dict, and a dtype without a typed storage."""
    storage = b"(X\x07\x00\x00\x00storage%sX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
    empty = b"ccollections\nOrderedDict\n)R"
    typed = storage % b"ctorch\nByteStorage\n"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + typed
        + b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89"
        + empty
        + b"tR"
    )
    untyped = storage % b"ctorch.storage\nUntypedStorage\n"
    float8 = (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + untyped + b"K\x00K\x06\x85K\x01\x85\x89" + empty
        + b"ctorch\nfloat8_e4m3fn\ntR"
    )  # fmt: skip
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x88" + empty + b"tR"
    # An ordered dict with an attribute, as state dicts have their `_metadata`.
    state = empty + b"(X\x01\x00\x00\x00p" + parameter + b"X\x01\x00\x00\x00f" + float8 + b"u"
    state += b"}X\x09\x00\x00\x00_metadata" + empty + b"sb"
    raw(path, b"\x80\x02" + state + b".", **{"data/0": bytes(range(48, 54))})
    read = open_torch_file(path)
    np.testing.assert_array_equal(read["p"], np.arange(48, 54, dtype=np.uint8).reshape(2, 3))
    np.testing.assert_array_equal(read["f"], np.arange(48, 54, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn))


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickle_code_is_not_run(path, tmp_path):
    raw(path, pickle.dumps({"a": Evil(str(tmp_path / "made"))}, protocol=2))
    with pytest.raises(ValueError, match=r"refused: its pickle imports posix\.mkdir.*save the weights"):
        open_torch_file(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "os.system",
        "torch.nn.modules.linear.Linear",
        "torch.load",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "numpy.dtype",
        "collections.defaultdict",
        "argparse.Namespace",
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_only_tensors_may_be_named(path, name, protocol):
    module, _, attribute = name.rpartition(".")
    if protocol == 2:
        named = f"c{module}\n{attribute}\n".encode()
    else:
        named = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, attribute)) + b"\x93"
    raw(path, b"\x80" + bytes([protocol]) + named + b".")
    with pytest.raises(ValueError, match=f"imports {name}, and only tensors"):
        open_torch_file(path)


def test_a_tensor_cannot_reach_beyond_its_storage(path):
    storage = Storage(6, np.dtype(np.float32), lambda: np.zeros(6, np.float32))
    for shape, offset, strides in [
        ((7,), 0, (1,)),
        ((2, 3), 1, (3, 1)),
        ((2,), 0, (-1,)),
        ((2,), 0, (2**40,)),
    ]:
        torch_writer.save(path, {"a": Tensor(storage, shape, offset, strides)})
        with pytest.raises(ValueError, match="reaches beyond its storage"):
            open_torch_file(path)


def test_a_storage_cannot_claim_more_than_its_member(path):
    torch_writer.save(
        path, {"a": Tensor(Storage(4000, np.dtype(np.float32), lambda: np.zeros(6, np.float32)), (2,))}
    )
    with pytest.raises(ValueError, match="the storage 0 ends early"):
        open_torch_file(path)


def test_a_missing_storage(path):
    storage = b"(X\x07\x00\x00\x00storagectorch\nByteStorage\nX\x01\x00\x00\x007X\x03\x00\x00\x00cpuK\x06tQ"
    raw(path, b"\x80\x02" + storage + b".")
    with pytest.raises(ValueError, match="lacks the storage 7"):
        open_torch_file(path)


def test_truncated_files(path):
    torch_writer.save(path, {"a": np.ones((8, 8), np.float32), "b": np.ones(5, np.float32)})
    whole = path.read_bytes()
    for length in range(2, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged: download or copy it again"):
            open_torch_file(path)


def test_damaged_files_give_one_kind_of_error(path):
    torch_writer.save(path, {"a": np.ones((2, 2), np.float32), "b": {"c": np.ones(5, np.float32)}, "d": 3})
    whole = path.read_bytes()
    rng = random.Random(0)
    outcomes = set()
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole) // 2)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            open_torch_file(path)
            outcomes.add("read")
        except ValueError as error:
            outcomes.add("refused" if str(path) in str(error) else f"unclear: {error}")
    assert outcomes == {"read", "refused"}


def test_formats_that_cannot_be_mapped_say_how_to_save_anew(path):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"\x80\x02M\xe9\x03.")
    with pytest.raises(ValueError, match=r"legacy format.*torch\.save"):
        open_torch_file(path)
    torch_writer.save(path, {"a": np.zeros(100, np.float32)}, compress=True)
    with pytest.raises(ValueError, match=r"compressed members.*torch\.save"):
        open_torch_file(path)
    raw(path, b"\x80\x02N.", byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        open_torch_file(path)


def test_other_files(path, tmp_path):
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="not a torch file"):
        open_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"not one that torch\.save wrote"):
        open_torch_file(path)
    with pytest.raises(FileNotFoundError):
        open_torch_file(tmp_path / "absent.pt")
