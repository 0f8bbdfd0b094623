"""The functional layer as a user calls it: quantise, dequantise, code tables, small functions. States: `test_quant_state.py`."""

import copy
import ctypes
from functools import partial

from helpers import (
    BLOCKSIZES_4BIT,
    DEVICE,
    FLOAT_DTYPES,
    QUANT_TYPES,
    STORAGE_DTYPES,
    assert_same_bits,
    bell,
    grid,
    model_dequantize,
    model_dequantize_4bit,
    model_quantize_4bit,
    model_quantize_blockwise,
    quantised,
    raw_bytes,
    short_name,
)
from hypothesis import given
from hypothesis import strategies as st
import pytest
from strategies import float_dtypes, float_tensors, shapes
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F

state_of = partial(quantised, F)


# -------------------------------------------------------------------------------------------------------------------------- code tables
@pytest.mark.parametrize("make", [F.create_linear_map, F.create_dynamic_map, F.create_fp8_map, F.create_normal_map])
def test_code_is_256_ascending_floats_with_zero_and_one(make):
    code = make()
    assert code.shape == (256,) and code.dtype == torch.float32 and code.device.type == DEVICE
    assert (code.diff() >= 0).all()
    assert 0.0 in code and code.max() == 1.0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_few_bit_codes_have_so_many_values(bits, signed):
    exponent_bits = bits - 1
    for code in (F.create_linear_map(signed, total_bits=bits), F.create_dynamic_map(signed, exponent_bits, bits)):
        assert code.numel() == 256
        assert code.unique().numel() in (2**bits, 2**bits - 1)


def test_dynamic_code_of_wrong_size_is_refused():
    with pytest.raises(AssertionError):
        F.create_dynamic_map(signed=False, max_exponent_bits=3, total_bits=8)


def test_fp8_code_whose_bits_do_not_add_up_is_refused():
    with pytest.raises(AssertionError):
        F.create_fp8_map(True, 5, 5, 8)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_4bit_table_is_a_copy_each_time(quant_type):
    F.get_4bit_type(quant_type, device=DEVICE).zero_()
    table = F.get_4bit_type(quant_type, device=DEVICE)
    assert table.shape == (16,) and table.dtype == torch.float32 and table.abs().max() == 1


def test_4bit_table_of_unknown_type_is_refused():
    with pytest.raises(NotImplementedError, match="not supported"):
        F.get_4bit_type("nf5", device=DEVICE)
    with pytest.raises(NotImplementedError, match="64"):
        F.get_4bit_type("af4", device=DEVICE, blocksize=128)


def test_af4_descends():
    assert (F.get_4bit_type("af4", device=DEVICE).diff() < 0).all()


def test_4bit_table_of_integers_is_evenly_spaced():
    table = F.get_4bit_type("int4", device=DEVICE)
    assert table.numel() == 16 and (table.unique() * 7 - torch.arange(-7, 8)).abs().max() < 1e-5


def test_normal_code_has_the_nf4_levels_at_its_ends():
    code = F.create_normal_map()
    assert_same_bits(torch.cat((code[:8], code[-8:])), F.get_4bit_type("nf4", device=DEVICE))


def test_changing_a_state_or_the_named_code_leaves_other_states_alone():
    A = bell(256)
    _, first = F.quantize_blockwise(A)
    first.code.zero_()
    _, second = F.quantize_blockwise(A)
    assert_same_bits(second.code, F.create_dynamic_map())
    assert "dynamic" in F.name2qmap


# ----------------------------------------------------------------------------------------------------------------------- 8-bit blockwise
@given(A=float_tensors(), blocksize=st.one_of(st.integers(1, 300), st.sampled_from([256, 512, 4096, 16384])))
def test_8bit_codes_are_the_nearest_values(A, blocksize):
    codes, state = F.quantize_blockwise(A, blocksize=blocksize)
    expected, absmax = model_quantize_blockwise(A, F.create_dynamic_map(), blocksize)
    assert_same_bits(codes, expected)
    torch.testing.assert_close(state.absmax, absmax, rtol=0, atol=0, equal_nan=True)
    assert (state.dtype, state.blocksize, state.shape, state.quant_type) == (A.dtype, blocksize, None, None)
    assert state.code.shape == (256,) and codes.is_contiguous()


