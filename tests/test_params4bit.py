"""Params4bit: when it quantises, what it carries along, how it is copied and saved, and what PyTorch functions do with it."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F

import bitsandbytes as bnb
from bitsandbytes.nn import Params4bit
from tests.helpers import DEVICE, STORAGE_DTYPES, run_python

ATTRIBUTES = {"blocksize", "compress_statistics", "quant_type", "quant_state", "quant_storage", "bnb_quantized", "module"}
SHAPE = (48, 96)


def quantised(shape=SHAPE, **kwargs) -> Params4bit:
    return Params4bit(torch.randn(shape), **{"quant_type": "nf4", **kwargs}).to(DEVICE)


def snapshot(weight):
    """Everything that must not change behind the owner's back: bytes, class, statistics with their device."""
    state = weight.quant_state
    packed = {key: value.clone() for key, value in state.as_dict(packed=True).items()}
    return weight.data.clone(), weight.dtype, weight.device, state.absmax.device, state.dtype, packed


def assert_unchanged(weight, before):
    data, dtype, device, statistics_device, value_dtype, packed = before
    state = weight.quant_state
    assert (weight.dtype, weight.device, state.absmax.device, state.dtype) == (dtype, device, statistics_device, value_dtype)
    assert torch.equal(weight.data, data)
    for key, value in state.as_dict(packed=True).items():
        assert torch.equal(value, packed[key]), key


# ------------------------------------------------------------------------------------------------------------------- construction


def test_dict_holds_exactly_the_constructor_arguments():
    weight = Params4bit(torch.randn(4, 4))
    assert set(weight.__dict__) == ATTRIBUTES
    assert set(weight.to(DEVICE).__dict__) == ATTRIBUTES
    assert (weight.blocksize, weight.compress_statistics, weight.quant_type) == (64, True, "fp4")
    assert weight.quant_storage is torch.uint8 and not weight.requires_grad


def test_without_data_it_is_empty():
    assert Params4bit().shape == (0,)


def test_unknown_arguments_are_swallowed():
    assert Params4bit(torch.randn(2, 2), _is_hf_initialized=True, requires_grad=False).shape == (2, 2)


def test_class_source_is_retrievable():
    assert "class Params4bit" in inspect.getsource(Params4bit)


def test_integer_codes_cannot_require_grad():
    with pytest.raises(RuntimeError, match="floating point"):
        Params4bit(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=True)


@pytest.mark.parametrize("flag", [False, True])
def test_dense_values_with_an_older_parameters_attributes_are_not_taken_for_codes(flag):
    """Adapters merge by Params4bit(dense, **old.__dict__), with or without resetting the flag."""
    old = quantised()
    old.__dict__["bnb_quantized"] = flag
    dense = torch.randn(SHAPE)
    new = Params4bit(dense, **old.__dict__)
    assert not new.bnb_quantized and new.quant_state is None
    new = new.to(DEVICE)
    assert new.quant_type == "nf4" and (new.dequantize() - dense).abs().mean() < 0.1


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_packed_codes_with_a_state_are_quantised_whatever_the_flag_says(storage):
    old = quantised(quant_storage=storage)
    again = Params4bit(old.data, quant_state=old.quant_state, bnb_quantized=False)
    assert again.bnb_quantized and torch.equal(again.to(DEVICE).data.view(torch.uint8), old.data.view(torch.uint8))


# -------------------------------------------------------------------------------------------------------------- quantise and move


def test_first_move_quantises_in_place_even_to_where_it_is():
    weight = Params4bit(torch.randn(SHAPE), quant_type="nf4", blocksize=128)
    assert weight.to(DEVICE, torch.bfloat16) is weight
    assert weight.dtype is torch.uint8 and weight.bnb_quantized
    assert weight.quant_state.blocksize == 128 and weight.quant_state.dtype is torch.float32


@pytest.mark.parametrize("move", [lambda w: w.to(device=DEVICE), lambda w: w.to(torch.empty(0)), lambda w: w.cpu()])
def test_every_way_to_name_a_device_quantises(move):
    assert move(Params4bit(torch.randn(SHAPE))).bnb_quantized


