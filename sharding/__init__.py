"""Sequence parallelism: every frame's tokens sharded over a device mesh, behind `jax_causal`'s `Parallel`.

from jax_causal import Pipeline
from sharding import SequenceParallel

pipe = Pipeline.from_pretrained(folder, parallel=SequenceParallel(devices=8, strategy="auto"))
"""

from sharding.sequence_parallel import SequenceParallel, Sharded
from sharding.strategies import NAMES as STRATEGIES

__all__ = ["STRATEGIES", "SequenceParallel", "Sharded"]