@given(shape=shapes(), dtype=float_dtypes, blocksize=st.integers(1, 300), seed=st.integers(0, 99))
def test_8bit_values_are_level_times_scale(shape, dtype, blocksize, seed):
    A = bell(torch.Size(shape).numel(), seed).reshape(shape).to(dtype)
    codes, state = F.quantize_blockwise(A, blocksize=blocksize)
    values = F.dequantize_blockwise(codes, state)
    assert_same_bits(values, model_dequantize(codes, state.absmax, state.code, blocksize, dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=short_name)
@pytest.mark.parametrize("blocksize", [256, 4096, 16384])
@pytest.mark.parametrize("nested", [False, True])
def test_8bit_roundtrip_error(dtype, blocksize, nested):
    A = torch.randn(1024, 1024, dtype=dtype)
    codes, state = F.quantize_blockwise(A, blocksize=blocksize, nested=nested)
    error = (F.dequantize_blockwise(codes, state).float() - A.float()).abs()
    assert error.mean() < 0.011
    assert (error / (A.float().abs() + 1e-8)).mean() < (0.018 if blocksize == 256 else 0.025)


@pytest.mark.parametrize("signed, bars", [(True, (0.0036, 0.015)), (False, (0.0023, 0.012))])
def test_8bit_roundtrip_error_of_uniform_values(signed, bars):
    A = torch.rand(1024, 1024) * (2 if signed else 1) - (1 if signed else 0)
    codes, state = F.quantize_blockwise(A, code=F.create_dynamic_map(signed=signed), blocksize=256)
    error = (F.dequantize_blockwise(codes, state) - A).abs()
    assert error.mean() < bars[0] and (error / (A.abs() + 1e-8)).mean() < bars[1]


def test_8bit_code_maps_every_level_to_itself():
    code = F.create_dynamic_map()
    A = torch.cat((code, torch.ones(1)))  # the largest magnitude is 1, so that nothing is scaled
    codes, state = F.quantize_blockwise(A, blocksize=512)
    assert torch.equal(codes[:256].long(), torch.arange(256))
    assert_same_bits(F.dequantize_blockwise(codes, state), A)


def test_8bit_nested_state():
    A = bell(256 * 40)
    codes, state = F.quantize_blockwise(A, blocksize=256, nested=True)
    flat_codes, flat = F.quantize_blockwise(A, blocksize=256)
    assert_same_bits(codes, flat_codes)
    assert state.nested and state.absmax.dtype == torch.uint8 and state.offset.shape == () and state.state2.blocksize == 256
    assert_same_bits(state.offset, flat.absmax.mean())
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert_same_bits(F.dequantize_blockwise(codes, state), model_dequantize(codes, scales, state.code, 256, torch.float32))


def test_8bit_results_go_into_given_tensors():
    A = bell(1000).reshape(10, 100)
    expected, flat = F.quantize_blockwise(A, blocksize=256)
    out, absmax = torch.empty(10, 100, dtype=torch.uint8), torch.empty(4, dtype=torch.float32)
    codes, state = F.quantize_blockwise(A, absmax=absmax, out=out, blocksize=256)
    assert codes is out and state.absmax is absmax
    assert_same_bits(out, expected)
    assert_same_bits(absmax, flat.absmax)
    values = torch.empty(10, 100)
    assert F.dequantize_blockwise(codes, state, out=values) is values
    assert_same_bits(values, F.dequantize_blockwise(codes, state))


def test_8bit_dequantise_by_absmax_alone():
    A = bell(1000).to(torch.float16)
    codes, state = F.quantize_blockwise(A)
    values = F.dequantize_blockwise(codes, absmax=state.absmax)
    assert_same_bits(values, model_dequantize(codes, state.absmax, F.create_dynamic_map(), 4096, torch.float32))
    linear = F.create_linear_map()
    codes, state = F.quantize_blockwise(A, code=linear, blocksize=64)
    values = F.dequantize_blockwise(codes, absmax=state.absmax, code=linear, blocksize=64)
    assert_same_bits(values, model_dequantize(codes, state.absmax, linear, 64, torch.float32))


def test_8bit_errors():
    A = bell(64)
    codes, state = F.quantize_blockwise(A)
    for blocksize in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            F.quantize_blockwise(A.long(), blocksize=blocksize)  # the block size is looked at first
    for dtype in (torch.float64, torch.int32, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match="16/32-bit floats"):
            F.quantize_blockwise(A.to(dtype))
    with pytest.raises(ValueError, match="absmax"):
        F.dequantize_blockwise(codes)
    with pytest.raises(ValueError, match="uint8"):
        F.dequantize_blockwise(A, state)
    with pytest.raises(ValueError, match="positive"):
        F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=0)


