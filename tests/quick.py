"""How XLA generates code for tests, which compile much and compute little. Imported before jax is."""

import importlib.metadata

# Without optimisation code is generated several times faster.
UNOPTIMIZED = "--xla_backend_optimization_level=0"
# Where it is still there, the generator before that of fusions takes a third off the whole suite. Its loops round alike
# only where they are fused alike, and its programs are not kept in the compilation cache.
OLD = "xla_cpu_use_fusion_emitters" if importlib.metadata.version("jaxlib").startswith("0.10.") else None
FLAGS = f"{UNOPTIMIZED} --{OLD}=false" if OLD else UNOPTIMIZED
# For `jax.jit` where that matters.
AS_INSTALLED = {OLD: True} if OLD else {}
