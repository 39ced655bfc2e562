"""`jax-causal bench --scaling`: one device and several in one run with the same kernels, and a projection to more.

Measured are the rows of `bench` for one device and for every strategy that the devices and heads allow, and from a
profile, on GPUs, how much of its collectives each hides behind computation. The projection takes the time of one
device's share of the rollout, run alone (`sharding.share`), and adds the strategy's collectives by latency and
bandwidth. Where a strategy was measured, its projection is made for the devices that are there too, beside the
measurement, and calibrated on it: of the sending, the part that shows there is counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from statistics import fmean

import jax
import jax.numpy as jnp

from jax_causal import bench, bench_ceilings, components, rollout
from jax_causal.attention import choose_backend
from jax_causal.bench_rows import COMMUNICATION, Row
from jax_causal.config import ModelConfig
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.pipeline import Pipeline
from jax_causal.vae import num_latent_frames
from sharding.link import measure_link
from sharding.sequence_parallel import SequenceParallel
from sharding.share import Share
from sharding.strategies import NVLINK, Link, Strategy, Workload, fitting

ROWS = ("rollout", "end_to_end", "first_frame")
HOW = {
    "share": "the rollout's own program with one device's rows, heads and keys, timed alone on one device; copies of "
    "the same shapes stand where its collectives would be, and a kernel that sends by itself writes as much at home",
    "sending": "all collectives of the rollout, each latency + bytes x (group - 1) / group / bandwidth, by the devices "
    "that take part; the link is taken to be the same between more devices. A kernel that sends by itself pays no "
    "latency of a collective: for it this is too much",
    "together": "share + sending: nothing overlaps",
    "exposed": "(measured - share) / sending on the devices that are there: the part of the sending that shows, and "
    "whatever else sharing costs",
    "calibrated": "share + exposed x sending, for strategies that were measured: takes the part that shows to be the "
    "same on more devices, though there is less work to hide the rest behind",
}


@dataclasses.dataclass(frozen=True)
class Way:
    """A strategy with the switches it is measured under; `direct` says what it does, not what it may."""

    strategy: Strategy
    label: str
    direct: bool = False
    overlap: bool = True
    parts: int = 1

    @property
    def options(self) -> dict[str, bool | int]:
        """Of `SequenceParallel` and `Sharded`."""
        return {"direct": self.direct, "overlap": self.overlap, "parts": self.parts}

    @property
    def is_form(self) -> bool:
        """Whether it is another form of a strategy than that which is used."""
        return self.label != self.strategy.name


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rows of one way of running, by name: `ROWS`, and `COMMUNICATION` where a profile shows it; `way` is None for one
    device, which has a `number`, and may be measured `again`."""

    way: Way | None
    rows: dict[str, Row]
    number: int = 0
    again: bool = False

    @property
    def label(self) -> str:
        if self.way is None:
            single = f"single (device {self.number})" if self.number else "single"
            return f"{single}, again" if self.again else single
        return self.way.label

    @property
    def devices(self) -> int:
        return 1 if self.way is None else self.way.strategy.devices


def alone(measured: Sequence[Measured]) -> dict[str, float]:
    """Seconds of one device alone by row: the mean of all devices that were measured, each the mean of its medians."""
    medians = {}
    for one in measured:
        for name, row in one.rows.items() if one.way is None else ():
            medians.setdefault(name, {}).setdefault(one.number, []).append(row.median)
    return {name: fmean(map(fmean, devices.values())) for name, devices in medians.items()}


@dataclasses.dataclass(frozen=True)
class Projection:
    """What a rollout is made of on `way.strategy.devices` devices, in seconds.

    Attributes:
      share: one device's work, measured.
      sending: all collectives, by the link.
      measured: the rollout itself, on devices that are there.
      calibration: of the same strategy on devices that are there, for more of them.
    """

    way: Way
    share: float
    sending: float
    measured: float | None = None
    calibration: Projection | None = None

    @property
    def together(self) -> float:
        return self.share + self.sending

    @property
    def exposed(self) -> float | None:
        """What of `sending` shows, where that was measured."""
        if self.calibration:
            return self.calibration.exposed
        return None if self.measured is None else max(self.measured - self.share, 0) / self.sending

    @property
    def calibrated(self) -> float | None:
        return self.share + self.exposed * self.sending if self.calibration else None


