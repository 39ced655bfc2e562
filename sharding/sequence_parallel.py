"""`SequenceParallel`: the `Parallel` that shards every frame's tokens over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_causal.cache import CacheLayout, KVCache, Placement
from jax_causal.config import ModelConfig, TransformerConfig
from jax_causal.parallel import SingleDevice
from jax_causal.transformer_layers import ACTIVATION, TOKENS_FIRST
from sharding import causal_rope_sp, direct, halo, specs
from sharding.causal_rope_sp import Shares
from sharding.mesh import HEADS, SEQ, make_mesh, pick_devices
from sharding.specs import CACHE, QKV, TABLE, Rules
from sharding.strategies import Strategy, Workload, check_name, choose

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SequenceParallel:
    """Asks for sequence parallelism; `for_model` settles strategy and mesh once the model is known.

    Attributes:
      devices: how many, which ones, or None for all.
      strategy: "auto", or one of `strategies.NAMES`.
      mesh: a mesh of the caller's, with axes `batch_axis` (optional), "seq" and "heads" (optional), instead of
        `devices`. Its degrees then fix the strategy unless it is "gather".
      batch_axis: mesh axis for the batch.
      data: groups of devices that share the batch between them; the devices of a group share every frame.
      shard_params: shard the transformer's weights over all devices as well, for models that would not fit.
      backend: attention back end, as in `SingleDevice`.
      parts: parts that `gather` splits its keys into on each device; divides the tokens of a frame. More than one may
        pay where cuDNN attends with few queries, at a rounding more: `bench --scaling` measures both. The Hopper kernel
        fills a device by itself.
      direct: whether `gather` may have the kernel that rotates keys write them and the values into the caches of the
        other devices, instead of a collective. It does on Hopper GPUs where `peer_memory.can_reach_peers`, one
        process has all of them, the mesh takes them in order from the first, `hopper_rows.suits` its rows and
        `Peers.suit` the shares.
      overlap: whether `gather`, by a collective, attends to the past while the block's keys and values travel, and
        merges.
      unroll: as in `SingleDevice`.
    """

    devices: int | Sequence[jax.Device] | None = None
    strategy: str = "auto"
    _: dataclasses.KW_ONLY
    mesh: Mesh | None = None
    batch_axis: str = "data"
    data: int = 1
    shard_params: bool = False
    backend: str = "auto"
    parts: int = 1
    direct: bool = True
    overlap: bool = True
    unroll: bool | None = None

    def for_model(self, config: ModelConfig, *, held: int | None = None) -> Sharded:
        """The settled form for a model: `auto` judges by the video size of `config` and by `held` cached frames.

        Raises:
          ValueError: more devices than there are, or a strategy that heads or mesh do not allow.
        """
        work = Workload(config.transformer, *_block_of(config, held))
        if self.mesh is not None:
            strategy, mesh = _of_mesh(self.mesh, self.strategy, self.batch_axis, config.transformer.num_heads)
            reason = f"{strategy.name} as the mesh has it"
        else:
            devices = pick_devices(self.devices)
            memory = _memory(next((d for d in devices if d.process_index == jax.process_index()), None))
            if memory is not None:
                memory -= work.weight_bytes // (len(devices) if self.shard_params else 1)
            if len(devices) % self.data:
                raise ValueError(f"{len(devices)} devices cannot be split into data={self.data} equal groups")
            strategy, reason = choose(self.strategy, len(devices) // self.data, work, memory)
            mesh = make_mesh(devices, strategy.seq, strategy.heads, batch_axis=self.batch_axis)
        log.info("%s", reason)
        return Sharded(
            mesh=mesh,
            strategy=strategy,
            rules=Rules(batch=self.batch_axis),
            shard_params=self.shard_params,
            backend=self.backend,
            parts=self.parts if strategy.gathers else 1,
            direct=self.direct,
            overlap=self.overlap,
            unroll=self.unroll,
            reason=reason,
        )


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Tokens sharded over a mesh: implements `jax_causal.parallel.Parallel`. Made by `SequenceParallel.for_model`.

    Tokens are padded at the end of every frame to a multiple of the devices; padding is computed and dropped.
    The VAE's width is padded likewise; only the state that a stage of indivisible width leaves between two chunks is
    whole on every device.
    """

    mesh: Mesh
    strategy: Strategy
    rules: Rules = dataclasses.field(default_factory=Rules)
    shard_params: bool = False
    backend: str = "auto"
    parts: int = 1
    direct: bool = True
    overlap: bool = True
    unroll: bool | None = None
    reason: str = dataclasses.field(default="", compare=False)

    @property
    def unrolled(self) -> bool:
        return SingleDevice(unroll=self.unroll).unrolled

    @property
    def name(self) -> str:
        return self.strategy.name

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    def for_model(self, config, *, held=None):
        return self

    def shares(self, tokens: int) -> Shares:
        """How a frame's tokens are dealt."""
        return Shares(tokens, self.strategy.seq, self.strategy.heads, short_last=self.strategy.gathers)

    # Parameters and cache.

    def shardings(self, abstract, component: str = "transformer"):
        if component == "data":
            return specs.batched(abstract, self.mesh, self.rules)
        if component == "text_encoder" or (component == "transformer" and self.shard_params):
            return specs.fully_sharded(abstract, self.mesh)
        return specs.replicated(abstract, self.mesh)

    def cache_shape(self, tokens: int) -> tuple[int, int]:
        if self.strategy.gathers:
            return tokens, self.parts
        if self.strategy.seq == 1:
            return tokens, 1
        return self.shares(tokens).padded, self.strategy.seq

    def init_cache(self, layout, num_layers, batch, num_heads, head_dim, dtype, *, stacked):
        if batch % (copies := self.mesh.shape[self.rules.batch]):
            raise ValueError(
                f"{batch} videos cannot be shared by the {copies} devices of mesh axis {self.rules.batch!r}: "
                f"generate a multiple of {copies} at a time"
            )
        sizes = (num_layers, batch, num_heads, head_dim)
        device = self.cache_sharding(stacked=stacked)
        return KVCache.zeros(layout, *sizes, dtype, stacked=stacked, device=device)

    def cache_sharding(self, *, stacked):
        names = self._cache_names if stacked else self._cache_names[1:]
        return self.rules.sharding(names, self.mesh)

    @property
    def _cache_names(self):
        return ("layers", "batch", None, None, None, None) if self.strategy.gathers else CACHE

    # Tokens.

    def constrain(self, x, names):
        return jax.lax.with_sharding_constraint(x, self.rules.sharding(names, self.mesh))

    def halo(self, run, seen, columns, weights, *others):
        return halo.exchange(self.mesh, self.rules, run, seen, columns, weights, *others)

    def to_tokens(self, latent, patch):
        tokens = SingleDevice().to_tokens(latent, patch)
        padding = self.shares(tokens.shape[2]).padded - tokens.shape[2]
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, padding), (0, 0)))
        return self.constrain(tokens, ("batch", "frames", "tokens", None))

    def from_tokens(self, tokens, patch, height, width):
        # One gather of a small array; from whole latents any other sharding is a local slice.
        tokens = self.constrain(tokens, ("batch", "frames"))
        return SingleDevice().from_tokens(tokens[:, :, : height * width], patch, height, width)

    def rope(self, frames, height, width, head_dim):
        shares = self.shares(height * width)
        body = functools.partial(
            causal_rope_sp.local_table, shares=shares, height=height, width=width, head_dim=head_dim
        )
        return self._shard_map(body, (P(),), self._spec(TABLE))(jnp.asarray(frames))

    # Attention.

    def attend_cached(self, q, k, v, table, cache: KVCache, layer, placement: Placement, layout: CacheLayout):
        if isinstance(cache.k, tuple):  # only this layer's arrays go in, stacked alone
            one = KVCache(cache.k[layer][None], cache.v[layer][None])
            out, one = self.attend_cached(q, k, v, table, one, 0, placement, layout)
            return out, cache.replace_layer(layer, one.k[0], one.v[0])
        attend = functools.partial(causal_rope_sp.attend_gathered, overlap=self.overlap)
        local = layout
        if not self.strategy.gathers:
            attend = causal_rope_sp.attend_traded
            share = layout.stored // layout.parts
            local = dataclasses.replace(layout, tokens=share, stored=share, parts=1)
        body = functools.partial(
            attend, layout=local, shares=self.shares(layout.tokens), backend=self.backend
        )
        held = jax.tree.map(lambda _: self._spec(self._cache_names), cache)
        tokens = self._spec(QKV)
        in_specs = (tokens, tokens, tokens, self._spec(TABLE), held, P(), P(), P())
        # What `gather` writes is the same everywhere, and it writes it after a read that is not: jax cannot see that.
        check = not self.strategy.gathers
        return self._shard_map(body, in_specs, (tokens, held), check_vma=check)(
            q,
            k,
            v,
            table,
            cache,
            jnp.asarray(layer),
            jnp.asarray(placement.slots),
            jnp.asarray(placement.held),
        )

    # The same by fused kernels, which the partitioner cannot see into.

    def fuses(self, tokens, heads, head_dim, dtype):
        rows = self.shares(tokens).rows
        return SingleDevice(self.backend, self.parts).fuses(rows, heads, head_dim, dtype)

    def writes_directly(self, tokens: int, config: TransformerConfig, dtype) -> bool:
        """Whether `gather` is by a kernel that writes to the caches of all devices; `tokens` are of a frame."""
        fused = self.unrolled and self.fuses(tokens, config.num_heads, config.head_dim, dtype)
        return fused and self._peers(tokens) is not None

    def add_norm(self, x, out, gate, norm, time, rows, *, eps, tokens_first=False):
        param, row = gate or (None, None)

        def body(x, out, param, norm, time):
            gate = None if param is None else (param, row)
            return SingleDevice().add_norm(x, out, gate, norm, time, rows, eps=eps, tokens_first=tokens_first)

        tokens, added = self._spec(ACTIVATION), self._spec(TOKENS_FIRST if tokens_first else ACTIVATION)
        in_specs = (tokens, added, P(), P(), self._spec(("batch",)))
        run = self._shard_map(body, in_specs, (tokens, tokens), check_vma=False)
        return run(x, out, param, norm, time)

    def attend_product(self, qk, v, scales, table, cache, layer, placement, layout, eps):
        if (peers := self._peers(layout.tokens)) is None:
            q, k = direct.normalise(qk, scales, eps)
            out, cache = self.attend_cached(q, k, v, table, cache, 0, placement, layout)
            return out.swapaxes(1, 2), cache
        body = functools.partial(
            direct.attend,
            peers=peers, eps=eps, layout=layout, shares=self.shares(layout.tokens), backend=self.backend,
        )  # fmt: skip
        tokens, pairs, cached = (self._spec(x) for x in (QKV, (*QKV, None), self._cache_names[1:]))
        reach = P(self.mesh.axis_names)
        in_specs = (pairs, tokens, P(), self._spec(TABLE), cached, cached, reach, P(), P(), P())
        out_specs = (self._spec(TOKENS_FIRST), cached, cached, reach)
        run = self._shard_map(body, in_specs, out_specs, check_vma=False)
        numbers = layer, jnp.asarray(placement.slots), jnp.asarray(placement.held)
        out, *both, reach = run(qk, v, scales, table, *cache.read(0), cache.reach, *numbers)
        return out, dataclasses.replace(cache.replace_layer(0, *both), reach=reach)

    def begin_pass(self, cache, tokens):
        peers = self._peers(tokens)
        if peers is None or not peers.travels:
            return cache
        cached, reach = self._spec(self._cache_names[1:]), P(self.mesh.axis_names)
        body = functools.partial(direct.begin_pass, peers=peers)
        run = self._shard_map(body, (cached, cached), (cached, cached, reach), check_vma=False)
        keys, values, of_pass = run(cache.k, cache.v)
        return dataclasses.replace(cache, k=keys, v=values, reach=of_pass)

    def _peers(self, tokens):
        """The devices whose caches a kernel writes to; None where `gather` is not by such a kernel."""
        if not (self.direct and self.strategy.gathers):
            return None
        return direct.peers(self.mesh, self.strategy.seq, tokens, self.shares(tokens).rows)

    def attend(self, q, k, v, table, tokens, frame_mask=None):
        body = functools.partial(
            causal_rope_sp.attend_whole,
            frame_mask=frame_mask,
            shares=self.shares(tokens),
            backend=self.backend,
        )
        spec = self._spec(QKV)
        return self._shard_map(body, (spec, spec, spec, self._spec(TABLE)), spec)(q, k, v, table)

    def attend_text(self, q, k, v, distinct):
        spec, text = self._spec(QKV), self._spec(("batch",))
        body = SingleDevice(backend=self.backend).attend_text
        return self._shard_map(body, (spec, text, text, P()), spec)(q, k, v, distinct)

    def _spec(self, names) -> P:
        return self.rules.spec(names)

    def _shard_map(self, body, in_specs, out_specs, **options):
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, **options)


