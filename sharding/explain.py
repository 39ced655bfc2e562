"""`jax-causal explain`: how a model would be sharded, what would travel and what every device would hold, without
running it.

The block step is really compiled, for as many virtual CPU devices, and its collectives are read from the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from rich.table import Table
from rich.text import Text

from jax_causal.config import ModelConfig, preset
from jax_causal.console import nbytes, report
from jax_causal.model_folder import find_model
from jax_causal.outputs import json_writer
from jax_causal.parallel import SingleDevice
from jax_causal.request import prepare
from jax_causal.rollout import RolloutSpec
from sharding.compiled import CompiledBlock, compile_block
from sharding.sequence_parallel import SequenceParallel
from sharding.strategies import NAMES, Collective, Strategy, Workload, choose, fitting


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model, a size and a way of sharding them, compiled.

    Attributes:
      frames: of the video.
      work: what the strategies' formulas take, at `precision`.
      reason: why this strategy.
      block: compiled in float32, because XLA widens bfloat16 for CPUs, what is sent included.
    """

    config: ModelConfig
    frames: int
    precision: str
    work: Workload
    spec: RolloutSpec
    reason: str
    block: CompiledBlock
    compile_s: float

    @classmethod
    def create(cls, args: argparse.Namespace) -> Plan:
        """Raises ValueError or OSError for what `generate` would refuse too; the message names what would do."""
        config = preset(args.preset) if args.preset else find_model(args.model)[0]
        config = dataclasses.replace(
            config, height=args.height or config.height, width=args.width or config.width
        )
        precision = "bfloat16" if args.precision == "auto" else args.precision
        frames = args.frames or config.num_frames
        inputs = {"prompt": "any", "num_frames": frames, "seed": 0, "window": args.window, "sink": args.sink}
        absent = dict.fromkeys(("height", "width", "prompt_embeds", "image", "video", "noise", "renoise"))
        request = functools.partial(prepare, config, **inputs, **absent)
        layout, sampler = request(parallel=SingleDevice()).spec.layout, config.sampler
        size = jnp.dtype(precision).itemsize
        work = Workload(config.transformer, layout.tokens, sampler.frames_per_block, layout.capacity, size)
        strategy, reason = choose(args.strategy or "auto", args.devices, work)
        parallel = SequenceParallel(args.devices, strategy.name, unroll=False).for_model(config)
        spec = request(parallel=parallel).spec
        start = time.perf_counter()
        block = compile_block(spec, jnp.float32)
        return cls(config, frames, precision, work, spec, reason, block, time.perf_counter() - start)

    @property
    def strategy(self) -> Strategy:
        return self.spec.parallel.strategy

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on one device at `precision`; activations are the strategy's estimate."""
        size, compiled = self.work.bytes_per_element, self.block.memory
        return {
            "weights": compiled["weights"] * size // 4,
            "text_kv": compiled["text_kv"] * size // 4,
            "cache": compiled["cache"] * size // 4,
            "activations": self.strategy.activation_bytes(self.work),
        }

    @property
    def expected(self) -> list[Collective]:
        """What the formulas give for one layer and pass in float32."""
        return self.strategy.collectives(dataclasses.replace(self.work, bytes_per_element=4))

    @property
    def compiled(self) -> list[Collective]:
        """What one layer and pass of the program send."""
        return [sent.collective for sent in self.block.program.sent() if sent.loops == self._loops]

    @property
    def outside(self) -> list[Collective]:
        """What the program sends outside its layers."""
        return [sent.collective for sent in self.block.program.sent() if sent.loops != self._loops]

    @property
    def _loops(self) -> tuple[int, int]:
        return len(self.config.sampler.steps), self.config.transformer.num_layers


def run(args: argparse.Namespace) -> None:
    """Explains as the parsed arguments say: JSON where asked for, and a report unless that is on standard output."""
    write = json_writer(args.json)
    plan = Plan.create(args)
    write(record(plan))
    if args.json != "-":
        report(*_sections(plan))


