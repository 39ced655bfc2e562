"""Prints the kernels of a denoising pass of the 1.3B shape as XLA compiles it for an H200; no GPU is needed.

    PYTHONPATH=. python tests/gpu/compiled_for.py                      # two layers, one device, the Hopper kernel
    PYTHONPATH=. python tests/gpu/compiled_for.py --stage decode       # a block; --stage first: the first frame
    PYTHONPATH=. python tests/gpu/compiled_for.py --hlo program.txt    # and writes the whole program down

It needs jax with its CUDA plugin (jax-cuda13-plugin and jax-cuda13-pjrt, which may be installed with --no-deps), and
compiles for the description of a card below. Autotuning is off: what only a card can decide, which algorithm of cuBLAS
a product takes, does not matter to the kernels between the products.
"""

import argparse
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jax_causal import attention, components, config, environment, modules, rollout, transformer, vae
from jax_causal.parallel import SingleDevice
from sharding.hlo import Instruction, Program

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""

_FREE = ("after-all", "bitcast", "constant", "get-tuple-element", "parameter", "tuple")


MODEL = config.PRESETS["wan-1.3b"]
DTYPE = jnp.bfloat16


def described_cards(count: int) -> list[jax.Device]:
    """Devices of one process to compile for that are not there. From now on back ends are chosen as on them."""
    jax.config.update("jax_platforms", "cpu")  # the plugin compiles without being a back end
    attention._device = lambda: ("gpu", (9, 0))  # what is asked otherwise is the first local device
    topology = f"1x1x{count}"  # partitions, hosts, devices of a host
    return topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=topology).devices


def compiler_options() -> dict:
    """The flags of the command line, as `compile` takes them."""
    values = {"true": True, "false": False, "peer": "COLLECTIVES_PEER_MEMORY"}
    return {name: values[value] for name, value in environment.GPU_FLAGS.items()}


def compiled_text(lowered) -> str:
    """The optimised program, without the code of kernels written in Pallas."""
    options = compiler_options()
    options["xla_gpu_autotune_level"] = 0
    return re.sub(r'"[^"\n]{2000,}"', '""', lowered.compile(options).as_text())


def compile_text(stage: str, layers: int) -> str:
    """The optimised program of a block of `layers` layers ("denoise"), or of the decoder for the first frame ("first")
    or for a block ("decode"), on one device."""
    (card,) = described_cards(1)
    on_card = jax.sharding.SingleDeviceSharding(card)
    network = dataclasses.replace(MODEL.transformer, num_layers=layers)
    grid = (MODEL.height // 16, MODEL.width // 16)
    spec = rollout.RolloutSpec.create(network, MODEL.sampler, grid, 21, parallel=SingleDevice(unroll=True))
    if stage == "denoise":
        function, arguments = functools.partial(rollout.denoise_block.lower, spec), _denoising(spec)
    else:
        function = functools.partial(
            components.decode_chunk.lower, MODEL.vae, spec.framing, first=stage == "first"
        )
        arguments = _decoding(spec, first=stage == "first")
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_card), jax.eval_shape(arguments)
    )
    return compiled_text(function(*arguments))


def _denoising(spec):
    network, frames = spec.transformer, spec.sampler.frames_per_block

    def arguments():
        params = transformer.init(network, jax.random.key(0), DTYPE)
        params = transformer.unroll(params, spec.parallel.joined)
        cache = rollout.init_cache(spec, 1, DTYPE, stacked=False)
        text = rollout.embed_text(spec, params, jnp.zeros((1, network.text_length, network.text_dim)))
        noise, renoise = rollout.draw_noise(spec, jax.random.split(jax.random.key(0), 1), 0, frames, DTYPE)
        return params, cache, text, noise, renoise, jax.tree.map(jnp.asarray, spec.place(0, frames))

    return arguments


