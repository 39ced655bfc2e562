"""`jax-causal generate`: a prompt to a video file, or a file of prompts to a folder of them.

Whatever can be wrong is checked before anything is loaded: prompts, outputs, the model's configuration, and the
request against it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib

from jax_causal import __version__, checkpoint, estimate, rollout
from jax_causal.config import ModelConfig, TokenizerConfig, preset
from jax_causal.console import Display, nbytes, warn
from jax_causal.model_folder import find_model, incomplete
from jax_causal.outputs import VideoFolder, json_writer
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.pipeline import Pipeline
from jax_causal.request import Request, prepare
from jax_causal.timings import CompileClock, Timings
from jax_causal.tokenizer import clean_prompt
from jax_causal.video import VideoWriter


@dataclasses.dataclass(frozen=True)
class Job:
    """What the arguments ask for, checked and made definite.

    Attributes:
      config: the model's.
      folder: the model's; None for random weights.
      precision: name of a dtype.
      inputs: keyword arguments of `Pipeline.stream`, the prompt apart.
      parallel: how to run, settled for the model.
      limits: window and sink.
      request: what `stream` will make of the first prompt.
    """

    config: ModelConfig
    folder: Path | None
    precision: str
    inputs: dict
    parallel: Parallel
    limits: dict
    request: Request

    @classmethod
    def create(cls, args: argparse.Namespace, parallel: Parallel, prompt: str) -> Job:
        """Raises ValueError or OSError; the message names what would do."""
        config, folder = _find_model(args)
        precision = args.precision
        if precision == "auto":
            precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        inputs = {
            "num_frames": args.frames or config.num_frames,
            "height": args.height or config.height,
            "width": args.width or config.width,
            "seed": args.seed,
            "image": args.image,
            "video": args.video,
        }
        limits = {"window": args.window, "sink": args.sink}
        unused = dict.fromkeys(("prompt_embeds", "noise", "renoise"))
        check = functools.partial(prepare, config, prompt=prompt, **limits, **unused)
        # How to run may depend on the size, and on what will be cached of it.
        bare = check(parallel=SingleDevice(), **(inputs | {"image": None, "video": None}))
        sized = dataclasses.replace(config, height=inputs["height"], width=inputs["width"])
        parallel = parallel.for_model(sized, held=bare.spec.layout.capacity)
        request = check(parallel=parallel, **inputs)
        return cls(config, folder, precision, inputs, parallel, limits, request)

    @property
    def settings(self) -> dict:
        """All that the frames depend on beside the prompt, as JSON values."""
        model = self.config.name if self.folder is None else self.folder.resolve()
        settings = {"model": model, "precision": self.precision, **self.inputs, **self.limits}
        settings["frames"] = settings.pop("num_frames")
        return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}

    @property
    def agreed(self) -> dict:
        """What the processes of one run must have in common, as JSON values."""
        return self.settings | {
            "model": self.config.name,  # its folder may have another path elsewhere
            "config": self.config.to_json(),
            "devices": self.parallel.num_devices,
            "strategy": self.parallel.name,
            "jax_causal": __version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        }

    @property
    def num_blocks(self) -> int:
        """Blocks of the video, given ones included."""
        return len(list(rollout.block_sizes(self.request.num_frames, self.config.sampler)))

    def load(self, **options) -> Pipeline:
        """The model, with its weights or random ones; `options` as for `Pipeline.from_pretrained`."""
        options |= {"dtype": self.precision, "parallel": self.parallel, **self.limits}
        if self.folder is None:
            return Pipeline.random(self.config, **options)
        return Pipeline.from_pretrained(self.folder, **options)

    def facts(self) -> dict:
        """What a record of timings says beside the timings."""
        return {
            "model": self.config.name,
            **{name: self.inputs[name] for name in ("height", "width", "seed")},
            "precision": self.precision,
            "devices": self.parallel.num_devices,
            "strategy": self.parallel.name,
            "device_kind": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }


def run(args: argparse.Namespace, parallel: Parallel, session=None) -> None:
    """Generates as the parsed arguments say, run in the way of `parallel`.

    `session` is this process's `sharding.distributed.Session`, if it is one of several; only the first of them
    writes files and shows anything.

    Raises ValueError or OSError for bad input, before the work begins.
    """
    writes = session is None or session.first
    display = Display(quiet=args.quiet or not writes)
    prompts = _read_prompts(args)
    job = Job.create(args, parallel, prompts[0])
    if session:
        session.check_agreement(job.agreed | {"prompts": prompts})
    write_json = json_writer(args.json if writes else None)
    many, unfinished = None, []
    if not writes:
        pass  # process 0 knows what is to be done
    elif args.prompts:
        many = VideoFolder(args.out, prompts, job.settings, overwrite=args.overwrite)
        unfinished = many.unfinished()
    else:
        VideoWriter(
            args.out, job.config.fps, overwrite=args.overwrite
        )  # checks that there is a place to write to
        unfinished = [(args.out, prompts[0])]

    if session:
        unfinished = [
            (Path(path), prompt)
            for path, prompt in session.broadcast([(str(p), text) for p, text in unfinished])
        ]
    if writes:
        _announce(job, display)
        _warn_of_unknown_words(job.config, prompts)
    if many:
        display.print(
            f"{len(prompts)} prompts, {len(prompts) - len(unfinished)} of them finished in {args.out}"
        )
    if not unfinished:
        return

    with CompileClock() as clock:
        with display.working(f"loading {job.config.name}"):
            pipe = job.load()
        compile_from = time.perf_counter()
        if args.warmup:
            with display.working("compiling"):
                pipe.warmup(**{name: value for name, value in job.inputs.items() if name != "seed"})
        if many:
            many.begin()
        for path, prompt in unfinished:
            timings = Timings(clock, compile_from=compile_from)
            if not writes:
                for _ in pipe.stream(prompt, **job.inputs):
                    pass
                continue
            label = f"{path.name}  " if many else ""
            with display.progress(timings, job.inputs["num_frames"], job.num_blocks, label=label) as update:
                with VideoWriter(path, job.config.fps, overwrite=args.overwrite) as writer:
                    _write(pipe.stream(prompt, report=timings.report, **job.inputs), writer, timings, update)
                timings.finish()
            compile_from = time.perf_counter()
            write_json(timings.to_json() | job.facts() | {"out": str(path)})
            if not many:
                display.table(timings)
            display.finished(path, timings, job.config.fps, brief=bool(many))


def _write(chunks, writer: VideoWriter, timings: Timings, update) -> None:
    """Writes chunks of frames as they come. Video encoding runs beside the model, at most a chunk behind it."""
    with ThreadPoolExecutor(1) as encoder:
        written = None
        for chunk in chunks:
            timings.add(len(chunk))
            update()
            if written:
                written.result()
            written = encoder.submit(writer.write, chunk)
        written.result()


def _announce(job: Job, display: Display) -> None:
    """What will be run, and whether it will fit."""
    inputs, request, sampler = job.inputs, job.request, job.config.sampler
    display.header(
        job.config.name,
        f"{inputs['num_frames']} frames of {inputs['width']} x {inputs['height']} pixels",
        f"{job.precision} on {_devices(job)}",
        f"seed {inputs['seed']}",
    )
    if job.parallel.reason:
        display.print(job.parallel.reason)
    given = 0 if request.given is None else request.given.shape[1]
    parts = estimate.memory_estimate(job.config, request.spec, 1, job.precision, given_frames=given)
    needed, available = sum(parts.values()), estimate.device_memory()
    display.memory(estimate.summary(parts), available)
    if available and needed > available:
        warn(
            f"this needs about {nbytes(needed)} and the device has {nbytes(available)}: "
            f"try {estimate.mend(parts, request.spec, job.precision)}"
        )
    if job.folder is None:
        warn(f"{job.config.name} has random, untrained weights: the video shows noise, not the prompt")
    if (context := request.spec.layout.capacity) > sampler.trained_frames:
        window, sink = sampler.trained_frames, sampler.frames_per_block
        warn(
            f"{context} latent frames are attended to and the model was trained on {window}: to stay within, "
            f"try --window {window} --sink {sink}"
        )


def _warn_of_unknown_words(config: ModelConfig, prompts: list[str]) -> None:
    """Of prompts for a model of the procedural world, which its tokenizer tells from one of the real world."""
    if config.tokenizer is None or config.tokenizer.kind != "world":
        return
    from jax_causal.training import captions, world  # on demand: models of the real world do not need it

    if unknown := captions.unknown_words(" ".join(prompts)):
        warn(
            f"{config.name} has never seen {', '.join(map(repr, unknown[:5]))}: it knows one or two shapes "
            f"({', '.join(world.SHAPES)}) of plain colors that move on plain backgrounds"
        )


def _devices(job: Job) -> str:
    kind, count = jax.devices()[0].device_kind, job.parallel.num_devices
    return kind if count == 1 else f"{count} x {kind}, {job.parallel.name}"


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if not args.prompts:
        if not clean_prompt(args.prompt):
            raise ValueError("the prompt is empty: describe what the video shows in a sentence or more")
        return [args.prompt]
    try:
        lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{args.prompts} is not a text file in UTF-8: save it as one") from None
    prompts = [line.strip() for line in lines if clean_prompt(line) and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompts: write one per line")
    return prompts


def _find_model(args: argparse.Namespace) -> tuple[ModelConfig, Path | None]:
    """The model's configuration, and its folder or None where the weights are to be random."""
    if args.preset:
        # Without weights there is no tokenizer either. Bytes in its place keep every cost of a run.
        return dataclasses.replace(preset(args.preset), tokenizer=TokenizerConfig(kind="bytes")), None
    config, folder = find_model(args.model)
    missing = {} if folder is None else checkpoint.missing(folder)
    if config.tokenizer is not None and not config.tokenizer.needs_file:
        missing.pop("tokenizer", None)
    for part in missing:
        raise FileNotFoundError(incomplete(folder, part))
    return config, folder
