"""Makes a model that the package ships out of a trained model folder: its parameters in bfloat16.

python -m jax_causal.training.bundle runs/tiny-distill jax_causal/weights/tiny
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp

from jax_causal import checkpoint, modules
from jax_causal.components import COMPONENTS
from jax_causal.model_folder import find_model

LARGEST_BYTES, MOST_PARAMETERS = 20_000_000, 10_000_000


def bundle(source: Path, target: Path) -> tuple[int, int]:
    """Writes the model folder `source` to `target` in bfloat16, named as that folder is.

    Returns:
      Parameters, and bytes on disk.

    Raises:
      ValueError: the model is not distilled, or too large to be shipped.
      FileExistsError: `target` is there already.
    """
    config, _ = find_model(source)
    shapes = {
        name: modules.abstract(module, getattr(config, name), dtype=jnp.bfloat16)
        for name, module in COMPONENTS.items()
    }
    count = modules.num_parameters(shapes)
    if count > MOST_PARAMETERS or 2 * count > LARGEST_BYTES:
        raise ValueError(
            f"{count:,} parameters are too many to be shipped: {MOST_PARAMETERS:,} and {LARGEST_BYTES:,} bytes at most"
        )
    for name, abstract in shapes.items():
        checkpoint.save(target / name, checkpoint.restore(source / name, abstract))
        # Nothing reads what orbax says there: where on this machine the folder was written.
        (target / name / "commit_success.txt").unlink(missing_ok=True)
    config = dataclasses.replace(config, name=target.name)
    (target / "config.json").write_text(config.to_json(), encoding="utf-8")
    return count, sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="trained model folder")
    parser.add_argument("target", type=Path, help="folder to make")
    args = parser.parse_args()
    count, size = bundle(args.source, args.target)
    print(f"{args.target}: {count:,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