def test_a_dtype_alone_casts_the_values():
    weight = Params4bit(torch.randn(SHAPE), quant_type="nf4")
    half = weight.to(torch.float16)
    assert type(half) is Params4bit and half.dtype is torch.float16 and half.quant_type == "nf4" and weight.dtype is torch.float32
    assert half.to(DEVICE).quant_state.dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_values_of_other_floating_dtypes_are_quantised_from_float32(dtype):
    values = torch.randn(SHAPE).to(dtype)
    weight = Params4bit(values, quant_type="nf4").to(DEVICE)
    assert weight.quant_state.dtype is torch.float32
    assert (weight.dequantize() - values.float()).abs().mean() < 0.1


def test_codes_without_statistics_are_not_quantised_again():
    with pytest.raises(RuntimeError, match="no quant_state"):
        Params4bit(torch.zeros(8, 1, dtype=torch.uint8)).to(DEVICE)


def test_meta_has_nothing_to_quantise():
    with pytest.raises(NotImplementedError, match="meta device.*load_state_dict"):
        Params4bit(torch.empty(4, 4, device="meta")).to(DEVICE)


@pytest.mark.parametrize("move", ["meta", "cpu", torch.float16, torch.float32])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_moving_a_quantised_weight_leaves_the_original_alone(move, storage):
    weight = quantised(quant_storage=storage)
    before = snapshot(weight)
    moved = weight.to(move)
    assert moved is not weight and type(moved) is Params4bit and moved.module is None
    assert_unchanged(weight, before)


def test_a_move_to_the_same_device_shares_storage():
    weight = quantised()
    assert weight.to(DEVICE).data_ptr() == weight.data_ptr()


def test_statistics_survive_the_meta_device():
    weight = quantised()
    on_meta = weight.to("meta")
    assert on_meta.is_meta and on_meta.quant_state == weight.quant_state and on_meta.absmax.device.type == DEVICE


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_casting_changes_the_dtype_of_values_but_no_code(cast, storage):
    weight = quantised(quant_storage=storage)
    expected = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(cast, torch.float32)
    converted = getattr(weight, cast)()
    assert torch.equal(converted.data.view(torch.uint8), weight.data.view(torch.uint8))
    assert converted.dequantize().dtype is expected and converted.dtype is storage
    assert weight.quant_state.dtype is torch.float32


def test_codes_cannot_become_integers():
    with pytest.raises(TypeError, match="dequantize"):
        quantised().to(torch.int32)


def test_a_state_that_moves_itself_is_asked():
    """FSDP recipes replace quant_state.to on the object."""
    weight = quantised()
    state, asked = weight.quant_state, []
    state.absmax, state.to = state.absmax.to("meta"), asked.append
    assert weight.to(DEVICE).quant_state is state and asked == [weight.device]


def test_the_default_dtype_does_not_leak_into_the_tables():
    torch.set_default_dtype(torch.bfloat16)
    weight = Params4bit(torch.randn(SHAPE, dtype=torch.float32)).to(DEVICE)
    state = weight.quant_state
    assert state.code.dtype is state.state2.code.dtype is state.offset.dtype is torch.float32
    again = Params4bit.from_prequantized(weight.data, state.as_dict(packed=True), device=DEVICE)
    assert again.quant_state.offset.dtype is torch.float32 and torch.equal(again.dequantize(), weight.dequantize())


def test_share_memory_takes_the_statistics_along():
    weight = quantised()
    weight.share_memory_()
    state = weight.quant_state
    assert all(t.is_shared() for t in (weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code))


# --------------------------------------------------------------------------------------------------------------- from_prequantized


@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.q.weight."])
def test_from_prequantized_restores_and_leaves_the_dict_as_it_was(prefix):
    weight = quantised(compress_statistics=False, quant_type="fp4", quant_storage=torch.float16)
    statistics = {prefix + key: value for key, value in weight.quant_state.as_dict(packed=True).items()}
    keys = list(statistics)
    again = Params4bit.from_prequantized(weight.data, statistics, device=DEVICE)
    assert list(statistics) == keys
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert (again.quant_type, again.compress_statistics, again.quant_storage, again.bnb_quantized) == ("fp4", False, torch.float16, True)


def test_from_prequantized_tells_the_module():
    weight, layer = quantised(), bnb.nn.LinearNF4(96, 48)
    again = Params4bit.from_prequantized(weight.data, weight.quant_state.as_dict(packed=True), device=DEVICE, module=layer)
    assert layer.quant_state is again.quant_state or layer.__dict__["quant_state"] is again.quant_state
    assert again.module is layer


