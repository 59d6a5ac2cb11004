"""Seeds made of names and numbers, so that each part of a run has random numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(*parts: object) -> Iterator[torch.Generator]:
    """Seed torch's global CPU generator, and the one yielded, by the parts; restore it after.

    Each epoch of each stage has its own seed, so a resumed run needs no saved random state.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    seed = int.from_bytes(digest[:7], "big")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def starts_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a generator on the device, for an attack's starts, seeded by one of the host.

    The data are ordered on the host, so that their order is that of every device.
    """
    if device.type == generator.device.type:
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
