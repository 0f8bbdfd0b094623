"""Parameters of any module in 4 bit: they load what they save, move, copy, and keep nothing dense for the backward pass."""

import copy
import io
import pickle
import threading

from helpers import DEVICE, assert_same_bits, bell, grid, seeded
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from bitsandbytes import functional
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized

SHAPES = {"vector": (100,), "matrix": (48, 64), "stack": (4, 48, 64), "odd": (3, 5, 7)}


class Experts(nn.Module):
    """A stack of matrices, multiplied one by one, and a bias."""

    def __init__(self, shape=SHAPES["stack"], seed=1):
        super().__init__()
        self.stack = nn.Parameter(bell(torch.Size(shape).numel(), seed).reshape(shape))
        self.bias = nn.Parameter(torch.zeros(shape[-2]))

    def forward(self, x):
        return sum(F.linear(x, self.stack[i]) for i in range(self.stack.shape[0])) + self.bias


def quantised(nested=False, seed=1, **options):
    module = Experts(seed=seed)
    replace_parameter_4bit(module, "stack", compress_statistics=nested, **options)
    return module


# -------------------------------------------------------------------------------------------------------------------------- values
@grid(shape=list(SHAPES.values()), nested=[False, True], dtype=[torch.float32, torch.bfloat16])
def test_reading_the_parameter_dequantises_it(shape, nested, dtype):
    module = nn.Module()
    module.param = nn.Parameter(bell(torch.Size(shape).numel()).reshape(shape).to(dtype))
    recipe = {"compress_statistics": nested, "quant_type": "fp4", "blocksize": 32}
    expected = functional.dequantize_4bit(*functional.quantize_4bit(module.param.detach(), **recipe))
    replace_parameter_4bit(module, "param", **recipe)
    assert_same_bits(module.param.clone(), expected.view(shape))
    assert not module.param.requires_grad


def test_prequantised_codes_of_any_storage_become_bytes_that_a_cast_leaves_alone():
    dense = bell(48 * 64).reshape(48, 64)
    packed, state = functional.quantize_4bit(dense, quant_type="nf4", quant_storage=torch.bfloat16, compress_statistics=True)
    module, statistics = nn.Module(), state.as_dict(packed=True)
    module.weight, keys = nn.Parameter(packed, requires_grad=False), set(statistics)
    replace_parameter_4bit_prequantized(module, "weight", statistics, torch.device(DEVICE))
    assert set(statistics) == keys, "the caller's dict was changed"
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(module.weight, expected)
    assert torch.equal(module.to(torch.float16).weight, expected.half())


def test_prequantised_codes_must_fit_their_statistics():
    packed, state = functional.quantize_4bit(bell(64 * 64).reshape(64, 64), quant_type="nf4")
    module = nn.Module()
    module.weight = nn.Parameter(packed[:-1], requires_grad=False)
    with pytest.raises(ValueError, match="2048"):
        replace_parameter_4bit_prequantized(module, "weight", state.as_dict(packed=True), torch.device(DEVICE))


def test_assignment_quantises():
    module, values = quantised(nested=True), bell(4 * 48 * 64, seed=5).reshape(SHAPES["stack"])
    module.stack = values
    other = quantised(nested=True, seed=5)
    assert torch.equal(module.stack, other.stack)
    with pytest.raises(ValueError, match="48, 64"):
        module.stack = values[0]


# ---------------------------------------------------------------------------------------------------------------------- state dict
@grid(nested=[False, True], strict=[False, True], assign=[False, True])
def test_a_module_loads_what_it_saves(nested, strict, assign):
    source, target = nn.Sequential(quantised(nested)), nn.Sequential(quantised(seed=2, quant_type="fp4", blocksize=128))
    saved = source.state_dict()
    names = {"0.bias", "0.stack", "0.stack.absmax", "0.stack.quant_map", "0.stack.quant_state.bitsandbytes__nf4"}
    assert set(saved) == names | ({"0.stack.nested_absmax", "0.stack.nested_quant_map"} if nested else set())
    before = {key: value.clone() for key, value in saved.items()}
    loaded = target.load_state_dict(saved, strict=strict, assign=assign)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert torch.equal(target[0].stack, source[0].stack)
    assert all(torch.equal(saved[key], before[key]) for key in before) and set(saved) == set(before)
    again = target.state_dict()
    assert set(again) == set(saved) and all(torch.equal(again[key], saved[key]) for key in saved)
    parametrize.remove_parametrizations(target[0], "stack", leave_parametrized=True)


def test_dense_values_are_quantised_when_loaded():
    target, source = quantised(nested=True), Experts(seed=7)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.stack, quantised(nested=True, seed=7).stack)


