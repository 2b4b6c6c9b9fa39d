"""Which number format computes where, over faked hardware."""

import pytest

from worker.precision import BF16, FP16, FP32, INITIAL_SCALE, Fp16UnsafeError, Precision, precision_for
from worker.processor import Cpu, read_cpu

INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), FP32), ((7, 0), FP16), ((7, 5), FP16), ((8, 0), BF16), ((8, 6), BF16), ((9, 0), BF16), ((12, 0), BF16)],
)
def test_a_gpu_computes_by_its_capability(capability: tuple[int, int], expected: Precision) -> None:
    assert precision_for(capability, Cpu(INTEL, frozenset({"amx_bf16"})), "safe") == expected


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        (INTEL, {"avx2"}, FP32),
        (INTEL, {"avx512f", "avx512_bf16"}, FP32),
        (INTEL, {"avx512_bf16", "amx_bf16"}, BF16),
        (AMD, {"avx512_bf16"}, BF16),
        (AMD, {"avx512f"}, FP32),
        ("", set(), FP32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_where_that_is_faster(
    vendor: str, flags: set[str], expected: Precision
) -> None:
    assert precision_for(None, Cpu(vendor, frozenset(flags)), "unknown") == expected


def test_only_float16_scales_the_loss() -> None:
    assert [p.scaled for p in (BF16, FP16, FP32)] == [False, True, False]
    assert INITIAL_SCALE == 4_096


def test_a_base_that_overflows_is_refused_where_only_float16_is_left() -> None:
    with pytest.raises(Fp16UnsafeError, match="overflows"):
        precision_for((7, 5), Cpu(), "unsafe")
    assert precision_for((8, 0), Cpu(), "unsafe") == BF16


def test_the_processor_is_read_from_linux() -> None:
    text = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert read_cpu(text) == Cpu(INTEL, frozenset({"fpu", "amx_bf16"}))
    assert read_cpu("Features : asimd bf16\n") == Cpu()
