"""How XLA generates code for tests, which compile much and compute little. Imported before jax is."""

import importlib.metadata

# Without optimisation code is generated several times faster, and with the least work where a program stays whole:
# other tests keep the cores busy that its parts would be shared out to.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# Where it is still there, the generator before that of fusions takes a third off the whole suite. Its loops round alike
# only where they are fused alike, and its programs are not kept in the compilation cache.
OLD = "xla_cpu_use_fusion_emitters" if importlib.metadata.version("jaxlib").startswith("0.10.") else None
_OLD = f" --{OLD}=false" if OLD else ""
FLAGS = UNOPTIMIZED + _OLD
# Where much is computed, the first level is worth its compiling.
OPTIMIZED = "--xla_backend_optimization_level=1" + _OLD
# For `jax.jit` where that matters.
AS_INSTALLED = {OLD: True} if OLD else {}
