"""Numerical traps: cases in which the published library 0.50.2, or one of its backends, is wrong or disagrees with itself.

Each test fails there on a CPU, with the native kernels (the one of the 8-bit tail: with the plain ones), unless its name ends in `_kept`: those
are oddities of the format, and rules that hold already. The file needs nothing but the public surface, so it also runs against that wheel.
"""

import copy
import warnings

from helpers import (
    DEVICE,
    FLOAT_DTYPES,
    FP4_BY_MAGNITUDE,
    FP4_THRESHOLDS,
    LEVELS,
    NF4_THRESHOLDS,
    QUANT_TYPES,
    assert_same_bits,
    bell,
    grid,
    model_dequantize_4bit,
    model_quantize_4bit,
    model_quantize_blockwise,
    short_name,
    unpack,
)
import numpy as np
import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F

ops = torch.ops.bitsandbytes


def codes_of(values, quant_type="nf4", blocksize=64) -> list[int]:
    A = torch.tensor(values, dtype=torch.float32)
    packed, _ = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type)
    return unpack(packed, A.numel()).tolist()


def neighbours(value: np.float32, steps: int) -> np.float32:
    """The float32 so many representable steps further from zero."""
    return (np.array([value]).view(np.int32) + steps).view(np.float32)[0]


# --------------------------------------------------------------------------------------------------- 4 bit: where a code begins and ends
@grid(quant_type=QUANT_TYPES, shape=((7, 96), (3, 16), (5, 48), (64, 32), (130, 80)))
def test_scales_follow_flat_blocks_whatever_the_row_length(quant_type, shape):
    A = bell(torch.Size(shape).numel()).reshape(shape) * torch.linspace(1, 50, shape[0])[:, None]
    packed, state = F.quantize_4bit(A, blocksize=64, quant_type=quant_type)
    for dtype in FLOAT_DTYPES:
        values = ops.dequantize_4bit(packed, state.absmax, 64, quant_type, list(shape), dtype)
        assert torch.equal(values, model_dequantize_4bit(packed, state.absmax, 64, quant_type, shape, dtype))


@pytest.mark.parametrize("n", [2, 64, 128, 4096])
def test_one_dimensional_tensor_keeps_its_shape(n):
    A = bell(n)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    assert ops.dequantize_4bit(packed, state.absmax, 64, "nf4", [n], torch.float32).shape == (n,)
    assert F.dequantize_4bit(packed, state).shape == (n,)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_tail_is_scaled_as_a_full_block(quant_type):
    """The same values, once as a full block and once as the tail behind one."""
    generator = np.random.default_rng(0)
    thresholds = NF4_THRESHOLDS if quant_type == "nf4" else FP4_THRESHOLDS
    for absmax in generator.uniform(0.5, 2, 40).astype(np.float32):
        near = [neighbours(np.float32(t * absmax), k) for t in thresholds for k in (-1, 0, 1)][:63]
        block = [absmax, *near] + [0.0] * (63 - len(near))
        tail = codes_of([1.0] * 64 + block[:-1], quant_type)[64:]
        assert tail == codes_of(block, quant_type)[:63]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_zero_tail_has_absmax_zero(quant_type):
    packed, state = F.quantize_4bit(torch.cat((torch.ones(64), torch.zeros(7))), quant_type=quant_type)
    assert state.absmax.tolist() == [1.0, 0.0]
    values = F.dequantize_4bit(packed, state)
    assert (values.reshape(-1)[64:] == 0).all() and not values.signbit().any()
    assert unpack(packed, 72).tolist()[64:] == [{"nf4": 7, "fp4": 0}[quant_type]] * 8


def test_fp4_has_one_zero():
    values = [1.0, 0.002, -0.002, 1e-30, -1e-30, 0.0, -0.0] + [0.5] * 57
    assert codes_of(values, "fp4")[:7] == [3, 0, 0, 0, 0, 0, 0]


def test_fp4_second_zero_is_read_as_plus_zero():
    data = torch.tensor([[0x08], [0x80]], dtype=torch.uint8)
    for n in (2, 3, 4):
        values = ops.dequantize_4bit(data, torch.ones(1), 64, "fp4", [n], torch.float32).reshape(-1)
        assert (values == 0).all() and not values.signbit().any()


