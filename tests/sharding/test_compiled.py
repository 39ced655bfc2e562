"""What the compiled program of a block sends and holds, strategy by strategy: read from it, not assumed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jax_causal import parallel as single
from jax_causal import rollout
from jax_causal.config import PRESETS, TransformerConfig
from jax_causal.rollout import RolloutSpec
from sharding import Sharded, causal_rope_sp
from sharding.compiled import abstract_block, compile_block
from sharding.hlo import KINDS, Program
from sharding.strategies import Workload
from tests.sharding import seeded

pytestmark = pytest.mark.sp

LAYERS, FRAMES = 3, 8
MODEL = dataclasses.replace(seeded.MODEL, transformer=dataclasses.replace(seeded.CONFIG, num_layers=LAYERS))
WIDE = dataclasses.replace(  # 12 heads
    MODEL, transformer=dataclasses.replace(MODEL.transformer, dim=96, num_heads=12)
)
STEPS, BLOCK = len(MODEL.sampler.steps), MODEL.sampler.frames_per_block
GRID = (6, 20)  # 120 tokens: no other size in these programs is, so that a whole frame shows

CASES = [
    *((name, n) for name in ("gather", "ring", "ulysses") for n in (2, 4, 8)),
    *(("hybrid", (1, 2, heads)) for heads in (2, 4)),
    ("hybrid", (1, 4, 2)),
    ("gather", 7),  # 120 tokens make short shares on 7 devices
    ("ring", 7),
    ("hybrid", (2, 2, 2)),
]
SLOW = [("gather", 4), ("gather", 7), ("ulysses", 2), ("hybrid", (1, 4, 2))]  # the others say the same
PROOFS = [("gather", 8), ("ring", 8), ("ulysses", 4), ("hybrid", (1, 2, 4)), ("ring", 7)]


def _spec(case, model=MODEL, grid=GRID, **options) -> RolloutSpec:
    parallel = seeded.parallel(case, model, **options)
    return RolloutSpec.create(model.transformer, model.sampler, grid, FRAMES, parallel=parallel)


def _work(spec) -> Workload:
    block = spec.sampler.frames_per_block
    return Workload(spec.transformer, spec.layout.tokens, block, FRAMES, bytes_per_element=4)


@functools.cache
def _compiled(case, model=MODEL, grid=GRID, *, unroll=False):
    """One video for each entry of the data axis, so that formulas for one video hold."""
    spec = _spec(case, model, grid, unroll=unroll)
    return spec, compile_block(spec, jnp.float32, batch=spec.parallel.mesh.shape["data"])


def _cases(cases):
    slow = [(pytest.mark.slow,) if case in SLOW else () for case in cases]
    params = [pytest.param(c, marks=m, id=seeded.label(c)) for c, m in zip(cases, slow, strict=True)]
    return pytest.mark.parametrize("case", params)


def test_abstract_arguments_are_those_of_a_run():
    """Else all that follows would be about another program."""
    spec = _spec(("hybrid", (1, 2, 4)), seeded.MODEL, unroll=False)
    params = seeded.params(spec)
    keys = jax.random.split(jax.random.key(0), 1)
    noise, renoise = rollout.draw_noise(spec, keys, 0, BLOCK, jnp.float32)
    cache, text = rollout.init_cache(spec, 1, jnp.float32), seeded.text(spec, params, 1)
    real = (params, cache, text, noise, renoise, spec.place(0, BLOCK))
    abstract = abstract_block(spec, jnp.float32)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for here, there in zip(*map(jax.tree.leaves, (real[:-1], abstract[:-1])), strict=True):
        assert (here.shape, here.dtype) == (there.shape, there.dtype)
        assert here.sharding.is_equivalent_to(there.sharding, here.ndim)


# Collectives.


@_cases(CASES)
def test_every_collective_is_in_the_formula(case):
    """So nothing is sent between the passes, and nothing for the cache."""
    spec, block = _compiled(case)
    sent = block.program.sent()
    assert [s.collective for s in sent] == spec.parallel.strategy.collectives(_work(spec))
    assert {s.loops for s in sent} == {(STEPS, LAYERS)}


def test_12_heads_on_8_devices():
    spec, block = _compiled(("hybrid", 8), WIDE)
    assert (spec.parallel.strategy.seq, spec.parallel.strategy.heads) == (2, 4)
    assert [s.collective for s in block.program.sent()] == spec.parallel.strategy.collectives(_work(spec))


@_cases([("gather", 2), ("hybrid", (1, 2, 2))])
def test_unrolled_layers(case):
    spec, block = _compiled(case, unroll=True)
    sent = block.program.sent()
    assert [s.collective for s in sent] == spec.parallel.strategy.collectives(_work(spec)) * LAYERS
    assert {s.loops for s in sent} == {(STEPS,)}


@_cases([("gather", 2), ("ring", 4)])
def test_context_pass(case):
    spec = _spec(case, unroll=False)
    params, cache, text, noise, _, place = abstract_block(spec, jnp.float32)
    lowered = rollout.write_context.lower(spec, params, cache, text, noise, place, jnp.float32(0))
    sent = Program(lowered.compile().as_text()).sent()
    assert [s.collective for s in sent] == spec.parallel.strategy.collectives(_work(spec))
    assert {s.loops for s in sent} == {(LAYERS,)}


def test_a_stray_collective_is_seen():
    """What the tests above would find if activations were gathered somewhere."""

    class Stray(Sharded):
        def constrain(self, x, names):
            return super().constrain(x, names[:2])

    spec = _spec(("ring", 4), unroll=False)
    fields = {field.name: getattr(spec.parallel, field.name) for field in dataclasses.fields(Sharded)}
    spec = dataclasses.replace(spec, parallel=Stray(**fields))
    sent = compile_block(spec, jnp.float32).program.sent()
    assert len(sent) > len(spec.parallel.strategy.collectives(_work(spec)))


# Rotation.


def _inside(program: Program, scope: str) -> list:
    """Instructions under a named scope of the model's code, and the loops around each."""
    return [(at, loops) for at, loops in program.walk() if f"/{scope}/" in at.scope]


