"""Linear8bitLt: what it computes, what it saves for the backward pass, and how codes and scales stay together whatever happens to the layer."""

import copy
import gc
import io
import logging
import pickle
import threading
import weakref

import accelerate
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
from bitsandbytes.autograd._functions import GlobalOutlierPooler, MatMul8bitFp, MatMul8bitLt
from bitsandbytes.nn import Int8Params, Linear8bitLt
from tests.helpers import DEVICE, FLOAT_DTYPES, cpu_only, raw_bytes

IN, OUT = 96, 48
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def layer(in_features=IN, out_features=OUT, bias=True, threshold=0.0, **kwargs) -> Linear8bitLt:
    return Linear8bitLt(in_features, out_features, bias, has_fp16_weights=False, threshold=threshold, **kwargs).to(DEVICE)


def trainable(threshold=0.0) -> Linear8bitLt:
    return Linear8bitLt(IN, OUT, has_fp16_weights=True, threshold=threshold)


def activations(*leading, features=IN, dtype=torch.float32, outliers=True) -> torch.Tensor:
    x = torch.randn(*leading, features)
    if outliers and x.numel():
        x[..., 3] = x[..., 3] * 20
    return x.to(dtype)


def dense(linear: Linear8bitLt, x: torch.Tensor) -> torch.Tensor:
    """What the layer should return but for the quantisation of x, in float64."""
    result = x.detach().double() @ linear.weight.dequantize().double().t()
    return result if linear.bias is None else result + linear.bias.detach().double()


def assert_close(result, expected, dtype=None):
    tolerance = TOLERANCE[dtype or result.dtype]
    assert (result.double() - expected).norm() <= tolerance * expected.norm() + 1e-12


def gradients(linear, x, run=None):
    x = x.detach().clone().requires_grad_()
    (run or linear)(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in linear.parameters() if p.grad is not None)]


both_thresholds = pytest.mark.parametrize("threshold", [0.0, 6.0], ids=["no threshold", "threshold"])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


# ------------------------------------------------------------------------------------------------------------------------ values


@both_modes
@both_thresholds
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 3, 2), (0,), (2, 0, 3)], ids=str)
def test_inputs_of_any_rank_in_any_mode(leading, dtype, threshold, training):
    linear = layer(threshold=threshold).train(training)
    x = activations(*leading, dtype=dtype, outliers=threshold > 0)
    with torch.no_grad():
        result = linear(x)
    assert result.dtype is dtype and result.shape == (*leading, OUT)
    assert_close(result, dense(linear, x))


@both_thresholds
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_training_and_evaluation_agree_with_and_without_gradients(dtype, threshold):
    linear, x = layer(threshold=threshold), activations(5, dtype=dtype)
    results = [linear.train(training)(x.requires_grad_(grad)) for training in (True, False) for grad in (True, False)]
    with torch.no_grad():
        results += [linear.train()(x), linear.eval()(x)]
    assert all(torch.equal(result, results[0]) for result in results)


@both_modes
@both_thresholds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_beyond_float16_do_not_overflow(dtype, threshold, training):
    linear = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold)
    with torch.no_grad():
        linear.weight[0, 0] = 1e5
    linear = linear.to(DEVICE).train(training)
    assert linear.weight.SCB[0] == 1e5
    x = activations(8, dtype=dtype, outliers=False)
    x[0, 1] = 7e4
    with torch.no_grad():
        result = linear(x)
    assert result.isfinite().all()
    assert_close(result[1:], dense(linear, x)[1:])
    assert_close(result[0, 1:], dense(linear, x)[0, 1:])


@both_thresholds
def test_inputs_are_never_written_to(threshold):
    """Not even for a moment: an input that another node has saved, and one that is read-only, would notice."""
    linear = layer(threshold=threshold).eval()
    z = torch.randn(5, IN).half().requires_grad_()
    x = torch.exp(z)  # the backward pass of exp wants its result unchanged
    assert x.max() > 6.0
    version = x._version
    linear(x).sum().backward()
    assert x._version == version and z.grad.isfinite().all()
    with torch.inference_mode():
        frozen = torch.full((2, IN), 8.0)
    with torch.no_grad():
        linear(frozen)


