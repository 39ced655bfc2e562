"""`jax-causal eval`: scores of a model of the procedural world, or videos for VBench."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Sequence

import jax

from jax_causal import evaluation, evaluation_models, evaluation_report, vbench
from jax_causal.console import Display, note, report, warn
from jax_causal.evaluation import SETS, Variant
from jax_causal.evaluation_models import ManyStep
from jax_causal.generate import Job
from jax_causal.outputs import check_folder, json_writer
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.timings import CompileClock, Timings
from jax_causal.vae import num_latent_frames
from jax_causal.video import VideoWriter, check_output

STRATEGIES = ("gather", "ulysses", "ring", "hybrid")
PRECISIONS = ("float32", "bfloat16")
NAMES = ("model", "single", *STRATEGIES, *PRECISIONS, "windowed", "teacher", "vae", "truth")
SAME_MODEL = ("model", "single", *STRATEGIES, *PRECISIONS)  # whose frames should be the same
WINDOW = 12  # latent frames that "windowed" attends to
DEVICES = 8  # of the strategies
SHEET_ROWS = 24
# Clips that scoring in processes of their own is worth starting them for.
_MANY = 256


def run(args: argparse.Namespace, parallel: Parallel) -> None:
    """Evaluates as the parsed arguments say, the model run in the way of `parallel`.

    Raises ValueError or OSError for bad input, before the work begins.
    """
    if args.vbench or args.prompts or args.extended:
        export(args, parallel)
    else:
        score(args, parallel)


# Scores.


def score(args: argparse.Namespace, parallel: Parallel) -> None:
    """Makes and scores clips of every variant on every set; writes tables, JSON and a contact sheet.

    A JSON file is written anew after each, so that a run that is ended leaves what it has found.
    """
    job = Job.create(args, parallel, "any prompt")
    on_cpu = jax.default_backend() == "cpu"
    limit = args.limit or (32 if on_cpu else 128)
    seeds = args.seeds or (1 if on_cpu else 8)
    batch = args.batch or (4 if on_cpu else 32)
    sets = _sets(args.sets or (["held-out"] if on_cpu else list(SETS)))
    names = _variant_names(args, job)
    write_json = json_writer(args.json, replace=True)
    if args.sheet:
        if args.sheet.suffix != ".png":
            raise ValueError(f"--sheet {args.sheet} must end in .png")
        check_output(args.sheet, overwrite=True)

    if job.folder is None:
        warn(f"{job.config.name} has random, untrained weights: its clips show noise, not the prompts")
    asked = {name: evaluation.prompts(split, limit, objects) for name, (split, objects) in sets.items()}
    clips = limit * seeds * len(sets) * len(names)
    workers = min(os.cpu_count() or 1, 32) if clips >= _MANY else 1
    began, outcomes = time.perf_counter(), []
    facts = job.facts() | {
        "weights": "random" if job.folder is None else str(job.folder),
        "variants": names,
        "sets": list(sets),
        "prompts": limit,
        "seeds": seeds,
        "frames": job.inputs["num_frames"],
        "teacher": None if args.teacher is None else str(args.teacher),
        "teacher_steps": args.steps,
        "teacher_guidance": args.guidance,
    }
    facts.pop("seed")  # prompts have their own

    def record(complete: bool) -> dict:
        end = {"complete": complete, "total_s": round(time.perf_counter() - began, 3)}
        return facts | end | evaluation_report.record(outcomes)

    with evaluation.scoring(workers) as executor:
        for name in names:
            variant = load(name, args, job)
            keep = SHEET_ROWS if name == names[0] or parse_variant(name)[0] in SAME_MODEL else 0
            for set_name, prompts in asked.items():
                outcomes.append(
                    evaluation.evaluate(
                        variant, set_name, prompts, seeds=seeds, batch=batch, executor=executor,
                        keep=keep, progress=_progress(f"{name} on {set_name}"),
                    )
                )  # fmt: skip
                if args.json != "-":
                    write_json(record(complete=False))
    found = record(complete=True)
    write_json(found)
    if args.sheet:
        evaluation_report.save_sheet(args.sheet, outcomes[0])
        note(f"wrote {args.sheet}")
    if args.json != "-":
        report(*evaluation_report.sections(found))


def load(name: str, args: argparse.Namespace, job: Job) -> Variant:
    """The variant of this name, ready to make clips."""
    base, times = parse_variant(name)
    config = job.config
    factor, latents = config.vae.temporal_factor, num_latent_frames(config.vae, config.num_frames)
    frames = 1 + factor * (times * latents - 1)
    windows = {"windows": times, "window_frames": config.num_frames, "stride": factor * latents}
    if base == "truth":
        return Variant(name, evaluation_models.truth(frames, config.height), seeded=False, **windows)
    if base == "teacher":
        model = ManyStep.from_pretrained(
            args.teacher, dtype=job.precision, steps=args.steps, guidance=args.guidance
        )
        if model.config.num_frames != config.num_frames:
            raise ValueError(
                f"{args.teacher} makes {model.config.num_frames} frames and {config.name} {config.num_frames}"
            )
        return Variant(name, model)
    pipe = dataclasses.replace(job, **_changes(base, args, job)).load()
    if base == "vae":
        return Variant(name, evaluation_models.reconstruction(pipe), seeded=False)
    return Variant(name, evaluation_models.causal(pipe, frames), **windows)


def _changes(base: str, args: argparse.Namespace, job: Job) -> dict:
    """What a variant changes of the model's own way of running."""
    if base in ("single", "vae"):
        return {"parallel": SingleDevice().for_model(job.config)}
    if base in PRECISIONS:
        return {"precision": base}
    if base == "windowed":
        sampler = job.config.sampler
        sink = args.sink or sampler.frames_per_block
        return {
            "limits": {"window": args.window or max(WINDOW, sink + sampler.frames_per_block), "sink": sink}
        }
    if base in STRATEGIES:
        from sharding import SequenceParallel

        return {"parallel": SequenceParallel(args.devices or DEVICES, base).for_model(job.config)}
    return {}


