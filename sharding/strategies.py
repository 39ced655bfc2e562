"""Which way attention communicates: strategies, the ones that fit, and a small cost model to choose by.

A strategy is a pair of degrees, seq x heads = devices, and one bit:

    gather    keys and values of the block are gathered, every device keeps the whole cache
    ring      devices x 1: the cache is sharded by tokens; queries travel, outputs are merged
    ulysses   1 x devices: the cache is sharded by heads; tokens are traded for heads
    hybrid    both: as many heads as divide, the rest by tokens

What one layer and one pass send, in elements per device, with T tokens of E channels on n = seq x heads devices (a
collective over g devices moves (g - 1) / g of its result or operand past each):

    gather    1 all-gather   2 T E
    heads > 1 1 all-to-all   3 T E / n          1 all-to-all   T E / n
    seq > 1   1 all-gather   T E / heads        1 all-to-all   T (E + N) / heads, in fp32
"""

from __future__ import annotations

import dataclasses
import math

from jax_causal.config import TransformerConfig

NAMES = ("gather", "ulysses", "ring", "hybrid")

# The machine that the model assumes, measured on H200s over NVLink: seconds a collective takes however small,
# bytes a second past each device, what products and attention reach, the multiprocessors that attention fills.
LATENCY = 1.0e-4
BANDWIDTH = 3.0e11
ATTENTION_RATE = 6.0e14
PROCESSORS = 132
QUERY_TILE = 128


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of one layer in one pass: its kind, and the bytes of its result on each device."""

    kind: str
    bytes: int
    group: int

    @property
    def seconds(self) -> float:
        return LATENCY + self.bytes * (self.group - 1) / self.group / BANDWIDTH


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the choice depends on. `tokens` are of one frame; `frames` of a block; `held` of the full cache."""

    config: TransformerConfig
    tokens: int
    frames: int
    held: int
    bytes_per_element: int = 2


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
        """What one layer sends in one pass over a block; the formulas of the module's text."""
        rows = -(-work.tokens // self.devices) * work.frames  # one device's, padding included
        channels, size = work.config.dim, work.bytes_per_element
        if self.devices == 1:
            return []
        if self.gathers:
            return [Collective("all-gather", 2 * rows * self.devices * channels * size, self.devices)]
        found = []
        part = rows * self.heads * self.seq * channels // self.heads  # a part's queries, all of them
        if self.heads > 1:
            found.append(Collective("all-to-all", 3 * rows * channels * size, self.heads))
        if self.seq > 1:
            found.append(Collective("all-gather", part * size, self.seq))
            merged = part + part // work.config.head_dim
            found.append(Collective("all-to-all", merged * 4, self.seq))
        if self.heads > 1:
            found.append(Collective("all-to-all", rows * channels * size, self.heads))
        return found

    def cache_bytes(self, work: Workload) -> int:
        """Keys and values of all layers on one device."""
        config = work.config
        if self.gathers:
            elements = work.held * work.tokens * config.dim
        else:
            tokens = work.tokens
            if self.seq > 1:
                tokens = -(-work.tokens // self.devices) * self.heads
            elements = work.held * tokens * config.dim // self.heads
        return 2 * config.num_layers * elements * work.bytes_per_element

    def attention_seconds(self, work: Workload) -> float:
        """Self-attention of one layer over the full cache, with the card filled as well as its tiles allow."""
        queries, heads, keys = work.tokens * work.frames, work.config.num_heads, work.tokens * work.held
        if self.gathers:
            queries = math.ceil(queries / self.devices)
        else:
            heads, keys = heads // self.heads, math.ceil(keys / self.seq)
        flops = 4 * queries * keys * heads * work.config.head_dim
        tiles = math.ceil(queries / QUERY_TILE) * heads
        fill = max(_fill(tiles * parts) for parts in (1, 2, 4, 8))
        return flops / (ATTENTION_RATE * fill)

    def seconds(self, work: Workload) -> float:
        """Attention and communication of one layer in one pass; nothing else differs between strategies."""
        return self.attention_seconds(work) + sum(c.seconds for c in self.collectives(work))


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


def choose(name: str, devices: int, work: Workload, memory: int | None = None) -> tuple[Strategy, str]:
    """The strategy of this name, or for "auto" the fastest by the cost model whose cache fits `memory` bytes (None:
    unlimited), and the reasoning as text.

    Raises:
      ValueError: an unknown name, or one that heads and devices do not allow; the message says what fits.
    """
    found, heads = fitting(devices, work.config.num_heads), work.config.num_heads
    if name != "auto":
        if name not in NAMES:
            raise ValueError(f"unknown strategy {name!r}: choose auto, {', '.join(NAMES)}")
        if name not in found:
            divisors = [d for d in range(2, heads + 1) if heads % d == 0]
            raise ValueError(
                f"{name} cannot share {heads} heads among {devices} devices: there {' or '.join(found)} fit "
                f"(auto chooses), and {name} fits {', '.join(map(str, divisors))} devices"
                if name == "ulysses"
                else f"{name} needs a common divisor of {heads} heads and {devices} devices: use {' or '.join(found)}"
            )
        return found[name], f"{name} as asked"
    fits = {n: s for n, s in found.items() if memory is None or s.cache_bytes(work) <= memory}
    candidates = fits or {n: s for n, s in found.items() if s.cache_bytes(work) == _smallest(found, work)}
    best = min(candidates.values(), key=lambda s: s.seconds(work))
    rows = [
        f"{s.name} {s.seq} x {s.heads}: {s.seconds(work) * 1e3:.3f} ms a layer and pass "
        f"({len(s.collectives(work))} collectives), cache {s.cache_bytes(work) / 2**30:.2f} GiB"
        + ("" if s.name in fits else ", does not fit")
        for s in found.values()
    ]
    return best, f"auto chose {best.name} for {heads} heads on {devices} devices. " + "; ".join(rows)


def _smallest(found, work):
    return min(s.cache_bytes(work) for s in found.values())