def test_a_module_on_meta_takes_codes_and_statistics():
    with torch.device("meta"):
        target = Experts()
        replace_parameter_4bit(target, "stack")
    target.load_state_dict(quantised().state_dict(), assign=True)
    assert torch.equal(target.stack, quantised().stack)
    moved = quantised(seed=3).to("meta")
    moved.bias = nn.Parameter(torch.zeros(48))
    moved.load_state_dict(quantised().state_dict())
    assert torch.equal(moved.stack, quantised().stack)


def test_a_dict_without_the_parameter_changes_nothing():
    module = quantised()
    before = module.stack.clone()
    result = module.load_state_dict({"bias": torch.ones(48)}, strict=False)
    assert result.missing_keys == ["stack"] and torch.equal(module.stack, before)
    with pytest.raises(RuntimeError, match='Missing.*"stack.absmax"'):
        module.load_state_dict({"bias": torch.ones(48), "parametrizations.stack.original": quantised(seed=2).parametrizations.stack.original})
    assert torch.equal(module.stack, before)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: d.pop("stack.absmax"), r'Missing.*"stack.absmax"'),
        (lambda d: d.update({"stack.absmax": d["stack.absmax"][:-1]}), r'"stack" cannot be loaded.*absmax'),
        (lambda d: d.update({"stack": d["stack"][:-1]}), r'"stack" cannot be loaded.*6143'),
        (lambda d: d.update({"stack": [1, 2]}), r'"stack" cannot be loaded.*list'),
        (lambda d: d.update({"stack.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8)}), r'"stack" cannot be loaded'),
    ],
    ids=["no scales", "too few scales", "too few codes", "no tensor", "no json"],
)
def test_a_broken_dict_is_reported_and_leaves_the_parameter_alone(spoil, message):
    module, saved = quantised(), quantised(seed=2).state_dict()
    before = module.stack.clone()
    spoil(saved)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        module.load_state_dict(saved)
    assert torch.equal(module.stack, before)


# ---------------------------------------------------------------------------------------------------------------- moving and copying
@grid(nested=[False, True], dtype=[torch.float16, torch.bfloat16])
def test_casts_change_what_dequantisation_returns_and_nothing_else(nested, dtype):
    module = quantised(nested)
    dense, state = module.stack.clone(), copy.deepcopy(module.parametrizations.stack[0].quant_state)
    module.to(dtype)
    assert_same_bits(module.stack.clone(), dense.to(dtype))
    assert module.parametrizations.stack[0].quant_state.absmax.dtype == state.absmax.dtype
    assert torch.equal(module.float().stack, dense)


def test_statistics_move_with_the_module():
    """Without a second device: the module goes to "meta" and comes back empty, statistics in place; to_empty does the same for the codes."""
    module = quantised(nested=True)
    asked = []
    module._apply(lambda tensor: asked.append((tensor.dtype, tensor.device.type)) or tensor.clone())
    assert (torch.float32, DEVICE) in asked[1:], "nobody asked where the statistics should go"
    codes = module.parametrizations.stack.original.clone()
    module.to("meta").to_empty(device=DEVICE).parametrizations.stack.original.data.copy_(codes)
    assert torch.equal(module.stack, quantised(nested=True).stack)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(duplicate):
    module = nn.Sequential(quantised(nested=True), quantised())
    dense = [layer.stack.clone() for layer in module]
    replica = duplicate(module)
    parametrize.remove_parametrizations(module[0], "stack")
    module[1].stack = torch.zeros(SHAPES["stack"])
    assert all(torch.equal(layer.stack, values) for layer, values in zip(replica, dense))
    assert set(replica.state_dict()) >= {"0.stack.absmax", "1.stack.absmax"}
    replica.load_state_dict(replica.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(replica[1](x), quantised()(x))
    parametrize.remove_parametrizations(replica[0], "stack", leave_parametrized=True)
    assert torch.equal(replica[0].stack, dense[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_values_is_an_ordinary_tensor(duplicate):
    values = quantised().stack
    assert type(duplicate(values)) is torch.Tensor and torch.equal(duplicate(values), values)
    assert type(values.detach().cpu().numpy()).__name__ == "ndarray" and isinstance(nn.Parameter(values), nn.Parameter)


def test_torch_save_of_the_module():
    buffer = io.BytesIO()
    torch.save(quantised(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded.stack, quantised().stack) and type(loaded).__name__ == "ParametrizedExperts"


def test_removal_leaves_an_ordinary_parameter():
    module = quantised()
    dense = module.stack.clone()
    parametrize.remove_parametrizations(module, "stack", leave_parametrized=True)
    assert type(module) is Experts and type(module.stack) is nn.Parameter and torch.equal(module.stack, dense)
    assert set(module.state_dict()) == {"stack", "bias"}
    module.load_state_dict(Experts().state_dict())
    replace_parameter_4bit(module, "stack")
    assert torch.equal(module.stack, quantised().stack)


# ------------------------------------------------------------------------------------------------------------------------- gradients
@grid(nested=[False, True], shape=[SHAPES["stack"], SHAPES["odd"]])
def test_gradients_equal_those_of_the_dense_weight(nested, shape):
    module = Experts(shape)
    replace_parameter_4bit(module, "stack", compress_statistics=nested)
    dense = copy.deepcopy(module)
    parametrize.remove_parametrizations(dense, "stack", leave_parametrized=True)
    x, y = (torch.randn(6, shape[-1], generator=seeded(3)).requires_grad_() for _ in range(2))
    module(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert_same_bits(x.grad, y.grad)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ w[2].t(),
        lambda x, w: torch.matmul(x, w.transpose(1, 2)),
        lambda x, w: torch.einsum("bi,eoi->beo", x, w),
        lambda x, w: torch.bmm(x.expand(4, -1, -1), w.mT),
        lambda x, w: sum(F.linear(input=x, weight=part) for part in w.unbind(0)),
        lambda x, w: F.linear(x, w.view(-1, 64)[10:20]),
        lambda x, w: x[:, None, :48] * w[1, :, 5],
    ],
    ids=["matmul", "batched", "einsum", "bmm", "unbind", "rows", "strided"],
)
def test_backward_keeps_no_dense_weight(use, monkeypatch):
    module, made, dequantize = quantised(), [], functional.dequantize_4bit
    dense = module.stack.clone()
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: made.append(dequantize(*args)) or made[-1])
    x = torch.randn(6, 64, requires_grad=True)
    result = use(x, module.stack)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in made]
    made.clear()
    assert storages and all(storage.expired() for storage in storages), "the graph keeps the dense weight alive"
    (gradient,) = torch.autograd.grad(result.square().sum(), x)
    (expected,) = torch.autograd.grad(use(x, dense).square().sum(), x)
    assert_same_bits(gradient, expected)


def test_what_was_written_to_is_kept():
    module = quantised()
    weight, x = module.stack, torch.randn(2, 64, requires_grad=True)
    with torch.no_grad():
        weight[0].zero_()
    (gradient,) = torch.autograd.grad(F.linear(x, weight[0]).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_change_of_the_codes_before_backward_is_noticed():
    module, x = quantised(), torch.randn(2, 64, requires_grad=True)
    y = module(x)
    module.load_state_dict(quantised(seed=2).state_dict())
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    module = nn.Sequential(quantised(), nn.Linear(48, 64), quantised(nested=True))
    x = torch.randn(4, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    assert_same_bits(x.grad, expected)


def test_function_transforms_see_an_ordinary_weight():
    module, x = quantised(), torch.randn(5, 64)
    expected = torch.autograd.functional.jacobian(lambda row: module(row).sum(), x[0])
    assert torch.allclose(torch.func.grad(lambda row: module(row).sum())(x[0]), expected)
    assert torch.allclose(torch.func.vmap(module)(x), module(x), atol=1e-5)


def test_compiles():
    module, x = quantised(), torch.randn(4, 64)
    compiled = torch.compile(lambda x: F.linear(x, module.stack[1]), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), F.linear(x, module.stack[1]))


# ----------------------------------------------------------------------------------------------------------------------------- cache
@pytest.fixture
def dequantisations(monkeypatch):
    counted, original = [], functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args, **kwargs: counted.append(1) or original(*args, **kwargs))
    return counted


def test_a_forward_pass_dequantises_once(dequantisations):
    module = quantised()
    module(torch.randn(2, 64))
    assert len(dequantisations) == 1
    module(torch.randn(2, 64))
    assert len(dequantisations) == 2, "the dense weight outlived the forward pass"


def test_a_failing_forward_pass_leaves_nothing_behind(dequantisations):
    module = quantised()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            module(torch.randn(2, 63))
    module.bias.data = module.bias.data
    module(torch.randn(2, 64))
    assert len(dequantisations) == 3 and parametrize._cache_enabled == 0 and parametrize._cache == {}


def test_threads_do_not_share_the_dense_weight():
    """One thread reads under inference mode while another builds a graph, each in the middle of a forward pass."""
    inside, leave = threading.Event(), threading.Event()

    class Waiting(Experts):
        def forward(self, x):
            result = super().forward(x)
            if torch.is_inference_mode_enabled():
                inside.set()
                leave.wait(30)
            return result

    module = Waiting()
    replace_parameter_4bit(module, "stack")

    def infer():
        with torch.inference_mode():
            module(torch.randn(2, 64, device=DEVICE))

    thread = threading.Thread(target=infer)
    thread.start()
    assert inside.wait(30)
    x = torch.randn(2, 64, requires_grad=True)
    module(x).sum().backward()
    leave.set()
    thread.join()
    assert x.grad is not None and parametrize._cache_enabled == 0 and parametrize._cache == {}
