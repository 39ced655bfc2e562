"""Where the rotation ended up in a GPU's program: in one kernel with the q / k norm, not in a pass of its own; where
the kernel is ours, the write to the cache is in it too, on every device.

The programs are a fixture, written by `tests/gpu/rope_fusion.py` on a GPU or for one.
"""

import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.sp
COMMAND = "PYTHONPATH=. python tests/gpu/rope_fusion.py"


def _script():
    path = Path(__file__).parents[1] / "gpu" / "rope_fusion.py"
    spec = importlib.util.spec_from_file_location("rope_fusion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()
HEADER, PROGRAMS = SCRIPT.read()
PROGRAM = PROGRAMS["xla"]


def _producer(body, name):
    """The instruction that computes `name`, past what only renames it."""
    while body[name].opcode in ("bitcast", "get-tuple-element"):
        name = body[name].operands[0]
    return body[name]


def _kernels():
    """The fusions whose computation turns pairs, each with the instructions around it."""
    turning = {i.computation for i in SCRIPT.rotations(PROGRAM) if i.opcode in ("multiply", "concatenate")}
    for body in PROGRAM.computations.values():
        for instruction in body.values():
            if instruction.opcode == "fusion" and turning & set(instruction.calls):
                yield instruction, body


def test_fixture_is_of_the_code_here():
    assert HEADER["source"] == SCRIPT.fingerprint(), (
        f"the fixture is stale: run {COMMAND} on a GPU, or with --described, and commit it"
    )


def test_every_rotation_is_in_a_fusion():
    free = {i.opcode for i in SCRIPT.rotations(PROGRAM) if not i.computation.startswith("fused")}
    # Constants and what only renames cost nothing.
    assert free <= {"bitcast", "constant", "get-tuple-element", "fusion"}


def test_one_kernel_a_layer_takes_the_product_and_gives_rotated_heads():
    kernels = list(_kernels())
    assert len(kernels) == SCRIPT.LAYERS
    for kernel, body in kernels:
        (inside,) = (PROGRAM.computations[name] for name in kernel.calls)
        norm = [i for i in inside.values() if i.opcode == "multiply" and "/rope/" not in i.scope]
        assert norm, "the norm's factor and scale are multiplied elsewhere"
        large = [name for name in kernel.operands if body[name].nbytes >= 4680 * 1536 * 2]
        assert [_producer(body, name).opcode for name in large] == ["custom-call"], "a pass lies between"
        assert sum(1 for shape in kernel.shapes if shape[-3:] == (12, 64, 2)) == 2  # q and k
        assert kernel.type.count("bf16[") == len(kernel.shapes)


def test_our_kernel_goes_from_the_products_to_all_caches():
    """And is all there is of the rotation: no collective, no copy of a cache, no kernel between."""
    program = PROGRAMS["kernel"]
    assert not SCRIPT.rotations(program)
    around, kernels = _ours(program)
    assert len(kernels) == SCRIPT.LAYERS
    cache, block = 32760 * 1536 * 2, 784 * 3 * 1536 * 2
    for kernel in kernels:
        qk, v, received, *caches = (name for name in kernel.operands if around[name].nbytes >= block)
        assert [around[name].nbytes for name in (qk, v, received)] == [2 * block, block, block]
        assert "matmul" in _producer(around, qk).attributes
        assert _producer(around, received).opcode == "collective-permute-done"
        assert [around[name].nbytes for name in caches] == [cache, cache]
        # Keys, values and what counts arrivals are the operands themselves.
        aliased = re.search(r"output_to_operand_aliasing={(.*?)}, api", kernel.attributes)[1]
        assert len(re.findall(r"{\d}: \(\d+, {}\)", aliased)) == 3
        assert "uses_xla_collective_metadata = true" in kernel.attributes


def test_values_travel_while_queries_and_keys_are_multiplied():
    """And nothing else does."""
    program = PROGRAMS["kernel"]
    around, kernels = _ours(program)
    order = list(around)
    assert [sent.collective.kind for sent in program.sent()] == ["collective-permute"] * len(kernels)
    for kernel, sent in zip(kernels, program.sent(), strict=True):
        assert sent.collective.bytes == 784 * 3 * 1536 * 2
        assert "COLLECTIVES_PEER_MEMORY" in sent.instruction.attributes  # by the copy engine
        start = around[sent.instruction.operands[0]]
        assert "matmul" in _source(around, start.operands[0]).attributes
        qk = _producer(around, kernel.operands[0])
        assert order.index(start.name) < order.index(qk.name) < order.index(sent.instruction.name)


def test_no_cache_is_copied_within_a_pass():
    """Behind the first layer, where devices wait for each other, a peer may write to it: what the loop carries is what
    the kernels take."""
    around, kernels = _ours(PROGRAMS["kernel"])
    cache = 32760 * 1536 * 2
    for kernel in kernels:
        before = [_producer(around, name) for name in kernel.operands if around[name].nbytes == cache]
        assert [instruction.opcode for instruction in before] == ["parameter"] * 2
    assert not [i for i in around.values() if i.opcode == "copy" and i.nbytes >= cache]


def _ours(program):
    """The instructions around our kernels, in order, and these."""
    (body,) = {i.computation for c in program.computations.values() for i in c.values() if _is_ours(i)}
    around = program.computations[body]
    return around, [i for i in around.values() if _is_ours(i)]


def _source(around, name):
    """`_producer`, past a barrier too."""
    while (found := _producer(around, name)).opcode == "tuple":
        name = found.operands[0]
    return found


def _is_ours(instruction):
    return instruction.opcode == "custom-call" and "/rotate_into_caches/" in instruction.scope
