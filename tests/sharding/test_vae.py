"""The VAE with its width sharded: the same frames, an honest share of the work, and halos for communication."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import modules, rollout
from jax_causal.components import decode_chunk
from jax_causal.config import PRESETS, VAEConfig
from jax_causal.rollout import RolloutSpec
from jax_causal.vae import VAE
from jax_causal.vae_layers import ACTIVATION_AXES
from sharding import halo
from tests.sharding import seeded

pytestmark = pytest.mark.sp
ATOL = 1e-5

# With fewer channels some norms divide by next to nothing, and rounding shows.
CONFIG = VAEConfig(dim=8, multipliers=(1, 2, 1), num_res_blocks=1, temporal_downsample=(True, False))
HEIGHT = 4  # of the latents

# (devices, latent width). Columns on each device: 2; 1.5, so that one device has none; less than one, though the
# finer stages divide; with a batch on an axis of its own.
CASES = {
    "even": (("gather", 8), 16),
    "two": (("gather", 2), 8),
    "uneven": (("gather", 8), 12),
    "narrow": (("ring", 8), 6),
    "heads": (("ulysses", 4), 8),
    "data": (("auto", (2, 2, 2)), 8),
}


def _cases(always, slow):
    return [pytest.param(n, marks=() if n in always else (pytest.mark.slow,), id=n) for n in (*always, *slow)]


@functools.cache
def _params():
    return jax.jit(functools.partial(modules.init, VAE, CONFIG))(jax.random.key(0))


def _on(parallel):
    return jax.device_put(_params(), parallel.shardings(_params(), "vae"))


def _stream(method, parallel, x, cuts):
    """`x` cut along its frames, through a method of the VAE; the outputs joined."""
    how = {"constrain": parallel.constrain, "halo": parallel.halo} if parallel else {}

    @functools.partial(jax.jit, static_argnames="first")
    def call(params, x, state, first):
        return getattr(modules.bind(VAE, CONFIG, params), method)(x, state, first=first, **how)

    params, state, out = _on(parallel) if parallel else _params(), None, []
    for index, chunk in enumerate(np.split(x, np.cumsum(cuts)[:-1], axis=1)):
        y, state = call(params, chunk, state, first=index == 0)
        out.append(np.asarray(y))
    return np.concatenate(out, axis=1)


@pytest.fixture(params=[False, True], ids=["joined", "edges"])
def _form(request, monkeypatch):
    """How neighbours' columns are used: joined to one's own, or for the outermost columns of a result."""
    if request.param:
        monkeypatch.setattr(halo, "NARROW", 0)


@pytest.mark.parametrize("name", _cases(["even", "two", "uneven"], slow=["narrow", "heads", "data"]))
@pytest.mark.usefixtures("_form")
def test_decode(name):
    """Streamed over devices, block by block, against one device and all frames at once."""
    case, width = CASES[name]
    latents = seeded.draw(2, 5, CONFIG.z_dim, HEIGHT, width)
    expected = _stream("decode", None, latents, [5])
    video = _stream("decode", seeded.parallel(case), latents, [1, 2, 2])
    np.testing.assert_allclose(video, expected, atol=ATOL)
    assert np.abs(expected[:, :, :, 1:] - expected[:, :, :, :-1]).max() > 0.1


@pytest.mark.parametrize("name", _cases(["uneven"], slow=["even", "narrow", "data"]))
def test_encode(name):
    case, width = CASES[name]
    factor = CONFIG.spatial_factor
    video = np.tanh(seeded.draw(2, 5, HEIGHT * factor, width * factor, 3))
    expected = _stream("encode", None, video, [5])
    latents = _stream("encode", seeded.parallel(case), video, [1, 4])
    np.testing.assert_allclose(latents, expected, atol=ATOL)


# What a device holds and sends.


def _bytes_on_a_device(arrays):
    return sum(x.addressable_shards[0].data.nbytes for x in arrays)


@pytest.mark.parametrize("name", _cases(["even"], slow=["narrow"]))
def test_state_stays_sharded(name):
    """From the first chunk on, so that all later ones share a program. What does not divide is whole between chunks."""
    case, width = CASES[name]
    parallel = seeded.parallel(case)
    grid = (HEIGHT // 2, width // 2)
    spec = RolloutSpec.create(seeded.CONFIG, seeded.SAMPLER, grid, 8, parallel=parallel)
    params, state = _on(parallel), None
    before = decode_chunk._cache_size()
    for index, frames in enumerate((1, 2, 2)):
        tokens = rollout.to_tokens(spec, seeded.latents(spec, 1, frames))
        video, state = decode_chunk(CONFIG, spec.framing, params, tokens, state, first=index == 0)
        for x in (video, *state):
            divides = x.shape[3] % parallel.num_devices == 0
            assert x.sharding.is_equivalent_to(
                parallel.rules.sharding(ACTIVATION_AXES if divides else (), parallel.mesh), x.ndim
            )
    assert decode_chunk._cache_size() - before == 2
    if name == "even":
        assert _bytes_on_a_device(state) * parallel.num_devices == sum(x.nbytes for x in state)


@functools.cache
def _full(devices):
    """The compiled decoder of Wan2.1 for one block of 480 x 832."""
    model = PRESETS["wan-1.3b"]
    parallel = seeded.parallel(("gather", devices), model)
    spec = RolloutSpec.create(model.transformer, model.sampler, (30, 52), 21, parallel=parallel)

    def shaped(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding)

    def lower(frames, state, first):
        tokens = jax.ShapeDtypeStruct(
            (1, frames, spec.layout.stored, 64),
            jnp.bfloat16,
            sharding=parallel.rules.sharding(("batch", "frames", "tokens"), parallel.mesh),
        )
        return decode_chunk.lower(model.vae, spec.framing, params, tokens, state, first=first)

    params = modules.abstract(VAE, model.vae)
    params = jax.tree.map(shaped, params, parallel.shardings(params, "vae"))
    _, state = lower(1, None, True).out_info
    width = parallel.rules.sharding(ACTIVATION_AXES, parallel.mesh)
    return lower(3, tuple(shaped(x, width) for x in state), False).compile()


def _collectives(compiled):
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text()))


def test_full_decoder_is_shared_out():
    """Work and memory of the real decoder fall with the devices; neighbours exchange columns, and only the latents and
    the middle block's attention are gathered. Nothing is masked, as the partitioner would."""
    one, many = _full(1), _full(8)
    assert not _collectives(one)
    found = _collectives(many)
    assert set(found) == {"all-gather", "collective-permute"}
    assert found["all-gather"] <= 3  # the latents, and of the middle block q, k and v or less
    masks = re.findall(r"pred\[([\d,]+)\]", many.as_text())
    assert max((math.prod(map(int, shape.split(","))) for shape in masks), default=0) < 1e5
    for share, excess in ((_flops, 1.05), (_temporaries, 1.25), (_aliased, 1.0)):
        assert share(many) * 8 <= share(one) * excess


def _flops(compiled):
    return compiled.cost_analysis()["flops"]


def _temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def _aliased(compiled):
    """Bytes of the state, which is updated in place."""
    return compiled.memory_analysis().alias_size_in_bytes