# --------------------------------------------------------------------------------------------------------------------------------- 4 bit
@given(A=float_tensors(), blocksize=st.sampled_from(BLOCKSIZES_4BIT), quant_type=st.sampled_from(QUANT_TYPES))
def test_4bit_codes_follow_the_decision_values(A, blocksize, quant_type):
    packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type)
    expected, absmax = model_quantize_4bit(A, blocksize, quant_type)
    assert_same_bits(packed, expected)
    torch.testing.assert_close(state.absmax, absmax, rtol=0, atol=0, equal_nan=True)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (A.shape, A.dtype, blocksize, quant_type)
    assert_same_bits(state.code, F.get_4bit_type(quant_type, device=DEVICE))


@given(A=float_tensors(kinds=("bell", "tiny", "zeros")), blocksize=st.sampled_from(BLOCKSIZES_4BIT), quant_type=st.sampled_from(QUANT_TYPES))
def test_4bit_values_are_level_times_scale(A, blocksize, quant_type):
    packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type)
    values = F.dequantize_4bit(packed, state)
    assert_same_bits(values, model_dequantize_4bit(packed, state.absmax, blocksize, quant_type, A.shape, A.dtype))


ROUNDTRIP_BARS = {  # mean absolute and mean relative error on a standard normal, by block size: what the published library measures
    "fp4": (
        (0.088925, 0.096543, 0.102969, 0.108684, 0.114115, 0.119333, 0.124556, 0.129536),
        (0.242443, 0.260125, 0.275817, 0.289831, 0.302881, 0.315000, 0.326607, 0.337169),
    ),
    "nf4": (
        (0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547),
        (0.189726, 0.203339, 0.215237, 0.226105, 0.236079, 0.245370, 0.254163, 0.262473),
    ),
}


@grid(quant_type=QUANT_TYPES, index=range(8))
def test_4bit_roundtrip_error(quant_type, index):
    A = torch.randn(1024, 1024)
    packed, state = F.quantize_4bit(A, blocksize=BLOCKSIZES_4BIT[index], quant_type=quant_type)
    error = (F.dequantize_4bit(packed, state) - A).abs()
    absolute, relative = ROUNDTRIP_BARS[quant_type]
    assert error.mean().item() == pytest.approx(absolute[index], rel=1e-2)
    assert (error / (A.abs() + 1e-8)).mean().item() == pytest.approx(relative[index], rel=1e-2)


