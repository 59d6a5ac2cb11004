"""Compile every GPU kernel for real targets and report what the compilers say; no GPU is needed.

`python benchmarks/static_gpu.py run.json` writes the findings and fails where one breaks a rule;
`--write docs/gpu.md` also puts the tables into that page, between its two marks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pybind11
import tyro
from gpu_model import (
    DEVICES,
    MULTIPROCESSORS,
    OPERATORS,
    Occupancy,
    occupancy,
    operator_time,
    tile_time,
)
from rich.console import Console
from rich.progress import track

from wcmi_fast.files import write_file

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "critic_stats", "statistics", "score_stats", "dv_value", "product", "critic_tail", "linf_step",
    "linf_start", "l2_step", "keep_best",
)  # fmt: skip
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
MARKS = ("<!-- static_gpu.py: begin -->", "<!-- static_gpu.py: end -->")


class Finding(msgspec.Struct, frozen=True):
    """What a compiler says of one kernel for one architecture; sizes in bytes."""

    kernel: str
    architecture: int
    default: bool
    threads: int
    registers: int
    stack: int
    spills: int
    shared: int
    instruction: str
    matrix: bool = False
    flops: int = 0
    bytes: int = 0

    def occupancy(self) -> Occupancy:
        return occupancy(self.architecture, self.threads, self.registers, self.shared)


class Report(msgspec.Struct):
    command: str
    compilers: dict[str, str]
    findings: list[Finding]


def output(*command: str | Path) -> str:
    """Run a command and return what it prints; RuntimeError has its words if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise RuntimeError(f"`{words}` failed: {done.stdout.strip()}")
    return done.stdout


# ---- Triton -------------------------------------------------------------------------------------


def triton_tool(name: str) -> Path:
    """Return one of the programs that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def compile_program(task: tuple[str, int, int]) -> Finding:
    """Compile program `index` of a module for an architecture."""
    module, index, architecture = task
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program = import_module(f"wcmi_fast.backends.triton.{module}").programs()[index]
    compiled = triton.compile(
        ASTSource(program.kernel, program.signature, program.constants, aligned(program.signature)),
        target=GPUTarget("cuda", architecture, 32),
        options=program.options,
    )
    usage = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    spills = spill_bytes(ptx, architecture) if usage["STACK"] else 0
    return Finding(
        kernel=program.name,
        architecture=architecture,
        default=program.default,
        threads=32 * compiled.metadata.num_warps,
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=spills,
        shared=compiled.metadata.shared,
        instruction=next((name for name in MATRIX_INSTRUCTIONS if name in ptx), ""),
        matrix=program.matrix,
        flops=program.flops,
        bytes=program.bytes,
    )


def aligned(signature: dict[str, str]) -> dict[tuple[int, ...], list[list[object]]]:
    """Say of pointers and sizes that 16 divides them, as a launch does where it is true."""
    return {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*") or kind in ("i32", "i64")
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers, stack and so on of the one kernel in a cubin."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = output(triton_tool("cuobjdump"), "-res-usage", path)
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def spill_bytes(ptx: str, architecture: int) -> int:
    """Return the bytes that ptxas spills; a stack may also hold arrays."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(architecture).path
    target = re.search(r"^\.target (\S+?),?\s", ptx, re.MULTILINE)
    assert target is not None, "PTX names its target"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        cubin = path.with_suffix(".cubin")
        text = output(tool, "-v", f"-arch={target[1]}", path, "-o", cubin)
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", text))


def triton_findings(architectures: Iterable[int], defaults: bool) -> Iterator[Finding]:
    """Compile every program, or only those that the heuristics choose, on every CPU."""
    tasks = [
        (module, index, architecture)
        for module in MODULES
        for index, program in enumerate(
            import_module(f"wcmi_fast.backends.triton.{module}").programs()
        )
        for architecture in architectures
        if program.default or not defaults
    ]
    with ProcessPoolExecutor() as pool:
        found = pool.map(compile_program, tasks, chunksize=4)
        yield from track(found, "Triton", total=len(tasks), console=Console(stderr=True))