@pytest.mark.parametrize("index", range(7))
def test_fp4_ties_go_to_the_smaller_magnitude_on_both_sides(index):
    threshold = FP4_THRESHOLDS[index]
    lower, upper = int(FP4_BY_MAGNITUDE[index]), int(FP4_BY_MAGNITUDE[index + 1])
    above = neighbours(threshold, 1)
    got = codes_of([1.0, threshold, -threshold, above, -above] + [0.0] * 59, "fp4")[1:5]
    assert got == [lower, lower | 8 if lower else 0, upper, upper | 8]


@pytest.mark.parametrize("index", range(15))
def test_nf4_ties_go_to_the_lower_value_kept(index):
    threshold = NF4_THRESHOLDS[index]
    towards_plus = neighbours(threshold, 1 if threshold > 0 else -1)
    assert codes_of([1.0, threshold, towards_plus] + [0.0] * 61)[1:3] == [index, index + 1]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_block_of_denormals_is_scaled_by_its_own_absmax(quant_type):
    A = (bell(64) * 16).round() * 2.0**-149
    packed, state = F.quantize_4bit(A, quant_type=quant_type)
    expected, absmax = model_quantize_4bit(A, 64, quant_type)
    assert_same_bits(state.absmax, absmax)
    assert_same_bits(packed, expected)


@grid(quant_type=QUANT_TYPES, blocks=("full", "tail"))
def test_nan_spoils_its_block_and_no_other_kept(quant_type, blocks):
    A = bell(64 * 3 if blocks == "full" else 64 * 2 + 10)
    A[130] = torch.nan
    packed, state = F.quantize_4bit(A, quant_type=quant_type)
    values = F.dequantize_4bit(packed, state).reshape(-1)
    assert values[128:].isnan().all() and values[:128].isfinite().all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_infinity_stays_visible_kept(quant_type):
    A = bell(192)
    A[70], A[71] = torch.inf, -torch.inf
    packed, state = F.quantize_4bit(A, quant_type=quant_type)
    values = F.dequantize_4bit(packed, state).reshape(-1)
    assert not values[70:72].isfinite().any() and values[:64].isfinite().all() and values[128:].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------------------- 8 bit
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=short_name)
def test_zero_is_stored_as_zero(signed, dtype):
    A = torch.tensor([1.0, 0.0, -0.0, 0.5] * 64, dtype=dtype)
    codes, state = F.quantize_blockwise(A, code=F.create_dynamic_map(signed=signed), blocksize=256)
    values = F.dequantize_blockwise(codes, state)
    assert (values[A == 0] == 0).all()
    assert (codes[A == 0] == (127 if signed else 0)).all()


@pytest.mark.parametrize("make, signed", [(F.create_dynamic_map, True), (F.create_dynamic_map, False), (F.create_linear_map, True)])
def test_every_level_is_stored_as_itself(make, signed):
    code = make(signed=signed)
    codes, state = F.quantize_blockwise(code, code=code, blocksize=256)
    assert_same_bits(F.dequantize_blockwise(codes, state), code)


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_code_is_the_nearest_value(blocksize):
    A = bell(100_000)
    code = F.create_dynamic_map()
    codes, _ = F.quantize_blockwise(A, blocksize=blocksize)
    assert torch.equal(codes, model_quantize_blockwise(A, code, blocksize)[0])


def test_editing_a_code_in_place_is_noticed():
    code = F.create_linear_map()
    A = bell(512)
    before, _ = F.quantize_blockwise(A, code=code, blocksize=256)
    code[2:126] = torch.linspace(-0.98, -0.9, 124)
    after, _ = ops.quantize_blockwise(A, code, 256)
    assert torch.equal(after, model_quantize_blockwise(A, code, 256)[0]) and not torch.equal(after, before)


