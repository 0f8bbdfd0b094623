"""Gradients of the 4-bit product, and that autograd sees everything the backward pass needs."""

import threading
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
from bitsandbytes import functional as F
from tests.helpers import DEVICE, FLOAT_DTYPES, STORAGE_DTYPES

IN, OUT = 96, 48
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

both_nestings = pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])


def quantised(nested=True, shape=(OUT, IN), storage=torch.uint8, quant_type="nf4"):
    """Packed weight, its state, and the dense matrix that they mean, in float64."""
    packed, state = F.quantize_4bit(torch.randn(shape), compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    return packed, state, F.dequantize_4bit(packed, state).double()


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------------------ values


@both_nestings
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (0,), (2, 0, 3), (1, 1, 1, 7)], ids=str)
def test_product_and_gradients_match_the_dense_ones(leading, bias, dtype, nested):
    packed, state, weight = quantised(nested)
    A = torch.randn(*leading, IN, dtype=dtype, requires_grad=True)
    b = torch.randn(OUT, dtype=dtype, requires_grad=True) if bias else None
    result = bnb.matmul_4bit(A, packed, state, bias=b)
    upstream = torch.randn_like(result)
    result.backward(upstream)

    expected = A.detach().double() @ weight.t() + (0 if b is None else b.detach().double())
    assert result.dtype is A.grad.dtype is dtype and result.shape == expected.shape and A.grad.shape == A.shape
    if A.numel():
        assert relative_error(result, expected) < TOLERANCE[dtype]
        assert relative_error(A.grad, upstream.double() @ weight) < TOLERANCE[dtype]
    if bias:
        assert b.grad.dtype is dtype
        torch.testing.assert_close(b.grad.double(), upstream.double().reshape(-1, OUT).sum(0), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_packed_weight_may_be_a_column_or_a_row(storage, row, grad):
    packed, state, weight = quantised(storage=storage)
    A = torch.randn(3, IN, requires_grad=grad)
    result = bnb.matmul_4bit(A, packed.t() if row else packed, state)
    assert relative_error(result, A.detach().double() @ weight.t()) < 1e-5
    if grad:
        result.sum().backward()
        assert relative_error(A.grad, weight.sum(0).expand(3, IN)) < 1e-5


@pytest.mark.parametrize("needs", ["A", "bias"])
def test_only_what_is_asked_for_gets_a_gradient(needs):
    packed, state, _ = quantised()
    A, bias = torch.randn(4, IN, requires_grad=needs == "A"), torch.randn(OUT, requires_grad=needs == "bias")
    bnb.matmul_4bit(A, packed, state, bias=bias).sum().backward()
    assert (A.grad is not None, bias.grad is not None) == (needs == "A", needs == "bias")


def test_tiny_weights_have_gradients():
    """Eight codes in float32 storage are one element, a column that looks like a row."""
    packed, state, weight = quantised(False, (2, 4), torch.float32)
    A = torch.randn(3, 4, requires_grad=True)
    bnb.matmul_4bit(A, packed, state).sum().backward()
    assert packed.numel() == 1
    torch.testing.assert_close(A.grad.double(), weight.sum(0).expand(3, 4))


def test_a_state_whose_nesting_was_undone_by_hand_works():
    packed, state, weight = quantised(nested=True)
    state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.state2, state.offset = False, None, None
    A = torch.randn(3, IN, requires_grad=True)
    result = bnb.matmul_4bit(A, packed.t(), state)
    result.sum().backward()
    assert relative_error(result, A.detach().double() @ weight.t()) < 1e-5 and relative_error(A.grad, weight.sum(0).expand(3, IN)) < 1e-5


def test_out_receives_the_result():
    packed, state, weight = quantised()
    A, out = torch.randn(3, IN), torch.empty(3, OUT)
    assert bnb.matmul_4bit(A, packed, state, out=out) is out
    assert relative_error(out, A.double() @ weight.t()) < 1e-5


def test_results_may_be_changed_in_place():
    packed, state, weight = quantised()
    A, bias = torch.randn(3, IN, requires_grad=True), torch.zeros(OUT, requires_grad=True)
    result = bnb.matmul_4bit(A, packed, state, bias=bias)
    result += 1
    result.sum().backward()
    assert relative_error(A.grad, weight.sum(0).expand(3, IN)) < 1e-5


# -------------------------------------------------------------------------------------------------------------- wrong arguments


def test_the_state_is_needed():
    with pytest.raises(ValueError, match="quant_state"):
        bnb.matmul_4bit(torch.randn(2, IN), torch.zeros(8, 1, dtype=torch.uint8), None)


def test_the_weight_must_be_a_matrix():
    packed, state, _ = quantised(shape=(2, OUT, IN))
    with pytest.raises(ValueError, match="matri"):
        bnb.matmul_4bit(torch.randn(2, IN), packed, state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64, torch.complex64, torch.bool])
