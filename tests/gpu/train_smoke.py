"""A few updates of Self-Forcing distillation at 1.3B on one GPU, from random weights: finite, and how long they take.

    PYTHONPATH=. python tests/gpu/train_smoke.py                        # a GPU with 141 GB: 70 GiB by count
    PYTHONPATH=. python tests/gpu/train_smoke.py --config tiny-distill  # anywhere, to try the script

The update is that of `jax-causal train`: five critic steps and a generator step, each on rollouts of its own. Prints
one line per check and exits with 1 if any fails. Run by hand; pytest does not collect it.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal import environment
from jax_causal.parallel import SingleDevice
from jax_causal.training import config as configs
from jax_causal.training import folder, optim, stage, trainer
from jax_causal.training.dry_run import Unread


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="wan-1.3b-distill")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    environment.apply()
    alone = ["batch_size=1", "accumulate=1", "mesh.data=1", "shard_params=false", "init_from=null"]
    model = ["model=tiny"] if args.config == "tiny-distill" else []
    config = configs.load(args.config, [*alone, *model, *args.set])
    sizes = folder.model_config(config)
    parallel = SingleDevice().for_model(sizes)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.config}, random weights", flush=True)

    random = Unread(sizes)
    distill = stage.create(config, sizes, random, parallel, teacher=random)
    state = jax.jit(distill.init)(stage.init_key(config.seed))
    before = np.asarray(_first_kernel(state))
    # Weights are made in the dtype of computation at once: the text encoder alone is 23 GB in fp32.
    frozen = {"teacher": "transformer", "text_encoder": "text_encoder"}
    parts = jax.jit(lambda: optim.cast({k: random[v] for k, v in frozen.items()}, config.dtype))()
    length, words = sizes.text_encoder.max_length, sizes.text_encoder.vocab_size
    ids = jnp.asarray(np.random.default_rng(0).integers(2, words, (8, 1, length)), jnp.int32)
    data = (ids[1:], ids[0, 0], parts)

    began = time.perf_counter()
    carry = {"good": jnp.asarray(True), "state": state}
    forms = trainer.abstract_carry(jax.eval_shape(lambda: state), parallel)
    names, update = trainer.compile_update(distill, forms, data, guard=False)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    ok = []
    for step in range(args.updates):
        began = time.perf_counter()
        carry, values = update(carry, np.int32(step), data)
        metrics = dict(zip(names, np.asarray(values).tolist(), strict=True))
        ok.append(all(np.isfinite(value) for value in metrics.values()))
        told = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{_mark(ok[-1])} update {step}: {time.perf_counter() - began:.2f} s  {told}", flush=True)
    moved = float(np.abs(np.asarray(_first_kernel(carry["state"])) - before).max())
    ok.append(0 < moved < 10 * args.updates * config.learning_rate)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(f"{_mark(ok[-1])} the generator moved by at most {moved:.2e}, peak {peak / 2**30:.1f} GiB")
    return int(not all(ok))


def _first_kernel(state):
    return state["generator"]["params"]["patch_embedding"]["kernel"]


def _mark(ok) -> str:
    return "ok  " if ok else "FAIL"


if __name__ == "__main__":
    sys.exit(main())