def test_float64_inputs_are_computed_in_float32_and_returned_as_float64():
    linear, x = layer(), activations(3, dtype=torch.float64).requires_grad_()
    result = linear(x)
    result.sum().backward()
    assert result.dtype is torch.float64 and x.grad.dtype is torch.float64
    assert_close(result, dense(linear, x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_other_inputs_are_refused(dtype):
    with pytest.raises(TypeError, match="Linear8bitLt.*takes float16, bfloat16, float32 or float64"):
        layer()(torch.ones(2, IN, dtype=dtype))


def test_wrong_sizes_are_refused():
    with pytest.raises(RuntimeError, match="int8_linear"):
        layer()(torch.ones(2, IN + 1))


@both_modes
@pytest.mark.parametrize("has_fp16_weights", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_autocast_is_followed_in_every_mode(dtype, has_fp16_weights, training):
    linear = Linear8bitLt(IN, OUT, has_fp16_weights=has_fp16_weights).to(DEVICE).train(training)
    x = torch.randn(3, IN).to(dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        result = linear(x)
    assert result.dtype is torch.bfloat16
    result.float().sum().backward()
    assert x.grad.dtype is dtype and x.grad.norm() > 0


def test_nothing_is_said_on_a_healthy_layer(caplog, recwarn):
    linear = layer(threshold=6.0).eval()
    with caplog.at_level(logging.DEBUG):
        for dtype in FLOAT_DTYPES:
            linear(activations(2, dtype=dtype))
    assert not caplog.records and not recwarn.list


def test_outlier_columns_are_reported_after_the_product():
    linear = layer(threshold=6.0)
    assert linear.state.idx is None
    x = torch.zeros(20, IN)
    x[2, 7] = x[1, 90] = -6.0
    linear(x)
    assert linear.state.idx.tolist() == [7, 90] and linear.state.idx.dtype is torch.int64


def test_a_bias_of_another_dtype_is_cast_for_good_outside_of_training():
    linear = layer()
    with torch.no_grad():
        linear(activations(2, dtype=torch.float16))
    assert linear.bias.dtype is torch.float16


def test_a_bias_in_training_keeps_its_dtype():
    linear = layer()
    optimizer = torch.optim.AdamW([linear.bias])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        linear(activations(4, dtype=dtype)).float().sum().backward()
        optimizer.step()
    assert linear.bias.dtype is torch.float32


class _LargestTensor(TorchDispatchMode):
    """Notes the largest floating-point tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return result


@both_modes
def test_the_weight_is_never_made_dense(training):
    linear = layer(512, 512, bias=False).train(training)
    x = torch.randn(4, 512, requires_grad=True)
    with _LargestTensor() as seen:
        linear(x).sum().backward()
    assert 0 < seen.elements <= 4 * 512


# --------------------------------------------------------------------------------------------------------------------- gradients


@both_modes
@both_thresholds
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_gradients_are_those_of_the_dense_product(leading, dtype, threshold, training):
    linear = layer(threshold=threshold).train(training)
    x = activations(*leading, dtype=dtype).requires_grad_()
    weights = torch.randn(*leading, OUT).to(dtype)
    (linear(x) * weights).sum().backward()
    expected = weights.double() @ linear.weight.dequantize().double()
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert x.grad.dtype is dtype and (x.grad.double() - expected).norm() <= error * expected.norm() + 1e-12
    assert linear.weight.grad is None
    torch.testing.assert_close(linear.bias.grad.double(), weights.double().reshape(-1, OUT).sum(0), atol=3e-2, rtol=2e-2)


@both_modes
@both_thresholds
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_a_floating_point_weight_is_trained(leading, threshold, training):
    linear, reference = trainable(threshold).train(training), nn.Linear(IN, OUT)
    reference.load_state_dict(linear.state_dict())
    x = activations(*leading, outliers=threshold > 0)
    for ours, theirs in zip(gradients(linear, x), gradients(reference, x)):
        assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.03 * theirs.norm()
    assert linear.weight.dtype is torch.float32 and linear.state_dict().keys() == {"weight", "bias"}


def test_a_floating_point_weight_is_quantised_anew_for_each_product():
    linear, x = trainable(), activations(3)
    linear(x).sum().backward()
    before = linear(x)
    with torch.no_grad():
        linear.weight.mul_(2.0)
    torch.testing.assert_close(linear(x) - linear.bias, 2 * (before - linear.bias))


def test_training_converges():
    torch.manual_seed(0)
    model = nn.Sequential(Linear8bitLt(16, 32), nn.Tanh(), Linear8bitLt(32, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_only_the_weight_is_saved_for_the_backward_pass():
    saved = []
    linear, x = layer(), activations(7).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    assert sorted((t.dtype, tuple(t.shape)) for t in saved if t.numel() > OUT) == [(torch.int8, (OUT, IN))]
    assert sum(t.numel() * t.element_size() for t in saved) == OUT * IN + 4 * OUT


def test_saved_tensors_can_be_kept_elsewhere():
    linear, x = layer(threshold=6.0), activations(7)
    plain = gradients(linear, x)
    linear.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.clone(), type(t)), lambda kept: kept[0]):
        assert all(map(torch.equal, gradients(linear, x), plain))


@both_modes
@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_activations_are_freed(has_fp16_weights, training):
    """A frozen weight needs none of them; within a checkpoint nobody does until the segment runs again."""
    linear = Linear8bitLt(IN, OUT, has_fp16_weights=has_fp16_weights).to(DEVICE).train(training)
    inner = []

    def segment(x):
        hidden = x * 2
        inner.append(weakref.ref(hidden))
        return linear(hidden)

    x = activations(4).requires_grad_()
    result = checkpoint(segment, x, use_reentrant=False) if has_fp16_weights else segment(x)
    gc.collect()
    assert inner[0]() is None
    result.sum().backward()
    assert x.grad.norm() > 0


@both_thresholds
@both_modes
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_checkpointing_gives_the_same_gradients(has_fp16_weights, reentrant, training, threshold):
    first = Linear8bitLt(IN, 2 * OUT, has_fp16_weights=has_fp16_weights, threshold=threshold)
    second = Linear8bitLt(2 * OUT, OUT, has_fp16_weights=has_fp16_weights, threshold=threshold)
    model = nn.Sequential(first, nn.GELU(), second).to(DEVICE).train(training)
    x = activations(5)
    plain = gradients(model, x)
    for _ in range(3):
        with torch.no_grad():
            model.eval()(activations(2))  # an evaluation in between
        model.train(training).zero_grad()
        again = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert len(again) == len(plain) and all(map(torch.equal, again, plain))


def test_writing_to_the_weight_before_the_backward_pass_is_noticed():
    for linear in (layer(), trainable()):
        result = linear(activations(3).requires_grad_())
        with torch.no_grad():
            linear.weight.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_going_backward_twice_needs_retain_graph():
    result = layer()(activations(3).requires_grad_()).sum()
    result.backward(retain_graph=True)
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


def test_functional_transforms_and_second_derivatives():
    linear, x = layer(bias=False), activations(5, outliers=False)
    weight = linear.weight.dequantize()
    loss = lambda x: linear(x).square().sum()  # noqa: E731
    gradient = torch.func.grad(loss)(x)
    torch.testing.assert_close(gradient, 2 * linear(x) @ weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), gradient, atol=2e-2, rtol=2e-2)
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, (2 * weight.t() @ weight).sum(0).expand(5, -1), atol=0.2, rtol=0.05)


def test_transforms_take_a_weight_that_carries_its_scales():
    weight, x = layer(bias=False).weight, activations(3, outliers=False)
    gradient = torch.func.grad(lambda x: bnb.matmul(x, weight).sum())(x)
    torch.testing.assert_close(gradient, weight.dequantize().sum(0).expand(3, -1), atol=1e-3, rtol=1e-3)


def test_forward_mode():
    linear, x = layer(), activations(3, outliers=False)
    weight, tangent = linear.weight.dequantize(), torch.randn_like(x)
    close = {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(torch.func.jvp(linear, (x,), (tangent,))[1], tangent @ weight.t(), **close)
    torch.testing.assert_close(torch.func.jacfwd(linear)(x[0]), weight, **close)
    loss = lambda x: linear(x).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.hessian(loss)(x[0]), 2 * weight.t() @ weight, atol=0.1, rtol=2e-2)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(result.tangent, tangent @ weight.t(), **close)


def test_forward_mode_of_a_weight_in_floating_point():
    x, weight, by_x, by_weight = torch.randn(3, 64), torch.randn(32, 64), torch.randn(3, 64), torch.randn(32, 64)
    product = lambda x, weight: bnb.matmul(x, weight, state=bnb.MatmulLtState())  # noqa: E731
    both = torch.func.jvp(product, (x, weight), (by_x, by_weight))[1]
    torch.testing.assert_close(both, by_x @ weight.t() + x @ by_weight.t(), atol=1e-3, rtol=1e-3)
    one = torch.func.jvp(lambda weight: product(x, weight), (weight,), (by_weight,))[1]
    torch.testing.assert_close(one, x @ by_weight.t(), atol=1e-3, rtol=1e-3)

    state = bnb.MatmulLtState()
    state.has_fp16_weights = False  # codes are made of the weight, which is not trained
    none = torch.func.jvp(lambda weight: bnb.matmul(x, weight, state=state), (weight,), (by_weight,))[1]
    assert none.shape == (3, 32) and not none.any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", FLOAT_DTYPES, ids=str)
def test_a_tangent_has_the_dtype_of_the_result(dtype, bias_dtype):
    weight, x, bias = layer(bias=False).weight, torch.randn(2, IN, dtype=dtype), torch.randn(OUT, dtype=bias_dtype)
    product = lambda x, bias: bnb.matmul(x, weight, bias=bias)  # noqa: E731
    for function, inputs in ((product, (x, bias)), (lambda b: product(x, b), (bias,)), (lambda a: product(a, bias), (x,))):
        result, tangent = torch.func.jvp(function, inputs, inputs)
        assert tangent.shape == result.shape and tangent.dtype == result.dtype == dtype


# ---------------------------------------------------------------------------------------------------------- the weight and its scales


def test_the_first_move_quantises_and_everything_else_is_a_view():
    linear = Linear8bitLt(IN, OUT, has_fp16_weights=False)
    parameter, values = linear.weight, linear.weight.detach().clone()
    linear.to(DEVICE)
    assert linear.weight is parameter and parameter.dtype is torch.int8 and not parameter.requires_grad
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(values)
    assert torch.equal(parameter.data, codes) and torch.equal(parameter.SCB, scales)
    for _ in range(2):
        for view in (parameter.CB, linear.state.CB):
            assert view.data_ptr() == parameter.data_ptr()
        assert linear.state.SCB is parameter.SCB
        linear(activations(2))
    assert parameter.__dict__.keys() == {"CB", "SCB", "has_fp16_weights"}


def test_codes_are_used_as_they_are():
    codes = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
    scales = torch.rand(OUT) + 0.5
    weight = Int8Params(codes, requires_grad=False, CB=None, SCB=scales, has_fp16_weights=False)
    assert weight.data_ptr() == codes.data_ptr() and weight.SCB is scales
    linear = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    linear.weight = weight.to(DEVICE)
    linear.to(DEVICE)
    assert linear.weight.data_ptr() == codes.data_ptr() and torch.equal(linear.weight.SCB, scales)
    x = activations(3)
    assert_close(linear(x), x.double() @ (codes.double() * scales.double()[:, None] / 127).t())


@pytest.mark.parametrize("plain", [False, True], ids=["Int8Params", "Parameter"])
def test_codes_without_scales_raise_and_say_how_to_mend_it(plain):
    codes = torch.ones(OUT, IN, dtype=torch.int8)
    linear = Linear8bitLt(IN, OUT, has_fp16_weights=False)
    linear.weight = nn.Parameter(codes, requires_grad=False) if plain else Int8Params(codes, requires_grad=False)
    with pytest.raises(RuntimeError, match=rf"Linear8bitLt\(in_features={IN}.*SCB.*load_state_dict.*Int8Params\("):
        linear(activations(2))
    linear.weight = Int8Params(codes, requires_grad=False)
    linear.weight.SCB = torch.full((OUT,), 127.0)
    linear.bias = None
    torch.testing.assert_close(linear(torch.ones(1, IN)), torch.full((1, OUT), float(IN)))


def test_moving_a_parameter_leaves_the_original_alone():
    weight = layer().weight
    for target in ("meta", "cpu", torch.float16):
        moved = weight.to(target)
        assert type(moved) is Int8Params and moved.dtype is torch.int8
        assert weight.SCB.device.type == DEVICE and weight.device.type == DEVICE
        assert moved.SCB.is_meta or torch.equal(moved.SCB.to(DEVICE), weight.SCB)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(DEVICE, torch.float16)])
def test_casting_and_moving_a_parent_keeps_codes_and_scales(move):
    model = nn.Sequential(layer(threshold=6.0))
    codes, scales = raw_bytes(model[0].weight), raw_bytes(model[0].weight.SCB)
    model[0](activations(2))
    move(model)
    assert type(model[0].weight) is Int8Params and model[0].weight.SCB.dtype is torch.float32
    assert (raw_bytes(model[0].weight), raw_bytes(model[0].weight.SCB)) == (codes, scales)
    assert model[0].state.SCB is model[0].weight.SCB


@pytest.mark.parametrize("half_first", [False, True])
def test_half_and_to_in_any_order(half_first):
    linear = Linear8bitLt(IN, OUT, has_fp16_weights=False)
    linear = linear.half().to(DEVICE) if half_first else linear.to(DEVICE).half()
    assert linear.weight.dtype is torch.int8 and linear(activations(2, dtype=torch.float16)).dtype is torch.float16


def test_reassigning_a_moved_weight_after_a_forward():
    linear, x = layer(), activations(3)
    expected = linear(x)
    linear.weight = linear.weight.to(DEVICE)
    assert torch.equal(linear(x), expected) and torch.equal(linear(x), expected)


def test_to_meta_and_back_by_loading():
    linear, x = layer(), activations(2)
    expected, saved = linear(x), copy.deepcopy(linear.state_dict())
    linear.to("meta")
    assert linear.weight.is_meta and type(linear.weight) is Int8Params and not linear.weight.SCB.is_meta
    linear.load_state_dict(saved)
    assert torch.equal(linear(x), expected)


def test_meta_cannot_simply_move():
    with torch.device("meta"):
        linear = Linear8bitLt(IN, OUT, has_fp16_weights=False)
    with pytest.raises(NotImplementedError, match="load_state_dict|to_empty"):
        linear.to(DEVICE)
    linear.to_empty(device=DEVICE)
    assert type(linear.weight) is Int8Params
    with accelerate.init_empty_weights():
        linear = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0)
    assert linear.weight.is_meta and type(linear.weight) is Int8Params and not linear.weight.requires_grad


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_a_deep_copy_is_a_layer_of_its_own(used, moved):
    linear, x = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0), activations(3)
    if moved:
        linear.to(DEVICE)
    if used:
        linear(x)
    other = copy.deepcopy(linear)
    other.to(DEVICE)
    assert (linear.weight.dtype is torch.int8) == moved
    linear.to(DEVICE)
    assert other.weight.data_ptr() != linear.weight.data_ptr() and other.weight.SCB.data_ptr() != linear.weight.SCB.data_ptr()
    assert other.state.CB.data_ptr() == other.weight.data_ptr() and other.state.SCB is other.weight.SCB
    expected = linear(x)
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", ["pickle", "torch.save", "weights_only"])
def test_a_saved_layer_comes_back_whole(how, used):
    linear, x = layer(threshold=6.0), activations(3)
    if used:
        linear(x)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(linear))
    else:
        torch.save(linear, buffer := io.BytesIO())
        buffer.seek(0)
        again = torch.load(buffer, weights_only=how == "weights_only")
    assert type(again.weight) is Int8Params and again.state == linear.state
    assert again.state.threshold == 6.0 and not again.state.has_fp16_weights
    assert torch.equal(again(x), linear(x)) and torch.equal(again.weight.SCB, linear.weight.SCB)
    assert again.state.CB.data_ptr() == again.weight.data_ptr()


def test_a_saved_parameter_keeps_its_class():
    weight = layer().weight
    torch.save(weight, buffer := io.BytesIO())
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert type(again) is Int8Params and torch.equal(again.data, weight.data) and torch.equal(again.SCB, weight.SCB)


def test_a_layer_pickled_by_the_published_library_gets_its_class_back():
    """There a weight becomes a plain Parameter with attributes, and after a forward only the state holds the scales."""
    linear, x = layer(threshold=6.0), activations(3)
    expected = linear(x)
    state = bnb.MatmulLtState(CB=linear.weight.data, SCB=linear.weight.SCB)
    state.threshold, state.has_fp16_weights = 6.0, False
    weight = nn.Parameter(linear.weight.data, requires_grad=False)
    weight.CB, weight.SCB, weight.has_fp16_weights = None, None, False
    pickled = {**linear.__dict__, "state": state, "_parameters": {**linear._parameters, "weight": weight}}
    again = Linear8bitLt.__new__(Linear8bitLt)
    again.__setstate__(pickled)
    assert type(again.weight) is Int8Params and torch.equal(again(x), expected)


def test_two_layers_may_share_a_weight():
    first, second, x = layer(bias=False), layer(bias=False), activations(3)
    second.weight = first.weight
    expected = first(x)
    for linear in (second, first, second):
        assert torch.equal(linear(x), expected)
    model = nn.ModuleList([first, second])
    model.to(DEVICE).half()
    assert torch.equal(second(x), expected)
    copied = copy.deepcopy(model)
    assert copied[0].weight is copied[1].weight and torch.equal(copied[1](x), expected)


def test_a_float_weight_is_used_as_it_is_and_this_is_said_once(caplog):
    table = nn.Embedding(OUT, IN)
    linear, x = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False), activations(3)
    linear.weight = table.weight
    with caplog.at_level(logging.WARNING, "bitsandbytes.nn.modules"):
        results = [linear(x) for _ in range(3)]
    assert len(caplog.records) == 1 and "Linear8bitLt" in caplog.text
    torch.testing.assert_close(results[2], x @ table.weight.t())
    results[2].sum().backward()
    assert table.weight.grad is not None
    assert linear.state_dict().keys() == {"weight"}


def test_share_memory_shares_everything():
    weight = layer().weight.share_memory_()
    assert weight.is_shared() and weight.SCB.is_shared()


def test_threads_may_share_a_layer():
    linear, x = layer(256, 256, threshold=6.0).eval(), activations(4, features=256)
    barrier, results = threading.Barrier(4), []

    def run():
        barrier.wait()
        with torch.no_grad():
            results.extend(linear(x) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20 and all(torch.equal(result, results[0]) for result in results)


def test_what_others_write_to_the_state():
    """accelerate and peft clear the state between forwards; serving code writes scales to it."""
    linear, x = layer(), activations(3)
    expected = linear(x)
    linear.state.CxB = linear.state.SCB = linear.state.CB = None
    linear.state.reset_grads()
    linear.state.memory_efficient_backward = False
    del linear.state.CB
    linear.init_8bit_state()
    assert torch.equal(linear(x), expected)
    linear.state.SCB = linear.state.SCB * 2
    torch.testing.assert_close(linear(x) - linear.bias, 2 * (expected - linear.bias))
    linear.weight.CB = torch.zeros_like(linear.weight.CB)
    assert torch.equal(linear(x), linear.bias.expand(3, -1))
    with pytest.raises(TypeError, match="int8"):
        linear.weight.CB = torch.zeros(OUT, IN)


def test_merging_code_may_replace_the_weight():
    linear, x = layer(), activations(3)
    linear(x)
    merged = torch.randn(OUT, IN)
    linear.weight = Int8Params(merged, requires_grad=False, has_fp16_weights=linear.weight.has_fp16_weights).to(DEVICE)
    linear.state.reset_grads()
    expected = x @ merged.t()
    assert (linear(x) - linear.bias - expected).norm() < 0.02 * expected.norm()
    old = linear.weight.__dict__
    assert torch.equal(Int8Params(merged, requires_grad=False, **old).to(DEVICE).SCB, merged.abs().amax(1))


# ---------------------------------------------------------------------------------------------------------- matmul and its state


def test_matmul_takes_slices_as_serving_code_does():
    linear = layer(bias=False)
    codes, scales, x = linear.weight.data, linear.weight.SCB, activations(2, 3, dtype=torch.bfloat16)
    expected = linear(x)
    pieces = []
    for rows in (slice(0, 16), slice(16, 48)):
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.threshold, state.has_fp16_weights, state.is_training = codes[rows], scales[rows], 0.0, False, False
        pieces.append(bnb.matmul(x, codes[rows], state=state))
    assert torch.equal(torch.cat(pieces, -1), expected)


def test_matmul_quantises_a_float_weight_once_into_the_state():
    state, weight, x = bnb.MatmulLtState(), torch.randn(OUT, IN), activations(3)
    state.has_fp16_weights = False
    result = bnb.matmul(x, weight, state=state)
    assert state.CB.dtype is torch.int8 and torch.equal(state.SCB, weight.abs().amax(1))
    assert torch.equal(bnb.matmul(x, state.CB, state=state), result)


def test_matmul_keeps_codes_and_scales_together():
    codes = torch.ones(OUT, IN, dtype=torch.int8)
    for state in (None, bnb.MatmulLtState(CB=codes)):
        if state is not None:
            state.has_fp16_weights = False
        with pytest.raises(RuntimeError, match="scales"):
            bnb.matmul(activations(3), codes, state=state)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        bnb.matmul(torch.ones(3, IN, dtype=torch.float64), torch.ones(OUT, IN))


def test_a_threshold_passed_to_matmul_counts():
    state, x = bnb.MatmulLtState(), activations(3)
    bnb.matmul(x, torch.randn(OUT, IN), state=state, threshold=5.0)
    assert state.threshold == 5.0 and state.idx.tolist() == (x.abs() >= 5).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_autograd_functions_can_be_applied(dtype, transposed):
    x = activations(5, dtype=dtype).requires_grad_()
    weight = torch.randn(IN, OUT).t() if transposed else torch.randn(OUT, IN)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    expected = x.detach().double() @ weight.double().t() + bias.detach().double()
    for function, tolerance in ((MatMul8bitLt, 2.5e-2), (MatMul8bitFp, 1.2e-2)):
        state = bnb.MatmulLtState()
        state.has_fp16_weights = False
        result = function.apply(x, weight, None, bias, state)
        assert result.dtype is dtype and (result.double() - expected).norm() < tolerance * expected.norm()
        x.grad = bias.grad = None
        result.sum().backward()
        assert (x.grad.double() - weight.double().sum(0)).norm() < 2e-2 * weight.sum(0).norm() and bias.grad.eq(5).all()


def test_the_state_is_a_dataclass_of_the_published_fields():
    fields = ["force_no_igemmlt", "CB", "SB", "SCB", "SBt", "CBt", "subB", "outlier_pool", "idx"]
    assert list(bnb.MatmulLtState.__dataclass_fields__) == fields
    state = bnb.MatmulLtState(True, torch.ones(1), idx=torch.tensor([2]))
    assert state.force_no_igemmlt and state.idx.tolist() == [2] and state.has_fp16_weights and state.threshold == 0.0
    assert state == bnb.MatmulLtState(True, torch.ones(1), idx=torch.tensor([2])) and state != bnb.MatmulLtState()
    for name in ("CxB", "CxBt", "formatB", "_tile_indices"):
        with pytest.warns(FutureWarning, match=name):
            assert getattr(state, name) is None
    with pytest.raises(AttributeError, match="nonsense"):
        state.nonsense
    del state.CB
    assert state.CB is None
    state.SCB = torch.ones(1)
    state.reset_grads()
    assert state.SCB is None


def test_the_outlier_pooler_is_a_singleton_of_one_width():
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()
    pooler = GlobalOutlierPooler.get_instance()
    assert pooler is GlobalOutlierPooler.get_instance()
    pooler.initialize()
    pooler.add_outliers(torch.tensor([5, 2]), 64)
    pooler.add_outliers(torch.tensor([9]), 128)
    assert pooler.get_current_outlier_idx().tolist() == [2, 5] and pooler.model_dim == 64


# ----------------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield lambda model, **options: torch.compile(model, fullgraph=True, **options)
    torch.compiler.reset()


compiles_on_the_cpu = cpu_only(
    "torch.compile refuses subclasses of Parameter while a default device is set (PyTorch 2.13); test_devices.py sets none"
)


@compiles_on_the_cpu
@both_thresholds
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_graph_breaks(compiled, bias_dtype, threshold):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer(64, 64, bias=bias_dtype is not None, threshold=threshold) for _ in range(2)))
    if bias_dtype is not None:
        for linear in model:
            linear.bias = nn.Parameter(linear.bias.to(bias_dtype), requires_grad=False)
    x = activations(16, features=64, dtype=torch.bfloat16)
    reference = copy.deepcopy(model)
    fast = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), reference(x))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    fast(ours).sum().backward()
    reference(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@compiles_on_the_cpu
def test_compiles_under_autocast_and_checkpointing(compiled):
    linear, x = layer(64, 64, threshold=6.0), activations(8, features=64)

    def run(x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return checkpoint(linear, x, use_reentrant=False)

    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    result, expected = compiled(run)(ours), run(theirs)
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
