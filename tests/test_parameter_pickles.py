"""Pickled quantised weights that were damaged or made by hand: refused when they are loaded, not when they are used."""

import io

from helpers import grid
import pytest
import torch

from bitsandbytes.nn import Int8Params, Params4bit


def weight_of(kind):
    values = torch.linspace(-1.0, 1.0, 48 * 96).view(48, 96)
    if kind == "int8":
        return Int8Params(values, requires_grad=False).to("cpu")
    return Params4bit(values, quant_type="nf4", compress_statistics=kind == "nested").to("cpu")


class Altered:
    """Pickles as a weight some of whose attributes are others."""

    def __init__(self, weight, changes):
        self.weight, self.changes = weight, changes

    def __reduce_ex__(self, protocol):
        state = {**self.weight.__getstate__(), **self.changes}
        return type(self.weight), (state["data"], False), state


def through_a_file(value):
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


ATTRIBUTES = {
    "nf4": {"data": "codes", "requires_grad": "no", "quant_state": {"absmax": 1}, "blocksize": "64", "quant_storage": "uint8", "quant_type": 4},
    "nested": {"bnb_quantized": "yes", "compress_statistics": 1, "quant_state": ["absmax"]},
    "int8": {"SCB": [1.0], "has_fp16_weights": None},
}
STATES = {
    "nf4": {"absmax": [1.0], "code": None, "blocksize": 64.0, "quant_type": None, "dtype": "float16", "shape": "48x96", "state2": {}},
    "nested": {"offset": 0.5},
}
NESTED_STATES = {"nested": {"absmax": None, "code": "dynamic", "blocksize": None}}


def each(table):
    return [(kind, name, value) for kind, values in table.items() for name, value in values.items()]


@grid(change=each(ATTRIBUTES))
def test_attributes_of_another_type_are_named(change):
    kind, name, value = change
    with pytest.raises(TypeError, match=f"{name} must be"):
        through_a_file(Altered(weight_of(kind), {name: value}))


@grid(change=each(STATES))
def test_statistics_of_another_type_are_named(change):
    kind, name, value = change
    weight = weight_of(kind)
    setattr(weight.quant_state, name, value)
    with pytest.raises(TypeError, match=f"quant_state: {name} must be"):
        through_a_file(weight)


@grid(change=each(NESTED_STATES))
def test_nested_statistics_of_another_type_are_named(change):
    kind, name, value = change
    weight = weight_of(kind)
    setattr(weight.quant_state.state2, name, value)
    with pytest.raises(TypeError, match=f"state2: {name} must be"):
        through_a_file(weight)


@grid(name_and_value=[("SCB", torch.ones(3)), ("SCB", torch.ones(48, dtype=torch.int32)), ("data", torch.zeros(7, 96, dtype=torch.int8))])
def test_scales_must_be_those_of_the_rows(name_and_value):
    with pytest.raises(ValueError, match="one for each row"):
        through_a_file(Altered(weight_of("int8"), dict([name_and_value])))


@grid(kind=["nf4", "nested"])
def test_codes_must_be_as_many_as_the_statistics_describe(kind):
    with pytest.raises(ValueError, match="packed codes"):
        through_a_file(Altered(weight_of(kind), {"data": torch.zeros(10, 1, dtype=torch.uint8)}))


@grid(kind=["nf4", "nested", "int8"])
def test_weights_that_nobody_touched_are_loaded(kind):
    weight = weight_of(kind)
    assert torch.equal(through_a_file(Altered(weight, {})).dequantize(), weight.dequantize())
