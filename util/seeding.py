"""Randomness that depends on what it is for, and on nothing else."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed (56 bits) that is a hash of all of `parts`."""
    # JSON and the names of files may hold lone surrogates, which are no text.
    text = "/".join(map(str, parts)).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:7], "big")


@contextlib.contextmanager
def fork_seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's generator of the CPU with `derive_seed(*parts)`; restore it at the end."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the GPU too, which fork_rng leaves alone here.
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield


def seeded_generator(*parts: int | str) -> torch.Generator:
    """Return a new generator on the CPU, seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
