"""Kernels of `hopper_rows` and `peer_memory`, walked through on the CPU as they are written, one block of threads after
another."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_causal import hopper_rows, peer_memory


class Machine:
    """Devices whose kernels run one after another.

    Attributes:
      axis, device: name of their mesh axis, and the one that runs.
      memory: arrays that kernels write in place, by device; None: those that a kernel is given. An array's address is
        its device and its number there.
      references: which of its device's memory a kernel is given, by number.
      awaited: by device, the counts that its kernels ended with.
      checked: by device, the numbers of the arrays that were found where peers expect them.
      order: in which other devices' memory was written and counted in: ("write" or "count", device).
    """

    axis, device, memory, references = "seq", 0, None, ()

    def __init__(self):
        self.awaited, self.checked = collections.defaultdict(list), collections.defaultdict(list)
        self.order = []

    def address(self, array):
        """Of this very array."""
        (found,) = (
            (device, number)
            for device, arrays in enumerate(self.memory)
            for number, other in enumerate(arrays)
            if other is array
        )
        return found

    def peer(self, what, ref, own, other):
        """What lies to `other` as `ref`, a part of an array of the device that runs, to `own`."""
        assert tuple(own.array) == self.address(ref.whole)
        device, number = other.array
        assert device != self.device
        self.order.append((what, device))
        return self.memory[device][number][ref.index]


class _Ref:
    """Memory as a kernel sees it, over a numpy array; `whole` and `index` say what it is a part of."""

    def __init__(self, array, whole=None, index=()):
        self.array, self.whole, self.index = array, array if whole is None else whole, index

    at = property(lambda self: _Parts(self))
    shape = property(lambda self: self.array.shape)

    def _index(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return tuple(
            slice(int(i.start), int(i.start) + i.size) if isinstance(i, pl.Slice) else int(i) for i in index
        )

    def __getitem__(self, index):
        part = self.array[self._index(index)]
        return _Ref(part) if part.ndim else part

    def __setitem__(self, index, value):
        part = self.array[self._index(index)]
        assert part.shape == value.shape
        assert part.dtype == value.dtype
        part[...] = value


class _Parts:
    """What `at` gives."""

    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        assert not self.ref.index
        index = (*self.ref._index(index), ...)
        return _Ref(self.ref.array[index], self.ref.array, index)


def _unwritten(x):
    return np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype)


@pytest.fixture
def machine(monkeypatch):
    """Runs the kernels of `hopper_rows`; a `Machine`."""
    machine, place = Machine(), {}

    def launch(kernel, out_type, grid, name):
        def run(*operands):
            many = isinstance(out_type, list)
            outs = [_unwritten(x) for x in (out_type if many else [out_type])]
            arrays = [np.array(x[...]) for x in operands]
            if machine.memory:
                own = (machine.memory[machine.device][number] for number in machine.references)
                arrays = [
                    next(own) if isinstance(x, jax.Ref) else a for x, a in zip(operands, arrays, strict=True)
                ]
            for point in itertools.product(*map(range, grid.values())):
                place.update(zip(grid, point, strict=True))
                kernel(*map(_Ref, arrays), *map(_Ref, outs))
            for ref, array in zip(operands, arrays, strict=True):
                if isinstance(ref, jax.Ref):
                    ref[...] = array
            outs = [jnp.asarray(x) for x in outs]
            return outs if many else outs[0]

        return run

    def remote(ref, device):
        _, number = machine.address(ref.array)
        return _Ref(machine.memory[int(device[machine.axis])][number])

    def store_address(out, ref):
        out.array[...] = machine.address(ref.array)

    def with_outbox(body, shape, dtype):
        body(_Ref(np.zeros(shape, dtype)))

    def send(x, outbox, ref, own, others):
        assert (outbox.shape, outbox.array.dtype) == (x.shape, x.dtype)
        assert not np.any(outbox.array)  # or what was there may not have been sent yet
        outbox.array[...] = 1
        for part in (ref.array, *(machine.peer("write", ref, own, other) for other in others)):
            assert (part.shape, part.dtype) == (x.shape, x.dtype)
            part[...] = x

    def count_one(ref, own, other):
        machine.peer("count", ref, own, other)[...] += 1

    def expect_at(ref, own):
        assert tuple(own.array) == machine.address(ref.array)
        machine.checked[machine.device].append(int(own.array[1]))

    def wait_for_count(ref, value):
        machine.awaited[machine.device].append(value)

    def swap_pairs(x):
        return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)

    def spread(x, like, *axes):
        return jax.lax.broadcast_in_dim(x, like.shape, axes)

    def wait_for_sent():
        machine.order.append(("sent", machine.device))

    def loop(start, stop):
        return lambda body: [body(jnp.int32(i)) for i in range(int(start), int(stop))]

    def when(condition):
        return lambda run: run() if condition else None

    monkeypatch.setattr(hopper_rows, "launch", launch)
    monkeypatch.setattr(hopper_rows, "load", lambda ref, layout: jnp.asarray(ref.array))
    monkeypatch.setattr(hopper_rows, "spread", spread)
    monkeypatch.setattr(hopper_rows, "swap_pairs", swap_pairs)
    monkeypatch.setattr(
        jax.lax, "axis_index", lambda name: jnp.int32(machine.device if name == machine.axis else place[name])
    )
    monkeypatch.setattr(plgpu, "remote_ref", remote, raising=False)
    monkeypatch.setattr(pl, "loop", loop)
    for function in (with_outbox, wait_for_sent, store_address, send, count_one, wait_for_count, expect_at):
        monkeypatch.setattr(peer_memory, function.__name__, function)
    monkeypatch.setattr(pl, "when", when)
    with jax.disable_jit():
        yield machine


def random(*shapes, seed=0):
    """bfloat16 normal numbers of each shape."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def f64(x):
    return np.asarray(x, np.float64)


def relative(actual, expected):
    """Euclidean distance by the norm of `expected`."""
    return np.linalg.norm(f64(actual) - f64(expected)) / np.linalg.norm(f64(expected))


def assert_rounded(actual, expected):
    """One rounding to bfloat16 away from float64, and what the fp32 sums before it explain."""
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(actual), expected, rtol=2**-8, atol=1e-4)
