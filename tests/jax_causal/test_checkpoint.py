"""Saving and restoring parameters: exact, onto any sharding and dtype, whole or not at all."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_causal import checkpoint

ROOT = Path(__file__).parents[2]


def tree():
    """Jax and numpy arrays of several dtypes, lists with more than ten elements, a scalar."""
    rng = np.random.default_rng(0)
    return {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.float32)},
        "list": {i: {"scale": np.full(2, i, ml_dtypes.bfloat16)} for i in range(12)},
        "half": rng.normal(size=(4, 4)).astype(np.float16),
        "bias": jnp.asarray(rng.normal(size=16), jnp.bfloat16),
        "step": jnp.int32(7),
    }


def abstract(params, dtype=None, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding), params)


def assert_same(restored, params):
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_is_exact(tmp_path):
    params = tree()
    checkpoint.save(tmp_path / "deep" / "params", params)
    assert_same(checkpoint.restore(tmp_path / "deep" / "params", abstract(params)), params)
    assert os.listdir(tmp_path / "deep") == ["params"]


def test_memory_mapped_arrays(tmp_path):
    values = np.arange(600, dtype=np.float32).reshape(20, 30)
    values.tofile(tmp_path / "file")
    mapped = np.memmap(tmp_path / "file", np.float32, "r", shape=(20, 30))
    checkpoint.save(tmp_path / "params", {"a": mapped})
    restored = checkpoint.restore(tmp_path / "params", abstract({"a": values}))
    np.testing.assert_array_equal(restored["a"], values)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_cast_on_the_way(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    checkpoint.save(tmp_path / "params", {"a": values})
    restored = checkpoint.restore(tmp_path / "params", abstract({"a": values}, dtype))["a"]
    assert restored.dtype == dtype
    np.testing.assert_array_equal(np.asarray(restored), values.astype(dtype))


@pytest.mark.parametrize("spec", [(), (None, "x"), ("x",), (("x", "y"),)])
def test_restores_onto_a_sharding(tmp_path, spec):
    """The sharding that was saved does not matter; the one that is asked for is the one that comes."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    saved = jax.device_put(values, jax.NamedSharding(mesh, jax.P("y", "x")))
    checkpoint.save(tmp_path / "params", {"a": saved, "b": values})
    wanted = jax.NamedSharding(mesh, jax.P(*spec))
    restored = checkpoint.restore(tmp_path / "params", abstract({"a": values, "b": values}, sharding=wanted))
    for name in "ab":
        assert restored[name].sharding.is_equivalent_to(wanted, 2)
        np.testing.assert_array_equal(np.asarray(restored[name]), values)


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    checkpoint.save(tmp_path / "params", {"a": jnp.zeros(2)})
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        checkpoint.save(tmp_path / "params", {"b": jnp.ones(3)})
    assert_same(checkpoint.restore(tmp_path / "params", abstract({"a": jnp.zeros(2)})), {"a": jnp.zeros(2)})
    checkpoint.save(tmp_path / "params", {"b": jnp.ones(3)}, overwrite=True)
    assert_same(checkpoint.restore(tmp_path / "params", abstract({"b": jnp.ones(3)})), {"b": jnp.ones(3)})
    assert os.listdir(tmp_path) == ["params"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    """Files are limited to 1 MB in another process, as a full disk would limit them."""
    old = {"a": jnp.arange(3.0)}
    checkpoint.save(tmp_path / "params", old)
    code = (
        "import resource, sys, numpy as np; from jax_causal import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try: checkpoint.save(sys.argv[1], {'a': np.zeros(2**20)}, overwrite=True)\n"
        "except OSError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "params"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "is its disk full?" in result.stdout
    assert "ERROR" not in result.stderr  # told once, by the exception
    assert os.listdir(tmp_path) == ["params"]
    assert_same(checkpoint.restore(tmp_path / "params", abstract(old)), old)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".params.new.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoint.save(tmp_path / "params", {"a": jnp.zeros(2)})
    assert os.listdir(tmp_path) == ["params"]


def test_a_missing_checkpoint_names_the_command_that_adds_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"`jax-causal convert \S+/Wan2\.1_VAE\.pth {tmp_path}`"):
        checkpoint.restore(tmp_path / "vae", {})
    (tmp_path / "vae").mkdir()
    assert set(checkpoint.missing(tmp_path)) == {"transformer", "text_encoder", "tokenizer"}


def test_other_leaves_and_shapes_are_listed(tmp_path):
    params = tree()
    checkpoint.save(tmp_path / "params", params)
    wanted = abstract(params)
    del wanted["bias"], wanted["list"][11]
    wanted["extra"] = {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}
    wanted["half"] = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    with pytest.raises(ValueError) as error:
        checkpoint.restore(tmp_path / "params", wanted)
    message = str(error.value)
    assert "1 missing: extra.kernel" in message
    assert "2 unexpected: bias; list.11.scale" in message
    assert "1 of wrong shape: half is (4, 4), expected (4, 5)" in message


# Orbax leaves failed reads behind to be collected; they are reported below through our own exception.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_damaged_checkpoints_say_so(tmp_path, damage):
    params = {"a": np.arange(5000, dtype=np.float32), "b": jnp.ones(3)}
    checkpoint.save(tmp_path / "params", params)
    state = tmp_path / "params" / "state"
    largest = max((p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    for file in (largest, state / "_METADATA", state / "manifest.ocdbt"):
        whole = file.read_bytes()
        if damage == "cut":
            file.write_bytes(whole[: len(whole) // 2])
        else:
            file.unlink()
        with pytest.raises(ValueError, match="incomplete or damaged: convert it again with --overwrite"):
            checkpoint.restore(tmp_path / "params", abstract(params))
        file.write_bytes(whole)
    gc.collect()
    assert_same(checkpoint.restore(tmp_path / "params", abstract(params)), params)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match="incomplete or damaged"):
        checkpoint.restore(tmp_path / "params", {"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
