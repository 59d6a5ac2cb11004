"""Count each kernel's instructions by valgrind: `python benchmarks/callgrind/count.py out.json`.

The counts are of driver.cpp, with AVX2 and one thread. They do not depend on the machine's load,
but on the compiler and on the C library. The file has the form that gate.py reads.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from rich.console import Console
from rich.progress import track

from wcmi_fast.files import write_file

HERE = Path(__file__).resolve().parent


def output(*command: str | Path) -> str:
    """Run a command and return what it prints; RuntimeError has its words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise RuntimeError(f"`{words}` failed: {(done.stdout + done.stderr).strip()}")
    return done.stdout


def build(folder: Path) -> Path:
    """Compile the driver in `folder` and return it."""
    output("cmake", "-S", HERE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release")
    output("cmake", "--build", folder, "--parallel", "2")
    return folder / "driver"


def count(driver: Path, case: str) -> int:
    """Return the instructions that one case's kernel executes."""
    counts = driver.with_name("callgrind.out")
    output(
        "valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=measured",
        f"--callgrind-out-file={counts}", driver, case,
    )  # fmt: skip
    found = re.search(r"^(?:totals|summary): (\d+)$", counts.read_text(), re.MULTILINE)
    if found is None or int(found[1]) == 0:
        raise RuntimeError(f"valgrind counted nothing for the case {case!r}")
    return int(found[1])


def main(out: tyro.conf.Positional[Path], /) -> int:
    """Write {case: instructions} for every case of the driver; return 1 if that fails.

    Args:
        out: the JSON file to write.
    """
    try:
        with TemporaryDirectory() as folder:
            driver = build(Path(folder))
            lines = output(driver).splitlines()
            conditions = dict(line.split("=", 1) for line in lines if "=" in line)
            conditions["valgrind"] = output("valgrind", "--version").strip()
            names = [line for line in lines if "=" not in line]
            counts = {name: count(driver, name) for name in track(names, "counting")}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, json.dumps({"conditions": conditions, "cases": counts}, indent=2) + "\n")
        return 0
    except (RuntimeError, OSError) as error:
        Console(stderr=True).print(f"count: {error}", markup=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
