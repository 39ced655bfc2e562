"""Examples and notes on every verb, which `jax-causal VERB --help` shows below its options."""

GENERATE = """\
examples:
  jax-causal generate "a red ball rolls to the right" --out ball.mp4
  jax-causal generate "a harbour at dawn" --out dawn.mp4 --model FOLDER --seed 7
  jax-causal generate --prompts prompts.txt --out videos --model FOLDER

times:
  first_frame_s and total_s start when the prompt is handed to the loaded model.
  They contain text encoding, denoising, context passes and decoding; total_s
  ends when the file is complete, and fps is frames / total_s. Loading is not in
  them. Compiling is, unless --warmup does it before; compile_s says how much it
  was. The phases (text_s, denoise_s, ...) never contain compiling.

prompts files:
  One prompt per line; empty lines and lines that start with # are skipped.
  Videos are numbered 0001.mp4, 0002.mp4, ... and all take the same --seed, so
  that any of them can be made again alone. After an interruption the same
  command continues. --json writes one line per video.

environment:
  Compiled programs are kept in ~/.cache/jax_causal/xla; the variable
  JAX_COMPILATION_CACHE_DIR names another folder. JAX_CAUSAL_TRACEBACK=1 shows
  where an error came from.
"""

CONVERT = """\
examples:
  jax-causal convert gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt FOLDER
  jax-causal convert Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth FOLDER
  jax-causal convert downloads/self_forcing_dmd.pt FOLDER --dtype bfloat16

FOLDER is complete once it has a transformer, a vae, a text encoder and a
tokenizer; convert says what is still missing and which command adds it.
"""

EXPLAIN = """\
examples:
  jax-causal explain --devices 8 --strategy hybrid --preset wan-1.3b
  jax-causal explain --devices 6 --model FOLDER --height 320 --width 576

No weights are read and nothing is run: the model is compiled for virtual CPU
devices, and what it sends is read from the compiled program.
"""

BENCH = """\
examples:
  jax-causal bench --preset wan-1.3b --json today.json
  jax-causal bench --preset wan-1.3b --compare today.json --only rollout,decode
  jax-causal bench --model FOLDER --devices 8 --strategy hybrid
  jax-causal bench --preset wan-1.3b --scaling --json scaling.json

Every row says what is inside it. Floors are operations by the speeds that
large products and attention reach on the same device in the same run.
"""

TRAIN = """\
examples:
  jax-causal train --stage vae --out runs/vae
  jax-causal train --stage teacher --out runs/teacher --set init_from=runs/vae
  jax-causal train --config FILE.json --out FOLDER --set learning_rate=1e-4 mesh.seq=4
  jax-causal train --config FILE.json --out FOLDER --resume
  jax-causal train --config wan-1.3b-distill --dry-run

FOLDER becomes a model folder, from which the next stage starts. FOLDER/training
holds config.json, metrics.jsonl (a line an update), samples and the last two
checkpoints. Ctrl-C saves another one before it ends. A run that is resumed ends
with the same bits as one that was never interrupted.
"""

EVAL = """\
examples:
  jax-causal eval --model tiny
  jax-causal eval --model FOLDER --teacher TEACHER --variants all --json scores.json --sheet clips.png
  jax-causal eval --model FOLDER --variants model,gather,ring --precision float32 --limit 16
  jax-causal eval --model FOLDER --vbench OUT --prompts prompts_per_dimension/scene.txt

A model of the procedural world is scored by an oracle on fixed prompts and
seeds; the first variant is the one that the others are compared with.
variants:
  model              as the options say
  single             on one device
  gather, ulysses, ring, hybrid    on --devices devices (8)
  float32, bfloat16  in this precision
  windowed           --window latent frames (12), --sink of them kept (a block)
  teacher            the model of --teacher, in many steps with guidance
  vae, truth         rendered clips with and without the model's VAE between
  all                all of these that there are weights and devices for
-Nx after a name makes clips N times as long, scored in N windows:
windowed-4x shows drift.

sets of prompts: held-out, seen (combinations never and ever trained on),
held-out-pairs, seen-pairs (two objects).

For models of the real world, --vbench makes the videos that VBench wants:
--seeds of each prompt (5, for temporal_flickering 25) in OUT/SUITE. The same
command continues after an interruption.
"""
