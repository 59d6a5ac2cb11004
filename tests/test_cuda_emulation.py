"""What single operations of the CUDA emulation do, against what CUDA's manual says of them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda_emulation import build, control
from hypothesis import example, given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

FULL = 0xFFFFFFFF
SHUFFLES = ("direct", "up", "down", "xor")


@pytest.fixture(scope="module")
def built() -> str:
    return str(build.link("plain", "semantics.so", [Path("semantics.cu")], build.HERE))


@pytest.fixture
def library(built: str) -> Iterator[ctypes.CDLL]:
    """The kernels, in the order of a seed that each test may change."""
    library = control.controls(built)
    yield library
    library.wcmi_emulation_set_seed(0)
    library.wcmi_emulation_set_os_threads(1)
    library.wcmi_emulation_only_blocks(0, -1)


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def source_lane(kind: str, lane: int, argument: int, width: int) -> int:
    """Return the lane that a lane reads, as CUDA's programming guide words it."""
    first = lane - lane % width
    match kind:
        case "direct":
            return first + argument % width
        case "up":
            return lane - argument if lane - argument >= first else lane
        case "down":
            return lane + argument if lane + argument < first + width else lane
        case _:
            # Groups before the own one can be read, later ones cannot.
            return lane ^ argument if lane ^ argument < first + width else lane


@given(
    kind=st.sampled_from(SHUFFLES),
    mask=st.integers(1, FULL) | st.just(FULL),
    argument=st.integers(0, 31),
    width=st.sampled_from([1, 2, 4, 8, 16, 32]),
    seed=st.integers(0, 3),
)
@example(kind="xor", mask=FULL, argument=16, width=8, seed=1)
@example(kind="down", mask=0x0000FFFF, argument=8, width=16, seed=0)
def test_shuffles(built: str, kind: str, mask: int, argument: int, width: int, seed: int) -> None:
    library = control.controls(built)
    library.wcmi_emulation_set_seed(seed)
    out = np.full(64, -1, np.int64)
    error = library.shuffle(
        SHUFFLES.index(kind), ctypes.c_uint(mask), argument, width, 64, address(out)
    )
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    sources = [source_lane(kind, lane, argument, width) for lane in lanes]
    if not set(sources) <= set(lanes):
        assert error != 0
        assert "which is not among them" in library.wcmi_emulation_error().decode()
        return
    assert error == 0, library.wcmi_emulation_error()
    wanted = np.full((2, 32), -1, np.int64)
    wanted[:, lanes] = 2**40 + np.array(sources) + np.array([[0], [32]])
    np.testing.assert_array_equal(out, wanted.ravel())


@pytest.mark.parametrize("width", [0, 3, 33, 64, -1])
def test_a_width_that_is_no_power_of_two(library: ctypes.CDLL, width: int) -> None:
    out = np.zeros(32, np.int64)
    assert library.shuffle(0, FULL, 0, width, 32, address(out)) != 0
    message = library.wcmi_emulation_error().decode()
    assert "semantics.cu:" in message
    assert "a shuffle's width is a power of two up to 32" in message


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("threads", [1, 32, 96, 100])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_votes(library: ctypes.CDLL, density: float, threads: int, seed: int) -> None:
    library.wcmi_emulation_set_seed(seed)
    predicates = (np.random.default_rng(threads).random(threads) < density).astype(np.int32)
    out, split = np.zeros((threads, 6), np.int32), 11
    assert library.votes(split, threads, address(predicates), address(out)) == 0
    for thread in range(threads):
        warp = thread - thread % 32
        low = thread % 32 < split
        peers = [t for t in range(warp, min(warp + 32, threads)) if (t % 32 < split) == low]
        true = [t for t in peers if predicates[t]]
        ballot = sum(1 << t % 32 for t in true)
        wanted = [ballot, bool(true), true == peers]
        wanted += [predicates.sum(), predicates.any(), predicates.all()]
        assert [out[thread, 0].astype(np.uint32), *out[thread, 1:]] == wanted