class Scaling:
    """The measurements of one model and size, in float seconds of the host's clock.

    Args:
      config: of the model; its weights are random.
      precision: name of a dtype.
      inputs: `num_frames`, `height`, `width` and `seed`, all given.
      limits: `window` and `sink`.
      rows: of `ROWS`, those to measure; the others cost nothing.
      repeats: measurements behind every median.
      progress: called with what is measured next.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: str,
        inputs: dict,
        limits: dict,
        *,
        rows: Sequence[str] = ROWS,
        repeats: int = 5,
        progress: Callable[[str], None] = lambda what: None,
    ):
        # Prompts are embeddings here: without a text encoder, memory is for what is measured.
        self.config = dataclasses.replace(config, text_encoder=None, tokenizer=None)
        self.precision, self.inputs, self.limits = precision, inputs, limits
        self.rows, self.repeats, self.progress = tuple(rows), repeats, progress

    def ways(self, devices: int, only: Collection[str] | None = None) -> list[Way]:
        """What is measured on so many devices: every strategy that fits, or those of them in `only`; and of the rollout
        `gather` under each of its switches."""
        found = fitting(devices, self.config.transformer.num_heads)
        # Where the heads divide, hybrid is ulysses.
        found = {name: s for name, s in found.items() if name != "hybrid" or s.seq > 1}
        ways = [Way(s, name, self._direct(s)) for name, s in found.items() if only is None or name in only]
        if ways and ways[0].strategy.gathers and "rollout" in self.rows:
            ways[1:1] = self._forms(ways[0])
        return ways

    def _direct(self, strategy: Strategy) -> bool:
        """Whether the kernels of such devices send by themselves."""
        share = Share.create(strategy, jax.devices()[0])
        *_, (work, _) = self._works()
        return share.writes_directly(work.tokens, work.config, jnp.dtype(self.precision))

    def _forms(self, gather: Way) -> list[Way]:
        """Other ways to run `gather` that say something here."""
        *_, (work, _) = self._works()  # a full-size block, which the first may not be
        forms, collective = [], dataclasses.replace(gather, direct=False)
        if gather.direct:
            forms.append(dataclasses.replace(collective, label="gather, by collectives"))
        head = 1, 1, work.config.num_heads, work.config.head_dim
        # A kernel of ours fills a device without.
        splits = choose_backend("auto", jax.ShapeDtypeStruct(head, self.precision)) != "hopper"
        if splits and (parts := gather.strategy.best_parts(work)) > 1 and work.tokens % parts == 0:
            forms.append(dataclasses.replace(collective, label=f"gather, keys in {parts}", parts=parts))
        if work.held == self._frames:  # with a ring for a cache nothing overlaps
            forms.append(dataclasses.replace(collective, label="gather, no overlap", overlap=False))
        return forms

    def single(self) -> Measured:
        """One device, the first."""
        self.progress("one device")
        return Measured(None, self._rows(SingleDevice(), self.rows))

    def each(self, devices: Sequence[jax.Device]) -> Iterator[Measured]:
        """The rollout on each of several devices alone, the first one again: cards differ, and are slower when warm. So
        a device is measured before and after what it is compared with."""
        for number, device in enumerate(devices if len(devices) > 1 and "rollout" in self.rows else []):
            self.progress(f"device {number} alone")
            rows = self._rows(SingleDevice(device=device), ["rollout"])
            yield Measured(None, rows, number, again=number == 0)

    def measure(self, way: Way, devices: Sequence[jax.Device]) -> Measured:
        """A way of running on the devices: of forms of a strategy the rollout alone, for they decode alike."""
        self.progress(f"{way.label} on {len(devices)} devices")
        parallel = SequenceParallel(devices, way.strategy.name, **way.options)
        rows = ("rollout",) if way.is_form else self.rows
        return Measured(way, self._rows(parallel, (*rows, *COMMUNICATION)))

    def link(self, devices: Sequence[jax.Device]) -> tuple[Link, str]:
        """Of the devices, measured; of one alone, the cost model's. With the word for which it is."""
        if len(devices) == 1:
            return NVLINK, "assumed"
        self.progress("link")
        return measure_link(devices, jnp.dtype(self.precision), self.repeats), "measured"

    def project(
        self,
        way: Way,
        link: Link,
        *,
        measured: Measured | None = None,
        calibration: Projection | None = None,
    ) -> Projection:
        """The projection of a way of running; see `Projection` for `measured` and `calibration`."""
        layers = self.config.transformer.num_layers
        sending = sum(
            passes * layers * way.strategy.sending_seconds(work, link) for work, passes in self._works()
        )
        took = measured and measured.rows["rollout"].median
        return Projection(way, self._share(way), sending, took, calibration)

    def _share(self, way: Way) -> float:
        self.progress(f"one of {way.strategy.devices} shares, {way.label}")
        share = Share.create(way.strategy, jax.devices()[0], **way.options)
        return self._rows(share, ["rollout"])["rollout"].median

    def _rows(self, parallel: Parallel, names) -> dict[str, Row]:
        parallel = parallel.for_model(self.config)
        params = components.place(self.config, self._params, parallel)
        pipe = Pipeline(self.config, params, parallel=parallel, **self.limits)
        rows = bench.run(pipe, **self.inputs, repeats=self.repeats, only=names, ceilings=self._ceilings)
        return {row.name: row for row in rows}

    @functools.cached_property
    def _params(self) -> dict[str, dict]:
        """In the host's memory: to make them takes longer than to bring them to where they are measured."""
        params = components.init(self.config, 0, jnp.dtype(self.precision), SingleDevice(unroll=False))
        return jax.device_get(params)

    @functools.cached_property
    def _ceilings(self) -> bench_ceilings.Ceilings:
        """Of all floors: measured once."""
        return bench_ceilings.measure_ceilings(self.config, jnp.dtype(self.precision), repeats=self.repeats)

    def _works(self) -> list[tuple[Workload, int]]:
        """(workload, passes) of every block of the rollout, all context passes included."""
        config, sampler = self.config, self.config.sampler
        step = config.transformer.patch_size * config.vae.spatial_factor
        tokens = (self.inputs["height"] // step) * (self.inputs["width"] // step)
        frames = self._frames
        size = jnp.dtype(self.precision).itemsize
        held = min(self.limits["window"] or frames, frames)
        return [
            (Workload(config.transformer, tokens, count, held, size), len(sampler.steps) + 1)
            for _, count in rollout.block_sizes(frames, sampler)
        ]

    @property
    def _frames(self) -> int:
        return num_latent_frames(self.config.vae, self.inputs["num_frames"])