@grid(quant_type=QUANT_TYPES, dtype=FLOAT_DTYPES, blocksize=(64, 256))
def test_4bit_nested_error_and_state(quant_type, dtype, blocksize):
    A = torch.randn(1024, 300).to(dtype)
    packed, state = F.quantize_4bit(A, blocksize=blocksize, compress_statistics=True, quant_type=quant_type)
    flat_packed, flat = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type)
    assert_same_bits(packed, flat_packed)
    blocks = flat.absmax.numel()
    assert state.nested and state.absmax.dtype == torch.uint8 and state.absmax.shape == (blocks,)
    assert_same_bits(state.offset, flat.absmax.mean())
    assert state.state2.blocksize == 256 and state.state2.absmax.shape == (-(-blocks // 256),) and state.state2.dtype == torch.float32
    expected, absmax2 = model_quantize_blockwise(flat.absmax - state.offset, F.create_dynamic_map(), 256)
    assert_same_bits(state.absmax, expected)
    assert_same_bits(state.state2.absmax, absmax2)
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = F.dequantize_4bit(packed, state)
    assert_same_bits(values, model_dequantize_4bit(packed, scales, blocksize, quant_type, A.shape, dtype))
    error = (values.float() - A.float()).abs()
    assert error.mean() < 0.12 and values.dtype == dtype


@grid(storage=STORAGE_DTYPES, quant_type=QUANT_TYPES, n=(2, 4, 8, 100, 129, 4096 + 10))
def test_4bit_storage_is_the_same_bytes_seen_otherwise(storage, quant_type, n):
    A = bell(n)
    expected, absmax = model_quantize_4bit(A, 64, quant_type)
    packed, state = F.quantize_4bit(A, quant_type=quant_type, quant_storage=storage)
    assert packed.dtype == storage and packed.shape == (-(-((n + 1) // 2) // storage.itemsize), 1)
    data = torch.frombuffer(bytearray(raw_bytes(packed)), dtype=torch.uint8).to(DEVICE)
    assert torch.equal(data[: expected.numel()], expected.reshape(-1))
    filler = {"nf4": 0x77, "fp4": 0}[quant_type]
    assert (data[expected.numel() :] == filler).all()
    assert_same_bits(F.dequantize_4bit(packed, state), model_dequantize_4bit(expected, absmax, 64, quant_type, (n,), torch.float32))


@pytest.mark.parametrize("quantise, dequantise, quant_type", [(F.quantize_nf4, F.dequantize_nf4, "nf4"), (F.quantize_fp4, F.dequantize_fp4, "fp4")])
def test_named_4bit_functions(quantise, dequantise, quant_type):
    A = bell(5000).reshape(50, 100)
    packed, state = quantise(A, blocksize=128, compress_statistics=True, quant_storage=torch.float16)
    expected, expected_state = F.quantize_4bit(A, None, None, 128, True, quant_type, torch.float16)
    assert_same_bits(packed, expected)
    assert state == expected_state
    assert_same_bits(dequantise(packed, state), F.dequantize_4bit(expected, expected_state))


def test_4bit_defaults():
    packed, state = F.quantize_4bit(bell(256))
    assert (state.blocksize, state.quant_type, packed.dtype, state.nested) == (64, "fp4", torch.uint8, False)
    assert_same_bits(packed, model_quantize_4bit(bell(256), 64, "fp4")[0])


def test_4bit_results_go_into_given_tensors():
    A = bell(1000)
    expected, flat = F.quantize_4bit(A, quant_type="nf4")
    out, absmax = torch.empty(500, 1, dtype=torch.uint8), torch.empty(16)
    packed, state = F.quantize_4bit(A, absmax=absmax, out=out, quant_type="nf4")
    assert packed is out and state.absmax is absmax
    assert_same_bits(out, expected)
    assert_same_bits(absmax, flat.absmax)
    values = torch.empty(1000)
    assert F.dequantize_4bit(packed, state, out=values) is values
    assert_same_bits(values, F.dequantize_4bit(expected, flat))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=short_name)
def test_4bit_dequantise_by_absmax_and_out(dtype):
    A = bell(640).reshape(10, 64)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    out = torch.empty(10, 64, dtype=dtype)
    F.dequantize_4bit(packed, absmax=state.absmax, out=out, quant_type="nf4")
    assert_same_bits(out, model_dequantize_4bit(packed, state.absmax, 64, "nf4", (10, 64), dtype))


def test_4bit_state_wins_over_arguments():
    packed, state = state_of()
    values = F.dequantize_4bit(packed, state, absmax=torch.zeros(3), blocksize=4096, quant_type="fp4")
    assert_same_bits(values, F.dequantize_4bit(packed, state))


def test_4bit_transposed_packed_gives_transposed_result():
    A = bell(96 * 40).reshape(96, 40)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    assert_same_bits(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


def test_4bit_errors_in_order():
    ints = torch.ones(64, dtype=torch.int32)
    with pytest.raises(ValueError, match="invalid blocksize"):
        F.quantize_4bit(ints, blocksize=65, quant_type="nf5")
    with pytest.raises(ValueError, match="quant_type"):
        F.quantize_4bit(ints, quant_type="nf5")
    for dtype in (torch.int32, torch.float64):
        with pytest.raises(ValueError, match="16/32-bit floats"):
            F.quantize_4bit(ints.to(dtype), quant_type="nf4")

    packed, state = state_of((64,))
    with pytest.raises(ValueError):
        F.dequantize_4bit(packed)
    with pytest.raises(ValueError):
        F.dequantize_4bit(packed, absmax=state.absmax)
    for field, value in (("blocksize", 100), ("quant_type", "int4"), ("dtype", torch.float64)):
        broken = copy.copy(state)
        setattr(broken, field, value)
        with pytest.raises(ValueError, match="blocksize|quant_type|16/32-bit floats"):
            F.dequantize_4bit(packed, broken)


def test_quantising_does_not_change_the_input():
    A = bell(1000).reshape(10, 100)
    before = A.clone()
    F.quantize_4bit(A, quant_type="nf4", compress_statistics=True)
    F.quantize_blockwise(A, nested=True)
    assert_same_bits(A, before)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), ()], ids=str)
def test_no_or_one_element(shape):
    A = torch.full(shape, 0.5)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    assert packed.shape == ((A.numel() + 1) // 2, 1)
    assert_same_bits(F.dequantize_4bit(packed, state), A)
    codes, state = F.quantize_blockwise(A)
    assert_same_bits(F.dequantize_blockwise(codes, state), A)


# ---------------------------------------------------------------------------------------------------------------------------------- gemv
@grid(quant_type=QUANT_TYPES, dtype=FLOAT_DTYPES, nested=(False, True))
def test_gemv_4bit_is_the_product_with_the_dequantised_weight(quant_type, dtype, nested):
    packed, state = state_of((96, 128), nested, quant_type, dtype)
    A = bell(2 * 3 * 128, seed=9).reshape(2, 3, 128).to(dtype)
    y = F.gemv_4bit(A, packed, state=state)
    expected = A.double() @ F.dequantize_4bit(packed, state).double().t()
    assert y.shape == (2, 3, 96) and y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=5e-2 if dtype != torch.float32 else 1e-4)
    out = torch.empty(2, 3, 96, dtype=dtype)
    assert F.gemv_4bit(A, packed, out=out, state=state) is out
    assert_same_bits(out, y)


def test_gemv_4bit_with_identity_returns_the_weight():
    packed, state = state_of((64, 32))
    y = F.gemv_4bit(torch.eye(32), packed, state=state)
    torch.testing.assert_close(y, F.dequantize_4bit(packed, state).t())


def test_gemv_4bit_without_state_is_refused():
    with pytest.raises(ValueError, match="state"):
        F.gemv_4bit(torch.ones(1, 64), torch.zeros(32, 1, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------------ the process's default dtype
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=short_name)
def test_default_dtype_does_not_leak_into_results(default):
    A = bell(256 * 64).reshape(128, 128)
    expected_packed, expected = F.quantize_4bit(A, quant_type="nf4", compress_statistics=True)
    expected_codes, expected_8bit = F.quantize_blockwise(A, blocksize=64, nested=True)
    torch.set_default_dtype(default)
    packed, state = F.quantize_4bit(A, quant_type="nf4", compress_statistics=True)
    codes, state_8bit = F.quantize_blockwise(A, blocksize=64, nested=True)
    read = F.QuantState.from_dict(state.as_dict(packed=True), DEVICE)
    values = [F.dequantize_4bit(packed, s) for s in (state, read)]
    maps = [F.create_dynamic_map(), F.create_linear_map(), F.create_fp8_map(), F.create_normal_map(), F.get_4bit_type("fp4", device=DEVICE)]
    torch.set_default_dtype(torch.float32)

    assert_same_bits(packed, expected_packed)
    assert_same_bits(codes, expected_codes)
    for s in (state, read):
        for field in ("absmax", "code", "offset"):
            assert_same_bits(getattr(s, field), getattr(expected, field))
        assert_same_bits(s.state2.code, expected.state2.code)
        assert_same_bits(s.state2.absmax, expected.state2.absmax)
    assert_same_bits(state_8bit.offset, expected_8bit.offset)
    for v in values:
        assert_same_bits(v, F.dequantize_4bit(expected_packed, expected))
    fresh = [F.create_dynamic_map(), F.create_linear_map(), F.create_fp8_map(), F.create_normal_map(), F.get_4bit_type("fp4", device=DEVICE)]
    for before, after in zip(fresh, maps, strict=True):
        assert_same_bits(after, before)


# ---------------------------------------------------------------------------------------------------------------------- small functions
def test_pointers():
    t = torch.ones(3)
    assert F.get_ptr(None) is None
    assert isinstance(F.get_ptr(t), ctypes.c_void_p) and F.get_ptr(t).value == t.data_ptr()


def test_devices_of_tensors():
    cpu, meta = torch.ones(2, device="cpu"), torch.ones(2, device="meta")
    assert F.is_on_gpu([]) and F.is_on_gpu([cpu, None, cpu])
    with pytest.raises(RuntimeError, match="same device"):
        F.is_on_gpu([cpu, meta])
    paged = torch.ones(2)
    paged.is_paged = True
    assert F.is_on_gpu([meta, paged])


@pytest.mark.parametrize("singleton", [F.GlobalPageManager, F.CUBLAS_Context])
def test_singletons(singleton):
    assert singleton.get_instance() is singleton.get_instance()
    with pytest.raises(RuntimeError, match="get_instance"):
        singleton()


def test_module_names():
    assert F.C == 127.0 and F.FIRST_CUDA_DEVICE == torch.device("cuda", 0)
    assert F.lib is bnb.cextension.lib
    assert F.has_avx512bf16() in (0, 1)
    assert F.int8_double_quant and F.int8_linear_matmul and F.int8_mm_dequant


@pytest.mark.parametrize("buffer", ["col_stats", "row_stats", "out_col", "out_row"])
def test_int8_double_quant_refuses_buffers(buffer):
    with pytest.raises(ValueError, match=buffer):
        F.int8_double_quant(torch.ones(4, 4, dtype=torch.float16), **{buffer: torch.ones(4)})
