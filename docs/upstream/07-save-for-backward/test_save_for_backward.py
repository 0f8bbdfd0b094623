"""What the backward pass of a 4-bit product needs is saved where PyTorch looks for it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb

NESTED = [False, True]


def layer(nested, seed=0):
    torch.manual_seed(seed)
    return bnb.nn.Linear4bit(256, 256, bias=False, quant_type="nf4", compress_statistics=nested).to("cpu").train()


def activations():
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()


def expected_gradient(linear):
    weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return torch.ones(4, 256) @ weight


@pytest.mark.parametrize("nested", NESTED)
def test_saved_tensor_hooks_see_the_weight(nested):
    linear, x, seen = layer(nested), activations(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel() * t.element_size()) or t, lambda t: t):
        y = linear(x)
    assert sum(seen) >= linear.weight.numel()
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected_gradient(linear))


@pytest.mark.parametrize("nested", NESTED)
def test_saved_tensors_can_be_kept_elsewhere(nested):
    """As activation offload does: backward uses what the hooks give back, not what the graph kept."""
    linear, x = layer(nested), activations()
    expected = expected_gradient(linear)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), lambda a: torch.from_numpy(a)):
        y = linear(x)
    linear.weight.data.zero_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", ["weight", "absmax"])
def test_a_change_between_forward_and_backward_is_noticed(name):
    linear, x = layer(False), activations()
    y = linear(x)
    with torch.no_grad():
        (linear.weight if name == "weight" else linear.weight.quant_state.absmax).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("nested", NESTED)
def test_a_checkpointed_segment_may_refill_one_buffer_for_every_layer(nested):
    """A weight that is streamed into a shared buffer is there again when the segment is recomputed, and only then."""
    sources = [layer(nested, seed) for seed in range(3)]
    shared = layer(nested, 9)

    def load(source):
        shared.weight.data.copy_(source.weight.data)
        shared.weight.quant_state = source.weight.quant_state
        shared.quant_state = source.weight.quant_state

    def streamed(x):
        for source in sources:
            x = checkpoint(lambda v, source=source: (load(source), shared(torch.tanh(v)))[1], x, use_reentrant=False)
        return x

    x, reference = activations(), activations()
    y, expected = streamed(x), reference
    for source in sources:
        expected = source(torch.tanh(expected))
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_the_graph_is_freed_by_backward():
    linear, x = layer(False), activations()
    y = linear(x)
    y.sum().backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)