def test_editing_a_code_that_a_kernel_has_seen_is_noticed():
    code, A = F.create_linear_map(), bell(512)
    ops.quantize_blockwise(A, code, 256)
    code[2:126] = torch.linspace(-0.98, -0.9, 124)
    codes, _ = ops.quantize_blockwise(A, code, 256)
    assert torch.equal(codes, model_quantize_blockwise(A, code, 256)[0])


@pytest.mark.parametrize("n", [64, 256, 300, 7])
def test_block_of_zeros_is_zero_codes(n):
    codes, state = F.quantize_blockwise(torch.zeros(n), blocksize=64)
    assert (codes == 127).all() and (state.absmax == 0).all()
    values = F.dequantize_blockwise(codes, state)
    assert (values == 0).all() and not values.signbit().any()


def test_8bit_nan_spoils_its_block_and_no_other():
    A = bell(192)
    A[70] = torch.nan
    codes, state = F.quantize_blockwise(A, blocksize=64)
    values = F.dequantize_blockwise(codes, state)
    assert values[64:128].isnan().all() and values[:64].isfinite().all() and values[128:].isfinite().all()


def test_8bit_infinity_stays_visible_kept():
    A = bell(192)
    A[70] = -torch.inf
    codes, state = F.quantize_blockwise(A, blocksize=64)
    values = F.dequantize_blockwise(codes, state)
    assert not values[70].isfinite() and values[:64].isfinite().all()


def test_8bit_tail_is_scaled_as_a_full_block():
    code = F.create_dynamic_map()
    midpoints = ((code[1:] + code[:-1]) * 0.5).cpu().numpy()
    for absmax in np.random.default_rng(1).uniform(0.5, 2, 10).astype(np.float32):
        near = [np.float32(m * absmax) for m in midpoints]
        A = torch.tensor([absmax, *near])
        full, _ = F.quantize_blockwise(A, blocksize=256)
        tail, _ = F.quantize_blockwise(torch.cat((torch.ones(257), A)), blocksize=257)
        assert torch.equal(tail[257:], full)


def test_signed_code_lacks_minus_one_kept():
    code = F.create_dynamic_map()
    assert code[0].item() == pytest.approx(-0.99296874) and code[127] == 0 and code[255] == 1


def test_signed_linear_code_is_off_centre_kept():
    code = F.create_linear_map()
    assert code[127] == 0 and 0 < code[128] < 1e-8


def test_two_bit_floats_are_not_the_fp4_table_kept():
    code = F.create_fp8_map(True, 2, 1, 4)
    assert code[code > 0].min().item() == pytest.approx(1 / 48) and F.get_4bit_type("fp4", device=DEVICE)[1].item() == pytest.approx(1 / 192)


def test_tables_are_made_without_a_gpu():
    """The default device is a CUDA one where there is one."""
    assert F.get_4bit_type("nf4").shape == (16,)
    assert F.get_4bit_type("int4", device=DEVICE).shape == (16,)


# ------------------------------------------------------------------------------------------------------------------ every operator everywhere
def test_forms_with_out_run_on_the_cpu():
    A = bell(64 * 96).reshape(64, 96)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    out = torch.empty(64, 96)
    assert F.dequantize_4bit(packed, state, out=out) is out
    assert torch.equal(out, model_dequantize_4bit(packed, state.absmax, 64, "nf4", (64, 96), torch.float32))
    codes, state8 = F.quantize_blockwise(A)
    assert F.dequantize_blockwise(codes, state8, out=out) is out
    y = torch.empty(2, 64)
    assert F.gemv_4bit(torch.ones(2, 96), packed, out=y, state=state) is y


def test_int8_double_quant_runs_on_the_cpu():
    rows, columns, row_stats, column_stats, _ = F.int8_double_quant(bell(60).reshape(6, 10).to(torch.float16))
    assert rows.shape == columns.shape == (6, 10) and row_stats.shape == (6,) and column_stats.shape == (10,)


@pytest.mark.parametrize("n, storage", [(1, torch.uint8), (2, torch.uint8), (4, torch.float16), (8, torch.float32)], ids=short_name)
def test_weight_packed_into_one_element_is_not_transposed(n, storage):
    A = bell(n).reshape(2, -1) if n % 2 == 0 else bell(n).reshape(1, n)
    packed, state = F.quantize_4bit(A, quant_type="nf4", quant_storage=storage)
    assert F.dequantize_4bit(packed, state).shape == A.shape