def _block_of(config: ModelConfig, held: int | None) -> tuple[int, int, int]:
    """(tokens of a frame, frames of a block, frames held)."""
    step = config.transformer.patch_size * (config.vae.spatial_factor if config.vae else 8)
    tokens = (config.height // step) * (config.width // step)
    return tokens, config.sampler.frames_per_block, held or config.sampler.trained_frames


def _memory(device) -> int | None:
    """Bytes that the device lets programs use, or None where it does not say (CPUs)."""
    return ((device and device.memory_stats()) or {}).get("bytes_limit")


def _of_mesh(mesh: Mesh, name: str, batch_axis: str, num_heads: int) -> tuple[Strategy, Mesh]:
    """Strategy and normalised mesh of a caller's mesh. Raises ValueError where the two, or heads and mesh, differ."""
    check_name(name)
    unknown = set(mesh.axis_names) - {batch_axis, SEQ, HEADS}
    if unknown:
        raise ValueError(
            f"the mesh has axes {sorted(unknown)}; known are {batch_axis!r} (batch_axis=), {SEQ!r} and {HEADS!r}"
        )
    seq, heads = mesh.shape.get(SEQ, 1), mesh.shape.get(HEADS, 1)
    if num_heads % heads:
        raise ValueError(f"{num_heads} heads cannot be shared by the {heads} devices of mesh axis {HEADS!r}")
    without = {"gather": HEADS, "ring": HEADS, "ulysses": SEQ}.get(name)
    if without and mesh.shape.get(without, 1) > 1:
        raise ValueError(
            f"{name} does not shard over {without!r}: use a mesh without it, or another strategy"
        )
    if name == "auto":
        name = "ulysses" if seq == 1 else "ring" if heads == 1 else "hybrid"
    order = [axis for axis in (batch_axis, SEQ, HEADS) if axis in mesh.axis_names]
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in order])
    return Strategy(name, seq, heads), make_mesh(devices.ravel(), seq, heads, batch_axis=batch_axis)
