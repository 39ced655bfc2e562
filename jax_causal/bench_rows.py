"""The rows that `bench` can give: their names, what lies inside each, and what floors leave out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

PROFILE = {
    "products": "kernels of matrix products",
    "attention": "attention kernels",
    "convolutions": "convolution kernels",
    "elementwise": "all other kernels: norms, modulation, rotation, activations, sums",
    "collectives": "collectives, in full where they overlap computation",
    "copies": "copies, in full where they overlap computation",
    "gaps": "time with nothing on the first device",
}
# As `Pipeline.stream` reports them.
FIRST_FRAME = {
    "text": "text keys and values",
    "denoise": "denoising of the first block, and what the device has left to do of the empty cache and the noise",
    "decode": "decode of the first frame",
}
# Of several GPUs.
COMMUNICATION = ("pass_collectives", "pass_collectives_exposed")

# Every row, in the order of the report, and what lies inside it.
BOUNDARIES = {
    "end_to_end": "prompt embedding to RGB of all frames on the host: text keys and values, noise, denoising, all "
    "context passes but the last, decode, transfer; no text encoding",
    "first_frame": "the same run until its first RGB frame is on the host",
    **{
        f"first_frame_{part}": f"{what}, the device waited for before and after; beside these parts the first frame "
        "waits for the host, the cache and the transfer"
        for part, what in FIRST_FRAME.items()
    },
    "rollout": "denoising and all context passes; noise and text keys and values made before, no decode",
    "rollout_without_last_context": "rollout without the context pass of the last block, which no frame needs",
    "rollout_short_prompt": "rollout for a prompt of an eighth of the positions that the text encoder has, 64 of 512: "
    "some sentences. On Hopper GPUs what pads it is read once. In all other rows a prompt fills the positions",
    "rollout_throughput": "operations of the rollout by its time; the floor is the product ceiling",
    "decode": "VAE decode of all frames to uint8 on the device, in the chunks of a run; no transfer",
    "steady_block": "one block of a long video, its window full: noise, denoising, context pass, decode; no transfer",
    "text": "text encoder over all its positions; no tokenizer",
    "warmup": "the first end-to-end run: compiling, and the run itself",
    "compile": "tracing and compiling in the warm-up, or fetching programs that were compiled before",
    "start_cold": "a process, from its start to its first RGB frame on the host, from prompt embeddings; nothing was "
    "compiled before; loading the weights taken off",
    "start_warm": "the same with all programs compiled before",
    "start_loading": "what was taken off the warm start: reading the weights, or making random ones",
    "peak_memory": "the first device's peak in such a process after the whole video: loading, denoising, decoding; no "
    "text encoder",
    "peak_memory_all": "the first device's peak in the measuring process, which holds the text encoder as well",
    **{f"profile_{part}": f"{what} in one profiled end-to-end run" for part, what in PROFILE.items()},
    "pass_collectives": "collectives in a pass of the network, waiting for other devices included: the time in which "
    "one runs, in a profiled rollout, by its passes; median, min and max over the GPUs of this process. "
    "The kernel that rotates queries and keys is one where it writes to the caches of other devices",
    "pass_collectives_exposed": "that part of it in which nothing computes on the same device; copies do not count as "
    "computing",
    "product_ceiling": "one large matrix product on one device",
    "attention_ceiling": "one large attention with the model's heads on one device, by the back end in use",
    "copy_ceiling": "one large copy inside one device, bytes read plus written; no floor uses it",
}
FLOORS = (
    "floor = (products / product_ceiling + attention / attention_ceiling) / devices, products and attention counted "
    "in operations; norms, activations, transfers and collectives are left out"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
      name: a key of `BOUNDARIES`.
      median, min, max: over the repeats, or what `BOUNDARIES` says, in `unit`.
      unit: "s", "TFLOP/s", "TB/s" or "GiB".
      floor: the best to be hoped for, in `unit`: the shortest time, or the highest speed. None where there is none.
    """

    name: str
    median: float
    min: float
    max: float
    unit: str
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        """Median by floor: times lie above 1 and speeds below. None without a floor."""
        return self.median / self.floor if self.floor else None

    def to_json(self) -> dict[str, str | float | None]:
        """The fields by name."""
        return dataclasses.asdict(self)


def check_rows(names: Collection[str] | None) -> set[str]:
    """The set of `names`, all rows for None. Raises ValueError, naming the known ones, for an unknown one."""
    if names is None:
        return set(BOUNDARIES)
    if unknown := [name for name in names if name not in BOUNDARIES]:
        raise ValueError(f"there is no row {unknown[0]!r}: the rows are {', '.join(BOUNDARIES)}")
    if not names:
        raise ValueError(f"no rows are asked for: the rows are {', '.join(BOUNDARIES)}")
    return set(names)
