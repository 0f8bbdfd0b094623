"""A 4-bit layer reads the state dict that it writes, whatever it held before."""

import copy
import io

import pytest
import torch

import bitsandbytes as bnb

NF4 = dict(quant_type="nf4", compress_statistics=True)
FP4 = dict(quant_type="fp4", compress_statistics=False)
STORAGES = [torch.uint8, torch.bfloat16, torch.float32]


def linear(seed=0, quantized=True, **options):
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(128, 96, **options)
    return layer.to("cpu") if quantized else layer


def embedding(seed=0, quantized=True, **options):
    torch.manual_seed(seed)
    layer = bnb.nn.Embedding4bit(50, 128, **options)
    return layer.to("cpu") if quantized else layer


def output(layer):
    generator = torch.Generator().manual_seed(1)
    layer = layer.train()
    if isinstance(layer, torch.nn.Embedding):
        return layer(torch.arange(50))
    return layer(torch.randn(4, 128, generator=generator, requires_grad=True)).detach()


def same_bits(left, right):
    """Codes that are stored as floats may spell NaN."""
    return left.dtype == right.dtype and torch.equal(*(t.detach().flatten().view(torch.uint8) for t in (left, right)))


def same_entries(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert same_bits(value, right[key]), key


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("options", [NF4, FP4], ids=["nested-nf4", "fp4"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("destination", ["quantized", "unquantized", "other recipe"])
def test_a_linear_layer_loads_what_another_one_saved(storage, options, assign, destination):
    source = linear(quant_storage=storage, **options)
    other = FP4 if options is NF4 else NF4
    target = {
        "quantized": lambda: linear(7, quant_storage=storage, **options),
        "unquantized": lambda: linear(7, quantized=False, quant_storage=storage, **options),
        "other recipe": lambda: linear(7, **other),
    }[destination]()
    state = source.state_dict()
    before = copy.copy(state)

    assert not any(target.load_state_dict(state, strict=True, assign=assign))

    same_entries(state, before)
    same_entries(target.state_dict(), state)
    assert torch.equal(output(target), output(source))
    assert isinstance(target.weight, bnb.nn.Params4bit)
    assert target.weight.quant_type == options["quant_type"]
    assert target.quant_state is target.weight.quant_state


def test_a_layer_on_the_meta_device_takes_the_weight():
    source = linear(**NF4)
    target = bnb.nn.Linear4bit(128, 96, device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(output(target), output(source))


def test_a_whole_model_goes_through_torch_save():
    source = torch.nn.Sequential(embedding(**{"quant_type": "nf4"}), linear(**NF4), torch.nn.Linear(96, 3))
    target = torch.nn.Sequential(embedding(3, **{"quant_type": "nf4"}), linear(4, **NF4), torch.nn.Linear(96, 3))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.arange(50)
    assert torch.equal(source.train()(x), target.train()(x))


@pytest.mark.parametrize("quantized", [True, False])
def test_a_table_loads_what_another_one_saved(quantized):
    source, target = embedding(quant_type="nf4"), embedding(7, quantized, quant_type="nf4")
    target.load_state_dict(source.state_dict())
    assert torch.equal(output(target), output(source))


def test_a_table_that_was_never_quantized_still_has_nothing_to_save():
    with pytest.raises(NotImplementedError):
        embedding(quantized=False).state_dict()


def test_a_float_weight_is_quantized_into_a_quantized_layer():
    dense = torch.nn.Linear(128, 96)
    target, expected = linear(7, **NF4), linear(8, quantized=False, **NF4)
    target.load_state_dict(dense.state_dict())
    expected.load_state_dict(dense.state_dict())
    same_entries(target.state_dict(), expected.to("cpu").state_dict())


def test_adapter_state_dicts_leave_the_base_layer_alone():
    """What broke PEFT in November 2023: dicts with none of the keys of the layer, and layers with a bias."""

    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = linear(**NF4)
            self.lora_A = torch.nn.Linear(128, 4, bias=False)

    source, target = Adapted(), Adapted()
    before = {key: value.clone() for key, value in target.base_layer.state_dict().items()}
    adapter = {key: value for key, value in source.state_dict().items() if "lora" in key}
    result = target.load_state_dict(adapter, strict=False)
    assert "base_layer.weight" in result.missing_keys and not result.unexpected_keys
    same_entries(target.base_layer.state_dict(), before)
    assert torch.equal(target.lora_A.weight, source.lora_A.weight)


@pytest.mark.parametrize("lost", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"])
def test_codes_without_their_statistics_are_reported_and_not_loaded(lost):
    target = linear(7, **NF4)
    before = {key: value.clone() for key, value in target.state_dict().items() if key != "bias"}
    state = linear(**NF4).state_dict()
    del state[f"weight.{lost}"]
    with pytest.raises(RuntimeError, match=f"weight.{lost}"):
        target.load_state_dict(state)
    for key, value in before.items():
        assert same_bits(target.state_dict()[key], value), key


def test_a_weight_of_another_size_is_refused_before_anything_changes():
    target = linear(7, **NF4)
    before = target.weight.data.clone()
    with pytest.raises(RuntimeError, match="weight"):
        target.load_state_dict(bnb.nn.Linear4bit(128, 64, **NF4).to("cpu").state_dict())
    assert torch.equal(target.weight.data, before)


def test_a_tied_weight_stays_tied():
    first, second = linear(**NF4), linear(**NF4)
    second.weight = first.weight
    first.load_state_dict(linear(5, **NF4).state_dict())
    assert second.weight is first.weight
    second.bias = first.bias
    assert torch.equal(output(second), output(first))


def test_pre_hooks_see_the_dict_before_it_is_read():
    source, target = linear(**NF4), linear(7, **NF4)
    renamed = {f"old_{key}": value for key, value in source.state_dict().items()}

    def rename(state_dict, prefix, *_):
        for key in list(state_dict):
            state_dict[key.removeprefix("old_")] = state_dict.pop(key)

    target._register_load_state_dict_pre_hook(rename)
    target.load_state_dict(renamed)
    assert torch.equal(output(target), output(source))
