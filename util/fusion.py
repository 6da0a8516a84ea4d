"""A CNN made ready for inference on a CPU: convolution, addition and activation in one operation.

By themselves, the addition of a residual block and the activation each read and write a whole
feature map again. oneDNN, the library of torch's convolutions on CPUs, does both while the result
of the convolution is still in the cache. `torch.compile` uses the same operations, after minutes
of compiling.
"""

import copy
import operator
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

ADDITIONS = (operator.add, operator.iadd, torch.add)
# Activation -> its name in oneDNN. Any other stays an operation of its own.
ACTIVATIONS = {
    nn.ReLU: "relu",
    F.relu: "relu",
    torch.relu: "relu",
    nn.Hardswish: "hardswish",
    F.hardswish: "hardswish",
    nn.SiLU: "swish",
    F.silu: "swish",
}


ORDERING = threading.Lock()


class FusedConv(nn.Module):
    """A convolution, to whose result another tensor may be added, and an activation."""

    def __init__(
        self,
        conv: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ):
        """With `weight` and `bias` in place of those of `conv`."""
        super().__init__()
        self.settings = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.activation = activation
        self.weight: Tensor | None = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.ordered: Tensor | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return activation(conv(x) + other)."""
        if self.ordered is None:
            self.order_weight(x.shape)
        convolve = torch.ops.mkldnn._convolution_pointwise
        weights = self.ordered, self.bias, *self.settings
        if other is None:
            return convolve(x, *weights, self.activation or "none", [], "")
        return convolve.binary(x, other, *weights, "add", 1.0, self.activation or None, [], "")

    def order_weight(self, input_size: Sequence[int]) -> None:
        """Put the weight into the order in which the kernel for inputs of this size reads it.

        It works for other sizes too, but a tensor in that order can be neither copied nor saved.
        """
        with ORDERING:  # threads that come first together
            if self.weight is not None:
                reorder = torch.ops.mkldnn._reorder_convolution_weight
                self.ordered = reorder(self.weight, *self.settings, list(input_size))
                self.weight = None


def can_fuse(cnn: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether `fuse_convolutions` is possible: a CNN with BatchNorm, and oneDNN in `dtype`.

    oneDNN computes in bfloat16 only on processors that multiply it, or nearly do.
    """
    if dtype != torch.float32 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    operations = ("_reorder_convolution_weight", "_convolution_pointwise")
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in operations)
        and any(isinstance(module, nn.BatchNorm2d) for module in cnn.modules())
    )


@torch.no_grad()
def fuse_convolutions(cnn: nn.Module, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Return `cnn` with its convolutions, and what follows each, as `FusedConv` in `dtype`.

    The result is for inference on the CPU only, with inputs in `dtype`; `cnn` stays as it is.
    """
    training = cnn.training
    graph = fx.symbolic_trace(cnn.eval())
    cnn.train(training)
    for number, node in enumerate(list(graph.graph.nodes)):
        conv = get_module(graph, node)
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
            continue
        last, inputs, activation = node, [node.args[0]], ""
        weights = conv.weight, conv.bias
        norm = get_module(graph, get_only_user(last))
        if isinstance(norm, nn.BatchNorm2d):
            last = get_only_user(last)
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            weights = fuse_conv_bn_weights(*weights, *statistics)
        user = get_only_user(last)
        if user is not None and user.target in ADDITIONS:
            others = [each for each in user.args if each is not last]
            if len(others) == 1 and isinstance(others[0], fx.Node):  # not a number, not itself
                last, inputs = user, [node.args[0], others[0]]
        user = get_only_user(last)
        if user is not None and (activation := get_activation(graph, user)):
            last = user
        name = f"fused_{number}"
        graph.add_submodule(name, FusedConv(conv, *weights, activation, dtype))
        # Where the last of the replaced operations was: all inputs have been computed there.
        with graph.graph.inserting_before(last):
            fused = graph.graph.call_module(name, tuple(inputs))
        last.replace_all_uses_with(fused)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    for name, module in list(graph.named_modules()):
        if any(True for _ in module.parameters(recurse=False)):  # shared with `cnn` until here
            graph.set_submodule(name, copy.deepcopy(module))
    graph.recompile()
    return graph.to(dtype)


def get_module(graph: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    """Return the module that a node calls; None if it calls a function, or there is no node."""
    is_module = node is not None and node.op == "call_module"
    return graph.get_submodule(node.target) if is_module else None


def get_only_user(node: fx.Node) -> fx.Node | None:
    """Return the one node that reads the result of `node`; None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def get_activation(graph: fx.GraphModule, node: fx.Node) -> str:
    """Return oneDNN's name of the activation that a node computes; empty if it is none of them."""
    module = get_module(graph, node)
    return ACTIVATIONS.get(node.target if module is None else type(module), "")
