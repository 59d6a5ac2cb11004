"""Small files of pytest-benchmark's form, made by hand for the tests of gate and report."""

from __future__ import annotations

from typing import Any

ENVIRONMENT = {
    "threads": 1,
    "simd": "avx2",
    "cpu": "Test CPU",
    "blas": "MKL",
    "versions": {"torch": "2.6.0", "wcmi_fast": "0.1.0"},
    "commit": "abc1234",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "OMP_NUM_THREADS=1 pytest benchmarks --benchmark-json=run.json",
}


def record(op: str, **fields: Any) -> dict[str, Any]:
    """Return `extra_info` of one case, of which `fields` are given."""
    return {
        "op": op,
        "case": {"N": 128},
        "seconds": {"ours": 0.25},
        "ratios": {},
        "environment": ENVIRONMENT,
        **fields,
    }


def run(records: list[dict[str, Any]], cpu: str = "Test(R) CPU @ 2.50GHz") -> dict[str, Any]:
    """Return pytest-benchmark's JSON of these cases."""
    return {
        "machine_info": {"cpu": {"brand_raw": cpu}},
        "benchmarks": [{"name": f"bench_{k}", "extra_info": r} for k, r in enumerate(records)],
        "version": "5.3.1",
    }