def test_from_prequantized_rejects_codes_of_another_weight():
    weight, other = quantised(), quantised((32, 32))
    with pytest.raises(ValueError, match="packed codes"):
        Params4bit.from_prequantized(other.data, weight.quant_state.as_dict(packed=True), device=DEVICE)


# --------------------------------------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_keys_resolve_as_attribute_paths(nested, quant_type):
    weight = quantised(compress_statistics=nested, quant_type=quant_type)
    for key, value in weight.quant_state.as_dict(packed=True).items():
        found = weight
        for name in key.split("."):
            found = getattr(found, name)
        assert torch.equal(found, value)
    assert hasattr(weight, "nested_absmax") == nested
    assert weight.code is weight.quant_map is weight.quant_state.code


@pytest.mark.parametrize("name", ["absmax", "code", "quant_map", "state2", "nested_absmax", "nested_offset", "nonexistent"])
def test_absent_attributes_are_named(name):
    weight = Params4bit(torch.randn(SHAPE))
    assert not hasattr(weight, name)
    with pytest.raises(AttributeError, match=name):
        getattr(weight, name)


def test_the_owner_is_not_kept_alive():
    layer = bnb.nn.LinearNF4(8, 8).to(DEVICE)
    weight, alive = layer.weight, weakref.ref(layer)
    assert weight.module is layer
    gc.disable()
    try:
        del layer
        assert alive() is None and weight.module is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------- copies and pickles


def test_shallow_copy_shares_storage_and_state():
    weight = quantised()
    other = copy.copy(weight)
    assert type(other) is Params4bit and other.data_ptr() == weight.data_ptr() and other.quant_state is weight.quant_state


@pytest.mark.parametrize("moved", [False, True])
def test_deep_copy_shares_nothing(moved):
    weight = Params4bit(torch.randn(SHAPE), quant_type="nf4")
    weight = weight.to(DEVICE) if moved else weight
    weight.note = ["mine"]
    other = copy.deepcopy(weight)
    assert type(other) is Params4bit and other.data_ptr() != weight.data_ptr() and torch.equal(other.data, weight.data)
    assert set(other.__dict__) == set(weight.__dict__) and other.note == weight.note and other.note is not weight.note
    if moved:
        assert other.quant_state == weight.quant_state and other.quant_state is not weight.quant_state


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("route", ["pickle", "torch.save"])
def test_pickled_parameters_stay_what_they_are(storage, nested, route):
    weight = quantised(quant_storage=storage, compress_statistics=nested)
    if route == "pickle":
        again = pickle.loads(pickle.dumps(weight))
    else:
        torch.save(weight, buffer := io.BytesIO())
        buffer.seek(0)
        again = torch.load(buffer, weights_only=True)
    assert type(again) is Params4bit and set(again.__dict__) == ATTRIBUTES
    assert torch.equal(again.data.view(torch.uint8), weight.data.view(torch.uint8)) and again.quant_state == weight.quant_state
    assert (again.quant_type, again.blocksize, again.compress_statistics, again.requires_grad) == ("nf4", 64, nested, False)


def test_get_and_set_state_name_everything():
    weight = quantised()
    state = weight.__getstate__()
    assert set(state) == ATTRIBUTES | {"data", "requires_grad"}
    fresh = Params4bit(torch.empty(0, dtype=torch.uint8))
    fresh.__setstate__(state)
    assert fresh.quant_state is weight.quant_state and torch.equal(fresh.data, weight.data)


# -------------------------------------------------------------------------------------------------------------- PyTorch functions

PRODUCTS = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "F.linear with bias": lambda x, w, b: F.linear(x, w, b) - b,
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "x @ w.T": lambda x, w, b: x @ w.T,
    "x @ w.mT": lambda x, w, b: x @ w.mT,
    "matmul, transpose": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "mm, torch.t": lambda x, w, b: torch.mm(x, torch.t(w)),
    "x.matmul": lambda x, w, b: x.matmul(w.t()),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()) - b,
    "addmm, scaled": lambda x, w, b: (torch.addmm(b, x, w.t(), alpha=2) - b) / 2,
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_products_with_a_quantised_weight_mean_the_matrix(product, storage):
    weight = quantised(quant_storage=storage)
    x = torch.randn(5, 96, requires_grad=True)
    bias = torch.randn(48)
    expected = x @ weight.dequantize().t()
    result = product(x, weight, bias)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert type(result) is torch.Tensor
    grad = torch.autograd.grad(result.sum(), x)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0], atol=1e-4, rtol=1e-5)


