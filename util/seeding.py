"""Seeds derived from what they are for, so that random numbers depend on nothing else.

The augmentation of an image, say, uses the seed of (seed, epoch, image id): it is the same for any
number of workers, in any batch, and in a run that is resumed.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed (56 bits): a hash of `parts`."""
    # Image ids may contain lone surrogates: file names that are not valid UTF-8.
    text = "/".join(map(str, parts)).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:7], "big")


@contextlib.contextmanager
def fork_seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's CPU generator with `derive_seed(*parts)` inside the block, then restore it."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPU, whose state fork_rng does not restore here.
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield


def seeded_generator(*parts: int | str) -> torch.Generator:
    """Return a new CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
