"""A GPU that isn't there: tensors that say they are on it are computed on the CPU.

What a real GPU would refuse, or wait for, is noticed: an operation on tensors of two devices, and
values that the CPU wants to know, for which it waits until the GPU has done all of its work.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
# Operations whose value, or the size of whose result, the CPU must know before it can go on.
WAITS = {
    ATEN._local_scalar_dense.default, ATEN.is_nonzero.default, ATEN.equal.default,
    ATEN.nonzero.default, ATEN.masked_select.default, ATEN.bincount.default,
    ATEN._unique2.default, ATEN.unique_dim.default, ATEN.repeat_interleave.Tensor,
}  # fmt: skip


class OnGPU(Tensor):
    """A tensor that says it is on the GPU; its `values` are on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGPU":
        about = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        about |= {"dtype": values.dtype, "device": torch.device("cuda", 0)}
        return Tensor._make_wrapper_subclass(cls, values.shape, **about)

    def __init__(self, values: Tensor):
        self.values = values

    def tolist(self) -> Any:  # torch has none for a class of one's own
        return self.cpu().tolist()

    __torch_dispatch__ = None


class PretendGPU(TorchDispatchMode):
    """Computes on the CPU what is on the GPU; `waits` are the operations that wait for it."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # in inference mode, torch leaves that to this class
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        on_gpu = any(isinstance(each, OnGPU) for each in tensors)
        # A GPU takes a single number from the CPU, but no other tensor.
        elsewhere = any(not isinstance(each, OnGPU) and each.dim() for each in tensors)
        if on_gpu and elsewhere and func not in COPIES:
            raise RuntimeError(f"{func} of tensors on the GPU and the CPU")
        to_gpu = isinstance(args[0], OnGPU) if func is ATEN.copy_.default else on_gpu
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        if on_gpu and self.must_wait(func, args, to_gpu):
            self.waits.append(str(func))
        kwargs.pop("pin_memory", None)
        args, kwargs = tree_map_only(OnGPU, lambda each: each.values, (args, kwargs))
        if func is ATEN._thnn_fused_lstm_cell.default:  # GPUs alone have it
            func = lstm_cell
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        return tree_map_only(Tensor, OnGPU, result) if to_gpu else result

    @staticmethod
    def must_wait(func: Any, args: tuple, to_gpu: bool) -> bool:
        """Return whether the CPU must wait for the result of an operation on the GPU."""
        if func in COPIES:
            return not to_gpu
        indices = args[1] if func in (ATEN.index.Tensor, ATEN.index_put_.default) else ()
        masks = any(each is not None and each.dtype == torch.bool for each in indices)
        return masks or func in WAITS


def lstm_cell(
    inputs: Tensor, hidden: Tensor, before: Tensor, bias: Tensor, bias_hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and the state of an LSTM cell, and its gates."""
    gates = inputs + hidden + bias + bias_hidden
    enter, forget, new, leave = gates.chunk(4, -1)
    state = forget.sigmoid() * before + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * state.tanh(), state, gates


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """Yield a GPU that isn't there, called "cuda". It has no backward passes."""
    future = torch.__future__
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())  # in it, torch looks for no real GPU
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor))
        before = future.get_overwrite_module_params_on_conversion()
        stack.callback(future.set_overwrite_module_params_on_conversion, before)
        future.set_overwrite_module_params_on_conversion(True)
        yield stack.enter_context(PretendGPU())
