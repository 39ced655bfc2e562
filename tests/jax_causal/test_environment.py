"""What JAX finds in the environment when the command line starts it."""

from jax_causal import environment


def test_the_environment_gets_defaults(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    environment.apply(environ)
    assert environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jax_causal" / "xla")
    assert (tmp_path / "jax_causal" / "xla").is_dir()
    assert environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert "--xla_gpu_enable_triton_gemm=false" in environ["XLA_FLAGS"].split()
    assert "JAX_PLATFORMS" not in environ
    again = dict(environ)
    environment.apply(again)
    assert again == environ


def test_what_the_user_set_wins(tmp_path):
    given = {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_COMPILATION_CACHE_DIR": "",
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=true --xla_dump_to=/tmp/x",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        "JAX_PLATFORMS": "cuda",
    }
    environ = dict(given)
    environment.apply(environ, platform="cpu")
    flags = environ.pop("XLA_FLAGS").split()
    assert flags[:2] == given.pop("XLA_FLAGS").split()
    assert sum("triton_gemm" in flag for flag in flags) == 1
    assert environ.items() >= given.items()
    assert "XLA_CLIENT_MEM_FRACTION" not in environ
    assert not list(tmp_path.iterdir())


def test_a_cache_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    environment.apply(environ)
    assert "JAX_COMPILATION_CACHE_DIR" not in environ


def test_several_devices_load_all_code_before_it_runs():
    environ = {"JAX_COMPILATION_CACHE_DIR": ""}
    environment.apply(environ, devices=1)
    assert "CUDA_MODULE_LOADING" not in environ
    environment.apply(environ, devices=2)
    assert environ["CUDA_MODULE_LOADING"] == "EAGER"


def test_memory_is_reserved_unless_others_need_it():
    environ = {"JAX_COMPILATION_CACHE_DIR": ""}
    environment.apply(environ)
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in environ
    environment.apply(environ, reserve=False)
    assert environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
