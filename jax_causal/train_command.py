"""`jax-causal train`: one stage of training, from a configuration to a model folder.

Whatever can be wrong is checked before anything is computed. Importing this does not start JAX, because how many
devices a CPU is to offer is in the configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from jax_causal.training import config as configs
from jax_causal.training.config import MeshConfig, TrainConfig

if TYPE_CHECKING:
    from jax_causal.console import Display
    from jax_causal.parallel import Parallel


def configuration(args: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments ask for.

    Raises:
      ValueError, FileNotFoundError: see `training.config.load`; or the options contradict it.
    """
    if not (args.config or args.stage):
        raise ValueError("say what to train: --stage vae, teacher, causal or distill, or --config")
    if args.out is None and not args.dry_run:
        raise ValueError("say where to: --out FOLDER, or --dry-run to see what memory it takes")
    config = configs.load(args.config or f"tiny-{args.stage}", args.set)
    if args.stage and args.stage != config.stage:
        raise ValueError(f"{args.config} is for --stage {config.stage}, not {args.stage}")
    if args.strategy:
        config = dataclasses.replace(config, strategy=args.strategy)
    if args.devices:
        # As in generate, a strategy asks for shared frames; how far they are shared the configuration may say.
        seq = config.mesh.seq
        if args.strategy and seq == 1:
            seq = args.devices
        if args.devices % seq:
            raise ValueError(f"--devices {args.devices} must be a multiple of mesh.seq={seq}")
        config = dataclasses.replace(config, mesh=MeshConfig(args.devices // seq, seq))
    return config


def run(args: argparse.Namespace, config: TrainConfig, parallel: Parallel) -> None:
    """Trains as the configuration says, run in the way of `parallel`.

    Raises:
      KeyboardInterrupt: a signal ended the run; the message says where it was saved.
      NotFinite, ValueError, OSError: see `trainer.train`.
    """
    import jax

    from jax_causal.console import Display
    from jax_causal.outputs import json_writer
    from jax_causal.training import folder, stage, trainer

    display, write_json = Display(quiet=args.quiet), json_writer(args.json)
    if args.dry_run:
        write_json(_dry_run(config, parallel, display))
        return
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"{args.out} is a file: --out names a folder")
    if config.init_from is not None and args.out.resolve() == Path(config.init_from).resolve():
        raise ValueError(f"--out and init_from are both {args.out}: train into another folder")
    model = folder.model_config(config)
    parallel = parallel.for_model(model)
    components = folder.Components(config.init_from, model, parallel)
    kind, mesh = jax.devices()[0].device_kind, config.mesh
    display.header(
        f"{config.stage} of {model.name}",
        f"{config.num_steps} updates of {config.batch_size} clips",
        f"{config.dtype} on {kind if mesh.size == 1 else f'{mesh.data} x {mesh.seq} x {kind}, {parallel.name}'}",
        f"seed {config.seed}",
    )
    outcome = trainer.train(
        stage.create(config, model, components, parallel),
        config,
        args.out,
        parallel=parallel,
        display=display,
        fps=model.fps,
        resume=args.resume,
        allow_changes=args.allow_changes,
    )
    write_json(
        dataclasses.asdict(outcome)
        | {
            "checkpoint": str(outcome.checkpoint),
            "stage": config.stage,
            "model": model.name,
            "out": str(args.out),
            "devices": mesh.size,
            "strategy": parallel.name,
            "device_kind": kind,
            "jax": jax.__version__,
        }
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"update {outcome.step} is saved in {outcome.checkpoint}; --resume goes on")
    display.print((str(args.out), "bold green"), f"  {outcome.step} updates in {outcome.elapsed_s:.0f} s")


def _dry_run(config: TrainConfig, parallel: Parallel, display: Display) -> dict[str, int | str]:
    """Shows and returns what an update takes on each device. No folder is needed where `model` gives the sizes."""
    from jax_causal.console import nbytes
    from jax_causal.training import dry_run, folder

    if config.model is not None:
        config = dataclasses.replace(config, init_from=None)
    model = folder.model_config(config)
    parallel = parallel.for_model(model)
    with display.working(f"compiling an update of {config.stage} of {model.name}"):
        sizes = dry_run.memory(config, model, parallel)
    for name, size in sizes.items():
        beside = " (an H100 has 80 GB, an H200 141 GB)" if name == "total" else ""
        display.print(f"{name:<10} {nbytes(size)} on each device{beside}")
    return {f"{name}_bytes": size for name, size in sizes.items()} | {
        "stage": config.stage,
        "model": model.name,
        "devices": config.mesh.size,
        "strategy": parallel.name,
    }
