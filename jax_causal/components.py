"""The components of a model as a run uses them: their classes, their parameters on their devices, and the compiled
programs of text encoder and VAE. Those of the transformer are in `rollout`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax

from jax_causal import checkpoint, modules, transformer
from jax_causal.config import ModelConfig, VAEConfig
from jax_causal.parallel import Parallel
from jax_causal.rollout import Framing
from jax_causal.text import UMT5Encoder
from jax_causal.tokenizer import Tokenizer, load_tokenizer
from jax_causal.vae import VAE, to_uint8
from jax_causal.vae_layers import ACTIVATION_AXES

COMPONENTS = {"transformer": transformer.CausalDiT, "vae": VAE, "text_encoder": UMT5Encoder}


# Parameters.


def restore(
    config: ModelConfig, folder: Path, dtype, parallel: Parallel, *, text_encoder: bool = True
) -> tuple[dict[str, dict], Tokenizer | None]:
    """Parameters of the components that a model folder has, in the form that they are run in, and its tokenizer, if
    it has a text encoder. Without `text_encoder` it is as if the folder had none.

    Raises what `checkpoint.restore` and `load_tokenizer` raise.
    """
    missing = set(checkpoint.missing(folder)) | (set() if text_encoder else {"text_encoder"})
    tokenizer = None
    if "text_encoder" not in missing and config.tokenizer is not None:
        length = config.text_encoder.max_length
        tokenizer = load_tokenizer(config.tokenizer, folder / "tokenizer", length)
    params = {}
    for component in COMPONENTS:
        if component not in missing:
            loaded = checkpoint.restore(folder / component, _abstract(config, component, dtype, parallel))
            params[component] = _laid_out(component, loaded, parallel)
    return params, tokenizer


def init(
    config: ModelConfig, seed: int, dtype, parallel: Parallel, *, text_encoder: bool = True
) -> dict[str, dict]:
    """Random parameters of the components that a model has, in the form that they are run in. Without `text_encoder` it
    is as if the model had none."""
    # The rbg generator compiles several times faster than threefry over a model's many leaves.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(COMPONENTS))
    params = {}
    for key, (component, module) in zip(keys, COMPONENTS.items(), strict=True):
        if not text_encoder and component == "text_encoder":
            continue
        if (part := getattr(config, component)) is not None:
            make = functools.partial(modules.init, module, part, dtype=dtype)
            make = jax.jit(make, out_shardings=_shardings(config, component, parallel))
            params[component] = _laid_out(component, make(key), parallel)
    return params


def place(config: ModelConfig, params: dict[str, dict], parallel: Parallel) -> dict[str, dict]:
    """Parameters in the host's memory, by component, as `init` would leave them: on their devices, with their
    dtypes, in the form that they are run in. They are stacked, as in a checkpoint; shapes are those of `config`."""
    return {
        component: _laid_out(
            component, jax.device_put(held, _shardings(config, component, parallel)), parallel
        )
        for component, held in params.items()
    }


def _laid_out(component: str, params: dict, parallel: Parallel) -> dict:
    """Parameters just made, which nobody else holds, in the form that they are run in."""
    if component == "transformer" and parallel.unrolled:
        return transformer.unroll(params, consume=True)
    return params


def _abstract(config: ModelConfig, component: str, dtype, parallel: Parallel):
    """Shapes with the shardings they are to be restored onto."""
    shapes = modules.abstract(COMPONENTS[component], getattr(config, component), dtype=dtype)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        _shardings(config, component, parallel),
    )


def _shardings(config: ModelConfig, component: str, parallel: Parallel):
    return parallel.shardings(modules.abstract(COMPONENTS[component], getattr(config, component)), component)


# Programs.


@functools.partial(jax.jit, static_argnames="config")
def encode_text(config, params, ids, mask) -> jax.Array:
    """Prompt embeddings [B, L, D] of token ids and mask [B, L]; zero at the padding."""
    return modules.bind(UMT5Encoder, config, params)(ids, mask)


@functools.partial(jax.jit, static_argnames=("config", "framing", "first"), donate_argnames="state")
def decode_chunk(config: VAEConfig, framing: Framing, params, tokens, state, *, first: bool):
    """Patch tokens [B, F, S, 4C] to uint8 video [B, T, H, W, 3], and the decoder's next state (donated)."""
    constrain, halo = framing.parallel.constrain, framing.parallel.halo
    decode = modules.bind(VAE, config, params).decode
    video, state = decode(framing.from_tokens(tokens), state, first=first, constrain=constrain, halo=halo)
    video = to_uint8(video)
    if jax.process_count() > 1:  # a process can read only what its own devices hold
        video = constrain(video, (None,) * video.ndim)
    # Left alone, what a chunk does not touch comes back whole, and the next chunk compiles once more.
    return video, tuple(constrain(x, ACTIVATION_AXES) for x in state)


@functools.partial(jax.jit, static_argnames=("config", "framing"))
def encode_video(config: VAEConfig, framing: Framing, params, video):
    """Video [B, T, H, W, 3] in [-1, 1] to patch tokens [B, F, S, 4C] of its latents."""
    encode = modules.bind(VAE, config, params).encode
    constrain, halo = framing.parallel.constrain, framing.parallel.halo
    latents, _ = encode(video, None, first=True, constrain=constrain, halo=halo)
    return framing.to_tokens(latents)
