"""What decoders are made of and nothing is learned in: packed words, attention, dropout.

B images · S image positions · D model width · T words · H heads · E = D/H · M captions in a batch
N words in a batch
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; from the CPU to a GPU without waiting for what that does."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy out of other memory would wait
    return tensor.to(device, non_blocking=True)


class Layout:
    """Where the N real words of a batch sit, so that no layer works on padding.

    Words travel packed, (N, D). Self-attention wants a row a caption, (M, T, D); cross-attention
    a row an image, (B, W, D), with the words of all its captions side by side, so that the
    image's keys and values are never copied for its captions.
    """

    def __init__(self, real: Tensor, owner: Tensor, images: int, device: torch.device):
        """`real` (M, T) is True at words; `owner` (M,) the image of each caption.

        What is worked out where these are (the CPU, if nobody is to wait for a GPU) is put on
        `device`.
        """
        captions, length = real.shape
        caption, position = real.nonzero(as_tuple=True)  # (N,), (N,)
        image = owner[caption]
        order = image.argsort(stable=True)
        counts = image.bincount(minlength=images)
        before = counts.cumsum(0) - counts
        place = torch.empty_like(image)  # the place of each word among its image's words
        place[order] = torch.arange(len(image), device=image.device) - before[image[order]]
        width = int(counts.max())
        self.position = to_device(position, device)
        self.by_caption = (captions, length), to_device(caption * length + position, device)
        self.by_image = (images, width), to_device(image * width + place, device)

    @staticmethod
    def spread(words: Tensor, grid: tuple[tuple[int, int], Tensor]) -> Tensor:
        """Return packed `words` (N, D) laid on a grid (rows, columns, D), zeros elsewhere."""
        (rows, columns), index = grid
        empty = words.new_zeros(rows * columns, words.shape[-1])
        return empty.index_copy(0, index, words).view(rows, columns, words.shape[-1])

    @staticmethod
    def pack(spread: Tensor, grid: tuple[tuple[int, int], Tensor]) -> Tensor:
        """Return the words (N, D) of a grid (rows, columns, D)."""
        return spread.flatten(0, 1).index_select(0, grid[1])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(…, T, D) -> (…, H, T, E)"""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def join_heads(x: Tensor) -> Tensor:
    """(…, H, T, E) -> (…, T, D)"""
    return x.transpose(-2, -3).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Return what each query (…, T, E) sees of keys and values (…, S, E), scaled dot products.

    With `causal`, query t sees the keys up to t alone.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    # For rows this short torch's fused backward takes up to ten times as long on a CPU.
    likeness = scaled_dot_products(query, key)
    if causal:
        later = torch.ones(likeness.shape[-2:], dtype=torch.bool, device=likeness.device).triu(1)
        likeness = likeness.masked_fill(later, float("-inf"))
    return likeness.softmax(-1) @ value


def scaled_dot_products(query: Tensor, key: Tensor) -> Tensor:
    """Return the scaled dot products (…, T, S) of queries (…, T, E) and keys (…, S, E)."""
    return query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)


class Dropout(nn.Module):
    """Zeroes a share `p` of its input in training and scales the rest by 1 / (1 - p).

    On a CPU torch draws a random number an element, which takes longer than the layer it is for;
    here a byte decides, so `p` is rounded to a multiple of 1/256.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = min(255, max(1, round(self.p * 256)))
        random = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = random.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * keep.to(x.dtype).mul_(256 / (256 - dropped))
