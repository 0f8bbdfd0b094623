"""Evaluating a 4-bit layer on a CPU leaves the layer as it was."""

import copy
import io

import pytest
import torch

import bitsandbytes as bnb

pytestmark = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="packing happens on CPUs with AVX512-BF16")

NESTED = [False, True]


def layer(nested=True, rows=64, columns=128, seed=0, **options):
    torch.manual_seed(seed)
    options = {"quant_type": "nf4", "compress_statistics": nested, **options}
    return bnb.nn.Linear4bit(columns, rows, **options).to("cpu").eval()


def batch(columns=128, requires_grad=False):
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def evaluated(linear, columns=128):
    with torch.no_grad():
        linear(batch(columns))
    return linear


def entries(linear):
    return {key: value.clone() for key, value in linear.state_dict().items()}


def assert_same_entries(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype and value.shape == right[key].shape, key
        assert torch.equal(value.contiguous().view(-1).view(torch.uint8), right[key].contiguous().view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", NESTED)
def test_checkpoints_are_the_same_before_and_after(nested, storage):
    linear = layer(nested, quant_storage=storage)
    before = entries(linear)
    assert_same_entries(entries(evaluated(linear)), before)


@pytest.mark.parametrize("nested", NESTED)
def test_the_weight_dequantizes_to_the_same_values(nested):
    linear = layer(nested)
    before = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    evaluated(linear)
    assert torch.equal(bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state), before)


@pytest.mark.parametrize("nested", NESTED)
def test_training_goes_on_after_an_evaluation(nested):
    """QLoRA with an evaluation every few steps: gradients reach what lies before the layer."""
    expected, found = batch(requires_grad=True), batch(requires_grad=True)
    layer(nested).train()(expected).square().sum().backward()
    evaluated(layer(nested)).train()(found).square().sum().backward()
    assert torch.equal(found.grad, expected.grad)


def test_gradients_in_eval_mode_after_an_evaluation():
    x = batch(requires_grad=True)
    evaluated(layer())(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_parameters_move_with_their_meaning():
    linear = evaluated(layer())
    fresh = layer()
    moved = linear.weight.to(torch.device("cpu"))
    for weight in (moved, copy.deepcopy(linear).weight):
        assert weight.shape == fresh.weight.shape
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(values, bnb.functional.dequantize_4bit(fresh.weight.data, fresh.weight.quant_state))


@pytest.mark.parametrize("shape", [(10, 64), (1, 128), (64, 96), (32, 32)], ids=str)
def test_shapes_that_the_kernel_cannot_take_are_computed_otherwise(shape):
    rows, columns = shape
    linear = layer(rows=rows, columns=columns)
    dense = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    x = batch(columns)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, dense, linear.bias), rtol=2e-2, atol=2e-2)


def test_other_codes_give_other_results():
    """The copy that the kernel reads follows the weight: loaded in place, assigned, and with other statistics."""
    x, linear, other = batch(), evaluated(layer()), layer(seed=3)
    with torch.no_grad():
        linear.bias.copy_(other.bias)
        linear.weight.copy_(other.weight)
        linear.weight.quant_state = linear.quant_state = copy.deepcopy(other.weight.quant_state)
        assert torch.equal(linear(x), other(x))
        linear.weight = layer(seed=4).weight
        expected = layer(seed=4)
        expected.bias = linear.bias
        assert torch.equal(linear(x), expected(x))


def test_the_copy_is_neither_saved_nor_kept_for_training():
    linear = evaluated(layer())
    sizes = []
    for module in (layer(), linear):
        file = io.BytesIO()
        torch.save(module, file)
        sizes.append(file.tell())
    assert abs(sizes[0] - sizes[1]) < 512
    packed = [name for name, value in vars(linear.train()).items() if "pack" in name and value is not None]
    assert not packed


def test_the_result_is_that_of_the_kernel():
    """Computed in bfloat16, as before."""
    linear, x = layer(nested=False, bias=False, compute_dtype=torch.bfloat16), batch()
    codes, state = bnb.functional._convert_weight_packed_for_cpu(linear.weight.data.clone(), copy.deepcopy(linear.weight.quant_state))
    expected = bnb.functional.gemv_4bit(x.to(torch.bfloat16), codes, state=state)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(linear(x), expected.float())
