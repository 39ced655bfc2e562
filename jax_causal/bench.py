"""Measurement: how long the parts of a run take, and how long they would at the device's own speed.

rows = bench.run(Pipeline.random("wan-1.3b"))
rows[0].median, rows[0].floor

All times are of the host's clock, warm, between points where the device has nothing left to do; only those of a
profile are of the device's own. Inputs are random and never zero. What is inside a row is said by `bench_rows`; where
floors come from, by `bench_ceilings`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import bench_ceilings, bench_profile, rollout, transformer
from jax_causal.bench_ceilings import Ceilings, Operations
from jax_causal.bench_rows import BOUNDARIES, COMMUNICATION, FIRST_FRAME, PROFILE, Row, check_rows
from jax_causal.components import decode_chunk, encode_text
from jax_causal.pipeline import Pipeline
from jax_causal.request import Request, prepare
from jax_causal.timings import CompileClock


def run(
    pipe: Pipeline,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    repeats: int = 5,
    only: Collection[str] | None = None,
    seed: int = 0,
    ceilings: Ceilings | None = None,
    progress: Callable[[str], None] = lambda what: None,
    measured: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measures a pipeline on one video.

    Args:
      num_frames, height, width: of the video; default the model's.
      repeats: measurements behind every median; the warm-up is one more.
      only: names of the rows wanted; None is all.
      seed: of all random inputs.
      ceilings: for the floors; None measures them.
      progress: called with what is measured next.
      measured: called with the rows wanted of each part as soon as they are known.

    Returns:
      Rows in the order of `BOUNDARIES`; those that this model or device cannot give are left out, and those of fresh
      processes, which `bench_start` measures.

    Raises:
      ValueError: sizes that do not fit the model, unknown rows, or no repeats.
    """
    wanted = check_rows(only)
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be 1 or more")
    bench = _Bench(pipe, num_frames or pipe.config.num_frames, height, width, repeats, seed)

    if ceilings is None:
        progress("ceilings")
        ceilings = bench.ceilings()
    groups = [
        (bench.end_to_end, ("warmup", "compile", "end_to_end", "first_frame")),
        (bench.first_frame, tuple(f"first_frame_{part}" for part in FIRST_FRAME)),
        (bench.rollout, ("rollout", "rollout_without_last_context", "rollout_throughput")),
        (bench.short_prompt, ("rollout_short_prompt",)),
        (bench.decode, ("decode",)),
        (bench.memory, ("peak_memory_all",)),
        (bench.steady_block, ("steady_block",)),
        (bench.text, ("text",)),
        (bench.profile, tuple(f"profile_{part}" for part in PROFILE)),
        (bench.communication, COMMUNICATION),
    ]
    rows = []

    def add(new: list[Row]) -> None:
        new = [row for row in new if row.name in wanted]
        rows.extend(new)
        measured(new)

    add(bench.ceiling_rows(ceilings))
    # A peak is of what was run: memory alone needs the runs whose peak it is.
    needed = wanted | {"rollout", "decode"} if "peak_memory_all" in wanted else wanted
    for measure, names in groups:
        if not needed.isdisjoint(names):
            progress(", ".join(names))
            add(measure(ceilings))
    return sorted(rows, key=lambda row: list(BOUNDARIES).index(row.name))


