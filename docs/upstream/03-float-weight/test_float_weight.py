"""A layer for quantized weights that holds an ordinary one computes with it; one that holds codes without statistics says so."""

import logging

import pytest
import torch
from torch import nn

import bitsandbytes as bnb

LINEAR = {
    "4bit": lambda i, o: bnb.nn.LinearNF4(i, o).to("cpu"),
    "8bit": lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False).to("cpu"),
}


def matrix(rows=40, columns=64, dtype=torch.float32):
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype), requires_grad=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LINEAR)
def test_a_tied_head_computes_with_the_embedding(kind, dtype, training):
    table = nn.Embedding(40, 64)
    table.weight = matrix(dtype=dtype)
    head = LINEAR[kind](64, 40).train(training)
    head.weight = table.weight
    x = torch.randn(3, 5, 64).to(dtype)
    assert torch.equal(head(x), nn.functional.linear(x, table.weight, head.bias.to(dtype)))
    assert head.weight is table.weight


@pytest.mark.parametrize("kind", LINEAR)
def test_gradients_reach_a_float_weight_and_what_is_before_it(kind):
    head, x = LINEAR[kind](64, 40), torch.randn(3, 64, requires_grad=True)
    head.weight = nn.Parameter(matrix().data)
    head(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 40) @ head.weight)
    assert head.weight.grad is not None and head.bias.grad is not None


def test_a_4bit_layer_that_was_never_moved_computes_in_full_precision():
    layer = bnb.nn.LinearNF4(64, 40)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_4bit_table_with_a_float_weight_looks_rows_up():
    table = bnb.nn.EmbeddingNF4(40, 64).to("cpu")
    table.weight = matrix()
    assert torch.equal(table(torch.tensor([[3, 39]])), table.weight[[3, 39]][None])


@pytest.mark.parametrize("kind", LINEAR)
def test_the_user_is_told_once_which_layer_it_is(kind, caplog):
    head = LINEAR[kind](64, 40)
    head.weight = matrix()
    with caplog.at_level(logging.WARNING, "bitsandbytes.nn.modules"):
        for _ in range(3):
            head(torch.randn(2, 64))
    told = [record.getMessage() for record in caplog.records if "full precision" in record.getMessage()]
    assert len(told) == 1 and "in_features=64, out_features=40" in told[0]


@pytest.mark.parametrize("kind", LINEAR)
def test_a_float_weight_is_saved_as_a_plain_one(kind):
    head = LINEAR[kind](64, 40)
    head.weight = matrix()
    assert {key.split(".")[0] for key in head.state_dict()} <= {"weight", "bias"}
    assert torch.equal(head.state_dict()["weight"], head.weight)


@pytest.mark.parametrize("kind", LINEAR)
def test_codes_without_statistics_raise_an_error_that_names_the_layer(kind):
    head = LINEAR[kind](64, 40)
    head.weight = nn.Parameter(head.weight.data, requires_grad=False)
    head.quant_state = None
    with pytest.raises(RuntimeError, match="in_features=64, out_features=40"):
        head(torch.randn(2, 64))


def test_quantized_layers_are_not_affected():
    for make in LINEAR.values():
        layer, x = make(64, 40).train(), torch.randn(2, 64)
        assert not torch.allclose(layer(x), torch.zeros(()))
        assert not layer.weight.is_floating_point()


def test_a_compiled_tied_head_has_no_graph_breaks():
    head = LINEAR["4bit"](64, 40).eval()
    head.weight, x = matrix(), torch.randn(2, 64)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x))