@_cases(PROOFS)
def test_nothing_is_sent_before_rotation(case):
    spec, block = _compiled(case)
    program, first = block.program, block.program.sent()[0].instruction
    layer = first.computation
    rotations = {at for at, _ in _inside(program, "rope")}
    chains = set()
    for at in rotations:
        sources = program.sources(at, within=layer)
        assert not {source.opcode for source in sources} & set(KINDS)
        inputs = [s for s in sources if s.opcode == "get-tuple-element" and s.computation == layer]
        chains.add(frozenset(shape for s in inputs for shape in [(s.number("index"), *s.shapes[0])]))
    # Two chains that are no part of another: queries and keys, each from this device's rows of the activations and
    # of the table.
    chains = [own for own in chains if not any(own < other for other in chains)]
    assert len(chains) == 2
    rows, head_dim = spec.parallel.shares(spec.layout.tokens).rows, spec.head_dim
    for chain in chains:
        shapes = {shape for _, *shape in map(tuple, chain) for shape in [tuple(shape)]}
        assert {(1, BLOCK, rows, spec.transformer.dim), (2, BLOCK, rows, head_dim // 2)} <= shapes
    # What is sent first has been rotated.
    assert rotations & program.sources(first, within=layer)


@_cases(PROOFS)
def test_rotary_factors_are_local(case):
    spec, block = _compiled(case)
    program, shares = block.program, spec.parallel.shares(spec.layout.tokens)
    table = _inside(program, "rope_table")
    sources = set().union(*(program.sources(at) for at, _ in table))
    given = {at for at in sources if at.opcode == "parameter" and at.computation == program.entry}
    # From the frame factors, the place in the mesh and constants alone; nothing is received for them.
    assert {at.scope for at in given} == {"placement.frames"}
    assert "partition-id" in {at.opcode for at in sources}
    assert not {at.opcode for at in sources} & {"while", "infeed", "rng", *KINDS}
    # Once a block, outside all loops, and for the rows of this device.
    assert {loops for _, loops in table} == {()}
    shapes = {shape for at in sources | {at for at, _ in table} for shape in at.shapes}
    assert (2, BLOCK, shares.rows, spec.head_dim // 2) in shapes
    assert max(size for shape in shapes for size in shape) < spec.layout.tokens
    # All arithmetic of rotations reads it, and no layer computes cosines of its own.
    made = {at for at, _ in table}
    turning = [at for at, _ in _inside(program, "rope") if at.opcode in ("multiply", "add", "subtract")]
    assert turning
    assert all(made & program.sources(at) for at in turning)
    assert not [at for at, loops in program.walk() if at.opcode in ("cosine", "sine") and len(loops) > 1]


# Memory.


@_cases([*PROOFS, ("gather", 2)])
def test_the_cache_is_updated_in_place(case):
    spec, block = _compiled(case)
    keys = abstract_block(spec, jnp.float32)[1].k
    shape = keys.sharding.shard_shape(keys.shape)
    written = [at for at, _ in block.program.walk() if at.shapes == [shape]]
    assert "dynamic-update-slice" in {at.opcode for at in written}
    assert "copy" not in {at.opcode for at in written}


@_cases(CASES)
def test_cache_formula(case):
    spec, block = _compiled(case)
    assert block.memory["cache"] == spec.parallel.strategy.cache_bytes(_work(spec))


def _devices(*strategies):
    """Strategies on 2, 4 and 8 devices; hybrid shards heads as far as it can with two parts of the sequence."""
    cases = []
    for name in strategies:
        for n in (2, 4, 8):
            case = (name, (1, 2, n // 2) if name == "hybrid" else n)
            slow = (pytest.mark.slow,) if n == 4 or case == ("gather", 2) else ()
            cases.append(pytest.param(case, marks=slow, id=seeded.label(case)))
    return pytest.mark.parametrize("case", cases)


def _held(block) -> int:
    """Bytes of cache and activations."""
    return sum(block.memory[part] for part in ("cache", "latents", "temporaries"))


@_devices("ring", "ulysses", "hybrid")
def test_cache_and_activations_fall_with_the_devices(case):
    """192 tokens, where even one device holds all scores of a layer at once."""
    grid = (12, 16)
    _, whole = _compiled(("ring", 1), grid=grid)
    spec, block = _compiled(case, grid=grid)
    devices = spec.parallel.num_devices
    assert block.memory["cache"] * devices == whole.memory["cache"]
    assert _held(block) * devices == pytest.approx(_held(whole), rel=0.1)


# Nine tenths of the activations above are scores, which a fused kernel does not keep. So the same without them:
# attention is replaced by something of the same operands and results that keeps nothing.
FUSED = dataclasses.replace(
    MODEL,
    transformer=TransformerConfig(
        dim=256, num_layers=2, num_heads=16, ffn_dim=1536, text_dim=16, text_length=8
    ),
)


@pytest.fixture
def _no_scores(monkeypatch):
    def attention_with_lse(q, k, v, *, length=None, backend="auto"):
        k, v = (x.reshape(x.shape[0], -1, *x.shape[-2:]).astype(jnp.float32).sum(1) for x in (k, v))
        out = q.astype(jnp.float32) * (k * v)[:, None]
        return out, out.sum(-1).swapaxes(1, 2)

    def attention(q, k, v, **options):
        return attention_with_lse(q, k, v)[0].astype(q.dtype)

    monkeypatch.setattr(causal_rope_sp, "attention_with_lse", attention_with_lse)
    monkeypatch.setattr(causal_rope_sp, "attention", attention)
    monkeypatch.setattr(single, "attention", attention)


@functools.cache
def _activations(case, model, grid) -> tuple[int, int, int]:
    """Bytes of a block's activations without scores, the strategy's estimate, and what of it travels over `seq`.

    Layers are unrolled, so that the weights of one are not among them.
    """
    spec = _spec(case, model, grid, unroll=True)
    memory = compile_block(spec, jnp.float32).memory
    strategy, work = spec.parallel.strategy, _work(spec)
    over_seq = sum(c.bytes for c in strategy.collectives(work) if c.group == strategy.seq > 1)
    return memory["latents"] + memory["temporaries"], strategy.activation_bytes(work), over_seq


@_devices("gather", "ring", "ulysses", "hybrid")
@pytest.mark.usefixtures("_no_scores")
def test_activations_without_scores(case):
    name, grid = case[0], (12, 16)
    devices = _spec(case, FUSED, grid).parallel.num_devices
    whole, _, _ = _activations(("ulysses", 1), FUSED, grid)
    held, estimate, over_seq = _activations(case, FUSED, grid)
    assert 0.4 * estimate < held < 1.05 * estimate
    if name in ("ulysses", "hybrid"):
        assert held * devices == pytest.approx(whole, rel=0.1)
    if name == "ring":  # all queries and outputs of a block pass through every device
        assert held < whole / devices + 2 * over_seq


@pytest.mark.parametrize("name", ["wan-1.3b", pytest.param("wan-14b", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_no_scores")
def test_ring_at_full_size(name):
    """Against a cache of 81 frames, what passes through every device is little."""
    preset = PRESETS[name]
    short = dataclasses.replace(preset, transformer=dataclasses.replace(preset.transformer, num_layers=2))

    def held(devices):
        spec = _spec(("ring", devices), short, (30, 52))
        work = dataclasses.replace(_work(spec), config=preset.transformer, held=21)
        activations, _, _ = _activations(("ring", devices), short, (30, 52))
        return spec.parallel.strategy.cache_bytes(work) + activations

    assert held(8) * 8 == pytest.approx(held(2) * 2, rel=0.1)