def record(plan: Plan) -> dict:
    """The plan as flat JSON values with units; lists go by collective, in the order they are sent."""
    strategy, work, shares = plan.strategy, plan.work, plan.spec.parallel.shares(plan.work.tokens)
    sent = strategy.collectives(work)
    return {
        "model": plan.config.name,
        "height": plan.config.height,
        "width": plan.config.width,
        "frames": plan.frames,
        "precision": plan.precision,
        "devices": strategy.devices,
        "strategy": strategy.name,
        "reason": plan.reason,
        **{f"mesh_{axis}": size for axis, size in plan.spec.parallel.mesh.shape.items()},
        "tokens_per_frame": work.tokens,
        "padding_per_frame": shares.padded - work.tokens,
        "rows_per_frame_per_device": shares.rows,
        "rows_per_block_per_device": strategy.rows(work),
        "cached_latent_frames": work.held,
        **{f"{part}_bytes_per_device": size for part, size in plan.memory.items()},
        "collectives_per_layer": len(sent),
        "collective_kinds": [c.kind for c in sent],
        "collective_devices": [c.group for c in sent],
        "collective_bytes": [c.bytes for c in sent],
        "collective_float32_bytes": [c.bytes for c in plan.expected],
        "compiled_collective_kinds": [c.kind for c in plan.compiled],
        "compiled_collective_float32_bytes": [c.bytes for c in plan.compiled],
        "compiled_collectives_outside_layers": len(plan.outside),
        **{
            f"{name}_{what}_per_layer_s": seconds
            for name, s in _fitting(plan).items()
            for what, seconds in (
                ("attention", s.attention_seconds(work)),
                ("sending", s.sending_seconds(work)),
            )
        },
        "compile_s": plan.compile_s,
        "jax": jax.__version__,
    }


def _fitting(plan: Plan) -> dict[str, Strategy]:
    return fitting(plan.strategy.devices, plan.config.transformer.num_heads)


# The report.


def _sections(plan: Plan) -> list:
    title = Text.assemble(
        (plan.config.name, "bold"),
        f" · {plan.frames} frames of {plan.config.width} x {plan.config.height} pixels",
        f" · {plan.precision} · {_count(plan.strategy.devices, 'device')}",
    )
    sections = [title, _layout(plan), _travels(plan), _verdict(plan), _memory(plan), _costs(plan)]
    return [item for section in sections for item in (section, "")]


def _layout(plan: Plan) -> Table:
    """How tokens and cache are dealt."""
    spec, strategy, config = plan.spec, plan.strategy, plan.config.transformer
    rows, frames = strategy.rows(plan.work), plan.work.frames
    shares = spec.parallel.shares(plan.work.tokens)
    held = []
    if not strategy.gathers and strategy.seq > 1:
        held.append(f"{min(shares.part, plan.work.tokens)} of {plan.work.tokens} tokens a frame")
    if not strategy.gathers and strategy.heads > 1:
        held.append(f"{config.num_heads // strategy.heads} of {config.num_heads} heads")
    table = _table(show_header=False)
    table.add_column(style="dim")
    table.add_column()
    reason = "as asked" if plan.reason.endswith("as asked") else "chosen by auto"
    table.add_row("strategy", f"{strategy.name}, {reason}")
    table.add_row("mesh", " x ".join(f"{axis} {n}" for axis, n in spec.parallel.mesh.shape.items()))
    table.add_row("tokens", f"{spec.grid[0]} x {spec.grid[1]} = {plan.work.tokens} a frame: {_dealt(plan)}")
    table.add_row("block", f"{_count(frames, 'latent frame')}: {rows} rows on a device")
    table.add_row(
        "rotation", f"factors of these {rows} rows, built on the device once a block; nothing is sent"
    )
    cached = _count(plan.work.held, "latent frame")
    table.add_row("cache", f"{cached}; a device holds {', '.join(held) or 'all of it'}")
    return table