class _Bench:
    """The measurements. Each takes the ceilings and returns its rows."""

    def __init__(self, pipe: Pipeline, num_frames, height, width, repeats, seed):
        self.pipe, self.config, self.repeats, self.seed = pipe, pipe.config, repeats, seed
        self.num_frames = num_frames
        self.height, self.width = height or pipe.config.height, width or pipe.config.width
        self.devices = pipe.parallel.num_devices
        self.params = pipe.params["transformer"]
        self.dtype = jax.tree.leaves(self.params)[0].dtype
        dit = self.config.transformer
        self.rng = np.random.default_rng(seed)
        self.embeds = self.rng.standard_normal((1, dit.text_length, dit.text_dim), np.float32)
        self.request = self._request(num_frames, pipe.window, pipe.sink)
        self.spec, self.frames = self.request.spec, self.request.num_frames

    def _request(self, num_frames, window, sink) -> Request:
        return prepare(
            self.config,
            parallel=self.pipe.parallel,
            num_frames=num_frames,
            window=window,
            sink=sink,
            height=self.height,
            width=self.width,
            seed=self.seed,
            prompt_embeds=self.embeds,
            **dict.fromkeys(("prompt", "image", "video", "noise", "renoise")),
        )

    def ceilings(self) -> Ceilings:
        backend = getattr(self.pipe.parallel, "backend", "auto")
        return bench_ceilings.measure_ceilings(self.config, self.dtype, backend=backend, repeats=self.repeats)

    def ceiling_rows(self, ceilings: Ceilings) -> list[Row]:
        units = {"product": "TFLOP/s", "attention": "TFLOP/s", "copy": "TB/s"}
        return [
            Row(f"{name}_ceiling", *(speed / 1e12 for speed in getattr(ceilings, name)), unit)
            for name, unit in units.items()
        ]

    def end_to_end(self, ceilings: Ceilings) -> list[Row]:
        with CompileClock() as clock:
            begin = time.perf_counter()
            warmup, _ = self._generate()
            compiling = clock.since(begin)
        total, first = zip(*(self._generate() for _ in range(self.repeats)), strict=True)

        text, denoising, decoding = self._first_operations()
        operations = bench_ceilings.rollout_operations(self.spec, self.frames, last_context=False)
        operations = operations.plus(text).plus(self._decode_operations())
        until_first = text.plus(denoising).plus(decoding)
        return [
            _row("warmup", [warmup]),
            _row("compile", [compiling]),
            _row("end_to_end", total, ceilings.floor(operations, self.devices)),
            _row("first_frame", first, ceilings.floor(until_first, self.devices)),
        ]

    def first_frame(self, ceilings: Ceilings) -> list[Row]:
        runs = []
        for _ in range(1 + self.repeats):
            seconds = {}
            chunks = self._stream(report=seconds.setdefault)
            next(chunks)
            chunks.close()
            runs.append(seconds)
        return [
            _row(
                f"first_frame_{part}", [run[part] for run in runs[1:]], ceilings.floor(counted, self.devices)
            )
            for part, counted in zip(FIRST_FRAME, self._first_operations(), strict=True)
        ]

    def rollout(self, ceilings: Ceilings) -> list[Row]:
        spec, roll = self.spec, self._roller()
        full, without = zip(*(roll() for _ in range(self.repeats)), strict=True)
        count = bench_ceilings.rollout_operations
        counted = [count(spec, self.frames, last_context=last) for last in (True, False)]
        floors = [ceilings.floor(operations, self.devices) for operations in counted]
        speeds = [counted[0].total / seconds / 1e12 for seconds in full]
        return [
            _row("rollout", full, floors[0]),
            _row("rollout_without_last_context", without, floors[1]),
            _row("rollout_throughput", speeds, ceilings.product[0] * self.devices / 1e12, "TFLOP/s"),
        ]

    def short_prompt(self, ceilings: Ceilings) -> list[Row]:
        positions = self.embeds.shape[1]
        roll = self._roller(np.where(np.arange(positions)[:, None] < positions // 8, self.embeds, 0))
        return [_row("rollout_short_prompt", [roll()[0] for _ in range(self.repeats)])]

    def decode(self, ceilings: Ceilings) -> list[Row]:
        plan = rollout.block_sizes(self.frames, self.spec.sampler)
        blocks = [self._noise(self.spec, start, size)[0] for start, size in plan]
        # Committed to where they are, as denoised blocks are: others would compile the decoder once more.
        blocks = [jax.device_put(block, block.sharding) for block in blocks]
        pieces = [*_first_pieces(blocks[0]), *blocks[1:]]

        def decode():
            jax.block_until_ready(pieces)
            begin, state = time.perf_counter(), None
            for piece in pieces:
                frames, state = self._decode(self.spec, piece, state)
            jax.block_until_ready((frames, state))
            return time.perf_counter() - begin

        decode()
        seconds = [decode() for _ in range(self.repeats)]
        return [_row("decode", seconds, ceilings.floor(self._decode_operations(), self.devices))]

    def steady_block(self, ceilings: Ceilings) -> list[Row]:
        sampler = self.config.sampler
        size = sampler.frames_per_block
        # By default the window is 12 latent frames and the sink 3, where blocks have 3.
        window, sink = (4 * size, size) if self.pipe.window is None else (self.pipe.window, self.pipe.sink)
        spec = self._request(None, window, sink).spec
        text = rollout.embed_text(spec, self.params, self.embeds)
        cache, state, seconds = self._cache(spec), None, []
        for start, frames in rollout.block_sizes(None, sampler):
            jax.block_until_ready((cache, state))
            begin = time.perf_counter()
            noise = self._noise(spec, start, frames)
            x0, cache = rollout.denoise_block(
                spec, self.params, cache, text, *noise, spec.place(start, frames)
            )
            cache = self._context(spec, cache, text, x0, start, frames)
            for piece in [x0] if start else _first_pieces(x0):
                video, state = self._decode(spec, piece, state)
            jax.block_until_ready((cache, video, state))
            # Blocks that overwrite others are all alike; the first two of the video compile.
            if start >= max(window, 2 * size):
                seconds.append(time.perf_counter() - begin)
            if len(seconds) == self.repeats:
                break
        operations = bench_ceilings.block_operations(spec, start, size, len(sampler.steps) + 1)
        operations = operations.plus(self._decoding(size, first=False))
        return [_row("steady_block", seconds, ceilings.floor(operations, self.devices))]

    def text(self, ceilings: Ceilings) -> list[Row]:
        config, params = self.config.text_encoder, self.pipe.params.get("text_encoder")
        if params is None:
            return []
        ids = self.rng.integers(2, config.vocab_size, (1, config.max_length), np.int32)
        mask = np.ones_like(ids)

        def encode():
            begin = time.perf_counter()
            jax.block_until_ready(encode_text(config, params, ids, mask))
            return time.perf_counter() - begin

        encode()
        seconds = [encode() for _ in range(self.repeats)]
        return [_row("text", seconds, ceilings.floor(bench_ceilings.text_operations(config)))]

    def memory(self, ceilings: Ceilings) -> list[Row]:
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return [] if peak is None else [_row("peak_memory_all", [peak / 2**30], None, "GiB")]

    def profile(self, ceilings: Ceilings) -> list[Row]:
        self._generate()
        parts, _ = bench_profile.breakdown(self._generate)
        return [_row(f"profile_{part}", [seconds]) for part, seconds in parts.items()]

    def communication(self, ceilings: Ceilings) -> list[Row]:
        found = bench_profile.communication(self._roller()) if self.devices > 1 else []
        if not found:
            return []
        blocks = len(list(rollout.block_sizes(self.frames, self.spec.sampler)))
        passes = blocks * (len(self.spec.sampler.steps) + 1)
        by_device = [[seconds / passes for seconds in values] for values in zip(*found, strict=True)]
        return [_row(name, values) for name, values in zip(COMMUNICATION, by_device, strict=True)]

    # Steps of a run.

    def _stream(self, report=None) -> Iterator[np.ndarray]:
        size = {"num_frames": self.num_frames, "height": self.height, "width": self.width}
        return self.pipe.stream(prompt_embeds=self.embeds, **size, seed=self.seed, report=report)

    def _generate(self) -> tuple[float, float]:
        """Seconds of a whole video, and until its first frame."""
        begin = time.perf_counter()
        chunks = self._stream()
        next(chunks)
        first = time.perf_counter() - begin
        for _ in chunks:
            pass
        return time.perf_counter() - begin, first

    def _roller(self, embeds=None) -> Callable[[], tuple[float, float]]:
        """A function, warm, that rolls out once: seconds, and seconds without the last context pass."""
        spec, plan = self.spec, list(rollout.block_sizes(self.frames, self.spec.sampler))
        text = rollout.embed_text(spec, self.params, self.embeds if embeds is None else embeds)
        noises = [self._noise(spec, start, size) for start, size in plan]

        def roll():
            cache = self._cache(spec)
            jax.block_until_ready((cache, text, noises))
            begin = time.perf_counter()
            for (start, size), noise in zip(plan, noises, strict=True):
                x0, cache = rollout.denoise_block(
                    spec, self.params, cache, text, *noise, spec.place(start, size)
                )
                cache = self._context(spec, cache, text, x0, start, size)
            # Only now: the device would stand still while the host begins the last context pass.
            jax.block_until_ready(x0)
            without = time.perf_counter() - begin
            jax.block_until_ready(cache)
            return time.perf_counter() - begin, without

        roll()
        return roll

    def _cache(self, spec):
        return rollout.new_cache(spec, 1, self.dtype, stacked=not transformer.is_unrolled(self.params))

    def _noise(self, spec, start, size):
        return rollout.draw_noise(spec, self.request.keys, np.int32(start), size, self.dtype)

    def _context(self, spec, cache, text, x0, start, size):
        t = np.float32(spec.sampler.context_noise)
        return rollout.write_context(spec, self.params, cache, text, x0, spec.place(start, size), t)

    def _decode(self, spec, tokens, state):
        params = self.pipe.params["vae"]
        return decode_chunk(self.config.vae, spec.framing, params, tokens, state, first=state is None)

    def _decoding(self, frames: int, *, first: bool) -> Operations:
        size = self.height, self.width
        return bench_ceilings.decode_operations(self.config.vae, frames, *size, first=first)

    def _first_operations(self) -> tuple[Operations, ...]:
        """Of the parts of the first frame, in the order of `FIRST_FRAME`."""
        start, size = next(rollout.block_sizes(self.frames, self.spec.sampler))
        return (
            bench_ceilings.text_kv_operations(self.config.transformer),
            bench_ceilings.block_operations(self.spec, start, size, len(self.spec.sampler.steps)),
            self._decoding(1, first=True),
        )

    def _decode_operations(self) -> Operations:
        """All frames; every chunk but the first costs the same per latent frame."""
        rest, later = self._decoding(1, first=False), self.frames - 1
        return self._decoding(1, first=True).plus(Operations(later * rest.products, later * rest.attention))


def _first_pieces(block: jax.Array) -> list[jax.Array]:
    """The chunks that a run decodes the first block [B, F, S, 4C] in: the first frame alone, so that it comes early."""
    return jnp.split(block, [1], axis=1) if block.shape[1] > 1 else [block]


def _row(name: str, values: Sequence[float], floor: float | None = None, unit: str = "s") -> Row:
    return Row(name, statistics.median(values), min(values), max(values), unit, floor)
