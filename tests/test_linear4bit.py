"""Linear4bit: what it computes, what its forward leaves alone, and how it survives being moved, copied, shared and compiled."""

import copy
import io
import logging
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from tests.helpers import DEVICE, FLOAT_DTYPES, STORAGE_DTYPES, raw_bytes

IN, OUT = 96, 48
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def layer(in_features=IN, out_features=OUT, bias=True, quant_type="nf4", **kwargs) -> Linear4bit:
    return Linear4bit(in_features, out_features, bias, quant_type=quant_type, **kwargs).to(DEVICE)


def dense(linear: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """What the layer should return, in float64."""
    result = x.detach().double() @ linear.weight.dequantize().double().t()
    return result if linear.bias is None else result + linear.bias.detach().double()


def assert_close(result, expected, dtype=None):
    tolerance = TOLERANCE[dtype or result.dtype]
    assert (result.double() - expected).norm() <= tolerance * expected.norm() + 1e-12


def snapshot(linear: Linear4bit):
    state = linear.quant_state
    return raw_bytes(linear.weight), linear.weight.shape, raw_bytes(state.absmax), state.dtype, state.nested, id(linear.weight), id(state)


# ------------------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("in_features,out_features", [(96, 48), (64, 10), (96, 64), (32, 1), (65, 7), (1, 8), (128, 32)], ids=lambda size: str(size))
def test_any_size_in_any_mode_is_the_dense_product(in_features, out_features, dtype, nested, training):
    linear = layer(in_features, out_features, compress_statistics=nested).train(training)
    for leading in ((), (1,), (7,), (2, 3), (0,)):
        x = torch.randn(*leading, in_features, dtype=dtype)
        with torch.no_grad():
            result = linear(x)
        assert result.dtype is dtype and result.shape == (*leading, out_features)
        assert_close(result, dense(linear, x))


def test_float32_is_computed_in_float32_in_both_modes():
    linear, x = layer(256, 256), torch.randn(4, 256)
    with torch.no_grad():
        trained, evaluated = linear.train()(x), linear.eval()(x)
    assert torch.equal(trained, evaluated)
    assert_close(evaluated, dense(linear, x), torch.float32)


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_storage_does_not_change_the_result(storage, quant_type):
    torch.manual_seed(1)
    plain = layer(quant_type=quant_type)
    torch.manual_seed(1)
    other = layer(quant_type=quant_type, quant_storage=storage)
    x = torch.randn(3, IN)
    assert other.weight.dtype is storage and torch.equal(plain(x), other(x))


def test_float64_inputs_are_computed_in_float32_and_returned_as_float64():
    linear, x = layer(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    result = linear(x)
    result.sum().backward()
    assert result.dtype is x.grad.dtype is torch.float64
    assert_close(result, dense(linear, x))


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_inputs_are_refused(dtype, quantised):
    linear = layer(compute_dtype=torch.float32) if quantised else Linear4bit(IN, OUT)
    with pytest.raises(TypeError, match=r"Linear4bit\(in_features=96.*float"):
        linear(torch.ones(2, IN, dtype=dtype))


# ----------------------------------------------------------------------------------------------------------------- compute dtype


@pytest.mark.parametrize("compute_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_compute_dtype_is_used_and_the_input_dtype_returned(dtype, compute_dtype):
    linear, x = layer(compute_dtype=compute_dtype), torch.randn(3, IN, dtype=dtype)
    result = linear(x)
    assert result.dtype is dtype
    bias = linear.bias.detach().to(compute_dtype)
    assert torch.equal(result, bnb.matmul_4bit(x.to(compute_dtype), linear.weight, linear.quant_state, bias=bias).to(dtype))


def test_without_compute_dtype_every_call_decides_for_itself():
    linear = layer(bias=False)
    x = torch.randn(3, IN)
    before = linear(x)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(linear(x.to(dtype)), bnb.matmul_4bit(x.to(dtype), linear.weight, linear.quant_state))
    assert torch.equal(linear(x), before)


def test_assigned_compute_dtype_counts_once_it_is_marked_as_set():
    linear, x = layer(bias=False), torch.randn(3, IN)
    linear.compute_dtype = torch.bfloat16
    assert_close(linear(x), dense(linear, x), torch.float32)
    linear.compute_type_is_set = True
    assert torch.equal(linear(x), bnb.matmul_4bit(x.bfloat16(), linear.weight, linear.quant_state).float())


def test_set_compute_type_serves_replaced_forward_methods():
    linear = layer()
    linear.set_compute_type(torch.ones(1, dtype=torch.bfloat16))
    assert linear.compute_dtype is torch.bfloat16


@pytest.mark.parametrize("rows,text", [(1, "inference."), (5, "inference or training")])
def test_float16_without_compute_dtype_warns_once_a_layer(rows, text, caplog):
    linear = layer()
    with caplog.at_level(logging.WARNING, "bitsandbytes.nn.modules"):
        for _ in range(3):
            linear(torch.ones(rows, IN, dtype=torch.float16))
    assert len(caplog.messages) == 1 and text in caplog.messages[0] and "Linear4bit(in_features=96" in caplog.messages[0]


def test_nothing_else_is_said(caplog, recwarn):
    with caplog.at_level(logging.DEBUG):
        layer(compute_dtype=torch.bfloat16)(torch.ones(2, IN, dtype=torch.float16))
        layer().eval()(torch.ones(2, IN))
    assert not caplog.messages and not recwarn.list


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize("quantised", [True, False])
def test_autocast_is_followed_as_by_linear(dtype, compute_dtype, quantised):
    linear = Linear4bit(IN, OUT, compute_dtype=compute_dtype, quant_type="nf4")
    linear = linear.to(DEVICE) if quantised else linear
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast(DEVICE, dtype):
        result = linear(x)
    result.sum().backward()
    assert result.dtype is dtype and x.grad.dtype is linear.bias.grad.dtype is linear.bias.dtype is torch.float32
    assert_close(result, dense(linear, x))


# -------------------------------------------------------------------------------------------------------- forward leaves things be


def test_forward_changes_neither_weight_nor_state():
    linear = layer()
    before = snapshot(linear)
    for training in (False, True):
        for x in (torch.randn(1, IN), torch.randn(4, IN, dtype=torch.bfloat16), torch.randn(4, IN, requires_grad=True)):
            linear.train(training)(x)
    with torch.inference_mode():
        linear.eval()(torch.randn(2, IN))
    assert snapshot(linear) == before


def test_dequantising_after_inference_gives_the_weight():
    linear = layer(64, 64)
    before = linear.weight.dequantize()
    linear.eval()(torch.randn(1, 64))
    assert torch.equal(bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state), before)


def test_gradients_flow_after_inference_and_in_eval_mode():
    linear, x = layer(64, 64), torch.randn(3, 64, requires_grad=True)
    linear.train()(x).sum().backward()
    expected, x.grad = x.grad, None
    linear.eval()(x.detach())
    linear(x).sum().backward()
    assert torch.equal(x.grad, expected)
    x.grad = None
    linear.train()(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_inference_between_forward_and_backward_does_not_matter():
    linear, x = layer(64, 64), torch.randn(3, 64, requires_grad=True)
    expected = torch.autograd.grad(linear(x).sum(), x)[0]
    result = linear.train()(x)
    linear.eval()(x.detach())
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], expected)


def test_inference_mode_leaves_no_inference_tensors():
    linear = layer()
    with torch.inference_mode():
        linear(torch.ones(2, IN, dtype=torch.float16))
    assert not linear.weight.data.is_inference() and not linear.bias.data.is_inference()
    linear(torch.ones(2, IN, dtype=torch.float16, requires_grad=True)).sum().backward()


def test_threads_may_share_a_layer():
    linear, x = layer(512, 512).eval(), torch.randn(2, 512)
    expected, results, barrier = copy.deepcopy(linear)(x).detach(), [], threading.Barrier(4)

    def work():
        barrier.wait()
        with torch.no_grad():
            results.append(linear(x))  # the first calls of this layer, all at once
            results.append(copy.deepcopy(linear)(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(result, expected) for result in results)


# -------------------------------------------------------------------------------------------------------------------------- bias


def test_a_bias_of_another_dtype_is_cast_for_good():
    linear = layer()
    linear(torch.randn(2, IN, dtype=torch.float16))
    assert linear.bias.dtype is torch.float16


def test_a_bias_in_training_keeps_its_dtype():
    linear = layer()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float32):
        linear(torch.randn(2, IN, dtype=dtype)).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert linear.bias.dtype is torch.float32
    with torch.no_grad():
        linear(torch.randn(2, IN, dtype=torch.float16))
    assert linear.bias.dtype is torch.float32


def test_a_bias_with_a_gradient_and_optimizer_state_keeps_its_dtype():
    linear = layer()
    optimizer = torch.optim.AdamW([linear.bias], lr=1e-3)
    linear.bias.grad = torch.ones_like(linear.bias)
    optimizer.step()
    for _ in range(2):
        linear(torch.randn(2, IN, dtype=torch.float16)).float().sum().backward()
        optimizer.step()
    assert linear.bias.dtype is torch.float32 and linear.bias.grad.dtype is torch.float32


def test_a_substituted_bias_is_not_written_to():
    linear, bias = layer(), torch.zeros(OUT)
    result = torch.func.functional_call(linear, {"bias": bias}, (torch.ones(2, IN, dtype=torch.float16),))
    assert result.dtype is torch.float16 and bias.dtype is linear.bias.dtype is torch.float32


# -------------------------------------------------------------------------------------------------- weights that are not quantised


@pytest.mark.parametrize("make", [lambda: Linear4bit(IN, OUT), lambda: LinearNF4(IN, OUT).to(torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_float_weight_is_used_as_it_is_and_this_is_said_once(make, dtype, caplog):
    linear, x = make(), torch.randn(3, IN, dtype=dtype)
    expected = x.double() @ linear.weight.data.double().t() + linear.bias.data.double()
    with caplog.at_level(logging.WARNING):
        result = linear(x)
        linear(x)
    assert result.dtype is dtype
    assert_close(result, expected, max((dtype, linear.weight.dtype), key=TOLERANCE.get))
    assert len(caplog.messages) == 1 and "in_features=96, out_features=48" in caplog.messages[0] and "full precision" in caplog.messages[0]


def test_a_weight_tied_to_a_float_embedding_works_and_trains():
    embedding, head = nn.Embedding(OUT, IN), layer(bias=False)
    head.weight = embedding.weight
    x = torch.randn(2, IN)
    result = head(x)
    result.sum().backward()
    torch.testing.assert_close(result, x @ embedding.weight.t())
    assert embedding.weight.grad is not None and head.quant_state is None and list(head.state_dict()) == ["weight"]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_codes_without_statistics_raise_and_say_how_to_mend_it(storage, plain):
    linear = layer(quant_storage=storage)
    codes = linear.weight.data
    linear.weight = nn.Parameter(codes, requires_grad=False) if plain else Params4bit(codes, bnb_quantized=True)
    linear.quant_state = None
    with pytest.raises(RuntimeError, match=r"Linear4bit\(in_features=96.*quant_state is missing.*load_state_dict"):
        linear(torch.randn(2, IN))


def test_a_column_is_not_taken_for_codes():
    """A weight of shape [8, 1] looks like packed codes."""
    linear, x = Linear4bit(1, 8), torch.randn(3, 1)
    torch.testing.assert_close(linear(x), x @ linear.weight.data.t() + linear.bias)


# --------------------------------------------------------------------------------------------------------------- lost and recovered


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_forward_recovers_a_state_that_the_weight_lost(storage):
    linear, x = layer(quant_storage=storage), torch.randn(2, IN)
    expected, state = linear(x), linear.quant_state
    linear.weight.quant_state = None
    assert torch.equal(linear(x), expected) and linear.weight.quant_state is state


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_forward_works_with_a_plain_parameter_in_place_of_the_weight(storage):
    """FSDP replaces the parameter; forward must not put another one in its place."""
    linear, x = layer(quant_storage=storage), torch.randn(2, IN, requires_grad=True)
    expected = linear(x)
    plain = nn.Parameter(linear.weight.data, requires_grad=False)
    linear.weight = plain
    result = linear(x)
    result.sum().backward()
    assert torch.equal(result, expected) and linear.weight is plain


def test_fix_recovers_the_whole_recipe():
    linear = layer(compress_statistics=False, quant_storage=torch.float32)
    linear.weight.blocksize = 128
    linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)
    bnb.nn.modules.fix_4bit_weight_quant_state_from_module(linear)
    weight = linear.weight
    assert type(weight) is Params4bit and weight.quant_state is linear.quant_state and weight.module is linear and weight.bnb_quantized
    assert (weight.quant_type, weight.compress_statistics, weight.quant_storage, weight.blocksize) == ("nf4", False, torch.float32, 64)


def test_fix_leaves_a_sound_weight_alone(caplog):
    linear = layer()
    before = snapshot(linear)
    bnb.nn.modules.fix_4bit_weight_quant_state_from_module(linear)
    assert snapshot(linear) == before and not caplog.messages


def test_fix_warns_and_names_what_it_finds_when_nothing_was_quantised(caplog):
    with caplog.at_level(logging.WARNING, "bitsandbytes.nn.modules"), pytest.raises(RuntimeError, match=r"torch.float32 \[48, 96\]"):
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(Linear4bit(IN, OUT))
    assert "not quantised" in caplog.messages[0]


# -------------------------------------------------------------------------------------------------- moving, casting, copying, sharing


def test_construction():
    linear = LinearNF4(IN, OUT, False, torch.bfloat16, False, torch.float16, "meta")
    weight = linear.weight
    assert type(weight) is Params4bit and weight.is_meta and weight.module is linear and linear.bias is None and not weight.requires_grad
    assert (weight.quant_type, weight.compress_statistics, weight.quant_storage) == ("nf4", False, torch.float16)
    assert linear.compute_dtype is torch.bfloat16 and linear.compute_type_is_set and linear.quant_storage is torch.float16
    assert linear.quant_state is None and not Linear4bit(1, 1).compute_type_is_set
    assert LinearFP4(1, 1).weight.quant_type == Linear4bit(1, 1).weight.quant_type == "fp4"
    with torch.device("meta"):
        assert type(Linear4bit(IN, OUT).weight) is Params4bit


def test_the_first_move_quantises_and_keeps_the_parameter():
    linear = Linear4bit(IN, OUT)
    weight = linear.weight
    linear.half()
    assert linear.weight is weight and type(weight) is Params4bit and weight.dtype is torch.float16 and linear.quant_state is None
    linear.to(DEVICE)
    assert linear.weight is weight and linear.quant_state is weight.quant_state and weight.quant_state.dtype is torch.float16
    state = linear.quant_state
    linear.to(DEVICE).to(DEVICE)
    assert linear.weight is weight and linear.quant_state is weight.quant_state is state


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_casting_a_layer_keeps_its_codes(storage, cast):
    linear = layer(bias=False, quant_storage=storage)
    before, x = raw_bytes(linear.weight), torch.randn(2, IN)
    expected = linear(x)
    getattr(nn.Sequential(linear), cast)()
    assert raw_bytes(linear.weight) == before and linear.weight.dtype is storage
    assert torch.equal(linear(x), expected) and linear.quant_state is linear.weight.quant_state


def test_to_meta_and_back_by_loading():
    linear, x = layer(), torch.randn(2, IN)
    expected, state_dict = linear(x), linear.state_dict()
    linear.to("meta")
    assert type(linear.weight) is Params4bit and linear.weight.is_meta and linear.weight.module is linear
    linear.load_state_dict(state_dict, assign=True)
    assert torch.equal(linear(x), expected)


def test_meta_cannot_simply_move():
    with pytest.raises(NotImplementedError, match="load_state_dict"):
        Linear4bit(IN, OUT, device="meta").to(DEVICE)


def test_to_empty_keeps_the_class_and_recipe():
    linear = LinearNF4(IN, OUT, compress_statistics=False, device="meta").to_empty(device=DEVICE)
    assert type(linear.weight) is Params4bit and linear.weight.quant_type == "nf4" and linear.weight.shape == (OUT, IN)
    linear.load_state_dict(nn.Linear(IN, OUT).state_dict())
    linear.to(DEVICE)
    assert linear.quant_state.quant_type == "nf4" and not linear.quant_state.nested


@pytest.mark.parametrize("moved", [False, True])
def test_a_deep_copy_is_a_layer_of_its_own(moved):
    model = nn.Sequential(Linear4bit(IN, OUT, quant_type="nf4"))
    model = model.to(DEVICE) if moved else model
    other = copy.deepcopy(model)
    assert other[0].weight.module is other[0] and model[0].weight.module is model[0]
    other.to(DEVICE)
    assert other[0].quant_state is other[0].weight.quant_state is not None
    assert (model[0].quant_state is None) == (not moved) and other[0].quant_state is not model[0].quant_state


def test_state_survives_copying_and_then_losing_the_weight():
    linear, x = copy.deepcopy(layer()), torch.randn(2, IN)
    expected = linear(x)
    linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)
    assert torch.equal(linear(x), expected)


def test_layers_that_share_a_weight_share_its_state():
    first, second = Linear4bit(IN, OUT, False), Linear4bit(IN, OUT, False)
    second.weight = first.weight
    nn.ModuleList([first, second]).to(DEVICE)
    x = torch.randn(2, IN)
    assert first.weight is second.weight and first.quant_state is second.quant_state is not None
    assert torch.equal(first(x), second(x))


def test_share_memory_shares_everything():
    linear = layer()
    nn.Sequential(linear).share_memory()
    assert linear.weight.is_shared() and linear.bias.is_shared() and linear.quant_state.absmax.is_shared()
    assert linear.quant_state.state2.absmax.is_shared()


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_saved_layer_comes_back_whole(weights_only, moved, nested):
    linear, x = LinearNF4(IN, OUT, compress_statistics=nested), torch.randn(2, IN)
    linear = linear.to(DEVICE) if moved else linear
    expected = linear(x)
    torch.save(linear, buffer := io.BytesIO())
    buffer.seek(0)
    again = torch.load(buffer, weights_only=weights_only)
    assert type(again) is LinearNF4 and type(again.weight) is Params4bit and again.weight.module is again
    assert again.quant_state is again.weight.quant_state and torch.equal(again(x), expected)


def test_a_layer_pickled_by_the_published_library_gets_its_class_back():
    """There the weight comes back as a plain Parameter with the attributes of a Params4bit."""
    linear, x = layer(), torch.randn(2, IN)
    expected, state = linear(x), dict(linear.__dict__)
    plain = nn.Parameter(linear.weight.data, requires_grad=False)
    plain.__dict__.update({**linear.weight.__dict__, "module": linear})
    state["_parameters"] = {"weight": plain, "bias": linear.bias}
    again = Linear4bit.__new__(Linear4bit)
    again.__setstate__(state)
    assert type(again.weight) is Params4bit and again.weight.module is again and torch.equal(again(x), expected)


def test_a_subclass_with_its_own_forward_works():
    """Adapters and Lightning replace or override forward."""

    class Scaled(Linear4bit):
        def __init__(self, *args, device=None, **kwargs):
            super().__init__(*args, device=device, **kwargs)

        def forward(self, x):
            bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self)
            return 2 * bnb.matmul_4bit(x, self.weight.t(), bias=None, quant_state=self.weight.quant_state)

    linear, x = Scaled(IN, OUT, quant_type="nf4", device=DEVICE).to(DEVICE), torch.randn(2, IN)
    torch.testing.assert_close(linear(x), 2 * x @ linear.weight.dequantize().t())


# ------------------------------------------------------------------------------------------------------------ compile, checkpointing


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_compiles_without_graph_breaks(compiled, dtype, nested, storage):
    """Also on the first call, with a bias of another dtype, in eval mode, with a gradient."""
    linear = layer(compress_statistics=nested, quant_storage=storage)
    x = torch.randn(3, IN, dtype=dtype)
    function = compiled(linear)
    with torch.no_grad():
        result = function(x)
    assert linear.bias.dtype is torch.float32
    reference = copy.deepcopy(linear)
    assert torch.equal(result, reference(x))
    x.requires_grad_()
    function(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(reference(x).sum(), x)[0])
    assert_close(linear.eval()(x), dense(linear, x))


def test_compiles_under_autocast_and_checkpointing(compiled):
    linear, x = layer(IN, IN), torch.randn(3, IN, requires_grad=True)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return checkpoint(self.linear, checkpoint(self.linear, x, use_reentrant=False), use_reentrant=False)

    with torch.autocast(DEVICE, torch.bfloat16):
        expected, result = linear(linear(x)), compiled(Twice())(x)
    assert torch.equal(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("use", [lambda x, w: torch.nn.functional.linear(x, w), lambda x, w: x @ w.t()], ids=["linear", "matmul"])
def test_direct_use_of_the_weight_compiles(compiled, use):
    linear, x = layer(), torch.randn(3, IN)

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return use(x, self.linear.weight)

    torch.testing.assert_close(compiled(Direct())(x), x @ linear.weight.dequantize().t())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant, training):
    model = nn.Sequential(layer(IN, IN), nn.GELU(), layer(IN, OUT)).train(training)
    x = torch.randn(4, IN, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)
