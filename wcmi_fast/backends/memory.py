"""Memory for large results, in large pages."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

# From this size on glibc maps a block of its own, with which the advice ends, unless it has one as
# large free already: then what it hands out later may keep large pages.
HUGE_BYTES = 32 << 20

_MADV_HUGEPAGE = 14
_PAGE = 4096
_madvise = getattr(ctypes.CDLL(None), "madvise", None)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor, of large pages where it is large and the system allows it.

    A new block costs a page fault for each 4 KiB at its first writing, or for each 2 MiB.
    """
    result = like.new_empty(shape)
    if result.nbytes >= HUGE_BYTES and result.device.type == "cpu" and _madvise is not None:
        start = -(-result.data_ptr() // _PAGE) * _PAGE
        length = result.data_ptr() + result.nbytes - start
        # Advice: if it is refused, pages are small, and nothing else changes.
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return result
