"""Which way attention communicates: strategies, the ones that fit, and a small cost model to choose by.

A strategy is a pair of degrees, seq x heads = devices, and one bit:

    gather    keys and values of the block are gathered, every device keeps the whole cache
    ring      devices x 1: the cache is sharded by tokens; queries travel, outputs are merged
    ulysses   1 x devices: the cache is sharded by heads; tokens are traded for heads
    hybrid    both: as many heads as divide, the rest by tokens

What one layer and one pass send, in elements per device, with T tokens (padding included) of E channels on n = seq x
heads devices; a collective over g devices moves (g - 1) / g of its result or operand past each:

    gather    1 all-gather   2 T E
    heads > 1 1 all-to-all   3 T E / n          1 all-to-all   T E / n
    seq > 1   1 all-gather   T E / heads        1 all-to-all   T (E + N) / heads, in fp32
"""

from __future__ import annotations

import dataclasses
import math

from jax_causal.cache import ALIGNMENT
from jax_causal.config import TransformerConfig
from sharding.mesh import rows_of_share

NAMES = ("gather", "ulysses", "ring", "hybrid")


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the devices: seconds that a collective takes however small, and bytes a second past each device."""

    latency: float
    bandwidth: float


# The machine that the model assumes, measured on H200s over NVLink; beside the link, what attention reaches and the
# multiprocessors that it fills.
NVLINK = Link(latency=1.0e-4, bandwidth=3.0e11)
ATTENTION_RATE = 6.0e14
PROCESSORS = 132
QUERY_TILE = 128


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of one layer in one pass.

    Attributes:
      kind: its name in HLO.
      bytes: of its result on each device.
      group: devices that take part in one.
      what: travels, in words.
    """

    kind: str
    bytes: int
    group: int
    what: str = dataclasses.field(default="", compare=False)

    def seconds(self, link: Link = NVLINK) -> float:
        return link.latency + self.bytes * (self.group - 1) / self.group / link.bandwidth


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the choice depends on. `tokens` are of one frame; `frames` of a block; `held` of the full cache."""

    config: TransformerConfig
    tokens: int
    frames: int
    held: int
    bytes_per_element: int = 2

    @property
    def weight_bytes(self) -> int:
        """Of the transformer's blocks, their matrices that is."""
        dim = self.config.dim
        return self.config.num_layers * (8 * dim + 2 * self.config.ffn_dim) * dim * self.bytes_per_element


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way to shard attention over seq x heads devices."""

    name: str
    seq: int
    heads: int

    @property
    def devices(self) -> int:
        return self.seq * self.heads

    @property
    def gathers(self) -> bool:
        return self.name == "gather"

    def collectives(self, work: Workload) -> list[Collective]:
        """What one layer sends in one pass over a block, in order; the formulas of the module's text."""
        whole = (
            self.rows(work) * work.config.dim * work.bytes_per_element
        )  # queries of this device's tokens, say
        if self.gathers:
            sent = [Collective("all-gather", 2 * whole * self.devices, self.devices, "keys and values")]
        else:
            queries, outputs = self._travelling(work)
            sent = [
                Collective("all-to-all", 3 * whole, self.heads, "queries, keys, values: tokens for heads"),
                Collective("all-gather", queries, self.seq, "queries, to all keys"),
                Collective("all-to-all", outputs, self.seq, "outputs and log-sum-exps, back to the queries"),
                Collective("all-to-all", whole, self.heads, "outputs: heads for tokens"),
            ]
        return [collective for collective in sent if collective.group > 1]

    def rows(self, work: Workload) -> int:
        """Tokens of a block on one device, padding included."""
        return rows_of_share(work.tokens, self.devices, short_last=self.gathers) * work.frames

    def _travelling(self, work: Workload) -> tuple[int, int]:
        """Bytes of a block's queries, for the heads of one device, and of the fp32 outputs that go back."""
        tokens = self.rows(work) * self.devices
        heads = work.config.num_heads // self.heads
        queries = tokens * heads * work.config.head_dim
        return queries * work.bytes_per_element, (queries + tokens * heads) * 4

    def cache_bytes(self, work: Workload) -> int:
        """Keys and values of all layers on one device, with the room that `CacheLayout.room` adds."""
        config, tokens = work.config, work.tokens
        if self.seq > 1 and not self.gathers:
            tokens = rows_of_share(work.tokens, self.devices) * self.heads
        room = -(-work.held * tokens // ALIGNMENT) * ALIGNMENT
        width = config.dim if self.gathers else config.dim // self.heads
        return 2 * config.num_layers * room * width * work.bytes_per_element

    def activation_bytes(self, work: Workload) -> int:
        """What a block keeps alive on one device beside cache and weights, at most, where attention is one kernel: the
        hidden units of the MLP, or queries, keys, values and their like with what of them travels.

        All of it falls with the number of devices but what travels over `seq`, which is as large on 2 as on 16.
        """
        whole = self.rows(work) * work.config.dim * work.bytes_per_element
        hidden = 2 * self.rows(work) * work.config.ffn_dim * work.bytes_per_element
        travelling = 0
        if self.gathers and self.devices > 1:
            travelling = 4 * whole * self.devices  # as it arrives, and as attention wants it
        elif self.seq > 1:
            queries, outputs = self._travelling(work)
            travelling = queries + 2 * outputs  # packed, and before or after
        return max(2 * whole + hidden, 8 * whole + travelling)

    def memory_bytes(self, work: Workload) -> int:
        """All of a device's memory that depends on the strategy."""
        return self.cache_bytes(work) + self.activation_bytes(work)

    def attention_seconds(self, work: Workload) -> float:
        """Self-attention of one layer over the full cache, with the card filled as well as its tiles allow."""
        queries, heads, keys = work.tokens * work.frames, work.config.num_heads, work.tokens * work.held
        if self.gathers:
            queries = math.ceil(queries / self.devices)
        else:
            heads, keys = heads // self.heads, math.ceil(keys / self.seq)
        flops = 4 * queries * keys * heads * work.config.head_dim
        tiles = math.ceil(queries / QUERY_TILE) * heads
        return flops / (ATTENTION_RATE * _fill(tiles * _best_parts(tiles)))

    def best_parts(self, work: Workload) -> int:
        """Parts of the keys with which `gather` fills the card best."""
        rows = math.ceil(work.tokens * work.frames / self.devices / QUERY_TILE)
        return _best_parts(rows * work.config.num_heads)

    def sending_seconds(self, work: Workload, link: Link = NVLINK) -> float:
        """Communication of one layer in one pass."""
        return sum(c.seconds(link) for c in self.collectives(work))

    def seconds(self, work: Workload) -> float:
        """Attention and communication of one layer in one pass; nothing else differs between strategies."""
        return self.attention_seconds(work) + self.sending_seconds(work)


def _best_parts(tiles: int) -> int:
    return max((1, 2, 4, 8), key=lambda parts: _fill(tiles * parts))


def _fill(tiles: int) -> float:
    """Share of the card that `tiles` equal pieces of work keep busy."""
    return tiles / (PROCESSORS * math.ceil(tiles / PROCESSORS))


def fitting(devices: int, num_heads: int) -> dict[str, Strategy]:
    """The strategies that this many devices and heads allow, by name."""
    shared = math.gcd(devices, num_heads)
    found = {"gather": Strategy("gather", devices, 1), "ring": Strategy("ring", devices, 1)}
    if num_heads % devices == 0:
        found["ulysses"] = Strategy("ulysses", 1, devices)
    if shared > 1:
        found["hybrid"] = Strategy("hybrid", devices // shared, shared)
    return found


def check_name(name: str) -> None:
    """Raises ValueError, naming those there are, unless `name` is "auto" or a strategy."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"unknown strategy {name!r}: choose auto, {', '.join(NAMES)}")


def choose(name: str, devices: int, work: Workload, memory: int | None = None) -> tuple[Strategy, str]:
    """The strategy of this name, or for "auto" the fastest by the cost model whose cache and activations fit `memory`
    bytes of a device (None: unlimited), and the reasoning as text. Where none fits it is the one that takes least.

    Raises:
      ValueError: an unknown name, or one that heads and devices do not allow; the message says what fits.
    """
    found, heads = fitting(devices, work.config.num_heads), work.config.num_heads
    if name != "auto":
        check_name(name)
        if name not in found:
            others = f"use {' or '.join(found)}, or auto"
            if name == "hybrid":
                raise ValueError(
                    f"hybrid needs a common divisor of {heads} heads and {_count(devices)}: {others}"
                )
            divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            raise ValueError(
                f"{name} cannot share {heads} heads among {_count(devices)}, only among {divisors}: {others}"
            )
        return found[name], f"{name} as asked"
    fits = [s for s in found.values() if memory is None or s.memory_bytes(work) <= memory]
    smallest = min(found.values(), key=lambda s: s.memory_bytes(work))
    best = min(fits or [smallest], key=lambda s: s.seconds(work))
    rows = [
        f"{s.name} {s.seq} x {s.heads}: {s.seconds(work) * 1e3:.3f} ms a layer and pass, "
        f"cache {s.cache_bytes(work) / 1e9:.2f} GB" + ("" if s in fits else ", does not fit")
        for s in found.values()
    ]
    return best, f"auto chose {best.name} for {heads} heads on {_count(devices)}: " + "; ".join(rows)


def _count(devices: int) -> str:
    return f"{devices} device" + "s" * (devices > 1)
