"""Access to the checkpoint manifests, the tensors of public formats: tests/manifests/README.md."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "manifests"


def load(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> torch shape of every tensor of a format, repeated layers written out."""
    manifest = json.loads((FOLDER / f"{name}.json").read_text())
    entries = dict(manifest["keys"])
    for layers in manifest.get("repeated", ()):
        for i in range(layers["count"]):
            entries |= {f"{layers['prefix']}{i}.{key}": entry for key, entry in layers["keys"].items()}
    return {key: tuple(entry["shape"]) for key, entry in entries.items()}


def totals(name: str) -> tuple[int, int]:
    """Tensors and elements that the manifest says there are."""
    manifest = json.loads((FOLDER / f"{name}.json").read_text())
    return manifest["num_tensors"], manifest["num_elements"]


def names() -> list[str]:
    """All manifests."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))
