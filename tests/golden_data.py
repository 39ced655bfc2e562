"""Access to the golden vectors: outputs of the original implementation with small random weights.

`JAX_CAUSAL_GOLDEN` names another folder of files in the same format. Shapes and settings are read
from the files, never assumed. File format: tests/golden/README.md.
"""

import functools
import os
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("JAX_CAUSAL_GOLDEN") or Path(__file__).parent / "golden")


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.npz`; float16 storage (exact) is widened to float32."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return {key: a.astype(np.float32) if a.dtype == np.float16 else a for key, a in arrays.items()}


def names(prefix: str = "") -> list[str]:
    """Sorted names of the golden files that start with `prefix`."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.npz"))


def settings(data: dict[str, np.ndarray]) -> dict:
    """The `cfg/` entries: integers, or lists of integers."""
    return {k.removeprefix("cfg/"): v.tolist() for k, v in data.items() if k.startswith("cfg/")}


def state_dict(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The `sd/` entries: weights under the original checkpoint's keys, torch shapes, float32."""
    return {k.removeprefix("sd/"): v for k, v in data.items() if k.startswith("sd/")}


def numbered(data: dict[str, np.ndarray], prefix: str, suffix: str = "") -> list[np.ndarray]:
    """`prefix000suffix`, `prefix001suffix`, ... in order, as many as there are."""
    keys = sorted(k for k in data if k.startswith(prefix) and k.endswith(suffix))
    keys = [k for k in keys if k[len(prefix) : len(k) - len(suffix)].isdigit()]
    return [data[k] for k in keys]


def divisors(number: int) -> list[int]:
    """All of them but 1, ascending."""
    return [d for d in range(2, number + 1) if number % d == 0]