def test_row_of_packed_bytes_asks_for_the_transpose_kept():
    A = bell(64 * 32).reshape(64, 32)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32], ids=short_name)
@pytest.mark.parametrize("n", [1, 2, 65, 129, 131])
def test_storage_whose_elements_are_wider_than_the_codes_need(storage, n):
    packed, state = F.quantize_4bit(bell(n), quant_type="nf4", quant_storage=storage)
    expected, absmax = model_quantize_4bit(bell(n), 64, "nf4")
    assert packed.shape == (-(-expected.numel() // storage.itemsize), 1)
    assert torch.equal(F.dequantize_4bit(packed, state).reshape(-1), model_dequantize_4bit(expected, absmax, 64, "nf4", (n,), torch.float32))


def test_reading_a_state_leaves_the_callers_dict_alone():
    _, state = F.quantize_4bit(bell(4096), quant_type="nf4", compress_statistics=True)
    given = state.as_dict(packed=True)
    before = dict(given)
    assert F.QuantState.from_dict(given, DEVICE) == state
    assert list(given) == list(before)


def test_nested_table_is_a_copy_kept():
    _, state = F.quantize_4bit(bell(4096), quant_type="nf4", compress_statistics=True)
    assert state.as_dict()["nested_quant_map"].data_ptr() != state.state2.code.data_ptr()


# ------------------------------------------------------------------------------------------------------------------------------- products
def reference_product(A, packed, state, bias=None):
    W = F.dequantize_4bit(packed, copy.copy(state)).double()
    y = A.double() @ W.t()
    return y if bias is None else y + bias.double()


@grid(quant_type=QUANT_TYPES, dtype=FLOAT_DTYPES, M=(1, 3, 40))
def test_gemv_reads_the_canonical_layout_and_fills_every_row(quant_type, dtype, M):
    W = bell(96 * 128).reshape(96, 128)
    packed, state = F.quantize_4bit(W, quant_type=quant_type)
    A = bell(M * 128, 3).reshape(M, 128).to(dtype)
    y = F.gemv_4bit(A, packed, state=state)
    expected = reference_product(A, packed, state)
    assert (y.double() - expected).abs().max() < {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}[dtype]


def test_gemv_with_a_table_of_the_callers_own():
    W = bell(64 * 64).reshape(64, 64)
    packed, state = F.quantize_4bit(W, quant_type="nf4")
    state.code = torch.linspace(-1, 1, 16).roll(3)  # neither type: code[1] says nothing
    values = state.code[unpack(packed, W.numel()).long()].view(64, 64) * state.absmax.view(64, 1)
    torch.testing.assert_close(F.gemv_4bit(torch.eye(64), packed, state=state), values.t())


@pytest.mark.parametrize("out_features, in_features", [(10, 64), (64, 96), (33, 65), (1, 8), (32, 33), (64, 32)])
@pytest.mark.parametrize("training", [True, False])
def test_layers_of_any_size_compute(out_features, in_features, training):
    layer = bnb.nn.LinearNF4(in_features, out_features).to(DEVICE).train(training)
    x = bell(2 * in_features).reshape(2, in_features)
    with torch.no_grad():
        y = layer(x)
    W = model_dequantize_4bit(*model_state(layer), (out_features, in_features), torch.float32)
    torch.testing.assert_close(y, x @ W.t() + layer.bias, rtol=1e-4, atol=1e-4)


def model_state(layer):
    state = layer.weight.quant_state
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return layer.weight.data, scales, state.blocksize, state.quant_type


@pytest.mark.parametrize("offset_dtype", [torch.float16, torch.bfloat16], ids=short_name)
def test_offset_of_an_old_checkpoint(offset_dtype):
    packed, state = F.quantize_4bit(bell(64 * 128).reshape(64, 128), quant_type="nf4", compress_statistics=True)
    A = bell(3 * 128).reshape(3, 128)

    def product(offset):
        return ops.gemm_4bit(A, packed, [64, 128], state.state2.absmax, 64, "nf4", None, state.absmax, state.state2.code, offset)

    old = state.offset.to(offset_dtype)
    assert torch.equal(product(old), product(old.float()))
    meta = [t.to("meta") for t in (A, packed, state.state2.absmax, state.absmax, state.state2.code, old)]
    assert ops.gemm_4bit(meta[0], meta[1], [64, 128], meta[2], 64, "nf4", None, *meta[3:]).shape == (3, 64)
    state.offset = old
    assert F.dequantize_4bit(packed, state).dtype == torch.float32


@grid(blocksize=(3, 65, 8192), name=("quantize", "dequantize"))
def test_operators_check_the_blocksize_outside_of_tracing_too(blocksize, name):
    with pytest.raises(RuntimeError, match="blocksize"):
        if name == "quantize":
            ops.quantize_4bit(bell(64), blocksize, "nf4", torch.uint8)
        else:
            ops.dequantize_4bit(torch.zeros(32, 1, dtype=torch.uint8), torch.ones(30), blocksize, "nf4", [64], torch.float32)


def test_operators_check_dtypes_outside_of_tracing_too():
    with pytest.raises(RuntimeError):
        ops.quantize_4bit(bell(64).double(), 64, "nf4", torch.uint8)
    with pytest.raises(RuntimeError):
        ops.quantize_blockwise(bell(64), F.create_dynamic_map().double(), 64)
    with pytest.raises(RuntimeError):
        ops.dequantize_blockwise(torch.zeros(64, dtype=torch.int8), torch.ones(1), F.create_dynamic_map(), 64, torch.float32)


def error_of(y, exact):
    return ((y.double() - exact) ** 2).mean().sqrt().item()


@grid(quant_type=QUANT_TYPES, dtype=FLOAT_DTYPES, mean=(0.0, 2.0), M=(1, 4, 16, 128), mode=("train", "eval"))
def test_product_is_no_worse_than_dequantising_and_multiplying(quant_type, dtype, mean, M, mode):
    """Within 10 %, against the product of the dequantised weight in float64, for activations with and without a mean."""
    N, K = 256, 1024
    W = bell(N * K).reshape(N, K) / 32
    layer = bnb.nn.Linear4bit(K, N, bias=False, quant_type=quant_type, compute_dtype=dtype)
    layer.weight.data = W
    layer = layer.to(DEVICE).train(mode == "train")
    dense = model_dequantize_4bit(*model_state(layer), (N, K), torch.float32)
    x = (bell(M * K, 5).reshape(M, K) + mean).to(dtype)
    with torch.no_grad():
        y = layer(x)
    exact = x.double() @ dense.double().t()
    baseline = x @ dense.to(dtype).t()
    assert y.dtype == dtype
    assert error_of(y, exact) <= 1.1 * error_of(baseline, exact)


def test_fp32_layer_computes_in_fp32_in_eval_mode():
    layer = bnb.nn.LinearNF4(256, 64, compute_dtype=torch.float32).to(DEVICE)
    x = bell(4 * 256).reshape(4, 256)
    with torch.no_grad():
        trained, evaluated = layer.train()(x), layer.eval()(x)
    torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)


def test_reading_a_layer_after_inference_gives_its_weight():
    layer = bnb.nn.LinearNF4(256, 64).to(DEVICE).eval()
    before = F.dequantize_4bit(layer.weight.data, copy.deepcopy(layer.weight.quant_state))
    with torch.no_grad():
        layer(bell(256).reshape(1, 256))
    assert torch.equal(F.dequantize_4bit(layer.weight.data, layer.weight.quant_state), before)


def test_levels_are_what_the_format_says_kept():
    for quant_type in QUANT_TYPES:
        assert F.get_4bit_type(quant_type, device=DEVICE).tolist() == LEVELS[quant_type].tolist()


def test_quantising_warns_of_nothing_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed, state = F.quantize_4bit(bell(4096), compress_statistics=True)
        F.dequantize_4bit(packed, state)
        codes, state = F.quantize_blockwise(bell(4096))
        F.dequantize_blockwise(codes, state)
