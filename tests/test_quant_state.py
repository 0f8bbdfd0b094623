"""QuantState: comparison, copies, its two forms on disk, and the published CPU layout that a state may be in."""

import copy
from functools import partial
import json
import pickle

from helpers import DEVICE, FLOAT_DTYPES, QUANT_TYPES, STORAGE_DTYPES, assert_same_bits, bell, grid, quantised
import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes.functional import QuantState

state_of = partial(quantised, F)


@pytest.mark.parametrize("nested", [False, True])
def test_state_as_list(nested):
    _, s = state_of(nested=nested)
    view = s[:]
    assert view[0] is s.absmax and view[1:4] == [s.shape, s.dtype, s.blocksize] and view[5] == "nf4"
    assert view[4] == ([s.offset, s.state2] if nested else None)
    assert s[0] is s.absmax and s[-1] == "nf4" and s[1:3] == [s.shape, s.dtype]
    assert len(list(s)) == 6
    with pytest.raises(TypeError):
        len(s)


def test_state_attributes_of_packed_form():
    _, s = state_of(nested=True)
    assert_same_bits(s.bitsandbytes__nf4, s.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    for missing in ("bitsandbytes__fp4", "nonsense"):
        assert not hasattr(s, missing)
        with pytest.raises(AttributeError, match=missing):
            getattr(s, missing)


@pytest.mark.parametrize("nested", [False, True])
def test_state_moves_in_place(nested):
    _, s = state_of(nested=nested)
    assert s.to("meta") is None
    tensors = [s.absmax, s.code] + ([s.offset, s.state2.absmax, s.state2.code] if nested else [])
    assert all(t.device.type == "meta" for t in tensors)


@pytest.mark.parametrize("nested", [False, True])
def test_state_comparison(nested):
    _, s = state_of(nested=nested)
    for same in (copy.deepcopy(s), copy.copy(s), pickle.loads(pickle.dumps(s)), QuantState.from_dict(s.as_dict(packed=True), DEVICE)):
        assert s == same and same == s
        assert_same_bits(same.absmax, s.absmax)
    assert s != 3 and s != None  # noqa: E711
    changes = {"shape": torch.Size((4096,)), "dtype": torch.float16, "blocksize": 32, "quant_type": "fp4", "absmax": s.absmax.clone().fill_(9)}
    if nested:
        changes |= {"offset": s.offset + 1, "state2": None}
    for field, value in changes.items():
        other = copy.copy(s)
        setattr(other, field, value)
        assert s != other, field
    with pytest.raises(TypeError):
        hash(s)


def test_states_of_different_sizes_are_unequal():
    assert state_of((64, 64))[1] != state_of((64, 65))[1]


@pytest.mark.parametrize("nested", [False, True])
def test_states_on_different_devices_are_unequal(nested):
    _, state = state_of(nested=nested)
    assert state != state.moved_to("meta") and state.moved_to("meta") != state


def test_state_has_room_for_other_attributes():
    _, s = state_of()
    s.to = lambda device: "mine"
    s.packing_format_for_cpu = False
    assert s.to(DEVICE) == "mine" and not s.packing_format_for_cpu


def test_packed_text_of_state():
    A = torch.ones(64, 64, dtype=torch.float16)
    A[0] = 2.0
    _, s = F.quantize_4bit(A, quant_type="nf4", compress_statistics=True)
    text = bytes(s.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 64], "nested_blocksize": 256, "nested_dtype": "float32", '
        f'"nested_offset": {s.offset.item()}}}'
    )
    assert json.loads(text)["nested_offset"] == 1.015625


@grid(quant_type=QUANT_TYPES, nested=(False, True), dtype=FLOAT_DTYPES)
@pytest.mark.parametrize("packed, prefix", [(True, ""), (True, "weight."), (True, "model.layers.0.weight."), (False, "")])
def test_state_survives_its_dict(quant_type, nested, dtype, packed, prefix):
    _, s = state_of((130, 70), nested, quant_type, dtype)
    given_dict = {prefix + key: value for key, value in s.as_dict(packed=packed).items()}
    before = dict(given_dict)
    read = QuantState.from_dict(given_dict, torch.device(DEVICE))
    assert list(given_dict) == list(before) and all(given_dict[key] is before[key] for key in before)
    assert read == s and read.shape == torch.Size((130, 70)) and isinstance(read.shape, torch.Size)
    for ours, theirs in ((read.absmax, s.absmax), (read.code, s.code)):
        assert_same_bits(ours, theirs)
    if nested:
        assert_same_bits(read.offset, s.offset)
        assert_same_bits(read.state2.absmax, s.state2.absmax)
        assert read.offset.shape == () and read.state2.shape is None and read.state2.quant_type is None


