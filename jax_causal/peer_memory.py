"""Memory of other devices, written to by kernels for NVIDIA Hopper, in Pallas (Mosaic GPU).

A kernel that has arrays of other devices for its operands stops the host at every run of its program: until the device
is done with all before, until all devices' arrays are known, and until the device has been told where they lie. With
such a kernel in every layer a program stops as often before it begins. So one kernel asks for a pass of all layers
(`reach`), and those of the layers go by the addresses that it has found.

Devices also wait for each other before that kernel. Each has then ended what it read in its caches before, has copied
them where XLA copies them, and has set its counts to zero: from there on a peer may write. But their hosts must have
met before it in the same run of the program (`reach` says how and why).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from jax_causal import hopper_rows
from jax_causal.hopper_rows import TOKENS


class Peers(NamedTuple):
    """Devices that share the S tokens of every frame, m each and fewer at the end, and each hold the whole cache.

    Attributes:
      count: of the devices.
      tokens: S.
      axis: of the mesh, along which they lie; the kernel is inside its `shard_map`. None for devices that are not
        there: this one's rows are then written, in its own cache, to the places of all.
    """

    count: int
    tokens: int
    axis: str | None

    def suit(self, m: int) -> bool:
        """Whether no block of threads holds both tokens and padding."""
        return self.count * m == self.tokens or m % TOKENS == self.tokens % TOKENS == 0

    @property
    def travels(self) -> bool:
        """Whether anything is written to another device."""
        return self.axis is not None and self.count > 1

    @property
    def values_apart(self) -> bool:
        """Whether values travel by themselves: by copy engines, of one device to one other."""
        return self.travels and self.count == 2


def can_reach_peers() -> bool:
    """Whether a kernel can write to other devices of its process: jax calls it experimental, and this is the version
    that it was tried with. And hosts must meet at a permute (see `reach`), which they do where copy engines make it:
    with the flag that `environment` sets."""
    tried = jax.__version_info__[:2] == (0, 11)
    return tried and "--xla_gpu_collective_permute_mode=peer" in os.environ.get("XLA_FLAGS", "").split()


class Reach(NamedTuple):
    """What a pass of L layers needs to write to the caches of all devices.

    Attributes:
      addresses: int32 [devices, 2L + 1, 2], 64 bits each: of this device, then of the next ones in turn, where the keys
        of all layers lie, the values of all layers, and the counts; [devices, L + 1, 2] where values travel apart.
      counts: pieces that have come from peers at each layer, int32 [L].
    """

    addresses: jax.Array
    counts: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reach(peers: Peers, keys: Sequence[jax.Array], values: Sequence[jax.Array], zeros: jax.Array):
    """The caches of all layers, [B, 1, K, N, D] each, ready for one pass that writes to those of all devices.

    Inside the `shard_map` of the peers. Donate the caches, or let the caller's `jax.jit`; what is not theirs alone is
    copied here, and what comes out must lie where it lay until it is written.

    Args:
      peers: they.
      keys, values: of the caches; no values where they travel apart.
      zeros: int32 [L], known only after the host's threads of all devices have met. At the start of a run each of them
        allocates and frees memory for this kernel, and what frees waits for all devices: for one that waits already in
        this kernel, for ever. So two H200s stopped.

    Returns:
      keys, values, and their `Reach`.
    """
    layers = len(keys)
    refs = [jax.new_ref(x) for x in (*(x[:, 0] for x in (*keys, *values)), zeros)]

    def kernel(*rest):
        *arrays, addresses = rest
        me = lax.axis_index(peers.axis)
        for step in range(peers.count):
            device = {peers.axis: lax.rem(me + step, peers.count)}
            for number, ref in enumerate(arrays):
                there = plgpu.remote_ref(ref, device) if step else ref
                store_address(addresses.at[step, number], there)

    shape = jax.ShapeDtypeStruct((peers.count, len(refs), 2), jnp.int32)
    addresses = hopper_rows.launch(kernel, shape, {"kernel_block": 1}, "reach_caches")(*refs)
    *caches, counts = (jax.freeze(ref) for ref in refs)
    caches = tuple(x[:, None] for x in caches)
    return caches[:layers], caches[layers:], Reach(addresses, counts)


reach.defvjp(
    lambda peers, keys, values, zeros: (reach(peers, keys, values, zeros), None),
    lambda peers, _, cotangents: (tuple(cotangents[0]), tuple(cotangents[1]), None),
)


# In a kernel.


def store_address(out, ref):
    """Writes where `ref` lies, perhaps on another device, to int32 [2]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def store(ctx, out, ref):
        llvm.store(_integer(ref), mgpu_utils.memref_ptr(out))

    store(out, ref)


def with_outbox(body, shape, dtype):
    """Calls `body` with shared memory of this shape, for `send`. Once in a block of threads."""
    pl.run_scoped(body, plgpu.SMEM(shape, dtype))


def send(x, outbox, ref, own, others):
    """Begins to write `x` to `ref`, of its shape and dtype and without gaps in memory: a stretch of this device's array
    at the address `own`; and to the same stretch of those at the addresses `others`, int32 [2] each. By the copy engine
    of the processor, from `outbox`, which nothing else may use until `wait_for_sent` returns."""
    outbox[...] = x
    plgpu.commit_smem()

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 + len(others)))
    def copy(ctx, outbox, ref, own, *others):
        size = mgpu.c(x.size * x.dtype.itemsize, ir.IntegerType.get_signless(32))
        source = mgpu_utils.memref_ptr(outbox)
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            for target in (*(_there(ref, own, other) for other in others), mgpu_utils.memref_ptr(ref)):
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"),
                    [target, source, size],
                    "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;",
                    "l,l,r",
                    has_side_effects=True,
                )
            nvvm.cp_async_bulk_commit_group()

    copy(outbox, ref, own, *others)


def wait_for_sent():
    """Waits until all is there that this block of threads has begun to send."""

    @plgpu.inline_mgpu()
    def wait(ctx):
        # All but the thread that has begun it have nothing to wait for; `count_one` has all wait for that one.
        nvvm.cp_async_bulk_wait_group(0)

    wait()


# Counts are int32 [] in global memory. Semaphores of Pallas would do, but each kernel has its own.


def count_one(ref, own, other):
    """Adds one to a count: that which lies to the address `other` as `ref` to `own`. Its device then sees what this
    block of threads has written before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def count(ctx, ref, own, other):
        mgpu_utils.warpgroup_barrier()
        mgpu_utils.SemaphoreRef(_there(ref, own, other)).signal(1)

    count(ref, own, other)


def wait_for_count(ref, value: int):
    """Waits until a count has come to `value`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(ctx, ref):
        mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(ref)).wait(value, decrement=False)

    wait(ref)


def expect_at(ref, own):
    """Ends the program with an error where `ref` does not lie at the address `own`: peers would have written where it
    was before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def expect(ctx, ref, own):
        moved = arith.cmpi(arith.CmpIPredicate.ne, _integer(ref), _load(own))
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [moved], "@$0 trap;", "b", has_side_effects=True)

    expect(ref, own)


def _integer(ref):
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu_utils.memref_ptr(ref))


def _load(address):
    return llvm.load(ir.IntegerType.get_signless(64), mgpu_utils.memref_ptr(address))


def _there(ref, own, other):
    """Pointer to what lies to the address `other` as `ref` does to `own`."""
    offset = arith.subi(_integer(ref), _load(own))
    return llvm.inttoptr(ir.Type.parse("!llvm.ptr"), arith.addi(_load(other), offset))
