"""State dicts of 8-bit layers: what is written, and what every kind of layer makes of every kind of dict."""

import copy
import io

import pytest
import torch
from torch import nn

from bitsandbytes.nn import Int8Params, Linear8bitLt
from bitsandbytes.nn.modules import maybe_rearrange_weight
from tests.helpers import DEVICE, raw_bytes

IN, OUT = 32, 24


def fresh(bias=True, **kwargs) -> Linear8bitLt:
    return Linear8bitLt(IN, OUT, bias, **{"has_fp16_weights": False, "threshold": 6.0, **kwargs})


def quantised(bias=True, **kwargs) -> Linear8bitLt:
    return fresh(bias, **kwargs).to(DEVICE)


def used() -> Linear8bitLt:
    linear = quantised()
    linear(torch.randn(2, IN))
    return linear


def on_meta() -> Linear8bitLt:
    with torch.device("meta"):
        return fresh()


def with_plain_weight() -> Linear8bitLt:
    linear = fresh()
    linear.weight = nn.Parameter(torch.randn(OUT, IN))
    return linear


def snapshot(linear: Linear8bitLt):
    weight = linear.weight
    scales = getattr(weight, "SCB", None)
    return id(weight), type(weight), weight.dtype, raw_bytes(weight), None if scales is None else raw_bytes(scales), raw_bytes(linear.bias)


def assert_equal_layers(linear, source):
    assert type(linear.weight) is Int8Params and linear.weight.dtype is torch.int8 and not linear.weight.requires_grad
    assert torch.equal(linear.weight.data, source.weight.data) and torch.equal(linear.weight.SCB, source.weight.SCB)
    assert torch.equal(linear.state.CB, linear.weight.data) and torch.equal(linear.state.SCB, linear.weight.SCB)
    x = torch.randn(5, IN)
    assert torch.equal(linear(x), source(x))


# ------------------------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("make", [quantised, used])
def test_the_keys_are_the_published_ones(make):
    linear = make()
    before = snapshot(linear)
    saved = linear.state_dict(prefix="a.b.")
    assert list(saved) == ["a.b.weight", "a.b.bias", "a.b.SCB", "a.b.weight_format"]
    assert saved["a.b.SCB"].dtype is torch.float32 and saved["a.b.SCB"].shape == (OUT,)
    assert saved["a.b.weight_format"].dtype is torch.uint8 and saved["a.b.weight_format"].item() == 0 and saved["a.b.weight_format"].shape == ()
    assert snapshot(linear) == before


@pytest.mark.parametrize("make", [fresh, on_meta, with_plain_weight, lambda: fresh(has_fp16_weights=True).to(DEVICE)])
def test_a_layer_that_is_not_quantised_saves_as_a_linear_layer(make):
    assert list(make().state_dict()) == ["weight", "bias"]


