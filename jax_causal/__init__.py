"""Causal autoregressive video generation in JAX, exact to Self-Forcing, streamed block by block.

    from jax_causal import Pipeline

    pipe = Pipeline.from_pretrained("tiny")
    pipe("a red ball rolls to the right").save("ball.mp4")

Public names are loaded on first use, so that importing the package does not start JAX.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "Pipeline": "pipeline",
    "SingleDevice": "parallel",
    "Video": "video",
    "ModelConfig": "config",
    "PRESETS": "config",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return __all__
