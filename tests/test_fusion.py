"""Fused convolutions compute what the layers that they replace compute."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from backbones import build_resnet
from util.fusion import FusedConv, can_fuse, fuse_convolutions

pytestmark = pytest.mark.skipif(
    not can_fuse(nn.BatchNorm2d(1), torch.float32), reason="this build of torch has no oneDNN"
)


@pytest.fixture(scope="module")
def cnn():
    """Return a ResNet in eval mode whose BatchNorms are not the identity."""
    torch.manual_seed(0)
    cnn = build_resnet("resnet18")
    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return cnn.eval().requires_grad_(False)


def pixels(count: int = 2, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(count, 3, size, size, generator=generator)
    return batch.contiguous(memory_format=torch.channels_last)


def test_nothing_but_convolutions_and_pooling_is_left_and_they_compute_the_same(cnn):
    fused = fuse_convolutions(cnn)
    kinds = {type(module) for module in fused.modules() if not list(module.children())}
    assert kinds == {FusedConv, nn.MaxPool2d}
    assert not [node for node in fused.graph.nodes if node.op == "call_function"]
    for batch in (pixels(), pixels(1, 96)):  # the weights are ordered for the first size
        torch.testing.assert_close(fused(batch), cnn(batch), atol=1e-4, rtol=1e-4)


def test_the_network_stays_as_it_was(cnn):
    network = copy.deepcopy(cnn).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fuse_convolutions(network)(pixels())
    assert network.training and isinstance(network.layer1[0].bn1, nn.BatchNorm2d)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype


def test_an_image_has_the_same_features_alone_and_in_a_batch(cnn):
    fused, batch = fuse_convolutions(cnn), pixels(5)
    together = fused(batch)
    for row in range(5):
        torch.testing.assert_close(fused(batch[row : row + 1]), together[row : row + 1])


class Branches(nn.Module):
    """What must not be fused: a result that two layers read, a number that is added, a sum of one
    tensor with itself, an activation that oneDNN does not compute here."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu, self.tanh = nn.BatchNorm2d(3), nn.ReLU(), nn.Tanh()
        self.first, self.second, self.third, self.last = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(self.norm(x))
        second = self.second(first) + 2
        third = self.third(x)
        return self.tanh(self.last(self.relu(first) + second)) + (third + third)


def test_what_others_read_too_is_not_fused_into_one_of_them():
    torch.manual_seed(0)
    network = Branches().eval().requires_grad_(False)
    fused, batch = fuse_convolutions(network), pixels(2, 8)
    torch.testing.assert_close(fused(batch), network(batch))
    before = network.norm.weight.clone()
    fused.get_submodule("norm").weight.zero_()
    assert torch.equal(network.norm.weight, before)  # a copy


def test_threads_that_come_first_together_order_a_weight_once(cnn):
    fused, batch = fuse_convolutions(cnn), pixels(1)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fused, [batch] * 16))
    assert all(torch.equal(result, results[0]) for result in results)