def _decoding(spec, *, first: bool):
    frames, width = 1 if first else spec.sampler.frames_per_block, 4 * MODEL.vae.z_dim

    def arguments():
        params = modules.init(vae.VAE, MODEL.vae, jax.random.key(0), dtype=DTYPE)
        state = None if first else vae.init_decoder_state(MODEL.vae, 1, MODEL.height, MODEL.width, DTYPE)
        return params, jnp.zeros((1, frames, spec.layout.tokens, width), DTYPE), state

    return arguments


def kernels(program: Program) -> Iterator[Instruction]:
    """What is launched, in order; of a program with a loop over passes, by one pass."""
    inside = program.entry
    for loop in program.computations[inside].values():
        if loop.opcode == "while":
            inside = re.search(r"body=%([\w.-]+)", loop.attributes)[1]
    yield from _launched(program, inside)


def _launched(program: Program, computation: str) -> Iterator[Instruction]:
    for instruction in program.computations[computation].values():
        if instruction.opcode == "call":  # a command buffer: what is in it
            for name in instruction.calls:
                yield from _launched(program, name)
        elif instruction.opcode not in _FREE:
            yield instruction


def traffic(program: Program, kernel: Instruction) -> tuple[int, int]:
    """Bytes that a kernel reads and writes: of what it slices or updates in place no more than that, and without what
    a library works in."""
    around = program.computations[kernel.computation]
    whole = [around[name].nbytes for name in kernel.operands]
    if kernel.opcode != "fusion":
        return sum(whole), dataclasses.replace(kernel, type=re.sub(r"s8\[\d+\]", "", kernel.type)).nbytes
    inside = program.computations[kernel.calls[0]]

    def read(name: str, size: float) -> float:
        elements, total = math.prod(inside[name].shapes[0]), 0.0
        for user in (i for i in inside.values() if name in i.operands):
            if user.opcode in ("bitcast", "convert"):
                total += read(user.name, size)
            elif user.opcode in ("dynamic-slice", "slice"):
                total += size * math.prod(user.shapes[0]) / elements
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return size
        return min(total, size)

    root = list(inside.values())[-1]
    written = 0
    for result in [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while result.opcode == "bitcast":
            result = inside[result.operands[0]]
        in_place = result.opcode == "dynamic-update-slice"
        written += inside[result.operands[1]].nbytes if in_place else result.nbytes
    parameters = (i for i in inside.values() if i.opcode == "parameter")
    return round(sum(read(i.name, whole[int(i.arguments)]) for i in parameters)), written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stage", choices=("denoise", "first", "decode"), default="denoise")
    parser.add_argument("--layers", type=int, default=2, help="of the network that denoises")
    parser.add_argument("--bandwidth", type=float, default=3.2, help="TB/s that bytes are turned to times by")
    parser.add_argument("--hlo", type=Path, help="writes the program to this file")
    args = parser.parse_args()
    text = compile_text(args.stage, args.layers)
    if args.hlo:
        args.hlo.write_text(text)
    program, total = Program(text), 0.0
    print(f"{'kernel':34} {'kind':22} {'read MB':>8} {'write MB':>8} {'us':>6}  computes")
    for kernel in kernels(program):
        found = re.search(r'custom_call_target="([^"]*)"|kind=(\w+)', kernel.attributes)
        kind = (found[1] or found[2]) if found else kernel.opcode
        read, written = traffic(program, kernel)
        moved = kernel.opcode != "custom-call"
        micros = (read + written) / args.bandwidth / 1e6
        total += micros if moved else 0
        scope = re.sub(r"^.*/while/body/(eval_jaxpr/|closed_call/)?", "", kernel.scope)
        time = f"{micros:6.1f}" if moved else " " * 6
        print(f"{kernel.name[:34]:34} {kind[:22]:22} {read / 1e6:8.2f} {written / 1e6:8.2f} {time}  {scope}")
    print(f"{total:.1f} us of kernels that move data, at {args.bandwidth} TB/s")


if __name__ == "__main__":
    main()
