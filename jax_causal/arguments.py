"""Verbs and options of the command line; nothing heavy is imported here."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from jax_causal import __version__, help_texts


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        # Without the usage: it is long enough to hide the message.
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parse(
    argv: list[str], others: Mapping[str, Callable[[argparse.ArgumentParser], None]]
) -> argparse.Namespace:
    """The parsed command; `verb` says which. Ends the process with a message for bad usage.

    Args:
      others: functions that add the arguments of verbs defined elsewhere, called for the verb in use alone.
    """
    parser = _Parser(
        prog="jax-causal",
        description="Text to video, block by block, in JAX.",
        epilog='first video:\n  jax-causal generate "a red ball rolls to the right" --out ball.mp4\n',
    )
    parser.add_argument("--version", action="version", version=f"jax-causal {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    generate = verbs.add_parser(
        "generate",
        help="make videos from prompts",
        description="Makes a video from a prompt, or one from every line of a file.",
        epilog=help_texts.GENERATE,
    )
    _generate_arguments(generate)
    explain = verbs.add_parser(
        "explain",
        help="show how a model would be shared by several devices",
        description="Shows what each of several devices would hold, and what they would send each other.",
        epilog=help_texts.EXPLAIN,
    )
    _size_arguments(explain)
    _model_arguments(explain)
    explain.set_defaults(devices=8)
    bench = verbs.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measures a model: end to end, part by part, and against what the device can do.",
        epilog=help_texts.BENCH,
    )
    _bench_arguments(bench)
    bench.set_defaults(image=None, video=None)
    train = verbs.add_parser(
        "train",
        help="train a stage: vae, teacher, causal or distill",
        description="Trains one stage of a model and leaves a model folder.",
        epilog=help_texts.TRAIN,
    )
    _train_arguments(train)
    evaluate = verbs.add_parser(
        "eval",
        help="score a model, or make videos for VBench",
        description="Scores a model of the procedural world, or makes the videos that VBench scores.",
        epilog=help_texts.EVAL,
    )
    _eval_arguments(evaluate)
    evaluate.set_defaults(image=None, video=None)
    verbs.add_parser(
        "convert",
        help="make a model folder from PyTorch weights",
        description="Adds every component that SOURCE holds to the model folder DEST.",
        epilog=help_texts.CONVERT,
    )
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    verb = argv[0]
    if verb in others:
        others[verb](verbs.choices[verb])
    elif not verb.startswith("-") and verb not in verbs.choices:
        near = difflib.get_close_matches(verb, verbs.choices, n=1, cutoff=0.5) or ["generate"]
        hint = f'jax-causal generate "{verb}"' if " " in verb else near[0]
        parser.error(f"unknown verb {verb!r}: did you mean {hint}?")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(verbs.choices[args.verb], unknown[0])
    return args


def _refuse(parser: argparse.ArgumentParser, word: str) -> None:
    """Ends with an error about an argument that `parser` does not know."""
    if word.startswith("-"):
        near = difflib.get_close_matches(word, parser._option_string_actions, n=1)
        parser.error(f"unknown option {word}" + (f": did you mean {near[0]}?" if near else ""))
    parser.error(f"unexpected {word!r}: a prompt of several words goes in quotes")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to make").add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", metavar="PROMPT", nargs="?", help="what the video shows")
    what.add_argument(
        "--prompts", metavar="FILE", type=Path, help="a prompt per line; --out is then a folder"
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        required=True,
        help="video to write, .mp4 or .gif; a folder with --prompts",
    )
    output.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    output.add_argument("--quiet", action="store_true", help="show warnings and errors only")

    given = _size_arguments(parser).add_mutually_exclusive_group()
    given.add_argument(
        "--image", metavar="FILE", type=Path, help="first frame, for models that can start from one"
    )
    given.add_argument("--video", metavar="FILE", type=Path, help="clip to extend; --frames counts it too")

    model = _model_arguments(parser)
    model.add_argument("--warmup", action="store_true", help="compile before the clock starts")

    _process_arguments(parser)


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every verb that several processes can share."""
    several = parser.add_argument_group("several processes, on one host or more")
    several.add_argument(
        "--distributed", action="store_true", help="be one of several processes that share the devices of all"
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens (default: the launcher's variables)",
    )
    several.add_argument("--num-processes", metavar="N", type=_whole(1), help="of the run")
    several.add_argument("--process-id", metavar="I", type=_whole(0), help="of this one, from 0")
    several.add_argument("--timeout", metavar="S", type=_whole(1), help="to wait for the others (60)")


def _size_arguments(parser: argparse.ArgumentParser):
    """Options of every verb that is about a video of a certain size."""
    group = parser.add_argument_group("video")
    group.add_argument("--frames", metavar="N", type=_whole(1), help="video frames (default: the model's)")
    group.add_argument("--height", metavar="N", type=_whole(1), help="pixels (default: the model's)")
    group.add_argument("--width", metavar="N", type=_whole(1), help="pixels (default: the model's)")
    return group


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    _size_arguments(parser)
    _model_arguments(parser)
    group = parser.add_argument_group("measuring")
    group.add_argument("--repeats", metavar="N", type=_whole(1), default=5, help="behind every median (5)")
    group.add_argument(
        "--only", metavar="ROWS", type=split_names, help="rows to measure, with commas between (default: all)"
    )
    group.add_argument("--compare", metavar="FILE", type=Path, help="show ratios to what --json wrote before")
    group.add_argument(
        "--scaling",
        action="store_true",
        help="measure each of --devices (default: all) alone and every strategy on all (or those of --strategy, with "
        "commas between), and project to more",
    )
    group.add_argument(
        "--project",
        metavar="N",
        type=_whole(0),
        default=8,
        help="devices to project to with --scaling, 0 for none (8)",
    )
    _process_arguments(parser)
    # How bench starts itself, to measure a fresh process: since when it runs.
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to train")
    group.add_argument("--stage", choices=("vae", "teacher", "causal", "distill"), help="which objective")
    group.add_argument(
        "--config", metavar="NAME|FILE", help="bundled configuration or JSON file (tiny-STAGE)"
    )
    group.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="values to change in it"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", type=Path, help="model folder to make")
    output.add_argument(
        "--dry-run", action="store_true", help="show the memory it takes on each device instead"
    )
    output.add_argument("--resume", action="store_true", help="go on from the last checkpoint in it")
    output.add_argument(
        "--allow-changes", action="store_true", help="resume with another configuration than before"
    )
    output.add_argument("--json", metavar="FILE", help="write how it ended; - is standard output")
    output.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--devices",
        metavar="N",
        type=_whole(1),
        help="share the batch among N devices, or among N / mesh.seq groups of them",
    )
    devices.add_argument(
        "--strategy",
        metavar="NAME",
        help="share every frame instead: auto, gather, ulysses, ring or hybrid, as in generate",
    )


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to score")
    group.add_argument(
        "--variants", metavar="LIST", type=split_names, default=["model"], help="see below (model)"
    )
    group.add_argument(
        "--sets", metavar="LIST", type=split_names, help="of prompts (CPU: held-out; else all)"
    )
    group.add_argument("--limit", metavar="N", type=_whole(1), help="prompts of each set (CPU: 32; else 128)")
    group.add_argument("--seeds", metavar="N", type=_whole(1), help="clips of each prompt (CPU: 1; else 8)")
    group.add_argument("--batch", metavar="N", type=_whole(1), help="clips made at once (CPU: 4; else 32)")
    group.add_argument(
        "--sheet", metavar="FILE.png", type=Path, help="write a contact sheet of the first variant"
    )
    group.add_argument("--teacher", metavar="FOLDER", type=Path, help="many-step model to compare with")
    group.add_argument("--steps", metavar="N", type=_whole(1, 1000), default=50, help="of the teacher (50)")
    group.add_argument("--guidance", metavar="X", type=float, default=3.0, help="of the teacher (3)")
    group = parser.add_argument_group("VBench")
    group.add_argument("--vbench", metavar="OUT", type=Path, help="folder for the videos")
    group.add_argument("--prompts", metavar="FILE", type=Path, help="suite of prompts, one per line")
    group.add_argument(
        "--extended", metavar="FILE", type=Path, help="longer wordings for the model, line by line"
    )
    group.add_argument("--overwrite", action="store_true", help="make all videos anew")
    _size_arguments(parser)
    _model_arguments(parser)


