"""int8 with a scale per output channel: what comes back is within half a scale."""

import pytest
import torch

from util.quantization import (
    choose_matrices,
    dequantize,
    dequantize_state,
    quantize,
    quantize_state,
)


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3, 3), (6, 1, 3, 3), (1, 1)])
def test_each_value_is_within_half_a_scale_of_its_channel(shape):
    sizes = torch.tensor([1e-30, 1e-3, 1.0, 50.0, 1e6, 1e30])[: shape[0]]
    before = matrix(*shape) * sizes.view(-1, *[1] * (len(shape) - 1))
    values, scale = quantize(before)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    assert values.shape == shape and scale.shape == shape[:1]
    assert torch.equal(values.flatten(1).abs().amax(1), torch.full(shape[:1], 127.0).to(torch.int8))
    error = (dequantize(values, scale) - before).flatten(1).abs().amax(1)
    assert (error <= 0.5001 * scale).all()


def test_a_channel_s_values_and_scale_are_those_of_the_formula():
    values, scale = quantize(torch.tensor([[127.0, -63.6, 0.4, 0.0], [-2.54, 1.27, 0.01, 0.0]]))
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.02]))
    assert values.tolist() == [[127, -64, 0, 0], [-127, 64, 0, 0]]  # 63.5 to the even number


@pytest.mark.parametrize("smallest", [0.0, -0.0, 1e-45])
def test_a_channel_of_zeros_stays_zero(smallest):
    before = torch.tensor([[smallest, 0.0], [1.0, -1.0]])
    values, scale = quantize(before)
    assert scale.isfinite().all() and (scale > 0).all()
    assert dequantize(values, scale).tolist() == [[0, 0], [1, -1]]


def test_what_is_quantized_again_is_the_same():
    values, scale = quantize(matrix(8, 30))
    again, scale_again = quantize(dequantize(values, scale))
    assert torch.equal(again, values)
    torch.testing.assert_close(scale_again, scale)


def state() -> dict[str, torch.Tensor]:
    return {
        "cnn.conv.weight": matrix(4, 3, 2, 2),
        "cnn.attention.in_proj_weight": matrix(6, 2),
        "cnn.norm.weight": matrix(4),
        "cnn.norm.num_batches_tracked": torch.tensor(3),
        "cnn.position": matrix(1, 5, 4),
        "cnn.table_of_biases": matrix(9, 2),
        "decoder.weight": matrix(4, 3),
    }


def test_only_the_matrices_of_the_prefix_are_stored_as_int8():
    stored = quantize_state(state(), "cnn.")
    small = {"cnn.conv.weight", "cnn.attention.in_proj_weight"}
    assert {name for name, each in stored.items() if each.dtype == torch.int8} == small
    assert stored.keys() - state().keys() == {f"{name}_scale" for name in small}
    back = dequantize_state(stored, "file", "cnn.")
    assert back.keys() == state().keys()
    for name, tensor in state().items():
        if name in small:
            torch.testing.assert_close(back[name], tensor, atol=0.02, rtol=0)
            assert not torch.equal(back[name], tensor)
        else:
            assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(("rows", "spared"), [((1, 2, 3, 90), 3), ((30, 1, 2), 1), ((5, 5), 0)])
def test_the_smallest_matrices_up_to_a_sixteenth_of_the_weights_are_spared(rows, spared):
    matrices = {f"{number}.weight": torch.ones(count, 4) for number, count in enumerate(rows)}
    chosen = choose_matrices(matrices, "")
    by_size = sorted(matrices, key=lambda name: len(matrices[name]))
    assert chosen == by_size[spared:]
    assert choose_matrices(matrices, "cnn.") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.finfo(torch.float32).max])
def test_a_matrix_that_int8_cannot_hold_stays_as_it_is(value):
    before = {"a.weight": matrix(3, 4), "b.weight": matrix(3, 4)}
    before["a.weight"][1, 2] = value
    stored = quantize_state(before, "")
    back = dequantize_state(stored, "file")
    assert stored["b.weight"].dtype == torch.int8
    assert stored["a.weight"] is before["a.weight"] and "a.weight_scale" not in stored
    assert back["a.weight"] is before["a.weight"]


PROBLEMS = {
    "missing": (None, "is missing"),
    "NaN": (torch.tensor([1.0, float("nan"), 1, 1]), "holds .* not finite and positive"),
    "infinite": (torch.tensor([1.0, float("inf"), 1, 1]), "holds .* not finite and positive"),
    "zero": (torch.tensor([1.0, 0, 1, 1]), "holds .* not finite and positive"),
    "negative": (torch.tensor([1.0, -1, 1, 1]), "holds .* not finite and positive"),
    "too few": (torch.ones(3), r"holds torch.float32 in shape \(3,\), expected .* in \(4,\)"),
    "one": (torch.tensor(1.0), r".* in shape \(\), expected .* in \(4,\)"),
    "a column": (torch.ones(4, 1), r".* in shape \(4, 1\), expected .* in \(4,\)"),
    "float16": (torch.ones(4).half(), "holds torch.float16"),
    "int8": (torch.ones(4, dtype=torch.int8), "holds torch.int8"),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_odd_scales_are_one_line_that_names_file_and_entry(kind):
    scale, said = PROBLEMS[kind]
    stored = quantize_state({"conv.weight": matrix(4, 3)}, "")
    stored["conv.weight_scale"] = scale
    if scale is None:
        del stored["conv.weight_scale"]
    with pytest.raises(ValueError, match=f"^x.safetensors is damaged: conv.weight_scale {said}"):
        dequantize_state(stored, "x.safetensors")
