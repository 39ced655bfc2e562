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


OURS = pytest.mark.parametrize("program", [PROGRAMS["kernel"], PROGRAMS["context"]], ids=["loop", "context"])
CACHE = 32760 * 1536 * 2
BLOCK = (
    792 * 3 * 1536 * 2
)  # rows of the first of two devices; the last has 768, which are 18 tiles of queries


@OURS
def test_our_kernel_goes_from_the_products_to_all_caches(program):
    """And is all there is of the rotation: no collective, no copy of a cache, no kernel between. The host need not stop
    for it."""
    assert not SCRIPT.rotations(program)
    around, kernels = _ours(program)
    assert len(kernels) == SCRIPT.LAYERS
    for kernel in kernels:
        qk, v, received, *caches = (name for name in kernel.operands if around[name].nbytes >= BLOCK)
        assert [around[name].nbytes for name in (qk, v, received)] == [2 * BLOCK, BLOCK, BLOCK]
        assert "matmul" in _producer(around, qk).attributes
        assert _producer(around, received).opcode == "collective-permute-done"
        assert [around[name].nbytes for name in caches] == [CACHE, CACHE]
        # Keys, values and what counts arrivals are the operands themselves.
        aliased = re.search(r"output_to_operand_aliasing={(.*?)}, api", kernel.attributes)[1]
        assert len(re.findall(r"{\d}: \(\d+, {}\)", aliased)) == 3
        assert "uses_xla_collective_metadata = false" in kernel.attributes


@OURS
def test_our_kernel_needs_no_kernel_for_small_operands(program):
    """Of its layer alone: they are constants, or all layers' ones."""
    around, kernels = _ours(program)
    small = [
        {_producer(around, name).name for name in kernel.operands if around[name].nbytes < 1e5}
        for kernel in kernels
    ]
    own = set.union(*small) - set.intersection(*small)
    # A tuple is what is left of a barrier, around counts from the custom call that begins the pass.
    assert {around[name].opcode for name in own} <= {"constant", "parameter", "custom-call", "tuple"}
    constants = [
        [around[name].arguments for name in kernel.operands if around[name].opcode == "constant"]
        for kernel in kernels
    ]
    assert constants == [[f"{{{layer}}}"] for layer in range(SCRIPT.LAYERS)]


@OURS
def test_values_travel_while_queries_and_keys_are_multiplied(program):
    """And nothing else does but a number for each pass, at which hosts meet before the kernel that begins it."""
    around, kernels = _ours(program)
    order = list(around)
    meeting, *values = program.sent()
    assert {sent.collective.kind for sent in program.sent()} == {"collective-permute"}
    assert meeting.collective.bytes == 4
    (begin,) = [i for i in around.values() if _is_ours(i, "reach_caches")]
    assert meeting.instruction in program.sources(begin, within=begin.computation)
    for kernel, sent in zip(kernels, values, strict=True):
        assert sent.collective.bytes == BLOCK
        assert "COLLECTIVES_PEER_MEMORY" in sent.instruction.attributes  # by the copy engine
        start = around[sent.instruction.operands[0]]
        assert "matmul" in _source(around, start.operands[0]).attributes
        qk = _producer(around, kernel.operands[0])
        assert order.index(start.name) < order.index(qk.name) < order.index(sent.instruction.name)


@OURS
def test_no_cache_is_copied_within_a_pass(program):
    """Once devices have waited for each other and told their addresses, which is once a pass, peers write there: what
    the loop carries, or the program is given, is what that kernel takes and what the layers' kernels take from it."""
    around, kernels = _ours(program)
    (begin,) = [i for i in around.values() if _is_ours(i, "reach_caches")]
    assert "skip_device_barrier = false" in begin.attributes
    assert "uses_xla_collective_metadata = true" in begin.attributes
    caches = [_producer(around, name) for name in begin.operands if around[name].nbytes == CACHE]
    assert [instruction.opcode for instruction in caches] == ["parameter"] * (2 * SCRIPT.LAYERS)
    # They are its first results behind the addresses, in place.
    aliased = re.search(r"output_to_operand_aliasing={(.*?)}, api", begin.attributes)[1]
    assert all(f"{{{number + 1}}}: ({number}, {{}})" in aliased for number in range(len(caches)))
    taken = [
        _whole(around, name) for kernel in kernels for name in kernel.operands if around[name].nbytes == CACHE
    ]
    assert {instruction.operands[0] for instruction in taken} == {begin.name}
    layers = range(1, SCRIPT.LAYERS + 1)  # keys of all, then values of all
    assert [_number(instruction) for instruction in taken] == [
        number for layer in layers for number in (layer, SCRIPT.LAYERS + layer)
    ]
    assert not [i for i in around.values() if i.opcode == "copy" and i.nbytes >= CACHE]


def _whole(around, name):
    """The `get-tuple-element` that `name` renames."""
    while around[name].opcode == "bitcast":
        name = around[name].operands[0]
    assert around[name].opcode == "get-tuple-element"
    return around[name]


def _number(instruction):
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


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


def _is_ours(instruction, name="rotate_into_caches"):
    return instruction.opcode == "custom-call" and f"/{name}/" in instruction.scope