# ----------------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("make", [quantised, used, on_meta, lambda: quantised(has_fp16_weights=False, threshold=0.0)])
def test_codes_load_into_every_quantised_layer(make, assign, strict):
    source, linear = quantised(), make()
    linear.state.threshold = source.state.threshold
    saved = source.state_dict()
    kept = dict(saved)
    torch.save(saved, buffer := io.BytesIO())
    buffer.seek(0)
    result = linear.load_state_dict(torch.load(buffer, weights_only=True), strict=strict, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert_equal_layers(linear, source)
    linear.load_state_dict(saved, strict=strict, assign=assign)
    assert saved.keys() == kept.keys() and all(saved[key] is kept[key] for key in kept)
    assert (linear.weight.data_ptr() == source.weight.data_ptr()) == assign


def test_loading_in_place_keeps_the_parameter_and_whoever_shares_it():
    source, linear, other = quantised(), used(), quantised()
    other.weight = linear.weight
    other.bias = linear.bias
    parameter = linear.weight
    linear.load_state_dict(source.state_dict())
    assert linear.weight is parameter
    assert_equal_layers(other, source)


def test_codes_become_the_weight_of_an_unquantised_layer_only_by_assignment():
    source = quantised()
    for strict in (True, False):
        linear = fresh()
        before = snapshot(linear)
        with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
            linear.load_state_dict(source.state_dict(), strict=strict)
        assert snapshot(linear) == before  # the codes have not become values
        linear.load_state_dict(source.state_dict(), strict=strict, assign=True)
        assert_equal_layers(linear, source)


@pytest.mark.parametrize("make", [with_plain_weight, lambda: fresh(has_fp16_weights=True)])
@pytest.mark.parametrize("assign", [True, False])
def test_codes_never_replace_a_weight_that_is_tied_or_trained(make, assign):
    linear = make()
    before = snapshot(linear)
    with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
        linear.load_state_dict(quantised().state_dict(), strict=False, assign=assign)
    assert snapshot(linear) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("make", [quantised, used])
def test_a_float_checkpoint_is_quantised_on_the_way_in(make, assign, dtype):
    source, linear = nn.Linear(IN, OUT).to(dtype), make()
    linear.load_state_dict(source.state_dict(), assign=assign)
    expected = fresh()
    expected.load_state_dict(source.state_dict(), assign=True)
    expected.bias = linear.bias
    assert_equal_layers(linear, expected.to(DEVICE))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("make", [fresh, on_meta])
def test_a_float_checkpoint_in_an_unquantised_layer_is_quantised_when_it_moves(make, assign):
    source, linear = nn.Linear(IN, OUT), make()
    linear.load_state_dict(source.state_dict(), assign=assign)
    assert type(linear.weight) is Int8Params and torch.equal(linear.weight.data, source.weight)
    linear.to(DEVICE)
    assert torch.equal(linear.weight.SCB, source.weight.abs().amax(1))


def test_a_float_weight_stays_one_where_it_is_trained():
    source, linear = nn.Linear(IN, OUT), fresh(has_fp16_weights=True)
    linear.load_state_dict(source.state_dict())
    assert torch.equal(linear.weight, source.weight) and linear.weight.requires_grad


def test_dicts_without_the_weight_change_nothing():
    linear = quantised()
    before = snapshot(linear)
    for partial in ({}, {"adapter": torch.ones(1)}):
        result = linear.load_state_dict(partial, strict=False)
        assert snapshot(linear) == before and "weight" in result.missing_keys
    linear.load_state_dict({"bias": torch.zeros(OUT)}, strict=False)
    assert not linear.bias.any() and snapshot(linear)[:5] == before[:5]
    result = linear.load_state_dict({"SCB": torch.ones(OUT)}, strict=False)
    assert snapshot(linear)[:5] == before[:5] and "weight" in result.missing_keys


# ------------------------------------------------------------------------------------------------------------------ what is refused


def without(*keys):
    return lambda saved: [saved.pop(key) for key in keys]


def replaced(**entries):
    return lambda saved: saved.update({key: change(saved[key]) for key, change in entries.items()})


BROKEN = {
    "no scales": (without("SCB", "weight_format"), "SCB"),
    "few scales": (replaced(SCB=lambda t: t[:-1]), "SCB.*24 floating-point scales"),
    "integer scales": (replaced(SCB=lambda t: t.to(torch.int32)), "SCB.*int32"),
    "scales no tensor": (replaced(SCB=lambda t: "scales"), "SCB.*str"),
    "few codes": (replaced(weight=lambda t: t[:, :-1]), r"size mismatch for .*weight.*\[24, 31\]"),
    "transposed codes": (replaced(weight=lambda t: t.t()), r"size mismatch for .*weight"),
    "codes of another dtype": (replaced(weight=lambda t: t.to(torch.int16)), "size mismatch for .*weight.*int16"),
    "weight no tensor": (replaced(weight=lambda t: 3), "weight.*must be a tensor"),
    "float of another size": (lambda saved: (saved.clear(), saved.update(nn.Linear(IN, OUT + 1).state_dict())), "size mismatch for .*weight"),
    "bias of another size": (replaced(bias=lambda t: t[:-1]), "size mismatch for .*bias"),
}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("make", [quantised, used])
@pytest.mark.parametrize("spoil,message", BROKEN.values(), ids=BROKEN.keys())
def test_a_checkpoint_that_cannot_be_right_changes_nothing(spoil, message, make, assign):
    linear, saved = make(), quantised().state_dict()
    spoil(saved)
    before = snapshot(linear)
    model = nn.ModuleDict({"inner": linear})
    with pytest.raises(RuntimeError, match=f"(?s){message}") as raised:
        model.load_state_dict({f"inner.{key}": value for key, value in saved.items()}, assign=assign)
    assert "inner." in str(raised.value)
    assert snapshot(linear) == before


@pytest.mark.parametrize("stored", [1, 3, torch.tensor(2, dtype=torch.uint8), "col_turing"])
def test_other_layouts_are_refused(stored):
    linear, saved = quantised(), quantised().state_dict()
    before = snapshot(linear)
    with pytest.raises(ValueError, match="col"):
        linear.load_state_dict({**saved, "weight_format": stored})
    with pytest.raises(ValueError, match="unknown"):
        linear.load_state_dict({**saved, "weight_format": torch.tensor(9, dtype=torch.uint8)})
    assert snapshot(linear) == before


def test_the_published_hook_takes_the_format_out_of_the_dict():
    saved = quantised().state_dict(prefix="m.")
    maybe_rearrange_weight(saved, "m.", {}, True, [], [], [])
    assert saved.keys() == {"m.weight", "m.bias", "m.SCB"}
    maybe_rearrange_weight(saved, "m.", {}, True, [], [], [])  # absent: the row layout
    with pytest.raises(ValueError):
        maybe_rearrange_weight({**saved, "m.weight_format": torch.tensor(1)}, "m.", {}, True, [], [], [])


def test_keys_of_other_modules_are_left_to_them():
    """An SCB of a module without such a thing is an unexpected key, however long its name is."""
    model = nn.Sequential(nn.Linear(IN, IN), quantised())
    saved = model.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*0.SCB"):
        model.load_state_dict({**saved, "0.SCB": torch.ones(IN)})
    assert model.load_state_dict({**saved, "0.SCB": torch.ones(IN)}, strict=False).unexpected_keys == ["0.SCB"]


def test_pre_hooks_see_the_dict_once_and_may_rename():
    calls = []

    def rename(module, state_dict, prefix, *rest):
        calls.append(prefix)
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "codes")

    source = quantised()
    model = nn.ModuleDict({"inner": quantised()})
    model["inner"].register_load_state_dict_pre_hook(rename)
    model.load_state_dict({f"inner.{key}".replace("weight", "codes", key == "weight"): value for key, value in source.state_dict().items()})
    assert calls == ["inner."]
    assert_equal_layers(model["inner"], source)


def test_tied_layers_save_and_load_together():
    first, second = quantised(), quantised()
    second.weight, second.bias = first.weight, first.bias
    model, other = nn.ModuleList([first, second]), nn.ModuleList([quantised(), quantised()])
    other.load_state_dict(model.state_dict())
    assert_equal_layers(other[1], first)


@pytest.mark.parametrize("wrap", [copy.copy, copy.deepcopy])
def test_a_copied_layer_loads(wrap):
    source, linear = quantised(), wrap(used())
    linear.load_state_dict(source.state_dict())
    assert_equal_layers(linear, source)