# ---- CUDA C++ -----------------------------------------------------------------------------------

# What csrc/cuda launches and ptxas cannot print: the threads of blocks, and dynamic shared memory,
# here at the largest U of backends/cuda.py.
BLOCKS = {"l2_step_kernel": 512}
THREADS = 256
DYNAMIC_SHARED = {
    "critic_stats_bwd_kernel<Float64>": 8 * (32 * 129 + 256),
    "critic_stats_bwd_kernel": 4 * (32 * 257 + 256),
}

PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
    r" (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def cuda_findings(architectures: Iterable[int]) -> list[Finding]:
    """Build the library's CUDA target with its own flags and read what ptxas prints."""
    chosen = ";".join(f"{architecture}-real" for architecture in architectures)
    with TemporaryDirectory() as folder:
        output(
            "cmake", f"-S{ROOT}", f"-B{folder}", "-GNinja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DWCMI_FAST_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={chosen}",
            "-DCMAKE_CUDA_FLAGS=-Xptxas=-v", f"-DCMAKE_CUDA_COMPILER={nvcc()}",
        )  # fmt: skip
        text = output("cmake", "--build", folder, "--target", "_cuda")
    return [cuda_finding(match) for match in PTXAS.finditer(text)]


def nvcc() -> Path:
    """Return nvcc's path, as setup.py finds it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if found is None:
        raise RuntimeError("nvcc was found neither in PATH nor in CUDA_HOME/bin")
    return Path(found)


def cuda_finding(match: re.Match[str]) -> Finding:
    name = kernel_name(match["name"])
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    return Finding(
        kernel=name,
        architecture=int(match["architecture"]),
        default=True,
        threads=of_kernel(BLOCKS, name, THREADS),
        registers=int(match["registers"]),
        stack=int(match["stack"]),
        spills=int(match["stores"]) + int(match["loads"]),
        shared=(int(shared[1]) if shared else 0) + of_kernel(DYNAMIC_SHARED, name, 0),
        instruction="",
    )


def of_kernel(sizes: dict[str, int], name: str, otherwise: int) -> int:
    return next((size for kernel, size in sizes.items() if kernel in name), otherwise)


def kernel_name(mangled: str) -> str:
    """Return "linf_step_kernel<Float32, 4>" for a mangled name."""
    text = output("c++filt", mangled).strip().removeprefix("void ")
    text = text.replace("(anonymous namespace)::", "").replace("wcmi::", "")
    return re.sub(r"\(int\)", "", re.split(r"\((?!int\))", text)[0])


# ---- rules --------------------------------------------------------------------------------------


def broken_rules(findings: Iterable[Finding]) -> list[str]:
    """Return a sentence for each finding that must not be."""
    return [
        f"{finding.kernel} for sm_{finding.architecture}: {rule}"
        for finding in findings
        for rule in _broken(finding)
    ]


def _broken(finding: Finding) -> Iterator[str]:
    limit = MULTIPROCESSORS[finding.architecture].shared_per_block
    if finding.default and finding.spills:
        yield f"spills {finding.spills} bytes, wanted 0 in a default configuration"
    if finding.default and finding.shared > limit:
        yield f"needs {finding.shared} bytes of shared memory, wanted at most {limit}"
    if finding.matrix and not finding.instruction:
        yield f"has no matrix instruction, wanted one of {MATRIX_INSTRUCTIONS}"


# ---- tables -------------------------------------------------------------------------------------


def table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def summary(report: Report, everything: bool) -> str:
    """Return the page's generated part."""
    findings = report.findings if everything else [f for f in report.findings if f.default]
    compilers = ", ".join(f"{name} {version}" for name, version in report.compilers.items())
    return "\n\n".join(
        (
            f"By `{report.command}` with {compilers}: {len(report.findings)} kernels times"
            " architectures compiled. **Compiled, not run on a GPU.** The tables show the default"
            " configurations; the command's JSON file has all of them.",
            "### Kernels without matrix products\n\n" + kernel_table(findings, matrix=False),
            "### Kernels with matrix products\n\n" + kernel_table(findings, matrix=True),
            "### Roofline times at the paper's sizes\n\n" + roofline_table(),
        )
    )


