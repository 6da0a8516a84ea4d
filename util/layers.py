"""Parts of decoders: linear layers, packed words, attention, dropout.

B images · S image positions · D model width · T words · H heads · E = D/H · M captions in a batch
N words in a batch
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MOST_LEFT_ROWS = 8  # from there on the weight on the left is not faster, see `linear`


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; copying from the CPU to a GPU does not wait for the GPU."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from pageable memory the copy would be synchronous
    return tensor.to(device, non_blocking=True)


class SkipInit(TorchFunctionMode):
    """While it is entered, modules are built without filling their parameters with numbers.

    On the device "meta" there is nothing to fill, but torch would import its compiler to do so.
    """

    FILLS = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_})

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor itself where `func` would fill it, else what `func` returns."""
        kwargs = kwargs or {}
        if func in self.FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` (..., O) for `x` (..., I), `weight` (O, I), `bias` (O,).

    As `F.linear`, but in half the time for the beams of one image, `x` (1, K, I), on a CPU: with
    few rows, MKL is faster with the weight on the left. Only for one image, because equal rows are
    then rounded differently, and an image's caption must not depend on its place in a batch.
    """
    one_image = x.dim() == 3 and x.shape[0] == 1 and 2 <= x.shape[1] <= MOST_LEFT_ROWS
    if not one_image or x.device.type != "cpu" or len(weight) < weight.shape[1] or is_traced():
        return F.linear(x, weight, bias)
    columns = x[0].t()
    product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t().contiguous()[None]


def is_traced() -> bool:
    """Return whether operations are recorded: for gradients, by a compiler or for an export."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


class Linear(nn.Linear):
    """A linear layer that is fast for few rows too, see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., O) for `x` (..., I)."""
        return linear(x, self.weight, self.bias)


class Grid(NamedTuple):
    """A (rows, columns) grid of which only N cells hold a word.

    `index` (N,) is the cell of each packed word, counted row by row.
    """

    rows: int
    columns: int
    index: Tensor

    def unpack(self, words: Tensor) -> Tensor:
        """Return packed `words` (N, D) in their cells (rows, columns, D), zero in the others."""
        width = words.shape[-1]
        empty = words.new_zeros(self.rows * self.columns, width)
        return empty.index_copy(0, self.index, words).view(self.rows, self.columns, width)

    def pack(self, grid: Tensor) -> Tensor:
        """Return the words (N, D) in the cells of a grid (rows, columns, D)."""
        return grid.flatten(0, 1).index_select(0, self.index)


class PackedWords:
    """Where the N real words of a batch belong, so that no layer computes padding.

    Captions differ in length: of the M x T positions of a batch about half are padding. Layers
    that work on each word alone (linear, norm) take the real words packed, (N, D). Attention needs
    words that belong together in one row, and `unpack`s them into one of two grids:

    - `by_caption` (M, T): a row per caption, for self-attention;
    - `by_image` (B, W): a row per image with the words of all its captions side by side, for
      attention to the image, whose keys and values are then not copied for each caption. W is the
      largest number of words of any image.

    `position` (N,) is the place of each word in its caption.
    """

    def __init__(self, mask: Tensor, owner: Tensor, images: int, device: torch.device):
        """`mask` (M, T) is True at real words; `owner` (M,) is the index of each caption's image.

        The indices are computed where these are (on the CPU, so that no GPU is waited for) and
        then copied to `device`.
        """
        captions, length = mask.shape
        caption, position = mask.nonzero(as_tuple=True)  # (N,), (N,)
        image = owner[caption]
        order = image.argsort(stable=True)
        counts = image.bincount(minlength=images)  # (B,): words of each image
        first = counts.cumsum(0) - counts  # where an image's words begin in `order`
        column = torch.empty_like(image)
        column[order] = torch.arange(len(image), device=image.device) - first[image[order]]
        width = int(counts.max())
        self.position = to_device(position, device)
        self.by_caption = Grid(captions, length, to_device(caption * length + position, device))
        self.by_image = Grid(images, width, to_device(image * width + column, device))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., T, D) -> (..., H, T, E)"""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def join_heads(x: Tensor) -> Tensor:
    """(..., H, T, E) -> (..., T, D)"""
    return x.transpose(-2, -3).flatten(-2)


def compute_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Return scaled dot-product attention (..., T, E), arXiv 1706.03762.

    `query` (..., T, E); `key` and `value` (..., S, E). With `causal`, query t attends to keys 0
    to t only.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    # On a CPU, torch's fused backward takes up to ten times as long for rows this short.
    scores = compute_scores(query, key)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ value


def compute_scores(query: Tensor, key: Tensor) -> Tensor:
    """Return scaled dot products (..., T, S) of `query` (..., T, E) and `key` (..., S, E)."""
    # The query is scaled, not the scores: they are the larger tensor.
    return query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)


class Dropout(nn.Module):
    """Dropout with a random byte per element: `p` is rounded to a multiple of 1/256.

    In training a fraction `p` of the elements is set to zero and the others are multiplied by
    1 / (1 - p). On a CPU, torch's own dropout draws a random number per element, which takes
    longer than the layer it belongs to; eight bytes come from each number here.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements dropped, of the same shape; `x` itself in eval mode."""
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = min(255, max(1, round(self.p * 256)))  # byte values that mean "drop"
        random = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = random.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * keep.to(x.dtype).mul_(256 / (256 - dropped))
