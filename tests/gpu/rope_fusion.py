"""Writes the fixture of `tests/sharding/test_rope_fusion.py`: a block's passes as XLA optimised them for GPUs.

    PYTHONPATH=. python tests/gpu/rope_fusion.py              # on the GPU; writes tests/gpu/rope_fusion.hlo.gz
    PYTHONPATH=. python tests/gpu/rope_fusion.py --described  # anywhere, for the H200 described in compiled_for.py
    PYTHONPATH=. python tests/gpu/rope_fusion.py --print      # only says where the rotation is in the fixture

The program is the denoising step of two layers of the 1.3B shape, in bf16, through the `shard_map` of Causal-RoPE SP:
once as XLA fuses it, on one GPU ("xla"), and once by the kernels of `fused_rotation`, on two ("kernel"); and by these
the context pass ("context"). Run it again, and commit the file, whenever the test says that the fixture is stale.
"""

import argparse
import ast
import dataclasses
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

import sharding
from jax_causal import (
    attention_hopper,
    attention_plan,
    attention_tile,
    config,
    environment,
    fused_norm,
    fused_rotation,
    fused_values,
    hopper_rows,
    peer_memory,
    rollout,
)
from sharding import direct, mesh, sequence_parallel
from sharding.compiled import abstract_block
from sharding.hlo import Instruction, Program
from sharding.mesh import make_mesh
from sharding.sequence_parallel import Sharded
from tests.gpu import compiled_for

FIXTURE = Path(__file__).with_name("rope_fusion.hlo.gz")
LAYERS = 2
FORMS = {"xla": 1, "kernel": 2, "context": 2}  # how the layers run, and on how many devices
SOURCES = (
    attention_hopper, attention_plan, attention_tile, direct, fused_norm, fused_rotation, fused_values, hopper_rows,
    mesh, peer_memory, sequence_parallel,
)  # fmt: skip
_BETWEEN = "\n=====\n"
# Versions of jax write these in different ways, and indices too; what is computed does not depend on them.
_MOVES = ("slice", "squeeze", "unstack", "pvary")


class Unfused(Sharded):
    """Without kernels of ours but that of attention."""

    def fuses(self, tokens, heads, head_dim, dtype):
        return False


def fingerprint() -> str:
    """SHA-256 of the program as traced, without kernels, and of the code of the kernels and what runs them."""
    spec, arguments = _block("xla", jax.devices()[:1], backend="xla")
    traced = jax.make_jaxpr(lambda *x: rollout.denoise_block(spec, *x))(*arguments)
    kernel = [_written_out(ast.parse(Path(x.__file__).read_text())) for x in SOURCES]
    return hashlib.sha256("\n".join([*_operations(traced.jaxpr), *kernel]).encode()).hexdigest()


def _operations(jaxpr) -> Iterator[str]:
    """Every primitive that gives floating-point arrays, with the types of its results, in order, those of inner
    programs included."""
    for equation in jaxpr.eqns:
        results = [v.aval for v in equation.outvars if getattr(v.aval, "shape", ())]
        floats = any(jnp.issubdtype(aval.dtype, jnp.floating) for aval in results)
        if floats and equation.primitive.name not in _MOVES:
            types = (
                f"{getattr(v.aval, 'dtype', '')}{getattr(v.aval, 'shape', '')}" for v in equation.outvars
            )
            yield f"{equation.primitive.name}: {', '.join(types)}"
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _operations(inner)


def _written_out(node) -> str:
    """A syntax tree as text, without comments and docstrings, that is the same under every version of Python: what is
    empty is left out."""
    if isinstance(node, list):
        return "".join(map(_written_out, node))
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return f"{type(node).__name__}({','.join(f'{name}={_written_out(value)}' for name, value in fields)})"


def _block(form: str, devices, backend: str = "auto"):
    """Spec and abstract arguments of a block step of two layers on the devices, unrolled as on a GPU."""
    model = config.PRESETS["wan-1.3b"]
    model = dataclasses.replace(model, transformer=dataclasses.replace(model.transformer, num_layers=LAYERS))
    grid = (model.height // 16, model.width // 16)
    shared = make_mesh(devices, len(devices), 1)
    how = sharding.SequenceParallel(mesh=shared, strategy="gather", backend=backend, unroll=True)
    parallel = how.for_model(model)
    if form == "xla":
        parallel = Unfused(**{x.name: getattr(parallel, x.name) for x in dataclasses.fields(parallel)})
    spec = rollout.RolloutSpec.create(model.transformer, model.sampler, grid, 21, parallel=parallel)
    return spec, abstract_block(spec, jnp.bfloat16)


def compile_text(form: str, devices, *, described: bool) -> str:
    """The optimised program for the devices, real or described."""
    spec, arguments = _block(form, devices)
    if form == "context":
        params, cache, text, x0, _, place = arguments
        lowered = rollout.write_context.lower(spec, params, cache, text, x0, place, jnp.float32(0))
    else:
        lowered = rollout.denoise_block.lower(spec, *arguments)
    if described:
        return compiled_for.compiled_text(lowered)
    return re.sub(r'"[^"\n]{2000,}"', '""', lowered.compile().as_text())  # without the code of Pallas kernels


def read() -> tuple[dict, dict[str, Program]]:
    """What the fixture says of itself, and its programs by form."""
    header, _, text = gzip.decompress(FIXTURE.read_bytes()).decode().partition("\n")
    return json.loads(header), dict(zip(FORMS, map(Program, text.split(_BETWEEN)), strict=True))


def rotations(program: Program) -> list[Instruction]:
    """Instructions that the model's code names as the rotation of queries and keys."""
    found = (i for body in program.computations.values() for i in body.values())
    return [i for i in found if "/rope/" in i.scope]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--print", action="store_true", dest="show")
    parser.add_argument("--described", action="store_true")
    parser.add_argument("--output", type=Path, default=FIXTURE)
    args = parser.parse_args()
    if not args.show:
        environment.apply()  # a kernel sends under its flags alone
        if args.described:
            jax.config.update("jax_num_cpu_devices", max(FORMS.values()))  # as many as are described
        devices = compiled_for.described_cards(max(FORMS.values())) if args.described else jax.devices()
        kind = f"{devices[0].device_kind}, described" if args.described else devices[0].device_kind
        texts = [
            compile_text(form, devices[:count], described=args.described) for form, count in FORMS.items()
        ]
        header = {"source": fingerprint(), "jax": jax.__version__, "device": kind}
        args.output.write_bytes(
            gzip.compress(f"{json.dumps(header)}\n{_BETWEEN.join(texts)}".encode(), 9, mtime=0)
        )
        print(header, args.output.stat().st_size, "bytes")
        return
    header, programs = read()
    print(header)
    for form, program in programs.items():
        for name in sorted({i.computation for i in rotations(program)}):
            inside = [i for i in rotations(program) if i.computation == name]
            print(
                form, name, len(inside), sorted({i.opcode for i in inside}), inside[-1].type, inside[-1].scope
            )


if __name__ == "__main__":
    main()
