"""One device's share of a strategy's work, run alone: for projections to more devices than there are.

A `Share` runs the very program of a sharded rollout, with the rows, heads and keys of one device, on one device. Its
collectives are left out: in their place stand copies inside the device, of the same shapes. So its time is that of
everything but the network, and its numbers mean nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_causal.parallel import SingleDevice
from sharding.causal_rope_sp import Shares
from sharding.mesh import HEADS, SEQ, make_mesh
from sharding.sequence_parallel import Sharded
from sharding.strategies import Strategy


@dataclasses.dataclass(frozen=True)
class LocalShares(Shares):
    """Shares among devices that are not there."""

    def all_gather(self, x, axis):
        return jnp.concatenate([x] * self.seq, axis)

    def all_to_all(self, x, over, split, concat):
        pieces = jnp.split(x, {SEQ: self.seq, HEADS: self.heads}[over], split)
        return jnp.concatenate(pieces, concat)


@dataclasses.dataclass(frozen=True)
class Share(Sharded):
    """The first device's part of `strategy`. It rolls out; having no whole frames, it cannot decode."""

    @classmethod
    def create(cls, strategy: Strategy, device: jax.Device, **options) -> Share:
        """`options` are those of `Sharded`."""
        return cls(mesh=make_mesh([device], 1, 1), strategy=strategy, **options)

    @property
    def num_devices(self) -> int:
        return self.strategy.devices

    def shares(self, tokens):
        return LocalShares(**dataclasses.asdict(super().shares(tokens)))

    def _peers(self, tokens):
        peers = super()._peers(tokens)
        return peers and peers._replace(axis=None)

    def cache_shape(self, tokens):
        stored, parts = super().cache_shape(tokens)
        return (stored, parts) if self.strategy.gathers else (stored // parts, 1)

    def init_cache(self, layout, num_layers, batch, num_heads, head_dim, dtype, *, stacked):
        heads = num_heads // self.strategy.heads
        return super().init_cache(layout, num_layers, batch, heads, head_dim, dtype, stacked=stacked)

    def to_tokens(self, latent, patch):
        tokens = SingleDevice().to_tokens(latent, patch)
        return tokens[:, :, : self.shares(tokens.shape[2]).rows]
