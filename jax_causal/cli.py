"""The command line: `jax-causal VERB`.

Parsing comes first and imports nothing heavy, so that help and bad usage answer at once, and so that what JAX must
know before it starts is in the environment when a verb imports it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from jax_causal import arguments, environment

_BAD_INPUT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C.

    `JAX_CAUSAL_TRACEBACK=1` in the environment lets errors through with their traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments.parse(argv, {"convert": _convert_arguments})
    # Bench starts processes that need the device's memory beside it; these are told since when they run.
    alone = args.verb != "bench" or args.since is not None
    # Of several processes, each has a share of the devices only; `distributed` sees to that.
    devices = None if getattr(args, "distributed", False) else getattr(args, "devices", None)
    environment.apply(devices=devices, reserve=alone)
    from jax_causal import console

    try:
        with console.plain_warnings():
            _VERBS[args.verb](args)
        return 0
    except KeyboardInterrupt as interrupt:
        without = " without --overwrite" if getattr(args, "overwrite", False) else ""
        again = f"; the same command{without} continues" if getattr(args, "prompts", None) else ""
        console.note(f"interrupted: {str(interrupt) or f'nothing half-written was left{again}'}")
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        message, status = _explain(error, args.verb)
        if message is None or os.environ.get("JAX_CAUSAL_TRACEBACK"):
            raise
        console.error(message)
        return status


def _explain(error: Exception, verb: str) -> tuple[str | None, int]:
    """(message, exit status) of an expected error; the message of any other is None."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        return message, 2 if isinstance(error, _BAD_INPUT) else 1
    if isinstance(error, RuntimeError):
        if "RESOURCE_EXHAUSTED" not in str(error):
            return None, 1
        mends = "a smaller --window, --height and --width, or --precision bfloat16"
        if verb == "train":
            mends = "--set accumulate=N, a smaller batch_size, or shard_params=true on more --devices"
        return f"the device's memory is full: try {mends} ({str(error).splitlines()[0]})", 1
    return str(error), 1


def _bench(args: argparse.Namespace) -> None:
    from jax_causal import bench_report

    _check_processes(args)
    if args.distributed:
        bench_report.check_distributed(args)
    if args.scaling:
        from sharding import scaling_report

        scaling_report.run(args)
        return
    with _shared(args) as (parallel, session):
        bench_report.run(args, parallel, session)


def _train(args: argparse.Namespace) -> None:
    from jax_causal import train_command

    config = train_command.configuration(args)
    # A dry run computes nothing, and there need not be as many devices.
    if args.dry_run:  # XLA's warnings of what would be slow are for whoever runs it
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    environment.apply(platform="cpu" if args.dry_run else None, devices=config.mesh.size)
    train_command.run(args, config, _training_parallel(config))


def _training_parallel(config):
    """How to run a training configuration."""
    if config.mesh.size == 1:
        from jax_causal.parallel import SingleDevice

        return SingleDevice()
    from sharding import SequenceParallel

    return SequenceParallel(
        config.mesh.size, config.strategy, data=config.mesh.data, shard_params=config.shard_params
    )


def _eval(args: argparse.Namespace) -> None:
    if not args.devices and {"gather", "ulysses", "ring", "hybrid", "all"} & {
        v.split("-")[0] for v in args.variants
    }:
        environment.apply(devices=8)
    from jax_causal import eval_command

    eval_command.run(args, _parallel(args))


def _explain_sharding(args: argparse.Namespace) -> None:
    # Wherever it runs: nothing is computed, and there need not be as many devices.
    environment.apply(platform="cpu", devices=args.devices)
    from sharding import explain

    explain.run(args)


def _generate(args: argparse.Namespace) -> None:
    from jax_causal import generate

    _check_processes(args)
    with _shared(args) as (parallel, session):
        generate.run(args, parallel, session)


@contextlib.contextmanager
def _shared(args: argparse.Namespace):
    """How to run, and this process's `sharding.distributed.Session` where it is one of several."""
    if not args.distributed:
        yield _parallel(args), None
        return
    from sharding import SequenceParallel, distributed, processes

    with distributed.session(
        args.coordinator,
        args.num_processes,
        args.process_id,
        timeout=args.timeout or 60,
        devices=args.devices,
    ) as session:
        yield SequenceParallel(processes.pick_devices(args.devices), args.strategy or "auto"), session


def _check_processes(args: argparse.Namespace) -> None:
    """Raises ValueError for options of several processes where there is one."""
    for name in ("coordinator", "num_processes", "process_id", "timeout"):
        if not args.distributed and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for several processes: add --distributed")


def _parallel(args: argparse.Namespace):
    """How to run, as the options say: one device, or several in sequence parallelism."""
    if args.devices is None and args.strategy is None:
        from jax_causal.parallel import SingleDevice

        return SingleDevice()
    from sharding import SequenceParallel

    return SequenceParallel(args.devices, args.strategy or "auto")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    # Converting needs no accelerator, and must not take one's memory.
    environment.apply(platform="cpu")
    from converters import convert

    convert.add_arguments(parser)


def _convert(args: argparse.Namespace) -> None:
    from converters import convert

    convert.run(args)


_VERBS = {
    "generate": _generate,
    "explain": _explain_sharding,
    "bench": _bench,
    "train": _train,
    "eval": _eval,
    "convert": _convert,
}