def _model_arguments(parser: argparse.ArgumentParser):
    """Options of every verb that runs a model."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--model", metavar="NAME|FOLDER", default="tiny", help="bundled model or model folder (tiny)"
    )
    which.add_argument("--preset", metavar="NAME", help="random weights of this size instead: shows noise")
    group.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="auto is bfloat16 on accelerators and float32, which is faster there, on CPUs",
    )
    group.add_argument(
        "--window", metavar="N", type=_whole(1), help="latent frames attended to (default: all)"
    )
    group.add_argument(
        "--sink", metavar="N", type=_whole(0), default=0, help="first latent frames kept in the window"
    )
    group.add_argument(
        "--devices",
        metavar="N",
        type=_whole(1),
        help="shard every frame over N devices (default: one device)",
    )
    group.add_argument(
        "--strategy",
        metavar="NAME",
        help="how: auto, gather, ulysses, ring or hybrid (auto, over all devices)",
    )
    seed = _whole(0, 2**32 - 1)  # JAX would drop higher bits
    group.add_argument("--seed", metavar="N", type=seed, default=0, help="of the noise (0)")
    group.add_argument("--json", metavar="FILE", help="write timings and settings; - is standard output")
    return group


def split_names(text: str) -> list[str]:
    """The words between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _whole(low: int, high: int | None = None):
    """A parser of whole numbers from `low` to `high`, both included."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            bounds = f"{low} or more" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {bounds}")
        return int(text)

    return parse
