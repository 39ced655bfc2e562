"""Layers of the causal 3-D VAE of Wan2.1, channels last: activations are [B, T, H, W, C].

Every layer that looks back in time takes a `Stream`, which hands it the frames it saw last and keeps
those it will need next. Whole clips and chunks of any length therefore run through the same code and
give the same frames.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CONV_FORMS = ("auto", "3d", "folded", "spread")

# Outputs up to which the taps of a convolution are cheaper spread over its outputs than folded into its inputs.
_FEW_OUTPUTS = 4
ACTIVATION_AXES = ("batch", "time", "height", "width", "channels")


def alone(run, seen, columns: tuple[int, int], weights, *others):
    """Runs a layer that sees columns beyond the width of its inputs, as `run(seen, columns, weights, *others)`.

    This is where the whole width is here: `columns` to the left and to the right are zeros, and the layer pads. Where
    neighbours are on other devices, the layer runs so too, and once more for the outermost columns of its result: with
    the neighbours' columns, padding nothing.

    Args:
      run: returns an activation [B, T, H', W', C'] whose columns are those of its inputs, or of each as many.
      seen: tuple of activations [B, T, H, W, C] that differ in T alone.
      columns: how many the layer sees to the left and to the right.
      weights: arrays that all devices hold whole.
      others: activations of the width of what `run` returns.
    """
    return run(seen, columns, weights, *others)


class Stream:
    """One pass over one chunk: where layers find their history, and how they are run.

    Attributes:
      lone: leading frames that temporal resampling passes as they are: 1 at the start of a clip, else 0.
      constrain: `constrain(x, ACTIVATION_AXES)` returns x, sharded as the caller wishes.
      halo: how layers that see columns beyond their own are run, see `alone`.
      conv: form of the convolutions, see `causal_conv`.
      next_state: the history for the next chunk, one array per layer in execution order.
    """

    def __init__(self, state, *, first: bool, constrain, halo, conv: str):
        if state is None and not first:
            raise ValueError("a chunk that is not the first needs the state that the chunk before returned")
        self.lone, self.constrain, self.halo, self.conv = int(first), constrain, halo, conv
        self.next_state: list[jax.Array] = []
        self._slots = None if first else iter(state)

    def history(self, x, frames: int):
        """[B, frames, ...]: the last `frames` frames of the chunks before x [B, T, ...], zeros at the start of a
        clip. Keeps those that the chunk after will ask for."""
        shape = (x.shape[0], frames, *x.shape[2:])
        history = jnp.zeros(shape, x.dtype) if self._slots is None else next(self._slots)
        if history.shape != shape or history.dtype != x.dtype:
            raise ValueError(
                f"the state holds {history.dtype}{list(history.shape)} where this chunk needs "
                f"{x.dtype}{list(shape)}: batch, size and dtype must be those of the chunk before; "
                "begin another clip with first=True"
            )
        self.next_state.append(jnp.concatenate([history[:, x.shape[1] :], x[:, -frames:]], axis=1))
        return history


def causal_conv(history, x, kernel, form: str, *, bias=0, residual=0, stride: int = 1, halo=alone):
    """Convolution with 3 taps in time, each frame with the two before it, zero-padded in space.

    Args:
      history: [B, 2, H, W, C], the frames before x. It comes apart because joining it to x would copy x once more
        than the folded form does already.
      x: [B, T, H, W, C]
      kernel: [3, kh, kw, C, O], kh and kw odd
      form: how it is computed; the forms agree to rounding. "3d": one 3-D convolution. "folded": one 2-D
        convolution with the taps side by side in the input channels, faster on GPUs and several times so on
        CPUs. "spread": one 2-D convolution with the taps side by side in the output channels, whose frames are
        then shifted and summed in float32: where outputs are few it reads its input once instead of writing and
        reading it three times over. "auto": the fastest.
      bias, residual: [O], and of the shape of the result; added to it
      stride: of the output frames
      halo: see `alone`; "3d" leaves neighbours to the partitioner

    Returns:
      [B, T / stride rounded up, H, W, O] in the dtype of x
    """
    if form == "auto":
        two_dimensional = "spread" if kernel.shape[-1] <= _FEW_OUTPUTS else "folded"
        form = two_dimensional if jax.default_backend() in ("cpu", "gpu") else "3d"
    rows, columns = padding = [(size // 2, size // 2) for size in kernel.shape[1:3]]
    if form == "3d":
        y = jax.lax.conv_general_dilated(
            jnp.concatenate([history, x], axis=1),
            kernel,
            (stride, 1, 1),
            [(0, 0), *padding],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        return y + bias + residual

    def spread(seen, columns, weights, *residual):
        kernel, *bias = weights
        kernel = jnp.concatenate(list(kernel), axis=-1)
        spread = [_conv2d(frames, kernel, rows, columns).astype(jnp.float32) for frames in seen]
        by_tap = zip(*(jnp.split(y, 3, axis=-1) for y in spread), strict=True)
        taps = [_tap(*parts, t, stride) for t, parts in enumerate(by_tap)]
        return sum((*bias, *residual), start=sum(taps).astype(kernel.dtype))

    def folded(seen, columns, weights, *residual):
        kernel, *bias = weights
        taps = jnp.concatenate([_tap(*seen, t, stride) for t in range(3)], axis=-1)
        return _conv2d(taps, jnp.concatenate(list(kernel), axis=-2), rows, columns, *bias, *residual)

    weights, others = (() if isinstance(term, int) else (term,) for term in (bias, residual))
    run = spread if form == "spread" else folded
    return halo(run, (history, x), columns, (kernel, *weights), *others)


def _tap(history, x, tap: int, stride: int):
    """What tap 0, 1 or 2 sees: every `stride`-th of the T frames that begin 2, 1 or 0 before x [B, T, ...]."""
    frames = x.shape[1]
    if tap < 2:
        x = jnp.concatenate([history[:, tap : tap + frames], x[:, : max(frames - 2 + tap, 0)]], axis=1)
    return x[:, ::stride]


def _conv2d(x, kernel, rows: tuple[int, int], columns: tuple[int, int], *terms):
    """Each frame of [B, T, H, W, C] convolved with [kh, kw, C, O], padded by so many rows and columns, plus `terms`,
    [O] or of the shape of the result.

    They are added while frames are still a batch: only so does XLA add them in the convolution's kernel on GPUs.
    """
    frames, numbers = x.reshape(-1, *x.shape[2:]), ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(frames, kernel, (1, 1), [rows, columns], dimension_numbers=numbers)
    for term in terms:
        y = y + (term if term.ndim == 1 else term.reshape(y.shape))
    return y.reshape(*x.shape[:2], *y.shape[1:])


# One output row of a nearest-2x upsampled image sees 3 upsampled rows, hence 2 original ones:
# [phase of the output row, original row, upsampled row] says which of the 3 taps fall on which.
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def upsampling_conv(x, kernel, halo=alone):
    """Nearest-neighbour 2x upsampling and a zero-padded 3x3 convolution, in one step on the small grid.

    The sub-pixel form: a 2x2 convolution to 4 O channels, one group per output phase. The products are
    those of the plain form with repeated ones merged, 4/9 of the work.

    Args:
      x: [B, T, H, W, C]
      kernel: [3, 3, C, O]
      halo: see `alone`

    Returns:
      [B, T, 2 H, 2 W, O]
    """
    phases = jnp.einsum(
        "pyi,qxj,ijco->yxcpqo", _PHASES, _PHASES, kernel.astype(jnp.float32), precision="highest"
    )
    kernel = phases.astype(x.dtype).reshape(2, 2, kernel.shape[2], -1)

    def run(seen, columns, weights):
        (x,), (kernel,) = seen, weights
        b, t, h, _, _ = x.shape
        y = _conv2d(x, kernel, (1, 1), columns)
        w = y.shape[3] - 1
        y = y.reshape(b, t, h + 1, w + 1, 2, 2, -1)
        rows = [jnp.stack([y[:, :, p : p + h, q : q + w, p, q] for q in (0, 1)], axis=4) for p in (0, 1)]
        return jnp.stack(rows, axis=3).reshape(b, t, 2 * h, 2 * w, -1)

    return halo(run, (x,), (1, 1), (kernel,))


class CausalConv(nnx.Conv):
    """Convolution with 3 taps in time that sees this frame and the two before; [B, T, H, W, C] to [.., O]."""

    def __init__(self, in_features: int, out_features: int, *, spatial: int = 3, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, (3, spatial, spatial), rngs=rngs)

    def __call__(self, x, stream: Stream, **options):
        history = stream.history(x, 2)
        if stream.lone and x.shape[1] == 1:
            # A clip's first frame by itself: behind it are zeros only, which two of three taps can leave out.
            rows, columns = ((size // 2, size // 2) for size in self.kernel_size[1:])
            weights, others = (self.kernel[...][2], self.bias[...]), options.values()

            def run(seen, columns, weights, *residual):
                kernel, bias = weights
                return _conv2d(*seen, kernel, rows, columns, bias, *residual)

            return stream.halo(run, (x,), columns, weights, *others)
        return self.behind(history, x, stream, **options)

    def behind(self, history, x, stream: Stream, **options):
        """The same behind two frames that are given. `options` are those of `causal_conv`."""
        options |= {"bias": self.bias[...], "halo": stream.halo}
        return causal_conv(history, x, self.kernel[...], stream.conv, **options)


class Norm(nnx.Module):
    """Scales each position's channel vector to length sqrt(C), times a learned scale. Computed in float32."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,)))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        squares = jnp.sum(y * y, axis=-1, keepdims=True)
        # The floor is that of a length of 1e-12, applied before the root: no infinite slope at zero.
        y = y * jax.lax.rsqrt(jnp.maximum(squares, 1e-24) / x.shape[-1])
        return (y * self.scale[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, conv, added to the input (through a linear map if channels change)."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.norm1 = Norm(in_features, rngs=rngs)
        self.conv1 = CausalConv(in_features, out_features, rngs=rngs)
        self.norm2 = Norm(out_features, rngs=rngs)
        self.conv2 = CausalConv(out_features, out_features, rngs=rngs)
        same = in_features == out_features
        self.shortcut = None if same else nnx.Linear(in_features, out_features, rngs=rngs)

    def __call__(self, x, stream: Stream):
        y = self.conv1(jax.nn.silu(self.norm1(x)), stream)
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(jax.nn.silu(self.norm2(y)), stream, residual=residual)


class Attention(nnx.Module):
    """Single-head attention over the positions of each frame; frames do not see each other."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norm = Norm(features, rngs=rngs)
        self.to_qkv = nnx.Linear(features, 3 * features, rngs=rngs)
        self.proj = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x, stream: Stream):
        b, t, h, w, c = x.shape
        # By columns: where the width is shared by devices, so are the positions then, and each has its own queries.
        y = jnp.swapaxes(self.norm(x), 2, 3)
        q, k, v = jnp.split(self.to_qkv(y).reshape(b * t, w * h, 1, 3 * c), 3, axis=-1)
        y = self.proj(jax.nn.dot_product_attention(q, k, v)).reshape(y.shape)
        return x + jnp.swapaxes(y, 2, 3)


class Downsample(nnx.Module):
    """Halves height and width, then time if `temporal`: 1 + 2 k frames to 1 + k in a clip's first chunk, 2 k
    to k in others."""

    def __init__(self, features: int, *, temporal: bool, rngs: nnx.Rngs):
        self.conv = nnx.Conv(features, features, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)
        self.time_conv = CausalConv(features, features, spatial=1, rngs=rngs) if temporal else None

    def __call__(self, x, stream: Stream):
        x = self.conv(x)
        if self.time_conv is None:
            return x
        # The lone frame is the history of the next.
        seen = jnp.concatenate([stream.history(x, 1), x], axis=1)[:, stream.lone :]
        y = self.time_conv.behind(seen[:, :2], seen[:, 2:], stream, stride=2)
        return jnp.concatenate([x[:, : stream.lone], y], axis=1)


class Upsample(nnx.Module):
    """Doubles time if `temporal`, 1 + k frames to 1 + 2 k in a clip's first chunk, k to 2 k in others; then
    doubles height and width, halving the channels."""

    def __init__(self, features: int, *, temporal: bool, rngs: nnx.Rngs):
        self.conv = nnx.Conv(features, features // 2, (3, 3), rngs=rngs)
        self.time_conv = CausalConv(features, 2 * features, spatial=1, rngs=rngs) if temporal else None

    def __call__(self, x, stream: Stream):
        if self.time_conv is not None:
            # Unlike in the encoder, the lone frame is no history: the next one has zeros before it.
            y = self._double(x[:, stream.lone :], stream)
            x = jnp.concatenate([x[:, : stream.lone], y], axis=1)
        return upsampling_conv(x, self.conv.kernel[...], stream.halo) + self.conv.bias[...]

    def _double(self, x, stream):
        b, t, h, w, c = x.shape
        y = self.time_conv(x, stream).reshape(b, t, h, w, 2, c)
        return jnp.moveaxis(y, 4, 2).reshape(b, 2 * t, h, w, c)