@pytest.mark.parametrize("os_threads", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_atomics_lose_nothing(library: ctypes.CDLL, seed: int, os_threads: int) -> None:
    library.wcmi_emulation_set_seed(seed)
    library.wcmi_emulation_set_os_threads(os_threads)
    fields = [("sum", "i4"), ("largest", "i4"), ("smallest", "i4"), ("last", "i4")]
    totals = np.zeros(1, np.dtype([*fields, ("half", "f4"), ("increments", "u8")], align=True))
    totals["smallest"] = 2**31 - 1
    blocks, threads = 300, 100
    assert library.atomics(blocks, threads, address(totals)) == 0
    count = blocks * threads
    wanted = (count * (count - 1) // 2, count - 1, 0, count / 2, count)
    assert totals[["sum", "largest", "smallest", "half", "increments"]][0].tolist() == wanted
    assert 0 <= totals["last"][0] < count


def visits(library: ctypes.CDLL, sizes: tuple[int, ...]) -> tuple[np.ndarray, list[int]]:
    """Return how often each thread of a grid ran, and the order in which they did."""
    count = math.prod(sizes)
    seen, order, number = (np.zeros(n, np.int32) for n in (count, count, 1))
    arguments = np.array(sizes, np.int32)
    assert library.places(*map(address, (arguments, seen, order, number))) == 0
    return seen, order[: number[0]].tolist()


@pytest.mark.parametrize("os_threads", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (5, 3, 2, 7, 2, 3), (40, 1, 1, 1024, 1, 1)])
def test_every_thread_runs_once(
    library: ctypes.CDLL, sizes: tuple[int, ...], seed: int, os_threads: int
) -> None:
    library.wcmi_emulation_set_seed(seed)
    library.wcmi_emulation_set_os_threads(os_threads)
    seen, _ = visits(library, sizes)
    assert (seen == 1).all()


def test_a_seed_orders_blocks_and_threads_its_own_way(library: ctypes.CDLL) -> None:
    sizes = (6, 1, 1, 8, 1, 1)
    orders = []
    for seed in range(4):
        library.wcmi_emulation_set_seed(seed)
        orders.append(visits(library, sizes)[1])
        assert orders[-1] == visits(library, sizes)[1]
    assert orders[0] == list(range(48))
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(i // 8 for i in order) for order in orders[1:]}) > 1


@pytest.mark.parametrize(
    ("first", "count", "wanted"),
    [(0, -1, range(30)), (2, 1, [2]), (-1, 1, [29]), (-3, 2, [27, 28]), (28, 9, [28, 29])],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_some_blocks_only(
    library: ctypes.CDLL, seed: int, first: int, count: int, wanted: list[int]
) -> None:
    library.wcmi_emulation_set_seed(seed)
    library.wcmi_emulation_only_blocks(first, count)
    seen, _ = visits(library, (5, 3, 2, 2, 1, 1))
    assert np.flatnonzero(seen.reshape(30, 2).all(axis=1)).tolist() == list(wanted)
    assert seen.sum() == 2 * len(wanted)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((1, 65536, 1, 1, 1, 1), "grid is (1, 65536, 1), wanted 1 to (2147483647, 65535, 65535)"),
        ((0, 1, 1, 1, 1, 1), "grid is (0, 1, 1), wanted 1 to"),
        ((1, 1, 1, 33, 32, 1), "block is (33, 32, 1), wanted 1 to 1024 threads"),
        ((1, 1, 1, 1, 1, 65), "block is (1, 1, 65), wanted 1 to 1024 threads, at most 64"),
        ((1, 1, 1, 0, 1, 1), "block is (0, 1, 1), wanted 1 to 1024 threads"),
    ],
)  # fmt: skip
def test_sizes_that_cuda_refuses(library: ctypes.CDLL, sizes: tuple[int, ...], wanted: str) -> None:
    arguments, memory = np.array(sizes, np.int32), np.zeros(1, np.int32)
    assert library.places(address(arguments), *3 * [address(memory)]) != 0
    message = library.wcmi_emulation_error().decode()
    assert message.startswith(f"places_kernel: {wanted}")