def kernel_table(findings: list[Finding], *, matrix: bool) -> str:
    """Return a line per kernel; a cell has the numbers of all architectures if they differ."""
    names = dict.fromkeys(f.kernel for f in findings if bool(f.flops) == matrix)
    lines = []
    for name in names:
        own = [f for f in findings if f.kernel == name]
        cells: tuple[object, ...] = (
            name,
            own[0].threads,
            each(f.registers for f in own),
            each(f.spills for f in own),
            each(f.stack for f in own),
            each(f.shared for f in own),
            each(f"{f.occupancy().share:.0%}" for f in own),
        )
        lines.append(cells + (matrix_cells(own) if matrix else ()))
    header = ("kernel", "threads", "registers", "spills B", "stack B", "shared B", "occupancy")
    more = ("matrix instruction", "flops / tile", "bytes / tile", *(f"tile, {d}" for d in DEVICES))
    return table(header + (more if matrix else ()), lines)


def matrix_cells(own: list[Finding]) -> tuple[object, ...]:
    first = own[0]
    times = (f"{1e9 * tile_time(device, first):.0f} ns" for device in DEVICES)
    instructions = each(f.instruction or "none (float32)" for f in own)
    return (instructions, f"{first.flops:,}", f"{first.bytes:,}", *times)


def each(values: Iterable[object]) -> str:
    """Return a cell: one value if all architectures agree, else theirs in order."""
    words = [str(value) for value in values]
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def roofline_table() -> str:
    lines = [
        (
            name, f"{work.flops:,}", f"{work.bytes:,}",
            *(f"{1e6 * operator_time(device, work):,.1f}" for device in DEVICES),
        )
        for name, work in OPERATORS.items()
    ]  # fmt: skip
    return table(("operator", "flops", "bytes", *(f"{d}, µs" for d in DEVICES)), lines)


def put_between_marks(page: str, text: str) -> str:
    """Return the page with `text` between its marks."""
    begin, end = (page.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        raise RuntimeError(f"the page has not both marks {MARKS}")
    return f"{page[: begin + len(MARKS[0])]}\n\n{text}\n\n{page[end:]}"


def versions() -> dict[str, str]:
    import triton

    found = re.search(r"release (\S+),", output(nvcc(), "--version"))
    return {"nvcc": found[1] if found else "unknown", "triton": triton.__version__}


def main(
    out: tyro.conf.Positional[Path],
    /,
    write: Path | None = None,
    architectures: tuple[int, ...] = tuple(MULTIPROCESSORS),
    defaults: bool = False,
) -> int:
    """Compile, write the findings and return 1 where a rule is broken.

    Args:
        out: the JSON file to write.
        write: a page with both marks, to put the tables in.
        architectures: compute capabilities, 80 for 8.0.
        defaults: leave out configurations of Triton kernels that no heuristic chooses.
    """
    findings = [*cuda_findings(architectures), *triton_findings(architectures, defaults)]
    # Without the folder, which is another on every machine.
    words = (out.name if word == str(out) else word for word in sys.argv[1:])
    command = " ".join(("python benchmarks/static_gpu.py", *words))
    report = Report(command, versions(), findings)
    write_file(out, msgspec.json.format(msgspec.json.encode(report)))
    if write is not None:
        write_file(write, put_between_marks(write.read_text(), summary(report, False)).encode())
    broken = broken_rules(findings)
    console = Console(stderr=True)
    for sentence in broken:
        console.print(sentence, markup=False)
    console.print(f"{len(findings)} compiled, {len(broken)} rules broken")
    return int(bool(broken))


def cli(arguments: list[str] | None = None) -> Any:
    return tyro.cli(main, args=arguments)


if __name__ == "__main__":
    sys.exit(cli())
