"""Kernels of a profile: told apart, added up, and the communication that they hide, against intervals laid by hand."""

import jax
import numpy as np
import pytest
from jax.profiler import ProfileData

from jax_causal import bench_profile
from jax_causal.bench_profile import busy, exposed

SENT, GEMM, COPY = "ncclDevKernel_AllGather_RING_LL", "nvjet_tst_128x256", "MemcpyD2D"


def test_kernels_are_told_apart_by_name():
    # Names as an H200 gives them.
    names = {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNN": "products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
        "flash_attention_hopper": "attention",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolutions",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collectives",
        "stream_executor::gpu::MultiGpuBarrierWithNcclKernelImpl(long, long, ncclWindow_vidmem*)": "collectives",
        "rotate_into_caches_mosaic_gpu_kernel": "collectives",
        "write_values_mosaic_gpu_kernel": "collectives",
        "rotate_into_cache_mosaic_gpu_kernel": "elementwise",
        "MemcpyD2D": "copies",
        "loop_add_convert_fusion_3": "elementwise",
        "input_reduce_fusion": "elementwise",
        "loop_convert_fusion": "elementwise",
    }
    assert {name: bench_profile.component(name) for name in names} == names


def test_gaps_lie_between_kernels_that_may_overlap():
    kernels = [("gemm", 5.0, 2.0), ("MemcpyD2H", 1.0, 3.0), ("fusion", 0.0, 2.0), ("gemm", 8.0, 1.0)]
    parts, names = bench_profile.add_up(kernels)
    busy = {name: seconds for name, seconds in parts.items() if seconds}
    assert busy == {"products": 3.0, "copies": 3.0, "elementwise": 2.0, "gaps": 2.0}
    assert names == {"gemm": 3.0, "MemcpyD2H": 3.0, "fusion": 2.0}
    assert bench_profile.add_up([]) == ({}, {})


# Communication.


@pytest.mark.parametrize(
    ("kernels", "seconds"),
    [
        ([], 0),
        ([("a", 2.0, 0.0)], 0),
        ([("a", 2.0, 3.0)], 3),
        ([("a", 2.0, 3.0), ("b", 5.0, 1.0)], 4),  # they touch
        ([("a", 5.0, 1.0), ("b", 2.0, 2.0)], 3),  # out of order, and apart
        ([("a", 2.0, 3.0), ("b", 4.0, 3.0)], 5),  # they overlap
        ([("a", 0.0, 9.0), ("b", 1.0, 2.0), ("c", 4.0, 1.0), ("d", 8.0, 2.0)], 10),  # nested, then beyond
        ([("a", 1.0, 2.0), ("b", 1.0, 2.0)], 2),  # the same
    ],
)
def test_busy(kernels, seconds):
    assert busy(kernels) == seconds


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([], (0, 0)),
        ([(GEMM, 0.0, 5.0)], (0, 0)),
        ([(SENT, 1.0, 3.0)], (3, 3)),
        ([(SENT, 1.0, 3.0), (GEMM, 0.0, 5.0)], (3, 0)),  # hidden
        ([(SENT, 1.0, 3.0), (GEMM, 0.0, 1.0), (GEMM, 4.0, 1.0)], (3, 3)),  # between what touches it
        ([(SENT, 0.0, 6.0), (GEMM, 1.0, 2.0), ("loop_fusion", 2.0, 2.0)], (6, 3)),  # 0-1 and 4-6
        ([(SENT, 1.0, 3.0), (COPY, 0.0, 5.0)], (3, 3)),  # a copy hides nothing
        ([(SENT, 0.0, 4.0), (SENT, 2.0, 4.0), (GEMM, 3.0, 2.0)], (6, 4)),  # two at once, 0-3 and 5-6
        ([(SENT, 0.0, 1.0), (GEMM, 0.5, 1.0), (SENT, 2.0, 1.0)], (2, 1.5)),
    ],
)
def test_exposed(kernels, expected):
    assert exposed(kernels) == expected
    assert exposed(kernels[::-1]) == expected


def test_exposed_counted_cell_by_cell():
    rng = np.random.default_rng(0)
    for _ in range(200):
        kinds = rng.choice([SENT, GEMM, COPY, "loop_fusion"], 12)
        starts, lengths = rng.integers(0, 40, 12), rng.integers(0, 9, 12)
        sending, computing = np.zeros(50, bool), np.zeros(50, bool)
        for kind, start, length in zip(kinds, starts, lengths, strict=True):
            cells = {SENT: sending, COPY: np.zeros(50, bool)}.get(kind, computing)
            cells[start : start + length] = True
        kernels = [(str(k), float(s), float(n)) for k, s, n in zip(kinds, starts, lengths, strict=True)]
        assert exposed(kernels) == (sending.sum(), (sending & ~computing).sum())


def _plane(name: str, **lines) -> str:
    """A plane of the profiler's format: lines of (kernel, start in ns, duration in ns)."""
    names = sorted({event[0] for events in lines.values() for event in events})
    numbers = {kernel: index + 1 for index, kernel in enumerate(names)}
    text = "".join(
        f'lines {{ name: "{line.replace("_", " ")}" '
        + "".join(
            f"events {{ metadata_id: {numbers[kernel]} offset_ps: {start}000 duration_ps: {length}000 }} "
            for kernel, start, length in events
        )
        + "} "
        for line, events in lines.items()
    )
    known = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{kernel}" }} }} '
        for kernel, i in numbers.items()
    )
    return f'planes {{ name: "{name}" {text}{known}}}'


# Two GPUs and one that did nothing. Lines that are no streams tell of the same time again.
TWO_GPUS = "\n".join(
    [
        _plane("/host:CPU", python=[("ncclAllGather", 0, 900)]),
        _plane(
            "/device:GPU:0",
            Stream_13_Compute=[(GEMM, 0, 300), (GEMM, 500, 100)],
            Stream_20=[(SENT, 200, 400)],
            XLA_Ops=[("all-gather-start.1", 0, 600), ("fusion.1", 300, 200)],
        ),
        _plane("/device:GPU:1", Stream_14=[(GEMM, 0, 100)], Stream_21=[(SENT, 100, 400), (COPY, 100, 400)]),
        _plane("/device:GPU:2", XLA_Ops=[]),
    ]
)


def test_kernels_of_several_gpus():
    planes = {plane.name: plane for plane in ProfileData.from_text_proto(TWO_GPUS).planes}
    found = [exposed(kernels) for kernels in bench_profile.gpu_kernels(planes)]
    assert np.asarray(found) == pytest.approx(np.asarray([(400e-9, 200e-9), (400e-9, 400e-9)]))
    parts, _ = bench_profile.add_up(bench_profile.gpu_kernels(planes)[0])
    assert parts["collectives"] == parts["products"] == pytest.approx(400e-9)
    assert parts["gaps"] == 0


def test_a_cpu_shows_no_communication():
    double = jax.jit(lambda x: 2 * x)
    assert bench_profile.communication(lambda: double(np.ones(8)).block_until_ready()) == []
