"""Memory of other devices, written to by kernels for NVIDIA Hopper, in Pallas (Mosaic GPU).

A kernel that has arrays of other devices for its operands stops the host at every run of its program: until the device
is done with all before, until all devices' arrays are known, and until the device has been told where they lie. With
such a kernel in every layer a program stops as often before it begins. So one kernel asks for all layers (`join`), once
for a cache that is donated from program to program, and all others go by the addresses that it has found.

Before a pass devices wait for each other (`join` and `meet`). Each has then ended what it read in its caches before,
has copied them where XLA copies them, and has set its counts to zero: from there on a peer may write.
"""

from __future__ import annotations

import functools
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
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

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


def can_reach_peers() -> bool:
    """Whether a kernel can write to other devices of its process: jax calls it experimental, and this is the version
    that it was tried with."""
    return jax.__version_info__[:2] == (0, 11)


class Reach(NamedTuple):
    """What passes of L layers need to write to the caches of all devices.

    Attributes:
      addresses: int32 [devices, 2L + 2, 2], 64 bits each: of this device, then of the next ones in turn, where the keys
        of all layers lie, the values of all layers, and the two below.
      counts: pieces that have come from peers at each layer of a pass, int32 [L].
      met: how often the next devices in turn have come to a pass, int32 [devices]; nothing of this one itself.
      meetings: how often this one has, int32 [1].
    """

    addresses: jax.Array
    counts: jax.Array
    met: jax.Array
    meetings: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def join(peers: Peers, keys: Sequence[jax.Array], values: Sequence[jax.Array]):
    """The caches of all layers, [B, 1, K, N, D] each, where all devices know of each other's, ready for a pass.

    Inside the `shard_map` of the peers. What is given is copied here where it is needed otherwise; what comes out must
    lie where it lies until it is written for the last time: pass it on, and donate it.

    Returns:
      keys, values, and their `Reach`.
    """
    zeros = [jnp.zeros(n, jnp.int32) for n in (len(keys), peers.count, 1)]

    def kernel(*rest):
        *arrays, _, addresses = rest
        me = lax.axis_index(peers.axis)
        for step in range(peers.count):
            device = {peers.axis: lax.rem(me + step, peers.count)}
            for number, ref in enumerate(arrays):
                there = plgpu.remote_ref(ref, device) if step else ref
                store_address(addresses.at[step, number], there)

    shape = jax.ShapeDtypeStruct((peers.count, 2 * len(keys) + 2, 2), jnp.int32)
    keys, values, counts, addresses = _in_place(kernel, "join_caches", keys, values, zeros, out_type=shape)
    return keys, values, Reach(addresses, *counts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def meet(peers: Peers, keys: Sequence[jax.Array], values: Sequence[jax.Array], reach: Reach):
    """What `join` has given, ready for another pass: devices wait for each other, and the host for none of them."""
    addresses, *counts = reach

    def kernel(addresses, *rest):
        *arrays, meetings, _ = rest
        *_, counts, met = arrays
        for number, ref in enumerate(arrays):
            expect_at(ref, addresses.at[0, number])
        clear(counts)
        for step in range(1, peers.count):  # this device is as many behind that one
            count_one(met.at[peers.count - step], *(addresses.at[i, len(arrays) - 1] for i in (0, step)))
        wait_for_meeting([met.at[step] for step in range(1, peers.count)], meetings)

    shape = jax.ShapeDtypeStruct((1,), jnp.int32)  # every kernel has a result
    keys, values, counts, _ = _in_place(kernel, "meet_peers", keys, values, counts, addresses, out_type=shape)
    return keys, values, Reach(addresses, *counts)


def _in_place(kernel, name, keys, values, counts, *operands, out_type):
    """Keys, values and counts from a kernel of one block that writes them in place, and its result. The kernel takes
    the operands, these arrays, and the result's place."""
    refs = [jax.new_ref(x) for x in (*(x[:, 0] for x in (*keys, *values)), *counts)]
    out = hopper_rows.launch(kernel, out_type, {"kernel_block": 1}, name)(*operands, *refs)
    arrays = [jax.freeze(ref) for ref in refs]
    caches, counts = tuple(x[:, None] for x in arrays[: -len(counts)]), arrays[-len(counts) :]
    return caches[: len(keys)], caches[len(keys) :], counts, out


join.defvjp(
    lambda peers, keys, values: (join(peers, keys, values), None),
    lambda peers, _, cotangents: (tuple(cotangents[0]), tuple(cotangents[1])),
)
meet.defvjp(
    lambda peers, keys, values, reach: (meet(peers, keys, values, reach), None),
    lambda peers, _, cotangents: (tuple(cotangents[0]), tuple(cotangents[1]), None),
)


# In a kernel.


def store_address(out, ref):
    """Writes where `ref` lies, perhaps on another device, to int32 [2]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def store(ctx, out, ref):
        llvm.store(_integer(ref), mgpu_utils.memref_ptr(out))

    store(out, ref)


def send(x, ref, own, others):
    """Writes `x` to `ref`, a stretch of this device's array at the address `own`, and to the same stretch of those at
    the addresses `others`, by the copy engine of the processor. Is there when this returns."""

    def through(smem):
        smem[...] = x
        plgpu.commit_smem()

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 + len(others)))
        def copy(ctx, smem, ref, own, *others):
            size = mgpu.c(x.size * x.dtype.itemsize, ir.IntegerType.get_signless(32))
            source = mgpu_utils.memref_ptr(smem)
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
                nvvm.cp_async_bulk_wait_group(0)

        copy(smem, ref, own, *others)

    pl.run_scoped(through, plgpu.SMEM(x.shape, x.dtype))


# Counts are int32 [] in global memory. Semaphores of Pallas would do, but each kernel has its own.


def count_one(ref, own, other):
    """Adds one to a count: that which lies to the address `other` as `ref` to `own`. Its device then sees what this
    block of threads has written before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def count(ctx, ref, own, other):
        mgpu_utils.warpgroup_barrier()
        mgpu_utils.SemaphoreRef(_there(ref, own, other)).signal(1)

    count(ref, own, other)


def clear(counts):
    """Sets int32 [n] to zero."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def store(ctx, counts):
        zero = mgpu.c(0, ir.IntegerType.get_signless(32))
        for i in range(ir.MemRefType(counts.type).shape[0]):
            memref.store(zero, counts, [mgpu.c(i, ir.IndexType.get())])

    store(counts)


def wait_for_count(ref, value: int):
    """Waits until a count has come to `value`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(ctx, ref):
        mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(ref)).wait(value, decrement=False)

    wait(ref)


def wait_for_meeting(met, meetings):
    """Counts `meetings`, int32 [1], up by one, and waits until each of the counts `met` has come as far."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (1 + len(met)))
    def wait(ctx, meetings, *met):
        i32, first = ir.IntegerType.get_signless(32), mgpu.c(0, ir.IndexType.get())
        now = arith.addi(memref.load(meetings, [first]), mgpu.c(1, i32))
        for ref in met:
            mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(ref)).wait(now, decrement=False)
        memref.store(now, meetings, [first])  # all threads have read it: each wait ends with a barrier

    wait(meetings, *met)


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
