"""One process of the runs in test_distributed.py.

python distributed_worker.py generate ...       the command line, with the preset "small"
python distributed_worker.py frames OUT I PORT  a video by the library, saved by process 0
"""

import dataclasses
import sys

from jax_causal.config import (
    PRESETS,
    SamplerConfig,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
    VAEConfig,
)

SMALL = dataclasses.replace(
    PRESETS["tiny"],
    name="small",
    transformer=TransformerConfig(dim=64, num_layers=1, num_heads=8, ffn_dim=64, text_dim=32, text_length=16),
    vae=VAEConfig(dim=8, multipliers=(1, 1), num_res_blocks=1, temporal_downsample=(True,)),
    text_encoder=TextConfig(
        vocab_size=384, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=1, max_length=16
    ),
    tokenizer=TokenizerConfig(kind="bytes"),
    sampler=SamplerConfig(frames_per_block=2, steps=(1000, 500)),
    height=8,
    width=32,
    num_frames=7,
)
PROMPT, SEED, STRATEGY = "a red ball", 5, "hybrid"


def frames(out: str, process: str, port: str) -> None:
    from sharding import SequenceParallel, distributed

    with distributed.session(f"127.0.0.1:{port}", 2, int(process)):
        from jax_causal import Pipeline

        pipe = Pipeline.random(SMALL, dtype="float32", parallel=SequenceParallel(8, STRATEGY))
        chunks = [chunk.shape for chunk in pipe.stream(PROMPT, num_frames=SMALL.num_frames, seed=SEED)]
        video = pipe(PROMPT, seed=SEED)
        video.save(out)
        print("chunks", chunks)
        print("holds frames", video.frames is not None)


if __name__ == "__main__":
    if sys.argv[1] == "frames":
        frames(*sys.argv[2:])
    else:
        from jax_causal import cli

        PRESETS["small"] = SMALL
        sys.exit(cli.main(sys.argv[1:]))