def test_other_dtypes_are_refused(dtype):
    packed, state, _ = quantised()
    with pytest.raises(TypeError, match=str(dtype)):
        bnb.matmul_4bit(torch.ones(2, IN, dtype=dtype), packed, state)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_sizes_must_fit(requires_grad):
    packed, state, _ = quantised()
    for A in (torch.randn(2, IN + 1), torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            bnb.matmul_4bit(A.requires_grad_(requires_grad), packed, state)
    with pytest.raises(RuntimeError, match="4-bit codes"):
        bnb.matmul_4bit(torch.randn(2, IN, requires_grad=requires_grad), packed[:-1], state)
    with pytest.raises(RuntimeError, match="bias"):
        bnb.matmul_4bit(torch.randn(2, IN, requires_grad=requires_grad), packed, state, bias=torch.zeros(OUT + 1))


def test_nested_statistics_of_another_blocksize_are_refused():
    packed, state, _ = quantised()
    state.state2.blocksize = 128
    with pytest.raises(NotImplementedError, match="256"):
        bnb.matmul_4bit(torch.randn(2, IN), packed, state)


@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
def test_a_weight_quantised_the_other_way_round_warns_and_works(row):
    packed, state, weight = quantised(shape=(IN, OUT))
    A, bias = torch.randn(3, IN, requires_grad=True), torch.randn(OUT)
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        result = bnb.matmul_4bit(A, packed.t() if row else packed, state, bias=bias)
    result.sum().backward()
    assert relative_error(result, A.detach().double() @ weight + bias) < 1e-5
    assert relative_error(A.grad, weight.sum(1).expand(3, IN)) < 1e-5


# ---------------------------------------------------------------------------------------------------------- what autograd can see


@both_nestings
def test_everything_is_saved_where_hooks_can_see_it(nested):
    packed, state, _ = quantised(nested)
    saved = []
    A = torch.randn(512, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bnb.matmul_4bit(A, packed, state)
    pointers = {t.data_ptr() for t in saved}
    statistics = [state.absmax] + ([state.offset, state.state2.absmax, state.state2.code] if nested else [])
    assert pointers == {t.data_ptr() for t in (packed, *statistics)}
    assert A.data_ptr() not in pointers


def test_offloading_hooks_may_replace_what_was_saved():
    packed, state, weight = quantised()
    A = torch.randn(3, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().numpy().copy(), lambda a: torch.from_numpy(a).to(DEVICE)):
        result = bnb.matmul_4bit(A, packed.clone(), state)
    result.sum().backward()
    assert relative_error(A.grad, weight.sum(0).expand(3, IN)) < 1e-5


def test_a_change_of_the_weight_before_backward_is_detected():
    layer = bnb.nn.LinearNF4(IN, OUT).to(DEVICE)
    result = layer(torch.randn(3, IN, requires_grad=True))
    layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_a_change_of_the_statistics_before_backward_is_detected():
    layer = bnb.nn.LinearNF4(IN, OUT).to(DEVICE)
    result = layer(torch.randn(3, IN, requires_grad=True))
    layer.weight.quant_state.absmax.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_replacing_the_state_before_backward_does_not_matter():
    layer = bnb.nn.LinearNF4(IN, OUT).to(DEVICE)
    weight, x = layer.weight.dequantize(), torch.randn(3, IN, requires_grad=True)
    result = layer(x)
    layer.weight.quant_state = bnb.nn.LinearNF4(IN, OUT).to(DEVICE).quant_state
    result.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, IN))