def parse_variant(name: str) -> tuple[str, int]:
    """(base, how many times as long as a clip): "windowed-4x" -> ("windowed", 4). Raises ValueError."""
    base, times = re.fullmatch(r"(.*?)(?:-([1-9]\d?)x)?", name).groups()
    if base not in NAMES or (times and base in ("teacher", "vae")):
        raise ValueError(
            f"unknown variant {name!r}; choose from {', '.join(NAMES)}, all; longer: windowed-4x"
        )
    return base, int(times or 1)


def _variant_names(args: argparse.Namespace, job: Job) -> list[str]:
    names = list(dict.fromkeys(args.variants))
    if "all" in names:
        other = next(p for p in PRECISIONS if p != job.precision)
        names = ["model", "truth", "vae", other, "windowed", "model-4x", "windowed-4x"]
        if job.parallel.num_devices > 1:
            names.insert(0, "single")
        names += STRATEGIES if len(jax.devices()) >= (args.devices or DEVICES) else ()
        names += ["teacher"] if args.teacher else []
    for name in names:
        if parse_variant(name)[0] == "teacher" and args.teacher is None:
            raise ValueError(
                "the variant teacher needs --teacher FOLDER, a model folder of kind bidirectional"
            )
    if args.teacher and "teacher" not in names:
        names.append("teacher")
    if not names:
        raise ValueError(f"--variants names none; choose from {', '.join(NAMES)}, all")
    return names


def _sets(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    if unknown := [name for name in names if name not in SETS]:
        raise ValueError(f"unknown set {unknown[0]!r}; choose from {', '.join(SETS)}")
    return {name: SETS[name] for name in names}


def _progress(what: str):
    shown = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > 10:
            shown = time.monotonic()
            note(f"{what}: {done}/{total} clips")

    return update


# Videos for VBench.


def export(args: argparse.Namespace, parallel: Parallel) -> None:
    """Makes the videos of a VBench suite that are not there yet."""
    if not (args.vbench and args.prompts):
        raise ValueError("--vbench OUT and --prompts FILE go together; --extended FILE may join them")
    job = Job.create(args, parallel, "any prompt")
    if not args.vbench.exists():
        check_folder(args.vbench.parent)
        args.vbench.mkdir()
    settings = {key: value for key, value in job.settings.items() if key not in ("seed", "image", "video")}
    suite = vbench.Suite(
        args.vbench,
        args.prompts,
        extended=args.extended,
        videos=args.seeds,
        seed=args.seed,
        settings=settings,
        overwrite=args.overwrite,
    )
    unfinished, write_json, display = suite.unfinished(), json_writer(args.json), Display()
    note(
        f"{suite.count} videos of {len(suite.prompts)} prompts, "
        f"{suite.count - len(unfinished)} finished in {suite.folder}"
    )
    if not unfinished:
        return
    with CompileClock() as clock:
        pipe = job.load()
        suite.begin()
        for one in unfinished:
            timings = Timings(clock, compile_from=time.perf_counter())
            inputs = job.inputs | {"seed": one.seed}
            with VideoWriter(one.path, job.config.fps, overwrite=args.overwrite) as writer:
                for chunk in pipe.stream(one.text, report=timings.report, **inputs):
                    timings.add(len(chunk))
                    writer.write(chunk)
            timings.finish()
            write_json(timings.to_json() | job.facts() | {"seed": one.seed, "out": str(one.path)})
            display.finished(one.path, timings, job.config.fps, brief=True)
