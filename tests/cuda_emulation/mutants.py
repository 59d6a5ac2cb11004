"""Bugs for the kernels of csrc/cuda, as changes of their text, and the checkers that find them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from cuda_emulation.build import CSRC


class Mutant(NamedTuple):
    """A change of one place in a file; `cases` is the function of kernel_cases.py that shows it.

    Of the checkers "values" sees wrong results, "emulation" an error of the emulation's own.
    """

    description: str
    file: str
    old: str
    new: str
    cases: str
    found_by: tuple[str, ...]


VALUES, EMULATION, ASAN, TSAN = "values", "emulation", "asan", "tsan"

MUTANTS = [
    Mutant(
        "linf_step: one pack too many",
        "linf_step.cu",
        "thread_index(); i < packs; i",
        "thread_index(); i <= packs; i",
        "linf_step",
        (ASAN,),
    ),
    Mutant(
        "linf_step: one element too many",
        "linf_step.cu",
        "thread_index(); i < count; i",
        "thread_index(); i <= count; i",
        "linf_step",
        (ASAN,),
    ),
    Mutant(
        "linf_step: the first element after the packs is left out",
        "linf_step.cu",
        "packs * kCount + thread_index()",
        "packs * kCount + 1 + thread_index()",
        "linf_step",
        (VALUES,),
    ),
    Mutant(
        "linf_step: no look at whether x is aligned",
        "linf_step.cu",
        "aligned(x) && aligned(grad) && aligned(origin)",
        "true",
        "linf_step",
        (EMULATION, ASAN),
    ),
    Mutant(
        "linf_step: a NaN gradient moves the pixel",
        "linf_step.cu",
        "if (g != g) return x;",
        "",
        "linf_step",
        (VALUES,),
    ),
    Mutant(
        "linf_start: a pack beyond the end",
        "linf_start.cu",
        "first + kGroup <= count",
        "first < count",
        "linf_start",
        (ASAN,),
    ),
    Mutant(
        "linf_start: no end in the last group",
        "linf_start.cu",
        "k < kGroup && first + k < count",
        "k < kGroup",
        "linf_start",
        (ASAN,),
    ),
    Mutant(
        "linf_start: half types use each number twice",
        "linf_start.cu",
        "philox((first + c) / 4,",
        "philox(first / 4,",
        "linf_start",
        (VALUES,),
    ),
    Mutant(
        "block_reduce: shared memory is read before all have written",
        "block_reduce.cuh",
        "= value;\n  __syncthreads();\n",
        "= value;\n",
        "l2_step",
        (EMULATION, TSAN),
    ),
    Mutant(
        "block_reduce: shared memory is written while others still read",
        "block_reduce.cuh",
        "  __syncthreads();\n  if (threadIdx.x % 32",
        "  if (threadIdx.x % 32",
        "l2_step",
        (TSAN,),
    ),
    Mutant(
        "block_reduce: half of a warp's values",
        "block_reduce.cuh",
        "offset = 16;",
        "offset = 8;",
        "l2_step",
        (VALUES,),
    ),
    Mutant(
        "block_reduce: a mask without the upper lanes",
        "block_reduce.cuh",
        "0xffffffffu",
        "0x0000ffffu",
        "l2_step",
        (EMULATION,),
    ),
    Mutant(
        "block_reduce: one warp too many",
        "block_reduce.cuh",
        "warp < warps;",
        "warp <= warps;",
        "l2_step",
        (ASAN,),
    ),
    Mutant(
        "l2_step: too little shared memory",
        "l2_step.cu",
        "shared, kThreads / 32)",
        "shared, kThreads / 64)",
        "l2_step",
        (ASAN,),
    ),
    Mutant(
        "l2_step: threads without an element leave before the barrier",
        "l2_step.cu",
        "if (along.largest != along.largest) return;",
        "if (along.largest != along.largest || threadIdx.x >= row.size) return;",
        "l2_step",
        (EMULATION,),
    ),
    Mutant(
        "keep_best: one word too many",
        "keep_best.cu",
        "i < size; i",
        "i <= size; i",
        "keep_best",
        (ASAN,),
    ),
    Mutant(
        "keep_best: rows that are not whole 16 bytes as such",
        "keep_best.cu",
        " && row_bytes % 16 == 0",
        "",
        "keep_best",
        (VALUES,),
    ),
    Mutant(
        "keep_best: NaN is never replaced",
        "keep_best.cu",
        "|| (other != other && own == own)",
        "",
        "keep_best",
        (VALUES,),
    ),
    Mutant(
        "keep_best: a value changes while other threads and blocks compare it",
        "keep_best.cu",
        "    if (!is_better<S>(value, best_value, row)) continue;\n",
        "    if (!is_better<S>(value, best_value, row)) continue;\n"
        "    if (thread_index() == 0) {\n"
        "      const_cast<typename S::Element*>(best_value)[row] = value[row];\n"
        "    }\n",
        "keep_best",
        (TSAN,),
    ),
    Mutant(
        "merge_threads: states are written while others still read",
        "statistics.cuh",
        "    __syncthreads();\n    states[t] = *own;",
        "    states[t] = *own;",
        "score_stats",
        (TSAN,),
    ),
    Mutant(
        "merge_threads: states are read before all have written",
        "statistics.cuh",
        "states[t] = *own;\n    __syncthreads();",
        "states[t] = *own;",
        "score_stats",
        (VALUES, TSAN),
    ),
    Mutant(
        "merge_threads: no end of the threads",
        "statistics.cuh",
        "t < half * apart && other < threads",
        "t < half * apart",
        "score_stats",
        (ASAN,),
    ),
    Mutant(
        "score_stats: one state too few",
        "score_stats.cu",
        "states, kThreads)",
        "states, kThreads - 1)",
        "score_stats",
        (ASAN,),
    ),
    Mutant(
        "score_stats: locations beyond the last",
        "score_stats.cu",
        "place.slot < place.slots && place.p < P",
        "place.slot < place.slots",
        "score_stats",
        (ASAN,),
    ),
    Mutant(
        "critic_stats: a tile is replaced while others still read it",
        "critic_stats.cu",
        "    __syncthreads();\n    load_tile<S>(tile_z",
        "    load_tile<S>(tile_z",
        "critic_stats",
        (TSAN,),
    ),
    Mutant(
        "critic_stats: units beyond the last",
        "critic_stats.cu",
        "from && u0 + u < U",
        "from",
        "critic_stats",
        (VALUES,),
    ),
    Mutant(
        "critic_stats: images beyond the last",
        "critic_stats.cu",
        "return j < sizes.N && p < sizes.P ?",
        "return p < sizes.P ?",
        "critic_stats",
        (ASAN,),
    ),
    Mutant(
        "critic_stats: a tile too short for its padding",
        "critic_stats.cu",
        "tile_z, kRows * (kDepth + 1))",
        "tile_z, kRows * kDepth)",
        "critic_stats",
        (ASAN,),
    ),
    Mutant(
        "critic_stats: the next image counts as the own pair",
        "critic_stats.cu",
        "      if (j == i) {",
        "      if (j == i + 1) {",
        "critic_stats",
        (VALUES,),
    ),
    Mutant(
        "critic_stats: slopes are read before all have written",
        "critic_stats.cu",
        "    __syncthreads();\n    if (u >= b.sizes.U) continue;",
        "    if (u >= b.sizes.U) continue;",
        "critic_stats",
        (VALUES, TSAN),
    ),
    Mutant(
        "critic_stats: too little dynamic shared memory",
        "critic_stats.cu",
        "+ kSide * kSide);",
        "+ kSide * (kSide - 1));",
        "critic_stats",
        (ASAN,),
    ),
    Mutant(
        "critic_stats: one part of dz is left out",
        "critic_stats.cu",
        "part < count; ++part",
        "part < count - 1; ++part",
        "critic_stats",
        (VALUES,),
    ),
    Mutant(
        "critic_stats: all blocks write their part of dz to one place",
        "critic_stats.cu",
        "(part * b.sizes.N + i) * b.sizes.U + u",
        "i * b.sizes.U + u",
        "critic_stats",
        (VALUES, TSAN),
    ),
    Mutant(
        "dv_value: the joint log-sum-exp is read before it is written",
        "dv_value.cu",
        "joint[lane] = own;\n    __syncthreads();",
        "joint[lane] = own;",
        "dv_value",
        (VALUES, TSAN),
    ),
]


def apply(mutant: Mutant, to: Path) -> Path:
    """Copy csrc with the mutant in it; return the copy."""
    tree = to / "csrc"
    shutil.copytree(CSRC, tree)
    path = tree / "cuda" / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        found = before.count(mutant.old)
        raise ValueError(f"{mutant.description}: {found} places in {mutant.file}, wanted 1")
    path.write_text(before.replace(mutant.old, mutant.new))
    return tree


def table() -> str:
    """Return the bugs and their checkers in Markdown, for docs/gpu.md."""
    lines = ["| planted bug | found by |", "|---|---|"]
    lines += [f"| {mutant.description} | {', '.join(mutant.found_by)} |" for mutant in MUTANTS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
