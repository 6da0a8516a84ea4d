"""Attention equals torch's own, dropout drops its share, packed words return to their cells."""

import pytest
import torch
import torch.nn.functional as F

from util.layers import Dropout, Linear, PackedWords, compute_attention, linear


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_gradient_equal_torchs(causal):
    torch.manual_seed(0)
    ours = [torch.randn(3, 2, 7, 4, requires_grad=True) for _ in range(3)]
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    found = compute_attention(*ours, causal=causal)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=causal)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(300, 1001)
    dropped = Dropout(p)(x)
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=0.005)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert len(dropped.unique()) == 2  # what is kept is scaled alike


def test_dropout_drops_independently():
    torch.manual_seed(0)
    dropped = Dropout(0.5)(torch.ones(64, 4096)) == 0
    rows = dropped.float() - 0.5
    correlation = (rows @ rows.T / 4096 / 0.25).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.1
    columns = rows.T @ rows / 64 / 0.25
    assert abs(float((columns.sum() - columns.trace()) / (4096 * 4095))) < 0.01


def test_dropout_is_reproducible_by_seed_and_off_in_eval_mode():
    dropout, x = Dropout(0.3), torch.randn(5, 7)
    first, second = (torch.manual_seed(seed) and dropout(x) for seed in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(dropout(x), first)
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_gradients_flow_only_through_elements_that_were_kept():
    x = torch.ones(1000, requires_grad=True)
    kept = Dropout(0.25)(x)
    kept.sum().backward()
    assert torch.equal(x.grad, kept.detach())


def test_packed_words_return_to_their_cells():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    packed = PackedWords(mask, torch.tensor([1, 0, 1]), 3, torch.device("cpu"))
    words = torch.arange(1.0, 7.0)[:, None]
    rows = {"by_caption": [[1, 2, 3], [4, 0, 0], [5, 6, 0]],
            "by_image": [[4, 0, 0, 0, 0], [1, 2, 3, 5, 6], [0, 0, 0, 0, 0]]}  # fmt: skip
    for name, expected in rows.items():
        grid = getattr(packed, name)
        assert grid.unpack(words)[..., 0].tolist() == expected
        assert torch.equal(grid.pack(grid.unpack(words)), words)
    assert packed.position.tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("shape", [(1,), (2, 1), (1, 2), (1, 5), (1, 8), (8,), (1, 9), (3, 16)])
@pytest.mark.parametrize("outputs", [8, 16, 300])
def test_a_linear_layer_of_few_rows_is_torchs(shape, outputs):
    torch.manual_seed(0)
    layer, x = Linear(16, outputs), torch.rand(*shape, 16)
    for bias in (layer.bias, None):
        expected = F.linear(x, layer.weight, bias)
        with torch.no_grad():
            found = linear(x, layer.weight, bias)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert layer(x).equal(linear(x, layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="shape"), torch.no_grad():
        layer(x[..., :-1])


def test_a_linear_layer_of_few_rows_has_torchs_gradients():
    torch.manual_seed(0)
    layer, x = Linear(4, 64), torch.rand(1, 3, 4, requires_grad=True)
    layer(x).square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), x)
    torch.testing.assert_close(x.grad, *expected)


@pytest.mark.parametrize("rows", range(2, 10))
def test_the_place_in_a_batch_changes_no_bit(rows):
    torch.manual_seed(0)
    layer, row = Linear(256, 4000), torch.rand(1, 1, 256)
    with torch.no_grad():
        first, *others = layer(row.expand(rows, 1, 256))
    assert all(other.equal(first) for other in others)