def test_state_is_read_whatever_the_order_of_its_text():
    _, s = state_of(nested=True)
    d = s.as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    values = json.loads(bytes(d[key].tolist()))
    text = json.dumps(dict(reversed(values.items())), separators=(",", ":"))
    d[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    assert QuantState.from_dict(dict(reversed(d.items())), DEVICE) == s


def test_8bit_state_has_no_packed_form():
    _, s = F.quantize_blockwise(bell(1000), nested=True, blocksize=64)
    assert s.as_dict(packed=True).keys() == s.as_dict().keys() and s.as_dict()["quant_type"] is None and s.as_dict()["shape"] is None
    assert QuantState.from_dict(s.as_dict(), DEVICE) == s


def test_nested_code_is_not_shared_between_dicts():
    _, a = state_of(nested=True)
    _, b = state_of(nested=True)
    b.state2.code = a.state2.code  # as after moving a model
    tables = [s.as_dict(packed=True)["nested_quant_map"] for s in (a, b)]
    assert len({t.data_ptr() for t in (*tables, a.state2.code)}) == 3


def test_names_of_state_keys():
    assert QuantState.valid_quant_types == ("fp4", "nf4")
    assert QuantState.valid_qs_type_keys == ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    assert QuantState.valid_qs_keys == [
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "quant_type", "blocksize", "dtype", "shape"),
        *("nested_blocksize", "nested_dtype", "nested_offset"),
    ]


def test_utf8_json_in_a_tensor():
    values = {"name": "größe", "list": [1, None, 2.5]}
    tensor = F.pack_dict_to_tensor(values)
    assert tensor.dtype == torch.uint8 and tensor.dim() == 1 and bytes(tensor.tolist()) == json.dumps(values).encode()
    assert F.unpack_tensor_to_dict(tensor) == values


# ------------------------------------------------------------------------------------------------------------------- the packed CPU layout
@grid(nested=(False, True), storage=STORAGE_DTYPES, dtype=FLOAT_DTYPES)
def test_cpu_layout_there_and_back_loses_nothing(nested, storage, dtype):
    A = bell(96 * 128).reshape(96, 128).to(dtype)
    packed, state = F.quantize_4bit(A, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    before = copy.deepcopy(state)
    shuffled, same = F._convert_weight_packed_for_cpu(packed, state)
    assert same is state and state.packing_format_for_cpu is True
    assert shuffled.shape == (96, 64) and shuffled.dtype == torch.uint8
    assert state.absmax.shape == (2, 96) and state.absmax.dtype == torch.bfloat16
    again, same = F._convert_weight_packed_for_cpu_inverse(shuffled, state)
    assert same is state and not state.packing_format_for_cpu
    assert_same_bits(again, packed)
    assert state == before
    assert_same_bits(state.absmax, before.absmax)


def test_cpu_layout_places_codes_as_published():
    A = bell(64 * 64).reshape(64, 64)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    data = packed.view(-1)
    codes = torch.stack((data >> 4, data & 15), dim=1).view(64, 64)
    shuffled, _ = F._convert_weight_packed_for_cpu(packed, state)
    flat = shuffled.reshape(-1)
    for n0, k2, j in ((0, 0, 0), (0, 0, 31), (0, 31, 7), (1, 5, 18), (1, 31, 31)):
        byte = flat[(n0 * 32 + k2) * 32 + j].item()
        row, column = 32 * n0 + j // 2, 2 * k2 + j % 2
        assert byte & 15 == codes[row, column] and byte >> 4 == codes[row + 16, column]


@pytest.mark.parametrize("shape", [(33, 64), (32, 63), (64, 96), (64 * 64,)], ids=str)
def test_cpu_layout_refuses_shapes_it_cannot_hold(shape):
    packed, state = state_of(shape)
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="layout"):
        F._convert_weight_packed_for_cpu(packed, state)
    assert state == before
    with pytest.raises((ValueError, AssertionError)):
        F._convert_weight_packed_for_cpu_inverse(packed, state)


@pytest.mark.parametrize("nested", [False, True])
def test_functions_understand_a_state_in_the_cpu_layout(nested):
    packed, state = state_of((64, 128), nested)
    values = F.dequantize_4bit(packed, state)
    A = bell(128 * 3, seed=4).reshape(3, 128)
    product = F.gemv_4bit(A, packed, state=state)
    shuffled, state = F._convert_weight_packed_for_cpu(packed, state)
    assert_same_bits(F.dequantize_4bit(shuffled, state), values)
    assert_same_bits(F.gemv_4bit(A, shuffled, state=state), product)
    assert state.packing_format_for_cpu, "reading must not change the caller's state"
