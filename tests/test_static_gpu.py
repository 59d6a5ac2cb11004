"""benchmarks/static_gpu.py: what it reads of compilers, its rules and its tables."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import static_gpu
from gpu_model import Work, occupancy, operator_time, tile_time

FINE = static_gpu.Finding(
    kernel="product/matrix_product nn bf16 64x64x64, 4 warps, 3 stages",
    architecture=80,
    default=True,
    threads=128,
    registers=120,
    stack=0,
    spills=0,
    shared=48 << 10,
    instruction="mma.sync",
    matrix=True,
    flops=2 * 64**3,
    bytes=2 * 64 * 128,
)
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4wcmi12_GLOBAL__N_116linf_step_kernelINS_7Float32E\
Li4EEEvPi' for 'sm_90'
ptxas info    : Function properties for _ZN4wcmi12_GLOBAL__N_116linf_step_kernelINS_7Float32E\
Li4EEEvPi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem
"""


def changed(**fields: object) -> static_gpu.Finding:
    known = {name: getattr(FINE, name) for name in FINE.__struct_fields__}
    return static_gpu.Finding(**{**known, **fields})


def test_what_ptxas_prints_is_read() -> None:
    (match,) = static_gpu.PTXAS.finditer(PTXAS)
    found = static_gpu.cuda_finding(match)
    assert found.kernel == "linf_step_kernel<Float32, 4>"
    assert (found.architecture, found.registers, found.shared) == (90, 40, 64)
    assert (found.stack, found.spills, found.threads) == (16, 20, 256)


def test_a_kernel_that_is_fine_breaks_no_rule() -> None:
    assert static_gpu.broken_rules([FINE]) == []
    assert static_gpu.broken_rules([changed(default=False, spills=8, shared=1 << 20)]) == []


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"spills": 8}, "spills 8 bytes, wanted 0 in a default configuration"),
        ({"shared": 170_000}, "needs 170000 bytes of shared memory, wanted at most 166912"),
        ({"instruction": ""}, "has no matrix instruction, wanted one of"),
        ({"instruction": "", "default": False}, "has no matrix instruction, wanted one of"),
    ],
)
def test_what_must_not_be_is_one_sentence(fields: dict[str, object], sentence: str) -> None:
    (broken,) = static_gpu.broken_rules([changed(**fields)])
    assert broken.startswith(f"{FINE.kernel} for sm_80: {sentence}")


@pytest.mark.parametrize(
    ("arguments", "blocks", "share"),
    [
        ((80, 256, 32, 0), 8, 1.0),  # warps are the limit
        ((80, 256, 80, 0), 3, 0.375),  # registers
        ((90, 128, 64, 77_312), 2, 0.125),  # shared memory, a KiB of which is the driver's
        ((120, 32, 16, 0), 24, 0.5),  # blocks
    ],
)
def test_occupancy_by_hand(arguments: tuple[int, ...], blocks: int, share: float) -> None:
    assert occupancy(*arguments) == (blocks, share)


def test_roofline_by_hand() -> None:
    # 312 TFLOP/s and 2.039 TB/s: the larger of both times.
    assert operator_time("A100", Work(312 * 10**9, 10)) == pytest.approx(1e-3)
    assert operator_time("A100", Work(10, 2_039_000_000)) == pytest.approx(1e-3)
    assert tile_time("A100", FINE) == pytest.approx(108 * FINE.bytes / 2.039e12)
    assert tile_time("A100", changed(bytes=1)) == pytest.approx(108 * FINE.flops / 312e12)


def test_a_triton_program_is_compiled_and_read() -> None:
    # In a process of its own: in this one other tests have Triton interpreted.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(static_gpu.compile_program, ("linf_step", 0, 90)).result()
    assert found.kernel.startswith("linf_step")
    assert 8 <= found.registers <= 255
    assert (found.spills, found.instruction) == (0, "")


def test_tables_show_where_architectures_differ() -> None:
    other = changed(architecture=90, registers=130)
    line = static_gpu.kernel_table([FINE, other], matrix=True).splitlines()[-1]
    assert line.startswith(f"| {FINE.kernel} | 128 | 120 / 130 | 0 | 0 | 49152 |")


def test_the_tables_go_between_the_marks_of_a_page() -> None:
    begin, end = static_gpu.MARKS
    page = static_gpu.put_between_marks(f"a\n{begin}\nold\n{end}\nb", "new")
    assert page == f"a\n{begin}\n\nnew\n\n{end}\nb"
    with pytest.raises(RuntimeError, match="has not both marks"):
        static_gpu.put_between_marks("a page", "new")