def test_the_graph_can_be_walked_once():
    packed, state, _ = quantised()
    result = bnb.matmul_4bit(torch.randn(3, IN, requires_grad=True), packed, state).sum()
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@both_nestings
def test_one_buffer_refilled_for_every_layer_gives_right_gradients_under_checkpointing(reentrant, nested):
    """Offloading keeps one buffer on the device and copies each layer's bytes there when its turn comes."""
    layers = [quantised(nested, (IN, IN)) for _ in range(3)]
    buffer = torch.empty_like(layers[0][0])

    def run(x, index):
        buffer.copy_(layers[index][0])
        return torch.tanh(bnb.matmul_4bit(x, buffer, layers[index][1]))

    x = torch.randn(4, IN, requires_grad=True)
    y = x
    for index in range(3):
        y = checkpoint(run, y, index, use_reentrant=reentrant)
    y.sum().backward()

    dense_x = x.detach().double().requires_grad_()
    dense_y = dense_x
    for _, _, weight in layers:
        dense_y = torch.tanh(dense_y @ weight.t())
    dense_y.sum().backward()
    assert relative_error(y, dense_y) < 1e-5 and relative_error(x.grad, dense_x.grad) < 1e-5


def test_checkpointing_frees_the_activations():
    layer = bnb.nn.LinearNF4(IN, IN).to(DEVICE)
    inner = []

    def segment(x):
        hidden = torch.tanh(layer(x))
        inner.append(weakref.ref(hidden))
        return layer(hidden)

    x = torch.randn(4, IN, requires_grad=True)
    y = checkpoint(segment, x, use_reentrant=False)
    assert inner[0]() is None
    y.sum().backward()
    plain = torch.autograd.grad(layer(torch.tanh(layer(x))).sum(), x)[0]
    assert torch.equal(x.grad, plain)


def test_activations_are_not_kept_for_a_frozen_layer():
    layer = bnb.nn.LinearNF4(IN, OUT, bias=False).to(DEVICE)
    x = torch.randn(4, IN, requires_grad=True)
    hidden = x * 1
    alive = weakref.ref(hidden)
    y = layer(hidden)
    del hidden
    assert alive() is None
    y.sum().backward()


def test_threads_may_run_backward_at_the_same_time():
    layer = bnb.nn.LinearNF4(IN, OUT).to(DEVICE)
    weight, errors = layer.weight.dequantize(), []

    def work():
        for _ in range(5):
            x = torch.randn(8, IN, requires_grad=True, device=DEVICE)
            layer(x).sum().backward()
            errors.append((x.grad - weight.sum(0)).abs().max().item())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20 and max(errors) < 1e-4


# ------------------------------------------------------------------------------------------------------- higher order, torch.func


@both_nestings
def test_second_derivatives(nested):
    packed, state, weight = quantised(nested)
    A = torch.randn(3, IN, requires_grad=True)
    first = torch.autograd.grad((bnb.matmul_4bit(A, packed, state) ** 2).sum(), A, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), A)[0]
    assert relative_error(first, 2 * A.detach().double() @ weight.t() @ weight) < 1e-5
    assert relative_error(second, 2 * torch.ones(3, IN).double() @ weight.t() @ weight) < 1e-5


@both_nestings
def test_function_transforms(nested):
    packed, state, weight = quantised(nested)
    weight, A, biases = weight.float(), torch.randn(4, IN), torch.randn(3, OUT)

    def loss(a, bias=None):
        return (bnb.matmul_4bit(a, packed, state, bias=bias) ** 2).sum()

    expected = 2 * A @ weight.t() @ weight
    close = {"atol": 2e-3, "rtol": 1e-4}
    torch.testing.assert_close(torch.func.grad(loss)(A), expected, **close)
    result, pull = torch.func.vjp(lambda a: bnb.matmul_4bit(a, packed, state), A)
    torch.testing.assert_close(pull(torch.ones_like(result))[0], weight.sum(0).expand(4, IN), **close)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(A), expected, **close)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), in_dims=1, out_dims=1)(A.t().contiguous()), expected.t(), **close)
    torch.testing.assert_close(torch.func.jacrev(lambda a: bnb.matmul_4bit(a, packed, state))(A[0]), weight, **close)

    over_biases = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(A, biases)
    torch.testing.assert_close(over_biases, torch.stack([2 * (A @ weight.t() + b).sum(0) for b in biases]), **close)
    over_both = torch.func.vmap(torch.func.grad(loss))(A[:3], biases)
    torch.testing.assert_close(over_both, torch.stack([2 * (a @ weight.t() + b) @ weight for a, b in zip(A, biases)]), **close)