def _dealt(plan: Plan) -> str:
    """Tokens of a frame by device, short shares and padding said."""
    shares, devices = plan.spec.parallel.shares(plan.work.tokens), plan.strategy.devices
    full, rest = divmod(plan.work.tokens, shares.rows)
    text = f"{shares.rows} on each device"
    if full < devices:
        empty = devices - full - (rest > 0)
        text = f"{shares.rows} on " + ("the first device" if full == 1 else f"each of {full} devices")
        text += f", {rest} on the next" * (rest > 0) + f", none on the last {empty}" * (empty > 0)
        text += f"; {_count(shares.padded - plan.work.tokens, 'row')} of padding, never a key"
    return text


def _travels(plan: Plan) -> Table | Text:
    """What one layer and pass send, in order: formulas beside the compiled program."""
    sent, compiled = plan.strategy.collectives(plan.work), plan.compiled
    if not sent + compiled:
        return Text("nothing is sent")
    table = _table()
    table.add_column("sent in each layer and pass")
    table.add_column("as")
    for name in ("over", plan.precision, "float32", "compiled"):
        table.add_column(name, justify="right")
    for index in range(max(len(sent), len(compiled))):
        ours, wide = (x[index] if index < len(x) else None for x in (sent, plan.expected))
        found = compiled[index] if index < len(compiled) else None
        first = ours or found
        cells = [nbytes(c.bytes) if c else "" for c in (ours, wide)]
        agree = "" if found == wide else "red"
        table.add_row(
            first.what,
            first.kind,
            str(first.group),
            *cells,
            Text(nbytes(found.bytes) if found else "", agree),
        )
    return table


def _verdict(plan: Plan) -> Text:
    """Whether the program does what the formulas say."""
    (steps, layers), count = plan._loops, len(plan.compiled)
    if plan.compiled != plan.expected or plan.outside:
        return Text.assemble(
            ("the compiled program differs: ", "bold red"),
            f"it sends {count} in a layer and pass, and {len(plan.outside)} outside the layers",
        )
    if not count:
        return Text.assemble(("as compiled: ", "green"), "nothing at all")
    total = f"{count} x {layers} layers x {steps} passes = {count * layers * steps} in a block"
    return Text.assemble(("as compiled: ", "green"), f"these and no others, {total}")


def _memory(plan: Plan) -> Table:
    """Bytes of one device."""
    names = {
        "weights": "weights of the transformer",
        "text_kv": "keys and values of the text",
        "cache": "keys and values of the video",
        "activations": "activations of a block, attention being one kernel",
    }
    table = _table()
    table.add_column("memory of one device")
    table.add_column(plan.precision, justify="right")
    for part, size in plan.memory.items():
        table.add_row(names[part], nbytes(size))
    table.add_row("together, VAE and text encoder apart", nbytes(sum(plan.memory.values())), style="bold")
    return table


def _costs(plan: Plan) -> Table:
    """The cost model's estimate of every strategy."""
    best, _ = choose("auto", plan.strategy.devices, plan.work)
    found = _fitting(plan)
    table = _table()
    table.add_column("estimate for H200s, a layer and pass")
    for name in ("seq x heads", "attention", "sending", "together", "cache"):
        table.add_column(name, justify="right")
    for name in NAMES:
        if name not in found:
            heads = plan.config.transformer.num_heads
            table.add_row(
                f"{name}: not for {heads} heads on {_count(plan.strategy.devices, 'device')}", style="dim"
            )
            continue
        s = found[name]
        times = (s.attention_seconds(plan.work), s.sending_seconds(plan.work), s.seconds(plan.work))
        table.add_row(
            name + "  fastest: auto's choice where memory allows" * (s == best),
            f"{s.seq} x {s.heads}",
            *(f"{seconds * 1e3:.3f} ms" for seconds in times),
            nbytes(s.cache_bytes(plan.work)),
            style="bold" if s == plan.strategy else None,
        )
    return table


def _table(**options) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim", **options)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