def test_other_products_use_the_dense_matrix():
    weight = quantised((48, 48))
    dense = weight.dequantize()
    x = torch.randn(3, 48)
    torch.testing.assert_close(x @ weight, x @ dense)
    torch.testing.assert_close(weight @ x.t(), dense @ x.t())
    torch.testing.assert_close(weight.t() @ x.t(), dense.t() @ x.t())
    torch.testing.assert_close(F.linear(x, weight.t()), x @ dense)
    torch.testing.assert_close(weight @ weight.t(), dense @ dense.t())
    torch.testing.assert_close(x.half() @ weight, x.half() @ dense.half())


def test_embedding_looks_up_rows():
    weight = quantised()
    ids = torch.tensor([[3, 0], [47, 3]])
    expected = weight.dequantize()[ids]
    assert torch.equal(F.embedding(ids, weight), expected)
    assert torch.equal(torch.embedding(weight, ids), expected)


def test_transposing_twice_gives_the_weight_back():
    weight = quantised()
    assert weight.t().t() is weight
    assert torch.equal(weight.t().dequantize(), weight.dequantize().t())
    assert weight.t().shape == (1, weight.numel()) and weight.t().data_ptr() == weight.data_ptr()


def test_transposed_weights_are_accepted_where_packed_rows_are():
    weight, x = quantised(), torch.randn(2, 96)
    expected = bnb.matmul_4bit(x, weight, weight.quant_state)
    assert torch.equal(bnb.matmul_4bit(x, weight.t(), weight.quant_state), expected)
    assert torch.equal(bnb.functional.dequantize_4bit(weight.t(), weight.quant_state), weight.dequantize().t())


def test_functions_that_handle_containers_see_the_bytes():
    weight = quantised()
    for result in (weight.detach(), weight.clone(), weight.view(-1), weight[0], weight[::2], weight.reshape(1, -1)):
        assert type(result) is torch.Tensor and result.dtype is torch.uint8


def test_an_unquantised_parameter_is_an_ordinary_one():
    values = torch.randn(SHAPE)
    weight, x = Params4bit(values), torch.randn(4, 96)
    assert torch.equal(F.linear(x, weight), F.linear(x, values))
    assert type(weight.t()) is torch.Tensor and torch.equal(weight.t(), values.t())
    assert torch.equal(weight.dequantize(), values)


@pytest.mark.parametrize("cut", [lambda w: torch.chunk(w, 5), lambda w: torch.split(w, 500)])
def test_pieces_stay_params4bit_wherever_they_are_cut(cut):
    """FSDP2 cuts parameters anywhere, to send the pieces. Those that are not whole blocks cannot be computed with."""
    weight = quantised()
    pieces = cut(weight)
    assert isinstance(pieces, tuple) and len(pieces) == 5
    assert all(type(piece) is Params4bit and piece.bnb_quantized and piece.quant_type == "nf4" for piece in pieces)
    assert torch.equal(torch.cat([piece.data for piece in pieces]), weight.data)
    assert pieces[1].quant_state is None
    with pytest.raises(RuntimeError, match="4-bit codes"):
        F.linear(torch.randn(1, 96), pieces[1])
    with pytest.raises(RuntimeError, match="whole blocks"):
        pieces[1].dequantize()


def test_assigning_a_moved_weights_data_brings_its_statistics():
    """This is how nn.Module.to writes back a moved parameter, in modules that know nothing of quantisation."""
    weight, other = quantised(), quantised()
    weight.data = other
    assert weight.quant_state is other.quant_state and torch.equal(weight.dequantize(), other.dequantize())


def test_works_without_its_torch_function():
    done = run_python(
        "import copy, torch, bitsandbytes as bnb\n"
        "del bnb.nn.Params4bit.__torch_function__\n"
        "layer = bnb.nn.LinearNF4(64, 32, bias=False).to('cpu')\n"
        "x = torch.randn(3, 64, requires_grad=True)\n"
        "y = layer(x); y.sum().backward()\n"
        "other = bnb.nn.LinearNF4(64, 32, bias=False); other.load_state_dict(layer.state_dict())\n"
        "assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(layer)(x), y)\n"
        "assert torch.equal(layer.half().float().to('cpu')(x), y) and type(layer.state_dict()['weight']) is torch.Tensor\n"
        "assert layer.to('meta').weight.is_meta\n"
        "print('fine')\n"
    )
    assert done.stdout.strip() == "fine", done.stderr
