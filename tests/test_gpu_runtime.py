"""What only a real GPU can show: calls that a CUDA graph captures, that never make the host wait, that follow the current stream and the tensor's
device, and that need no memory beyond what they promise.
"""

from helpers import DEVICE
import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F

pytestmark = pytest.mark.skipif(DEVICE != "cuda" or not torch.backends.cuda.is_built(), reason="needs an NVIDIA GPU")

N, K = 1024, 2048
TOKENS = [1, 4, 16, 64, 200, 1024]  # at least one for each kernel, and for the dense product


def linear4bit(dtype=torch.bfloat16, **kwargs):
    return bnb.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4", **kwargs).to("cuda", dtype)


def linear8bit(threshold, dtype=torch.bfloat16):
    return bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold).to(dtype).to("cuda")


LAYERS = {
    "nf4": linear4bit,
    "nf4, plain statistics": lambda: linear4bit(compress_statistics=False),
    "int8": lambda: linear8bit(0.0),
    "int8 with outliers": lambda: linear8bit(6.0),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def with_outliers(tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, K, device="cuda", dtype=torch.bfloat16)
    x[:, ::300] *= 20
    return x


@pytest.fixture
def host_never_waits():
    """Any call of torch's that waits for the device is an error from here on; ours are seen by the time they take (``assert_returns_at_once``)."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def assert_returns_at_once(call):
    """Fails if ``call`` waits for what the device had to do before it."""
    call()  # whatever is prepared once
    torch.cuda.synchronize()
    before, after = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(400_000_000)  # clock cycles, about a quarter of a second
    before.record()
    call()
    after.record()
    assert not before.query(), "the host waited for the device"
    after.synchronize()


# ---------------------------------------------------------------------------------------------------------------------- CUDA graphs
@layers
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward_is_captured_in_a_graph_and_replayed_on_new_inputs(layer, tokens):
    model = layer()
    x = with_outliers(tokens)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(2):
            other = with_outliers(tokens)
            x.copy_(other)
            graph.replay()
            assert torch.equal(y, model(other))


@layers
def test_a_training_step_is_captured(layer):
    model = layer()
    x = with_outliers(32).requires_grad_()
    torch.cuda.make_graphed_callables(model, (x,))(x).float().square().sum().backward()
    captured, x.grad = x.grad, None
    fresh = layer()
    fresh.load_state_dict(model.state_dict())
    fresh(x).float().square().sum().backward()
    assert torch.equal(captured, x.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantisation_and_its_inverse_are_captured(dtype, quant_type):
    x = torch.randn(4096, 512, device="cuda", dtype=dtype)

    def there_and_back():
        packed, state = F.quantize_4bit(x, quant_type=quant_type)
        codes, state8 = F.quantize_blockwise(x)
        return F.dequantize_4bit(packed, state), F.dequantize_blockwise(codes, state8)

    there_and_back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = there_and_back()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for value, expected in zip(found, there_and_back()):
        assert torch.equal(value, expected)


@layers
@pytest.mark.parametrize("tokens", [1, 64])
def test_compiled_with_reduced_overhead(layer, tokens):
    model = layer()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = with_outliers(tokens)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------- the host never waits
@layers
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward_and_backward_do_not_wait(layer, tokens, host_never_waits):
    model = layer()
    x = with_outliers(tokens).requires_grad_()
    assert_returns_at_once(lambda: model(x).sum().backward())


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Lion8bit", "SGD8bit", "RMSprop8bit", "Adagrad8bit", "AdEMAMix8bit"])
def test_a_step_of_an_optimizer_does_not_wait(optimizer):
    parameters = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in (64, 4096, 300_000)]
    step = getattr(bnb.optim, optimizer)(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        step.step()
    assert_returns_at_once(step.step)


# ------------------------------------------------------------------------------------------------------------------ streams, devices, memory
@layers
def test_work_is_done_on_the_current_stream(layer):
    model, x = layer(), with_outliers(64)
    with torch.no_grad():
        expected = model(x)
        late = torch.zeros_like(x)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            y = model(late)
        assert not side.query()
        side.synchronize()
    assert torch.equal(y, expected)


@layers
def test_a_device_that_is_not_the_current_one(layer):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = layer()
    x = with_outliers(32)
    expected = model(x)
    there = model.to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(there(x.to("cuda:1")).cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises((RuntimeError, ValueError)):
        there(x)


@pytest.mark.parametrize("tokens", [1, 16, 64, 128])
def test_no_dense_weight_is_made_for_few_tokens(tokens):
    features = 8192
    model = bnb.nn.Linear4bit(features, features, bias=False, compute_dtype=torch.bfloat16).to("cuda")
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).sum().backward()
    dense = features * features * 2
    assert torch.cuda.max_memory_allocated() - before < dense / 2


@pytest.mark.parametrize("tokens", [512, 4096])
def test_a_dense_weight_comes_in_slabs(tokens):
    out_features, in_features = 28672, 8192
    packed, state = F.quantize_4bit(torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    bnb.matmul_4bit(x, packed.t(), state)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = bnb.matmul_4bit(x, packed.t(), state)
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + out_features * in_features * 2 / 2