@both_nestings
def test_forward_mode(nested):
    packed, state, weight = quantised(nested)
    weight, A, bias = weight.float(), torch.randn(3, IN) / 8, torch.randn(OUT)
    tangent, bias_tangent = torch.randn(3, IN), torch.randn(OUT)
    close = {"atol": 2e-3, "rtol": 1e-3}

    def product(a, b=None):
        return bnb.matmul_4bit(a, packed, state, bias=b)

    by_A = tangent @ weight.t()
    torch.testing.assert_close(torch.func.jvp(product, (A,), (tangent,))[1], by_A, **close)
    torch.testing.assert_close(torch.func.jvp(product, (A, bias), (tangent, bias_tangent))[1], by_A + bias_tangent, **close)
    torch.testing.assert_close(torch.func.jvp(lambda b: product(A, b), (bias,), (bias_tangent,))[1], bias_tangent.expand(3, OUT), **close)
    torch.testing.assert_close(torch.func.vmap(lambda a, t: torch.func.jvp(product, (a,), (t,))[1])(A, tangent), by_A, **close)
    torch.testing.assert_close(torch.func.jacfwd(product)(A[0]), weight, **close)

    tanh = (A[0] @ weight.t()).tanh()
    hessian = weight.t() @ (-2 * tanh * (1 - tanh.square()))[:, None].mul(weight)
    for second in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacfwd(f)), lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
        torch.testing.assert_close(second(lambda a: product(a).tanh().sum())(A[0]), hessian, **close)


@pytest.mark.parametrize("with_grad", (True, False), ids=("grad", "no_grad"))
def test_a_dual_number_keeps_its_tangent(with_grad):
    packed, state, weight = quantised()
    A, tangent, bias = torch.randn(3, IN), torch.randn(3, IN), torch.randn(OUT)
    with forward_ad.dual_level(), torch.set_grad_enabled(with_grad):
        result = forward_ad.unpack_dual(bnb.matmul_4bit(forward_ad.make_dual(A, tangent), packed, state, bias=bias))
        torch.testing.assert_close(result.tangent, tangent @ weight.float().t(), atol=2e-3, rtol=1e-3)
        assert forward_ad.unpack_dual(bnb.matmul_4bit(A, packed, state)).tangent is None


def test_the_weight_cannot_be_mapped_over():
    packed, state, _ = quantised()
    with pytest.raises(NotImplementedError, match="quantised weight"):
        torch.func.vmap(lambda w: torch.func.grad(lambda a: bnb.matmul_4bit(a, w, state).sum())(torch.ones(IN)))(torch.stack([packed, packed]))


# ---------------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_it_does_what_linear_does(dtype, grad):
    packed, state, weight = quantised()
    A = torch.randn(4, IN, requires_grad=grad)
    bias = torch.randn(OUT, requires_grad=grad)
    with torch.autocast(DEVICE, dtype):
        result = bnb.matmul_4bit(A, packed, state, bias=bias)
        reference = torch.nn.functional.linear(A, weight.float(), bias)
    assert result.dtype is reference.dtype is dtype
    assert relative_error(result, reference.detach().double()) < TOLERANCE[dtype]
    if grad:
        result.sum().backward()
        assert A.grad.dtype is bias.grad.dtype is torch.float32
        assert relative_error(A.grad, weight.sum(0).expand(4, IN)) < TOLERANCE[dtype]


def test_a_backward_pass_inside_autocast_keeps_its_precision():
    packed, state, weight = quantised()
    A = torch.randn(4, IN, requires_grad=True)
    result = bnb.matmul_4bit(A, packed, state)
    with torch.autocast(DEVICE, torch.bfloat16):
        result.sum().backward()
    assert relative_error(A.grad, weight.sum(0).expand(4, IN)) < 1e-6
