"""Quantised models under torch.compile, torch.export, torch.func and autocast: one graph, the same numbers, nothing said on the way."""

import io
import logging
import warnings

from helpers import DEVICE, assert_same_bits, bell, grid, real_device
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb

VOCABULARY, WIDTH = 40, 64


@pytest.fixture(autouse=True)
def no_default_device():
    """torch.compile refuses subclasses of Parameter, and torch.export.load everything, while one is set (PyTorch 2.13)."""
    torch.set_default_device(None)


class Model(nn.Module):
    """Rows of a quantised table through two quantised layers and a head."""

    def __init__(self, table, linear, checkpointed=False):
        super().__init__()
        self.table, self.checkpointed = table(VOCABULARY, WIDTH), checkpointed
        self.layers = nn.ModuleList([linear(WIDTH, 96), linear(96, WIDTH)])
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids):
        x = self.table(ids) * self.scale
        for layer in self.layers:
            y = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            x = torch.relu(y)
        return x


def four_bit(storage=torch.uint8, nested=False, quant_type="nf4", compute_dtype=None):
    options = dict(quant_type=quant_type, quant_storage=storage, compress_statistics=nested)
    return (
        lambda n, d: bnb.nn.Embedding4bit(n, d, **options),
        lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=compute_dtype, **options),
    )


def eight_bit(threshold=0.0):
    return bnb.nn.Embedding8bit, lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False, threshold=threshold)


KINDS = {
    "nf4": four_bit(),
    "nf4-nested-bf16": four_bit(torch.bfloat16, True),
    "fp4-fp16": four_bit(torch.float16, quant_type="fp4"),
    "nf4-nested-fp32": four_bit(torch.float32, True),
    "nf4-computes-bf16": four_bit(compute_dtype=torch.bfloat16),
    "int8": eight_bit(),
    "int8-outliers": eight_bit(6.0),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = (torch.arange(24) * 7 % VOCABULARY).view(4, 6)


def build(kind, bias_dtype=torch.float32, **options):
    model = Model(*KINDS[kind], **options)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(bell(p.numel(), seed=i + 1).view(p.shape) * 0.3)
    model.to(DEVICE)
    for layer in model.layers:
        layer.requires_grad_(False)
        layer.bias = nn.Parameter(layer.bias.to(bias_dtype))
    return model


def step(model, run=None):
    """Output, and gradients of everything trained."""
    model.zero_grad()
    y = (model if run is None else run)(IDS)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_close(actual, expected):
    """Equal but for the order in which a compiler sums, and for rounding in the low precision of a bias."""
    torch.testing.assert_close(actual, expected, rtol=2e-2 if expected.dtype != torch.float32 else 1e-4, atol=1e-3)


@pytest.fixture(autouse=True)
def silence():
    """Nothing is logged or warned about, whether a graph is being traced or not."""
    torch.compiler.reset()
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("bitsandbytes")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="bitsandbytes")
        yield
    logger.removeHandler(handler)
    torch.compiler.reset()
    assert records == []


# --------------------------------------------------------------------------------------------------------------------- torch.compile


@every_kind
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiles_as_one_graph_forward_and_backward(kind, checkpointed):
    model = build(kind, checkpointed=checkpointed)
    (expected, gradients), compiled = step(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    y, found = step(model, compiled)
    assert_close(y, expected)
    assert len(found) == len(gradients) == 3
    for actual, wanted in zip(found, gradients):
        assert_close(actual, wanted)
    with torch.no_grad():
        assert_close(compiled(IDS), model(IDS))


@grid(kind=["nf4", "nf4-nested-bf16", "int8"], bias_dtype=[torch.float16, torch.bfloat16, torch.float64])
def test_a_compiled_forward_casts_a_copy_of_the_bias(kind, bias_dtype):
    model = build(kind, bias_dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, gradients = step(model, compiled)
    assert all(layer.bias.dtype is bias_dtype for layer in model.layers)
    assert sorted(str(g.dtype) for g in gradients) == sorted([str(bias_dtype)] * 2 + ["torch.float32"])
    assert_close(y, step(model)[0])


@real_device
@pytest.mark.parametrize("kind", ["nf4-nested-bf16", "int8"])
def test_compiles_with_the_default_backend_for_any_number_of_tokens(kind):
    """Inductor writes kernels around ours. The second and third length must not compile a graph each."""
    model = build(kind)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    dynamic = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(IDS), model(IDS))
        for tokens in (3, 5, 6):
            ids = IDS[:, :tokens].contiguous()
            assert_close(dynamic(ids), model(ids))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiles_under_autocast(kind):
    model = build(kind, checkpointed=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        expected, y = step(model), step(model, compiled)
    assert y[0].dtype is expected[0].dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-1)


# ---------------------------------------------------------------------------------------------------------------------- torch.export


@every_kind
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_programs_compute_the_same(kind, strict):
    """For other inputs and another batch size than the exported one, and after a trip through a file."""
    model, others = build(kind).eval(), (IDS + 3)[:3] % VOCABULARY
    expected = [model(ids).detach() for ids in (IDS, others)]
    program = torch.export.export(model, (IDS,), strict=strict, dynamic_shapes={"ids": {0: torch.export.Dim("batch", min=2, max=64)}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for run in (program.module(), torch.export.load(file).module()):
        for ids, y in zip((IDS, others), expected):
            assert_same_bits(run(ids), y)


@grid(kind=["nf4-nested-bf16", "int8"], strict=[True, False])
def test_exporting_changes_nothing(kind, strict):
    model = build(kind).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(IDS).detach()
    torch.export.export(model, (IDS,), strict=strict)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert_same_bits(after[key], value)
    assert_same_bits(model(IDS).detach(), expected)
    assert type(model.layers[0].weight) in (bnb.nn.Params4bit, bnb.nn.Int8Params)


# ------------------------------------------------------------------------------------------------------------ torch.func and autocast


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested-fp32", "int8"])
def test_functional_gradients_are_those_of_autograd(kind):
    model = build(kind)
    _, expected = step(model)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, ids):
        return torch.func.functional_call(model, parameters, (ids,)).square().sum()

    found = torch.func.grad(loss)(trained, IDS)
    for actual, wanted in zip(found.values(), expected):
        assert_close(actual, wanted)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, IDS)
    for actual, wanted in zip(each.values(), expected):
        assert actual.shape == (len(IDS), *wanted.shape)
        torch.testing.assert_close(actual.sum(0), wanted, rtol=1e-3, atol=1e-2)


@grid(kind=["nf4", "int8"], dtype=[torch.bfloat16, torch.float16], x_dtype=[torch.float32, torch.bfloat16], training=[True, False])
def test_autocast_gives_what_a_float_layer_gives(kind, dtype, x_dtype, training):
    """The dtype of the output, of the gradient, and of what is cast: nothing of the layer."""
    layer, reference = build(kind).layers[0].train(training), nn.Linear(WIDTH, 96, device=DEVICE)
    x = bell(3 * WIDTH).view(3, WIDTH).to(DEVICE, x_dtype)
    results = []
    for module in (layer, reference):
        inputs = x.clone().requires_grad_()
        with torch.autocast(DEVICE, dtype):
            y = module(inputs)
        y.sum().backward()
        results.append((y.dtype, inputs.grad.dtype, module.bias.dtype, module.bias.grad.dtype))
    assert results[0] == results[1]
    with torch.autocast(DEVICE, dtype, enabled=False):
        assert_close(layer(x.float()), layer(x.float()))
